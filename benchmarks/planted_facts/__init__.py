"""Planted facts: documents of which it is known which words matter, for methods that weight tokens."""
