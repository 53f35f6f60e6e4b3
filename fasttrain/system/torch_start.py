"""Imports torch without looking for garbage meanwhile.

The import makes a million objects that last. Searching them for garbage again and again takes a sixth of its time.
"""

import gc

_enabled = gc.isenabled()
gc.disable()
try:
    import torch  # noqa: F401
finally:
    if _enabled:
        gc.freeze()  # they are never searched
        gc.enable()
