"""LiveView: what the engines of a run are doing, redrawn in place on a terminal.

Elsewhere a line an engine every few seconds, so that a log of the run reads well, too.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from typing import TextIO

from engines import Status
from units import Units

_REDRAW_SECONDS = 0.2
_LINES_SECONDS = 5.0
_BAR_WIDTH = 30


def _cells(name: str, status: Status, units: Units) -> str:
    gib = units.gib
    return (
        f"{name:<12} {status.load_tokens:>9,} {gib(status.in_use):>8.1f} "
        f"{gib(status.idle):>8.1f} {gib(status.held):>8.1f} {status.waiting:>8,}"
    )


_HEAD = f"{'engine':<12} {'load tok':>9} {'in use':>8} {'idle':>8} {'held':>8} {'waiting':>8}"


class LiveView:
    def __init__(self, out: TextIO, units: Units, capacity_tokens: int, window_s: float) -> None:
        self._out = out
        self._units = units
        self._window_s = window_s
        self._in_place = out.isatty()
        gib = units.gib(units.bytes_of(capacity_tokens))
        self._capacity = f"capacity {capacity_tokens:,} tokens, {gib:.1f} GiB"
        self._latest: dict[str, Status | None] = {}
        self._drawn_lines = 0
        self._next = 0.0

    def begin(self, title: str, engines: Sequence[str]) -> None:
        self._latest = dict.fromkeys(engines)
        self._drawn_lines = 0
        self._next = 0.0
        print(f"\n== {title}", file=self._out, flush=True)

    def update(self, engine: str, status: Status) -> None:
        self._latest[engine] = status

    def tick(self) -> None:
        """Shows what is new, when it is time to."""
        now = time.monotonic()
        if now < self._next or not any(self._latest.values()):
            return
        if self._in_place:
            self._next = now + _REDRAW_SECONDS
            self._redraw()
        else:
            self._next = now + _LINES_SECONDS
            self._append()

    def end(self) -> None:
        """Shows how it ended."""
        if self._in_place:
            self._redraw()

    def _trace_s(self) -> float:
        return max((status.t_s for status in self._latest.values() if status), default=0.0)

    def _redraw(self) -> None:
        trace_s = self._trace_s()
        share = min(1.0, max(0.0, trace_s / self._window_s))
        filled = round(share * _BAR_WIDTH)
        lines = [
            f"[{'#' * filled}{'.' * (_BAR_WIDTH - filled)}] {max(0.0, trace_s):,.0f} of "
            f"{self._window_s:,.0f} s   {self._capacity}",
            _HEAD,
        ]
        for name, status in self._latest.items():
            lines.append(_cells(name, status, self._units) if status else f"{name:<12} starting")
        width = shutil.get_terminal_size().columns - 1
        up = f"\x1b[{self._drawn_lines}A" if self._drawn_lines else ""
        self._out.write(up + "".join(f"\r{line[:width]}\x1b[K\n" for line in lines))
        self._out.flush()
        self._drawn_lines = len(lines)

    def _append(self) -> None:
        gib = self._units.gib
        for name, status in self._latest.items():
            if status is None:
                continue
            print(
                f"{max(0.0, status.t_s):>6.0f} of {self._window_s:.0f} s  {name:<10} "
                f"load {status.load_tokens:>7,} tok  in use {gib(status.in_use):>5.1f}  "
                f"idle {gib(status.idle):>5.1f}  held {gib(status.held):>5.1f} GiB  "
                f"waiting {status.waiting:>5,}",
                file=self._out,
            )
        self._out.flush()
