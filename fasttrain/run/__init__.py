"""A run while it lasts and after: its folder, checkpoints, resume, metrics, display, faults."""
