"""Draws the state diagrams from the table: `python -m disagg.transceiver.protocol.diagram`."""

from __future__ import annotations

import sys

from disagg.transceiver.protocol.state import TRANSITIONS, Kind, Role, State, name_of

_HEAD = """# States of a transfer

Drawn from the table in `disagg/transceiver/protocol/state.py`: edit the table, then run
`.venv/bin/python -P -m disagg.transceiver.protocol.diagram > docs/transfer-states.md`.
Events that leave the state as it is are not drawn.
"""


def render() -> str:
    """The whole markdown file: one mermaid diagram per role."""
    return "\n".join([_HEAD, *(_section(role) for role in Role)])


def _section(role: Role) -> str:
    lines = [f"## {role.value.capitalize()}", "", "```mermaid", "stateDiagram-v2", "    [*] --> waiting"]
    for state, row in TRANSITIONS[role].items():
        lines += [f"    {state.value} --> {target.value}: {label}" for target, label in _edges(state, row)]
    return "\n".join([*lines, "    closed --> [*]", "```", ""])


def _edges(state: State, row: dict[Kind, State]) -> list[tuple[State, str]]:
    targets = dict.fromkeys(target for target in row.values() if target is not state)
    return [(target, ", ".join(name_of(kind) for kind, to in row.items() if to is target)) for target in targets]


if __name__ == "__main__":
    sys.stdout.write(render())
