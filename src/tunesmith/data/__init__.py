"""Reading and encoding the user's data."""
