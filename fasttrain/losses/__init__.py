"""Losses as pure functions and terms: over a queue of keys, over the global batch."""
