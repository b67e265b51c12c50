"""Bytes at offsets in host files. Knows nothing of disk images."""
