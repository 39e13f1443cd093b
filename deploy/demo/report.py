"""What the runs come to: verdicts against the bars, a table and JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from engines import Outcome

# A static split hurts an engine whose p99 wait is above this, in trace milliseconds.
_HURTS_MS = 500.0
# What the broker may cost in any case, in real milliseconds.
_SLACK_MS = 20.0
_NEIGHBOUR_SLACK_MS = 100.0
_MOST_OF_STATIC = 1.1


@dataclass(frozen=True)
class Compared:
    """One engine, both ways."""

    static: Outcome
    elastic: Outcome


@dataclass(frozen=True)
class Bar:
    name: str
    passed: bool
    value: float
    limit: float
    text: str

    def line(self) -> str:
        return f"{'PASS' if self.passed else 'MISS'}  {self.text}"


def _at_most(name: str, value: float, limit: float, text: str) -> Bar:
    return Bar(name, value <= limit, value, limit, text)


def engine_bars(name: str, engine: Compared, speedup: float) -> list[Bar]:
    """Act 1: the broker helps who suffers and harms nobody."""
    static, elastic = engine.static.wait_p99_ms, engine.elastic.wait_p99_ms
    bars = []
    if static > _HURTS_MS:
        bars.append(
            _at_most(
                f"{name}.p99_halved",
                elastic,
                static / 2,
                f"{name}: p99 wait {elastic:,.0f} ms on the broker, "
                f"at most half of the {static:,.0f} ms static",
            )
        )
    limit = max(_MOST_OF_STATIC * static, _SLACK_MS * speedup)
    bars.append(
        _at_most(
            f"{name}.p99_not_worse",
            elastic,
            limit,
            f"{name}: p99 wait {elastic:,.0f} ms on the broker, at most {limit:,.0f} ms "
            f"(the more of {_MOST_OF_STATIC:g} x static and {_SLACK_MS:g} ms x speed-up)",
        )
    )
    return bars


def neighbour_bar(name: str, engine: Compared, speedup: float) -> Bar:
    """Act 2: what is guaranteed is as good as what is one's own."""
    static, elastic = engine.static.wait_p99_ms, engine.elastic.wait_p99_ms
    limit = static + _NEIGHBOUR_SLACK_MS * speedup
    return _at_most(
        "neighbour.p99_kept",
        elastic,
        limit,
        f"{name} beside the flood: p99 wait {elastic:,.0f} ms on the broker, at most "
        f"{limit:,.0f} ms (static {static:,.0f} ms + {_NEIGHBOUR_SLACK_MS:g} ms x speed-up)",
    )


def must_bars(integrity_errors: int, leaked_bytes: int) -> list[Bar]:
    """What the exit status depends on."""
    return [
        _at_most(
            "integrity_errors",
            integrity_errors,
            0,
            f"{integrity_errors:,} lines of blocks overwritten by others",
        ),
        _at_most(
            "leaked_bytes",
            leaked_bytes,
            0,
            f"{leaked_bytes:,} bytes of shared memory left behind, by the kernel's count",
        ),
    ]


_HEAD = "{:<14} {:>8}  {:^19}  {:^19}  {:^15}  {}"
_ROW = "{:<14} {:>8}  {:>9} {:>9}  {:>9} {:>9}  {:>7} {:>7}  {}"


def table(engines: Mapping[str, Compared], verdicts: Mapping[str, bool | None]) -> str:
    """Waits in trace milliseconds. A verdict of None: there is none for that engine."""
    lines = [
        _HEAD.format("", "", "mean wait, ms", "p99 wait, ms", "preemptions", ""),
        _ROW.format("engine", "requests", *(["static", "broker"] * 3), "verdict"),
    ]
    for name, engine in engines.items():
        static, elastic = engine.static, engine.elastic
        verdict = verdicts.get(name)
        lines.append(
            _ROW.format(
                name,
                f"{static.requests:,}",
                f"{static.wait_mean_ms:,.0f}",
                f"{elastic.wait_mean_ms:,.0f}",
                f"{static.wait_p99_ms:,.0f}",
                f"{elastic.wait_p99_ms:,.0f}",
                f"{static.preemptions:,}",
                f"{elastic.preemptions:,}",
                "" if verdict is None else "PASS" if verdict else "MISS",
            )
        )
    return "\n".join(line.rstrip() for line in lines)


def remarks(engines: Mapping[str, Compared]) -> list[str]:
    """What a reader of the table should know besides."""
    found = []
    for name, engine in engines.items():
        for way, outcome in (("static", engine.static), ("broker", engine.elastic)):
            if outcome.rejected:
                found.append(
                    f"{name}, {way}: {outcome.rejected:,} requests could never fit its memory"
                )
            if outcome.unfinished:
                found.append(
                    f"{name}, {way}: {outcome.unfinished:,} requests were not done at the end; "
                    "waits are those of requests admitted"
                )
    return found


def lateness_remark(engines: Sequence[Compared], speedup: float) -> str | None:
    """A machine that was too busy to keep the pace makes waits on the broker longer.

    Static waits depend on the trace alone.
    """
    late_ms = max((engine.elastic.late_max_ms for engine in engines), default=0.0)
    if late_ms <= _NEIGHBOUR_SLACK_MS:
        return None
    return (
        f"this machine was busy: a step came {late_ms:,.0f} ms late, "
        f"{late_ms * speedup:,.0f} ms of trace time; a smaller --speedup would help"
    )


def _both_ways(engine: Compared) -> dict[str, Any]:
    return {"static": asdict(engine.static), "elastic": asdict(engine.elastic)}


def to_json(
    *,
    engines: Mapping[str, Compared],
    neighbour: tuple[str, Compared] | None,
    flood: Compared | None,
    bars: Sequence[Bar],
    integrity_errors: int,
    leaked_bytes: int,
    capacity_tokens: int,
    seconds: float,
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    """Times in trace milliseconds. Parts of an act that did not run are empty or null."""
    act2: dict[str, Any] = {"static_wait_p99_ms": None, "elastic_wait_p99_ms": None}
    if neighbour is not None and flood is not None:
        name, engine = neighbour
        act2 = {
            "engine": name,
            "static_wait_p99_ms": engine.static.wait_p99_ms,
            "elastic_wait_p99_ms": engine.elastic.wait_p99_ms,
            **_both_ways(engine),
            "flood": _both_ways(flood),
        }
    return {
        "integrity_errors": integrity_errors,
        "leaked_bytes": leaked_bytes,
        "capacity_tokens": capacity_tokens,
        "engines": {name: _both_ways(engine) for name, engine in engines.items()},
        "neighbour": act2,
        "bars": [asdict(bar) for bar in bars],
        "seconds": round(seconds, 1),
        **settings,
    }
