"""Dataset conversion: sources in, sharded .beton or .tar files and a manifest out."""
