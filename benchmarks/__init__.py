"""Measurements, each with its prediction and its recorded result."""
