"""Figures known before anything is loaded."""
