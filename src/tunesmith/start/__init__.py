"""The first ten minutes: a whole run on what comes with the program, and recipes to go on from."""
