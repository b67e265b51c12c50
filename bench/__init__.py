"""The benchmark of the project's targets: what users would use instead, and ours, in turn on one machine."""
