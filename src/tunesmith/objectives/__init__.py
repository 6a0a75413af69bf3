"""Losses as pure mathematics: no module, no data, no averaging."""
