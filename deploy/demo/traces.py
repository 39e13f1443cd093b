"""Which requests each engine replays: from `--trace NAME=FILE[@SHIFT]` to kvbroker-replay's flags.

Files of dates keep their distance from each other: all are read with the earliest row of any
of them as time zero, and shifts of all wrap around the longest of them.
"""

from __future__ import annotations

import contextlib
import datetime
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

BUILTIN_PREFIX = "builtin:"
BUILTIN_TRACES = ("conv", "code")
BUILTIN_SECONDS = 1200.0

# How the overloaded neighbour's requests come from those of the engine it is beside.
FLOOD_RATE = 3.0
_SEED_LIMIT = 1 << 64

_NAME = re.compile(r"[A-Za-z0-9_.-]{1,128}")
_DATE = re.compile(r"(\d{4}-\d\d-\d\d)[ T](\d\d:\d\d:\d\d(?:\.\d{1,9})?)(?:Z|\+00:00)?")


class TraceError(Exception):
    """A trace that cannot be used; the message is for whoever typed it."""


@dataclass(frozen=True)
class Trace:
    """The requests of one engine."""

    name: str  # the engine's
    source: str  # a file, or builtin:NAME
    shift_s: float = 0.0
    seed: int = 0
    rate_scale: float = 1.0
    origin: str | None = None  # of a file with dates
    length_s: float | None = None  # what a shift wraps around; None: as the source says

    @property
    def builtin(self) -> bool:
        return self.source.startswith(BUILTIN_PREFIX)

    def flags(self, window_s: float) -> list[str]:
        """What tells kvbroker-replay all this."""
        flags = ["--trace", self.source, f"--seed={self.seed}", f"--window={window_s:g}"]
        if self.shift_s:
            flags.append(f"--shift={self.shift_s!r}")
        if self.rate_scale != 1:
            flags.append(f"--rate-scale={self.rate_scale:g}")
        if self.origin is not None:
            flags.append(f"--origin={self.origin}")
        if self.length_s is not None:
            flags.append(f"--length={self.length_s!r}")
        return flags


def parse_trace(text: str) -> Trace:
    """Reads NAME=FILE[@SHIFT_SECONDS]; FILE may be builtin:conv or builtin:code."""
    name, equals, source = text.partition("=")
    if not equals or not source:
        raise TraceError(f"expected NAME=FILE[@SHIFT_SECONDS], got: {text}")
    if not _NAME.fullmatch(name):
        raise TraceError(f"an engine's name is 1 to 128 of [A-Za-z0-9_.-], got: {name}")
    shift_s = 0.0
    path, at, tail = source.rpartition("@")
    if at and path:
        # Else the @ is part of a file's name.
        with contextlib.suppress(ValueError):
            shift_s, source = float(tail), path
    if not math.isfinite(shift_s):
        raise TraceError(f"a shift is a number of seconds, got: {tail}")
    if source.startswith(BUILTIN_PREFIX):
        if source.removeprefix(BUILTIN_PREFIX) not in BUILTIN_TRACES:
            known = ", ".join(BUILTIN_PREFIX + trace for trace in BUILTIN_TRACES)
            raise TraceError(f"no such built-in trace: {source}; there are {known}")
    elif not Path(source).is_file():
        raise TraceError(f"no such trace file: {source}")
    return Trace(name=name, source=source, shift_s=shift_s)


def default_traces() -> list[Trace]:
    return [
        Trace("conv", "builtin:conv"),
        Trace("code", "builtin:code"),
        Trace("code2", "builtin:code", shift_s=600.0),
    ]


def check_names(traces: Sequence[Trace]) -> None:
    names = [trace.name for trace in traces]
    for name in names:
        if names.count(name) > 1:
            raise TraceError(f"two traces for one engine: {name}")


def align(traces: Sequence[Trace], seed: int, window_s: float) -> list[Trace]:
    """The same traces on one time axis. May read the files."""
    spans = {trace.source: _dates_in(trace.source) for trace in traces if not trace.builtin}
    dated = [span for span in spans.values() if span is not None]
    origin = min((first for first, _ in dated), default=None)
    length_s = None
    if origin is not None:
        length_s = max(_whole_minutes(origin, last) for _, last in dated)

    def aligned(trace: Trace) -> Trace:
        if trace.builtin:
            return replace(trace, seed=seed, length_s=max(BUILTIN_SECONDS, window_s))
        if spans[trace.source] is not None:
            return replace(trace, seed=seed, origin=origin, length_s=length_s)
        return replace(trace, seed=seed)

    return [aligned(trace) for trace in traces]


def measured_trace(traces: Sequence[Trace]) -> Trace:
    """The engine that capacity is computed from and that act 2 measures."""
    return next((trace for trace in traces if trace.name == "conv"), traces[0])


def flood_beside(trace: Trace) -> Trace:
    """A neighbour with three times the customers, whose requests are others."""
    name = "flood" if trace.name != "flood" else "flood2"
    seed = (trace.seed + 1) % _SEED_LIMIT
    shift_s = trace.shift_s
    if not trace.builtin:
        # A file's requests do not depend on the seed: let them come at another time.
        shift_s += (trace.length_s or BUILTIN_SECONDS) / 2
    return replace(trace, name=name, seed=seed, rate_scale=FLOOD_RATE, shift_s=shift_s)


def _dates_in(path: str) -> tuple[str, str] | None:
    """The earliest and latest date in a file's first column; None where there are none.

    Lines that are none are for kvbroker-replay to complain about.
    """
    first = last = None
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            for line in file:
                match = _DATE.fullmatch(line.partition(",")[0].strip())
                if not match:
                    continue
                # Digits in fixed places: text sorts as time does.
                date = f"{match[1]} {match[2]}"
                first = date if first is None else min(first, date)
                last = date if last is None else max(last, date)
    except OSError as error:
        raise TraceError(f"cannot read trace file: {path}: {error.strerror}") from error
    return None if first is None or last is None else (first, last)


def _whole_minutes(origin: str, last: str) -> float:
    seconds = (_seconds(last) - _seconds(origin)).total_seconds()
    return 60.0 * (math.floor(seconds / 60) + 1)


def _seconds(date: str) -> datetime.datetime:
    whole, _, fraction = date.partition(".")
    try:
        moment = datetime.datetime.strptime(whole, "%Y-%m-%d %H:%M:%S")
    except ValueError as error:
        raise TraceError(f"not a date: {date}") from error
    return moment + datetime.timedelta(seconds=float(f"0.{fraction or 0}"))
