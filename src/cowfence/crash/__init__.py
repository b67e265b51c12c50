"""The crash explorer: record, enumerate, judge."""
