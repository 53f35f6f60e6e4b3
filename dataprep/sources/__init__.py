"""What images may come in: one file a kind; kinds.py recognises them."""
