"""Engines: kvbroker-replay processes that run at once, watched until they are done."""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from processes import Child, Children, DemoError

# Engines are given this long, really, to open their sessions before trace time starts.
_START_SECONDS = 0.7
# What a run may take beyond its trace before it counts as stuck.
_STUCK_SECONDS = 60.0
_TICK_SECONDS = 0.1


@dataclass(frozen=True)
class Status:
    """One moment of one engine; memory in bytes of the scaled pool."""

    t_s: float  # trace time
    load_tokens: int
    waiting: int
    running: int
    in_use: int
    idle: int
    held: int

    @staticmethod
    def parse(line: bytes) -> Status:
        raw = json.loads(line)
        return Status(
            t_s=raw["t_ms"] / 1e3,
            load_tokens=raw["load_tokens"],
            waiting=raw["waiting"],
            running=raw["running"],
            in_use=raw["in_use_bytes"],
            idle=raw["idle_bytes"],
            held=raw["held_bytes"],
        )


@dataclass(frozen=True)
class Outcome:
    """What kvbroker-replay says at its end; times in trace milliseconds.

    Waits are over all requests admitted, the 99th percentile by nearest rank.
    """

    requests: int
    rejected: int
    unfinished: int
    wait_p99_ms: float
    wait_mean_ms: float
    wait_max_ms: float
    preemptions: int
    integrity_errors: int
    blocks_written: int
    late_max_ms: float  # real: how late the engine did something at worst
    seconds: float  # real

    @staticmethod
    def parse(text: str) -> Outcome:
        raw: dict[str, Any] = json.loads(text)
        return Outcome(**{f.name: raw[f.name] for f in fields(Outcome)})


@dataclass(frozen=True)
class Engine:
    name: str
    flags: list[str]  # of kvbroker-replay
    # The run is over when all these are done; others are then asked to end.
    measured: bool = True


@dataclass
class Run:
    """What came out of engines that ran at once, by engine."""

    outcomes: dict[str, Outcome] = field(default_factory=dict)
    samples: dict[str, list[Status]] = field(default_factory=dict)
    requests: dict[str, bytes] = field(default_factory=dict)  # CSV


class _Watched:
    """An engine that runs, and the pipe that it tells its state through."""

    def __init__(self, engine: Engine, child: Child, pipe: int, folder: Path) -> None:
        self.engine = engine
        self.child = child
        self.pipe = pipe
        self.folder = folder
        self._rest = b""

    def read(self) -> list[Status] | None:
        """The news; None at the end of them."""
        data = os.read(self.pipe, 1 << 16)
        if not data:
            return None
        *lines, self._rest = (self._rest + data).split(b"\n")
        return [Status.parse(line) for line in lines]

    def outcome(self) -> Outcome:
        """REQUIRES: the process has ended."""
        status = self.child.exit_status()
        try:
            outcome = Outcome.parse((self.folder / "summary.json").read_text(encoding="utf-8"))
        except (OSError, ValueError, KeyError):
            outcome = None
        # Wrong blocks are a result that is reported with the others.
        wrong_blocks = status == 1 and outcome is not None and outcome.integrity_errors > 0
        if outcome is None or (status != 0 and not wrong_blocks):
            raise self.child.failure(f"failed with exit status {status}")
        return outcome


def run_engines(
    children: Children,
    program: Path,
    engines: Sequence[Engine],
    folder: Path,
    *,
    limit_s: float,
    on_status: Callable[[str, Status], None],
    on_tick: Callable[[], None],
) -> Run:
    """Runs the engines from one moment on until all measured ones are done.

    `limit_s` is the longest that their traces may take, really. `on_tick` is called some ten
    times a second and may raise. Raises DemoError as soon as an engine fails.
    """
    start_at = time.time() + _START_SECONDS
    run = Run()
    with selectors.DefaultSelector() as selector:
        watched = [_start(children, program, engine, folder, start_at) for engine in engines]
        try:
            for each in watched:
                run.samples[each.engine.name] = []
                selector.register(each.pipe, selectors.EVENT_READ, each)
            _watch(watched, selector, run, _START_SECONDS + limit_s, on_status, on_tick)
        finally:
            for each in watched:
                os.close(each.pipe)
    for each in watched:
        run.outcomes[each.engine.name] = each.outcome()
        run.requests[each.engine.name] = (each.folder / "requests.csv").read_bytes()
    return run


def _start(
    children: Children, program: Path, engine: Engine, folder: Path, start_at: float
) -> _Watched:
    own = folder / engine.name
    own.mkdir()
    pipe, writer = os.pipe()
    try:
        command: list[str | Path] = [
            program,
            f"--name={engine.name}",
            *engine.flags,
            f"--start-at={start_at:.6f}",
            f"--requests={own / 'requests.csv'}",
            "--json",
            f"--status-fd={writer}",
        ]
        child = children.start(
            engine.name,
            command,
            folder / f"{engine.name}.log",
            stdout=own / "summary.json",
            keep_fds=[writer],
        )
    finally:
        os.close(writer)
    return _Watched(engine, child, pipe, own)


def _watch(
    watched: Sequence[_Watched],
    selector: selectors.BaseSelector,
    run: Run,
    limit_s: float,
    on_status: Callable[[str, Status], None],
    on_tick: Callable[[], None],
) -> None:
    deadline = time.monotonic() + limit_s + _STUCK_SECONDS
    running = {each.engine.name: each for each in watched}
    dismissed: set[str] = set()
    while running:
        for key, _ in selector.select(_TICK_SECONDS):
            each: _Watched = key.data
            news = each.read()
            if news is None:
                selector.unregister(each.pipe)
                each.child.process.wait()
                each.outcome()  # A failure ends the run at once.
                del running[each.engine.name]
            elif news:
                run.samples[each.engine.name] += news
                on_status(each.engine.name, news[-1])
        if not any(each.engine.measured for each in running.values()):
            # One that has said nothing yet may not take the signal for what it is.
            for name in {name for name in running if run.samples[name]} - dismissed:
                dismissed.add(name)
                running[name].child.process.send_signal(signal.SIGTERM)
        on_tick()
        if time.monotonic() > deadline:
            raise DemoError(
                f"engines run {_STUCK_SECONDS:g} s longer than their traces: {', '.join(running)}"
            )


def print_capacity(program: Path, flags: Sequence[str]) -> dict[str, Any]:
    """What a trace asks for, by `kvbroker-replay --print-capacity`."""
    done = subprocess.run(
        [str(program), *flags, "--print-capacity"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise DemoError(done.stderr.strip() or f"{program} failed with status {done.returncode}")
    result: dict[str, Any] = json.loads(done.stdout)
    return result
