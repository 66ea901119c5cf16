"""Sampling a whole step's rows: `rows` says what a row means, `native`, `triton` and `plain` compute it alike."""
