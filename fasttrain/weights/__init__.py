"""Weights in and out: files of other libraries, what tensors are called in them, and how they fit an encoder."""
