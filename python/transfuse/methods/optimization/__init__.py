"""Optimisation and training dynamics."""
