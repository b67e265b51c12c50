"""The guest's view of a disk, whatever its format."""
