"""Losses as pure mathematics."""
