"""fasttrain: pre-training of image encoders with XMoCo and its relatives."""

__version__ = "0.1.0"
