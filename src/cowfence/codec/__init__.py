"""Pure functions over bytes: compression. No I/O."""
