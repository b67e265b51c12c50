"""One file per verb; each returns a result value and prints nothing."""
