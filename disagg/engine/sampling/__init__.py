"""Sampling a whole step's rows at once: `rows` says what a row means, `native`, `triton` and `plain` compute it alike."""
