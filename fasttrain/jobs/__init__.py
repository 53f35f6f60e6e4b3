"""What the commands do, and what a library calls: to train, evaluate, embed, export and report."""
