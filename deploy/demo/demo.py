"""Runs engines on a static split and on the broker, and compares; see deploy/demo.sh --help.

What the traces ask for is printed, the acts are played, what shared memory is left is
measured, the results are reported. All that is started or made for it is gone at the end,
however it comes.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import chart
import report
from acts import Stage, engine_flags, program
from broker import request_times_in_words
from engines import Outcome, Run, print_capacity
from live import LiveView
from options import ADDED_FLAGS, Options, parse_options
from processes import Children, DemoError
from report import Compared
from traces import Trace, flood_beside, measured_trace
from units import MODEL, SCALE, Units

# Capacity `auto`, in 99th percentiles of one engine's tokens in flight.
_AUTO_CAPACITY = 2.4
# How long the kernel may take to count what has ended.
_SETTLE_SECONDS = 2.0


class Interrupted(BaseException):
    """A signal that asks to end."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.exit_status = 128 + number


@dataclass
class Results:
    """What the acts came to; an act that was not played left nothing."""

    engines: dict[str, Compared]
    neighbour: tuple[str, Compared] | None
    flood: Compared | None
    panels: list[chart.Panel]
    runs: dict[str, Run]

    def outcomes(self) -> list[Outcome]:
        return [outcome for run in self.runs.values() for outcome in run.outcomes.values()]

    def compared(self) -> list[Compared]:
        beside = [self.neighbour[1]] if self.neighbour is not None else []
        return [*self.engines.values(), *beside]


def shmem_bytes() -> int:
    """Shared memory of the whole machine, as the kernel counts it."""
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith("Shmem:"):
            return int(line.split()[1]) * 1024
    raise DemoError("/proc/meminfo has no line Shmem")


def leaked_since(before: int) -> int:
    """Bytes more than before, once the kernel has had time to count them."""
    deadline = time.monotonic() + _SETTLE_SECONDS
    while (leaked := shmem_bytes() - before) > 0 and time.monotonic() < deadline:
        time.sleep(0.05)
    return max(0, leaked)


@contextmanager
def temporary_folder(logs: Path | None) -> Iterator[Path]:
    """Gone afterwards; the logs in it are kept in `logs`, where given."""
    folder = Path(tempfile.mkdtemp(prefix="kvbroker-demo-"))
    try:
        yield folder
    finally:
        if logs is not None:
            for log in folder.glob("*/*.log"):
                logs.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(log, logs / f"{log.parent.name}-{log.name}")
        shutil.rmtree(folder, ignore_errors=True)


def look_at_traces(options: Options, traces: Sequence[Trace]) -> tuple[Units, int]:
    """Prints what each trace asks for, and the capacity; returns the latter in tokens."""
    measured = measured_trace(options.traces)
    print("\n== What the traces ask for, in tokens in flight")
    print(f"{'engine':<14} {'requests':>8} {'mean':>9} {'p99':>9} {'peak':>9}")
    found: dict[str, dict[str, Any]] = {}
    for trace in traces:
        figures = print_capacity(program(options, "kvbroker-replay"), engine_flags(options, trace))
        found[trace.name] = figures
        print(
            f"{trace.name:<14} {figures['requests']:>8,} "
            f"{figures['tokens_in_flight_mean']:>9,} {figures['tokens_in_flight_p99']:>9,} "
            f"{figures['tokens_in_flight_peak']:>9,}"
        )
    figures = found[measured.name]
    units = Units(figures["token_bytes"], figures["block_tokens"])
    p99 = figures["tokens_in_flight_p99"]
    if options.capacity_tokens is not None:
        capacity, why = options.capacity_tokens, "as given"
    else:
        capacity = int(_AUTO_CAPACITY * p99)
        why = f"{_AUTO_CAPACITY:g} x the p99 of {measured.name}, {p99:,}"
    if capacity < units.block_tokens * len(traces):
        raise DemoError(
            f"capacity is too small for {len(traces)} engines: {capacity:,} tokens ({why}); "
            "give one with --capacity"
        )
    gib = units.gib(units.bytes_of(capacity))
    print(
        f"capacity: {capacity:,} tokens ({why}), {gib:.1f} GiB of {MODEL}'s KV cache, "
        f"of which 1/{SCALE} is really allocated"
    )
    return units, capacity


def play(options: Options, traces: Sequence[Trace], units: Units, capacity: int) -> Results:
    measured = measured_trace(options.traces)
    live = LiveView(sys.stdout, units, capacity, options.window_s)
    engines: dict[str, Compared] = {}
    neighbour = flood = None
    with temporary_folder(options.logs) as folder, Children() as children:
        stage = Stage(options, children, folder, units, capacity, live)
        try:
            if 1 in options.acts:
                engines = stage.play_engines(options.traces)
            if 2 in options.acts:
                compared, flood = stage.play_neighbour(measured)
                neighbour = measured.name, compared
        finally:
            ignore_signals()
    catch_signals()
    return Results(engines, neighbour, flood, stage.panels, stage.runs)


def judge(results: Results, speedup: float) -> list[report.Bar]:
    bars = []
    for name, engine in results.engines.items():
        bars += report.engine_bars(name, engine, speedup)
    if results.neighbour is not None:
        bars.append(report.neighbour_bar(*results.neighbour, speedup))
    return bars


def print_results(
    results: Results,
    waits: Sequence[report.Bar],
    musts: Sequence[report.Bar],
    speedup: float,
) -> None:
    print("\n== Results, in trace milliseconds")
    rows: dict[str, Compared] = dict(results.engines)
    verdicts: dict[str, bool | None] = {
        name: all(bar.passed for bar in waits if bar.name.startswith(f"{name}."))
        for name in results.engines
    }
    if results.neighbour is not None and results.flood is not None:
        name, engine = results.neighbour
        rows[f"{name} (act 2)"] = engine
        rows["its flood"] = results.flood
        verdicts[f"{name} (act 2)"] = all(
            bar.passed for bar in waits if bar.name.startswith("neighbour.")
        )
    print(report.table(rows, verdicts))
    print()
    for bar in [*waits, *musts]:
        print(bar.line())
    lateness = report.lateness_remark(results.compared(), speedup)
    for remark in [*report.remarks(rows), *([lateness] if lateness else [])]:
        print(f"note  {remark}")


def write_requests(folder: Path, runs: Mapping[str, Run]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for label, run in runs.items():
        for name, csv in run.requests.items():
            (folder / f"{label}-{name}.csv").write_bytes(csv)


def write_json(path: Path, contents: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(contents, indent=2) + "\n", encoding="utf-8")


def settings_of(options: Options, arguments: Sequence[str]) -> dict[str, Any]:
    """How to get the same again: machine, command and what it came to mean."""
    cpus = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        if line.startswith("model name")
    ]
    typed = [word for word in arguments if not word.startswith(ADDED_FLAGS)]
    return {
        "machine": {
            "system": platform.platform(),
            "cpu": cpus[0] if cpus else platform.machine(),
            "cpus": len(os.sched_getaffinity(0)),
        },
        "command": shlex.join(["deploy/demo.sh", *typed]),
        "settings": {
            "traces": {
                trace.name: {"source": trace.source, "shift_s": trace.shift_s}
                for trace in options.traces
            },
            "capacity": options.capacity_tokens or "auto",
            "prefill_tokens_per_s": options.prefill,
            "decode_tokens_per_s": options.decode,
            "window_s": options.window_s,
            "speedup": options.speedup,
            "seed": options.seed,
            "model": MODEL,
            "scale": SCALE,
        },
    }


def run_demo(options: Options, arguments: Sequence[str]) -> int:
    started = time.time() if options.started is None else options.started
    shmem_before = shmem_bytes()
    traces = list(options.traces)
    if 2 in options.acts:
        traces.append(flood_beside(measured_trace(options.traces)))
    units, capacity = look_at_traces(options, traces)
    print(f"speed-up {options.speedup:g}: {request_times_in_words(options.speedup)}")

    results = play(options, traces, units, capacity)
    leaked = leaked_since(shmem_before)
    integrity_errors = sum(outcome.integrity_errors for outcome in results.outcomes())
    waits = judge(results, options.speedup)
    musts = report.must_bars(integrity_errors, leaked)
    print_results(results, waits, musts, options.speedup)

    drawing = chart.render(
        "KV cache of engines that share one GPU: static split and broker",
        f"{capacity:,} tokens in all, replayed at {options.speedup:g} times the speed",
        results.panels,
        units,
    )
    options.chart.write_text(drawing, encoding="utf-8")
    print(f"\nchart     {options.chart}")
    if options.requests is not None:
        write_requests(options.requests, results.runs)
        print(f"requests  {options.requests}")
    seconds = time.time() - started
    if options.json is not None:
        contents = report.to_json(
            engines=results.engines,
            neighbour=results.neighbour,
            flood=results.flood,
            bars=[*waits, *musts],
            integrity_errors=integrity_errors,
            leaked_bytes=leaked,
            capacity_tokens=capacity,
            seconds=seconds,
            settings=settings_of(options, arguments),
        )
        write_json(options.json, contents)
        print(f"results   {options.json}")
    print(f"took      {seconds:.0f} s")
    return 0 if all(bar.passed for bar in musts) else 1


_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def catch_signals() -> None:
    def interrupt(number: int, _frame: FrameType | None) -> None:
        raise Interrupted(number)

    for number in _SIGNALS:
        signal.signal(number, interrupt)


def ignore_signals() -> None:
    """While things are being ended, which takes seconds at most."""
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def main(arguments: Sequence[str]) -> int:
    options = parse_options(arguments)
    if options.bin is None:
        return 0
    catch_signals()
    try:
        return run_demo(options, arguments)
    except DemoError as error:
        print(f"demo.sh: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"demo.sh: {error.strerror}: {error.filename}", file=sys.stderr)
        return 1
    except Interrupted as interrupted:
        print("\ndemo.sh: interrupted", file=sys.stderr)
        return interrupted.exit_status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
