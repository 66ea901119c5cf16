"""The `disagg` command and `python -P -m disagg`: listen to signals first, then load what takes a while."""

from __future__ import annotations

from disagg.config.signals import end_on_signals


def run() -> None:
    """Entry point of the console script."""
    end_on_signals()
    from disagg.cli.main import run as run_command

    run_command()


if __name__ == "__main__":
    run()
