"""The two acts: which engines run at once, with which memory, both ways."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import chart
from broker import check_alive, running_broker, socket_of
from engines import Engine, Run, run_engines
from live import LiveView
from options import Options
from processes import Child, Children
from report import Compared
from traces import Trace, flood_beside
from units import MODEL, SCALE, Units

# How long after the window, in trace time, queues may drain.
_DRAIN_SECONDS = 300.0


def program(options: Options, name: str) -> Path:
    folders = {"kvbrokerd": "broker/server", "kvbroker-replay": "client/replay"}
    if options.bin is None:
        raise ValueError("acts need --bin")
    return options.bin / folders[name] / name


def engine_flags(options: Options, trace: Trace) -> list[str]:
    """Of kvbroker-replay: what the engine is and gets to do, whatever memory it has."""
    return [
        *trace.flags(options.window_s),
        f"--prefill={options.prefill:g}",
        f"--decode={options.decode:g}",
        f"--model={MODEL}",
        f"--scale={SCALE}",
    ]


def compare(static: Run, elastic: Run) -> dict[str, Compared]:
    return {
        name: Compared(outcome, elastic.outcomes[name]) for name, outcome in static.outcomes.items()
    }


@dataclass
class Stage:
    """What the acts are played on, and what is left of them afterwards."""

    options: Options
    children: Children
    folder: Path  # for what exists only meanwhile
    units: Units
    capacity_tokens: int
    live: LiveView
    panels: list[chart.Panel] = field(default_factory=list)
    runs: dict[str, Run] = field(default_factory=dict)  # by label, such as "act1-static"

    def play_engines(self, traces: Sequence[Trace]) -> dict[str, Compared]:
        """Act 1: engines beside each other."""
        static = self._static("act1-static", "Act 1, even static split", traces, traces)
        elastic = self._elastic("act1-broker", "Act 1, on the broker", traces, traces, {})
        return compare(static, elastic)

    def play_neighbour(self, trace: Trace) -> tuple[Compared, Compared]:
        """Act 2: the trace's engine, and the overloaded one beside it.

        The latter's queue never drains: the runs are over when the first engine is done.
        """
        flood = flood_beside(trace)
        both = [trace, flood]
        half = self.units.whole_blocks(self.capacity_tokens / 2)
        static = self._static("act2-static", "Act 2, static halves", both, [trace])
        elastic = self._elastic(
            "act2-broker",
            f"Act 2, on the broker, half guaranteed to {trace.name}",
            both,
            [trace],
            {trace.name: half},
        )
        compared = compare(static, elastic)
        return compared[trace.name], compared[flood.name]

    def _static(
        self, label: str, title: str, traces: Sequence[Trace], measured: Sequence[Trace]
    ) -> Run:
        share = self.units.whole_blocks(self.capacity_tokens / len(traces))
        engines = [
            self._engine(trace, [f"--static-share={share}"], trace in measured) for trace in traces
        ]
        run = self._run(label, title, engines, self._make_folder(label), None)
        shares = {trace.name: share for trace in traces}
        self._keep(label, title, run, shares)
        return run

    def _elastic(
        self,
        label: str,
        title: str,
        traces: Sequence[Trace],
        measured: Sequence[Trace],
        guarantees: Mapping[str, int],
    ) -> Run:
        """`guarantees`: bytes by engine."""
        folder = self._make_folder(label)
        capacity = self.units.bytes_of(self.capacity_tokens)
        with running_broker(
            self.children,
            program(self.options, "kvbrokerd"),
            folder,
            capacity,
            self.options.speedup,
        ) as broker:
            address = f"--address={socket_of(broker)}"
            engines = []
            for trace in traces:
                flags = [address]
                if trace.name in guarantees:
                    flags.append(f"--min={guarantees[trace.name]}")
                engines.append(self._engine(trace, flags, trace in measured))
            run = self._run(label, title, engines, folder, broker.child)
        self._keep(label, title, run, None)
        return run

    def _engine(self, trace: Trace, memory_flags: Sequence[str], measured: bool) -> Engine:
        until_s = self.options.window_s + _DRAIN_SECONDS
        flags = [
            *engine_flags(self.options, trace),
            *memory_flags,
            f"--speedup={self.options.speedup:g}",
            f"--until={until_s:g}",
        ]
        return Engine(trace.name, flags, measured)

    def _run(
        self,
        label: str,
        title: str,
        engines: Sequence[Engine],
        folder: Path,
        broker: Child | None,
    ) -> Run:
        def on_tick() -> None:
            self.live.tick()
            if broker is not None:
                check_alive(broker)

        self.live.begin(title, [engine.name for engine in engines])
        run = run_engines(
            self.children,
            program(self.options, "kvbroker-replay"),
            engines,
            folder,
            limit_s=(self.options.window_s + _DRAIN_SECONDS) / self.options.speedup,
            on_status=self.live.update,
            on_tick=on_tick,
        )
        self.live.end()
        return run

    def _keep(self, label: str, title: str, run: Run, shares: Mapping[str, int] | None) -> None:
        capacity = self.units.bytes_of(self.capacity_tokens)
        self.runs[label] = run
        self.panels.append(chart.Panel(title, run.samples, capacity, shares))

    def _make_folder(self, label: str) -> Path:
        folder = self.folder / label
        folder.mkdir()
        return folder
