"""`python -P -m disagg`: what `disagg up` starts its children with."""

from disagg.cli.main import run

run()
