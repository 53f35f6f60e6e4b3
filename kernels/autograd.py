"""The type of the first argument of autograd functions."""

from __future__ import annotations

from typing import Any

Context = Any  # torch's own types do not let an attribute be set, the object does
