"""A chart of memory over time as one SVG file that needs nothing else.

A panel a run: what each engine used and held, and below it how many of its requests waited.
A static panel has a lane an engine, as high as its share; an elastic one stacks the engines
up to the capacity that they share.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

from engines import Status
from units import Units

_WIDTH = 1080
_LEFT, _RIGHT = 64, 118
_PLOT = _WIDTH - _LEFT - _RIGHT
_HEAD = 92
_PANEL_TITLE = 30
_MEMORY = 190
_GAP = 10
_WAITING = 56
_X_AXIS = 46
_FOOT = 22
_PANEL = _PANEL_TITLE + _MEMORY + _GAP + _WAITING + _X_AXIS
_COLUMNS = 480  # points along the time axis

# Told apart by people with any colour vision, and in grey by their order.
_COLOURS = ("#2f6db3", "#e08a1e", "#2f9e6e", "#b1508f", "#7a6bc9", "#8a7a2a", "#4aa3b8", "#a8483c")
_INK, _FAINT, _GRID = "#22262b", "#6b737c", "#e3e6ea"
_FONT = "font-family=\"system-ui, 'Segoe UI', 'DejaVu Sans', Helvetica, Arial, sans-serif\""


@dataclass(frozen=True)
class Panel:
    title: str
    samples: Mapping[str, Sequence[Status]]  # by engine, bottom to top
    capacity_bytes: int
    shares: Mapping[str, int] | None  # bytes by engine; None: elastic


@dataclass(frozen=True)
class _Axis:
    """From values to pixels along one direction."""

    most: float
    start: float
    length: float  # negative: upwards

    def at(self, value: float) -> float:
        return self.start + self.length * min(max(value / self.most, 0.0), 1.0)

    def ticks(self, about: int) -> list[float]:
        step = _round_step(self.most / about)
        return [step * i for i in range(math.floor(self.most / step * (1 + 1e-9)) + 1)]


def _round_step(rough: float) -> float:
    magnitude = 10.0 ** math.floor(math.log10(rough))
    for factor in (1, 2, 5):
        if rough <= factor * magnitude * (1 + 1e-9):
            return factor * magnitude
    return 10 * magnitude


def render(title: str, subtitle: str, panels: Sequence[Panel], units: Units) -> str:
    """REQUIRES: at least one panel."""
    end_s = max(
        (each[-1].t_s for panel in panels for each in panel.samples.values() if each), default=1.0
    )
    end_s = max(end_s, 1.0)
    names = list(dict.fromkeys(name for panel in panels for name in panel.samples))
    colours = {name: _COLOURS[i % len(_COLOURS)] for i, name in enumerate(names)}
    height = _HEAD + _PANEL * len(panels) + _FOOT
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" '
        f'width="{_WIDTH}" height="{height}" {_FONT} font-size="12" fill="{_INK}">',
        f"<title>{escape(title)}</title>",
        f'<rect width="{_WIDTH}" height="{height}" fill="#ffffff"/>',
        _text(_LEFT, 30, title, size=19, weight=600),
        _text(_LEFT, 50, subtitle, colour=_FAINT),
        _legend(colours),
    ]
    for i, panel in enumerate(panels):
        most_waiting = max(_most_waiting(other) for other in panels if _comparable(panel, other))
        parts += _panel(panel, _HEAD + i * _PANEL, end_s, most_waiting, colours, units)
    parts += [
        _text(
            _LEFT,
            height - 10,
            "Engines report one after the other: while memory changes hands, "
            "stacked figures may seem to exceed what is shared.",
            colour=_FAINT,
        ),
        "</svg>\n",
    ]
    return "\n".join(parts)


def _panel(
    panel: Panel,
    top: float,
    end_s: float,
    most_waiting: int,
    colours: Mapping[str, str],
    units: Units,
) -> list[str]:
    time = _Axis(end_s, _LEFT, _PLOT)
    base = top + _PANEL_TITLE + _MEMORY
    capacity = units.gib(panel.capacity_bytes)
    memory = _Axis(capacity * 1.06, base, -_MEMORY)
    times = [end_s * i / _COLUMNS for i in range(_COLUMNS + 1)]

    def series(value: Callable[[Status], int]) -> dict[str, list[float]]:
        return {
            name: [units.gib(v) for v in _resampled(samples, times, value)]
            for name, samples in panel.samples.items()
        }

    used, held = series(lambda s: s.in_use), series(lambda s: max(s.held, s.in_use))
    parts = [_text(_LEFT, top + 18, panel.title, size=14, weight=600)]
    parts += _grid(time, memory, base)
    floor = [0.0] * len(times)
    for name in panel.samples:
        colour = colours[name]
        used_top = [f + u for f, u in zip(floor, used[name], strict=True)]
        held_top = [f + h for f, h in zip(floor, held[name], strict=True)]
        parts.append(_area(times, used_top, held_top, time, memory, colour, 0.25))
        parts.append(_area(times, floor, used_top, time, memory, colour, 0.9))
        if panel.shares is None:
            floor = held_top
            continue
        share = units.gib(panel.shares[name])
        floor = [f + share for f in floor]
        parts.append(_rule(memory.at(floor[0]), _INK, "3 3"))
        parts += _side_note(memory.at(floor[0] - share / 2), f"{name}'s own", f"{share:.1f} GiB")
    if panel.shares is None:
        parts.append(_rule(memory.at(capacity), _INK, "6 3"))
        parts += _side_note(memory.at(capacity / 2), "shared by all", f"{capacity:.1f} GiB")
    parts += _waiting_strip(
        panel, top + _PANEL_TITLE + _MEMORY + _GAP, time, times, most_waiting, colours
    )
    return parts


def _comparable(a: Panel, b: Panel) -> bool:
    """The same engines, run another way."""
    return a.samples.keys() == b.samples.keys()


def _most_waiting(panel: Panel) -> int:
    return max((status.waiting for each in panel.samples.values() for status in each), default=0)


def _waiting_strip(
    panel: Panel,
    top: float,
    time: _Axis,
    times: Sequence[float],
    most_waiting: int,
    colours: Mapping[str, str],
) -> list[str]:
    base = top + _WAITING
    waiting = {
        name: _most_between(samples, times, lambda s: s.waiting)
        for name, samples in panel.samples.items()
    }
    axis = _Axis(max(most_waiting, 10) * 1.1, base, -_WAITING)
    parts = []
    for value in axis.ticks(3):
        parts.append(_rule(axis.at(value), _GRID))
        parts.append(_text(_LEFT - 8, axis.at(value) + 4, f"{value:,.0f}", "end", _FAINT))
    for name, values in waiting.items():
        zero = [0.0] * len(times)
        parts.append(_area(times, zero, values, time, axis, colours[name], 0.75))
    parts += _side_note(top + _WAITING / 2, "requests waiting", "for memory")
    parts.append(_rule(base, _INK))
    for value in time.ticks(10):
        x = time.at(value)
        parts.append(
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{base}" y2="{base + 4}" stroke="{_INK}"/>'
        )
        parts.append(_text(x, base + 17, f"{value:,.0f}", "middle", _FAINT))
    parts.append(_text(_LEFT + _PLOT, base + 32, "trace time, seconds", "end", _FAINT))
    return parts


def _grid(time: _Axis, memory: _Axis, base: float) -> list[str]:
    parts = []
    for value in memory.ticks(5):
        y = memory.at(value)
        parts.append(_rule(y, _GRID if value else _INK))
        parts.append(_text(_LEFT - 8, y + 4, f"{value:g}", "end", _FAINT))
    middle = base - _MEMORY / 2
    parts.append(
        f'<text x="18" y="{middle:.1f}" text-anchor="middle" fill="{_FAINT}" '
        f'transform="rotate(-90 18 {middle:.1f})">GiB of KV cache</text>'
    )
    for value in time.ticks(10)[1:]:
        x = time.at(value)
        parts.append(
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{base - _MEMORY}" y2="{base}" stroke="{_GRID}"/>'
        )
    return parts


def _legend(colours: Mapping[str, str]) -> str:
    parts, x = [], float(_LEFT)
    for name, colour in colours.items():
        parts.append(_swatch(x, colour, 0.9))
        parts.append(_text(x + 18, 76, name))
        x += 18 + 7.5 * len(name) + 18
    parts.append(_swatch(x, _FAINT, 0.9))
    parts.append(_swatch(x + 14, _FAINT, 0.25))
    parts.append(_text(x + 32, 76, "dark: in use, light: held and empty"))
    return "\n".join(parts)


def _swatch(x: float, colour: str, opacity: float) -> str:
    return (
        f'<rect x="{x:.1f}" y="66" width="12" height="12" fill="{colour}" '
        f'fill-opacity="{opacity}"/>'
    )


def _area(
    times: Sequence[float],
    low: Sequence[float],
    high: Sequence[float],
    time: _Axis,
    value: _Axis,
    colour: str,
    opacity: float,
) -> str:
    up = [f"{time.at(t):.1f},{value.at(v):.1f}" for t, v in zip(times, high, strict=True)]
    down = [f"{time.at(t):.1f},{value.at(v):.1f}" for t, v in zip(times, low, strict=True)]
    points = " ".join(up + down[::-1])
    return f'<polygon points="{points}" fill="{colour}" fill-opacity="{opacity}"/>'


def _rule(y: float, colour: str, dashes: str = "") -> str:
    dash = f' stroke-dasharray="{dashes}"' if dashes else ""
    return (
        f'<line x1="{_LEFT}" x2="{_LEFT + _PLOT}" y1="{y:.1f}" y2="{y:.1f}" '
        f'stroke="{colour}"{dash}/>'
    )


def _text(
    x: float,
    y: float,
    text: str,
    anchor: str = "start",
    colour: str = _INK,
    *,
    size: int = 12,
    weight: int = 400,
) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}" '
        f'font-size="{size}" font-weight="{weight}">{escape(text)}</text>'
    )


def _side_note(y: float, first: str, second: str) -> list[str]:
    """Two lines right of the plot, centred on `y`."""
    x = _LEFT + _PLOT + 10
    return [_text(x, y - 3, first), _text(x, y + 12, second, colour=_FAINT)]


def _resampled(
    samples: Sequence[Status], times: Sequence[float], value: Callable[[Status], int]
) -> list[int]:
    """The latest value at each time; 0 before the first and after the last."""
    at = [status.t_s for status in samples]
    result = []
    for t in times:
        i = bisect.bisect_right(at, t) - 1
        result.append(value(samples[i]) if i >= 0 and t <= at[-1] else 0)
    return result


def _most_between(
    samples: Sequence[Status], times: Sequence[float], value: Callable[[Status], int]
) -> list[float]:
    """The highest value since the time before each; short queues are not to be missed."""
    step = times[1] - times[0]
    latest = _resampled(samples, times, value)
    result = [float(v) for v in latest]
    for status in samples:
        i = math.ceil(status.t_s / step)
        if 0 <= i < len(result):
            result[i] = max(result[i], float(value(status)))
    return result
