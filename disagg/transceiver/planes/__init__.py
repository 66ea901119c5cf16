"""Ways to move bytes between two workers, behind one contract (`base`)."""
