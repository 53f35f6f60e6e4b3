"""What an encoder is worth: features, kNN, linear probe, the monitor while training."""
