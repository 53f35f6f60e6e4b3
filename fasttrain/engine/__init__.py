"""What makes a step: its forward, backward and update, the optimizers, the ranks, skipped steps."""
