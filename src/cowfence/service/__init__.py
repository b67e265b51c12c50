"""An NBD server as a program: what it exports, and how it lives on its host."""
