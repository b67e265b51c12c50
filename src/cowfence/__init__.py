"""cowfence: a crash-safe QCOW2 engine."""

__version__ = "0.1.0"
