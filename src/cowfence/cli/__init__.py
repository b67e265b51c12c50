"""The command line: parse, call ops, print."""
