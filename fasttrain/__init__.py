"""fasttrain: pre-training of image encoders with XMoCo and its relatives."""

from fasttrain.system.caches import choose_caches

__version__ = "0.1.0"

choose_caches()  # before numba and the others are imported, which then keep to it
