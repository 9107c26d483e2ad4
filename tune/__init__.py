"""Searches over a stream's settings with Ray Tune; trials share every stage they have in common."""
