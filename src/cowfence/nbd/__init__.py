"""The NBD protocol: a sans-I/O state machine, and socket shells around it."""
