"""The user's mistakes: each is one sentence with the value, what was expected and the next step."""

from __future__ import annotations


class ConfigError(ValueError):
    """Something the user gave cannot be used. The command line prints the sentence and exits with code 2."""
