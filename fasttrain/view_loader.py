"""ViewLoader: the decoded batches and the views that training uses, for anyone's loop."""

from __future__ import annotations


class ViewLoader:
    """Batches of views."""
