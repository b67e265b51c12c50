"""The qcow2 format. Knows nothing of paths and sockets."""
