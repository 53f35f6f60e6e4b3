"""Weights in and out: names and file formats of other libraries."""
