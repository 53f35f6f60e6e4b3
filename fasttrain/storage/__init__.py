"""Files that are far away, behind any protocol that fsspec knows: listed, read, and kept near."""
