"""Bars of one figure by fleet and policy, as SVG: few shapes and some text, so no library is asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final
from xml.sax.saxutils import escape

from disagg.simulate.figures import Figures

COLOURS: Final = ("#4477aa", "#ee6677", "#228833", "#ccbb44")
"""Told apart by the colour-blind too."""

PLOTS: Final[Mapping[str, tuple[str, Callable[[Figures], float]]]] = {
    "ttft": ("TTFT p90, ms", lambda one: 1e3 * one.ttft_s.get("p90", 0.0)),
    "itl": ("ITL p99, ms", lambda one: 1e3 * one.itl_s.get("p99", 0.0)),
    "goodput": ("requests per second within the objectives", lambda one: one.goodput),
    "hits": ("prompt tokens found in a cache, %", lambda one: 100 * one.hit_rate),
    "moved": ("KV moved, GB", lambda one: one.moved_nbytes / 1e9),
}
_WIDTH, _HEIGHT, _LEFT, _TOP, _BELOW = 720, 300, 64, 44, 40


def write_plots(found: Sequence[Figures], folder: Path) -> list[Path]:
    """One file for each of `PLOTS`."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, (title, value) in PLOTS.items():
        path = folder / f"{name}.svg"
        path.write_text(bars(title, found, value), encoding="utf-8")
        paths.append(path)
    return paths


def bars(title: str, found: Sequence[Figures], value: Callable[[Figures], float]) -> str:
    """A group of bars for each fleet, one for each policy, from 0 to a round number above the highest."""
    fleets, policies = (list(dict.fromkeys(names)) for names in ([f.fleet for f in found], [f.policy for f in found]))
    top = round_above(max(map(value, found), default=0.0))
    parts = [_text(_LEFT, 18, title, size=14), *_scale(top), *_legend(policies)]
    room = (_WIDTH - _LEFT - 12) / len(fleets)
    wide = room * 0.8 / len(policies)
    for one in found:
        at = _LEFT + fleets.index(one.fleet) * room + room * 0.1 + policies.index(one.policy) * wide
        parts += _bar(at, wide, value(one), top, COLOURS[policies.index(one.policy) % len(COLOURS)])
    for place, fleet in enumerate(fleets):
        parts.append(_text(_LEFT + (place + 0.5) * room, _HEIGHT - _BELOW + 18, fleet, anchor="middle"))
    inside = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" font-family="sans-serif">\n'
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>\n{inside}\n</svg>\n'
    )


def round_above(value: float) -> float:
    """The smallest of 1, 2 and 5 times a power of ten that is not below; 1 for nothing."""
    if value <= 0:
        return 1.0
    step = 1.0
    while step > value:
        step /= 10
    while step * 10 <= value:
        step *= 10
    return next(factor * step for factor in (1, 2, 5, 10) if factor * step >= value)


def _y(value: float, top: float) -> float:
    return _HEIGHT - _BELOW - (_HEIGHT - _BELOW - _TOP) * value / top


def _bar(at: float, wide: float, value: float, top: float, colour: str) -> list[str]:
    y = _y(value, top)
    shape = f'<rect x="{at:.1f}" y="{y:.1f}" width="{wide * 0.92:.1f}" height="{_y(0, top) - y:.1f}" fill="{colour}"/>'
    return [shape, _text(at + wide * 0.46, y - 3, f"{value:.3g}", size=10, anchor="middle")]


def _scale(top: float) -> list[str]:
    lines = []
    for part in range(5):
        value = top * part / 4
        y = _y(value, top)
        lines.append(f'<line x1="{_LEFT}" x2="{_WIDTH - 8}" y1="{y:.1f}" y2="{y:.1f}" stroke="#cccccc"/>')
        lines.append(_text(_LEFT - 6, y + 4, f"{value:g}", anchor="end"))
    return lines


def _legend(policies: Sequence[str]) -> list[str]:
    parts = []
    for place, policy in enumerate(policies):
        at = _LEFT + 150 * place
        parts.append(f'<rect x="{at}" y="26" width="10" height="10" fill="{COLOURS[place % len(COLOURS)]}"/>')
        parts.append(_text(at + 14, 35, policy))
    return parts


def _text(x: float, y: float, text: str, *, size: int = 11, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}">{escape(text)}</text>'
