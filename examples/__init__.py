"""Streams to start from."""
