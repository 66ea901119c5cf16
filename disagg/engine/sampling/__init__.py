"""Sampling a whole step's rows at once: `rows` says what a row means, `native` and `plain` compute it alike."""
