"""Dataset conversion: sources in, sharded .beton files and a manifest out."""


class DataError(ValueError):
    """Something is wrong with data on disk; the text is one line for a person. Base of every error of this package."""
