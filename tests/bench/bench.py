"""Measures the host backend and prints a table; see deploy/bench.sh --help.

Everything runs in processes of its own against the real kvbrokerd, whose sockets, locks and
log lie in a temporary folder. Nothing outlives this program.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import resource
import select
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path

from processes import READY_SECONDS, BenchError, Interrupted, Process, environment_without, interrupt

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30

_CLIENTS = 8
_STEAL_ROUNDS = 300
_STEAL_SETTLE_SECONDS = 0.005
_OUTSTANDING = 70_000
_HOLDER_PAGES = 5_000
_GRANT_COST_ROUNDS = 5
_WAITER_PAGES = 65_536
_IDLE_SECONDS = 10.0
# CPU that others use, in percent of the machine, above which figures are doubtful.
_BUSY_PERCENT = 10.0


def note(text: str) -> None:
    print(f"   {text}", file=sys.stderr, flush=True)


# ---- the broker -------------------------------------------------------------


class Broker:
    """A kvbrokerd, and the engines that are connected to it."""

    def __init__(self, bench: Bench, capacity: int, *, free_handles: bool = False) -> None:
        """`free_handles`: bench_broker, on a device whose handles cost no descriptors."""
        self._bench = bench
        self._stack = contextlib.ExitStack()
        self.folder = Path(tempfile.mkdtemp(dir=bench.folder))
        self._children = 0
        if free_handles:
            self.process = self._start(
                [bench.program("tests/bench/bench_broker"), self.folder, str(capacity)]
            )
            if self.process.line() != "ready":
                raise self.process.failure()
            return
        ready, ready_writer = os.pipe()
        try:
            self.process = self._start(
                [
                    bench.program("broker/server/kvbrokerd"),
                    "--backend=host",
                    f"--capacity={capacity}",
                    f"--socket-dir={self.folder}",
                    f"--device-uuid=BENCH-{uuid.uuid4()}",
                    f"--lock-dir={self.folder}",
                    f"--state-dir={self.folder}",
                    f"--ready-fd={ready_writer}",
                ],
                keep_fds=[ready_writer],
            )
            os.close(ready_writer)
            ready_writer = -1
            if (
                not select.select([ready], [], [], READY_SECONDS)[0]
                or not os.read(ready, 64)
            ):
                raise self.process.failure()
        finally:
            os.close(ready)
            if ready_writer >= 0:
                os.close(ready_writer)

    def __enter__(self) -> Broker:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _start(self, command: Sequence[str | Path], keep_fds: Sequence[int] = ()) -> Process:
        self._children += 1
        process = Process(
            command, self.folder / f"{self._children}.log", environment_without("KVBROKER"), keep_fds
        )
        self._stack.callback(process.stop)
        return process

    def engine(self, mode: str, name: str, *arguments: int) -> Process:
        process = self._start(
            [
                self._bench.program("tests/bench/bench_engine"),
                mode,
                self.folder,
                name,
                *map(str, arguments),
            ]
        )
        if process.line() != "ready":
            raise process.failure()
        return process

    def idle_engine(self, name: str, seed: int, start_at: float) -> None:
        """A real engine's client that is connected and has no request before `start_at`."""
        self._start(
            [
                self._bench.program("client/replay/kvbroker-replay"),
                f"--name={name}",
                f"--address={self.folder}",
                "--trace=builtin:code",
                f"--seed={seed}",
                f"--start-at={start_at:.0f}",
            ]
        )

    def listed(self) -> int:
        """Instances that kvctl sees."""
        listing = subprocess.run(
            [
                self._bench.program("client/cli/kvctl"),
                f"--address={self.folder}",
                "list",
                "--json",
            ],
            capture_output=True,
            env=environment_without("KVBROKER"),
            check=False,
        )
        if listing.returncode != 0:
            return 0
        return listing.stdout.count(b'"ipc"')


class Bench:
    def __init__(self, folder: Path, bin_folder: Path, seconds: float) -> None:
        self.folder = folder
        self.seconds = seconds
        self._bin = bin_folder

    def program(self, name: str) -> Path:
        return self._bin / name


# ---- measurements -----------------------------------------------------------

Figures = dict[str, float]


def blocks(bench: Bench) -> Figures:
    """Alloc + Free of 16 blocks on mapped pages, CPU time; and what was said to the broker."""
    output = subprocess.run(
        [
            bench.program("tests/bench/pool_benchmark"),
            "--benchmark_filter=^BM_AllocFree/16$|^BM_MillionAllocs",
            "--benchmark_repetitions=5",
            "--benchmark_format=json",
        ],
        capture_output=True,
        check=True,
    ).stdout
    runs = [run for run in json.loads(output)["benchmarks"] if run["run_type"] == "iteration"]
    pairs = [run["cpu_time"] for run in runs if run["run_name"] == "BM_AllocFree/16"]
    million = [run for run in runs if run["run_name"].startswith("BM_MillionAllocs")]
    return {
        "alloc_free_16_us": statistics.median(pairs) / 1000,
        "rpcs_per_warm_alloc": max(run["rpcs_per_alloc"] for run in million),
    }


def churn(bench: Bench, handles: int, handle_bytes: int) -> tuple[float, float]:
    """Grants a second of all engines together, and the broker's CPU in us a grant."""
    with Broker(bench, max(64 * MIB, 64 * _CLIENTS * handles * handle_bytes)) as broker:
        engines = [
            broker.engine("churn", f"e{i}", handles, handle_bytes) for i in range(_CLIENTS)
        ]
        for engine in engines:
            engine.order("0.5")  # warm
        for engine in engines:
            engine.line()
        before = broker.process.cpu_seconds()
        for engine in engines:
            engine.order(str(bench.seconds))
        per_second = 0.0
        grants_made = 0
        for engine in engines:
            grants, seconds = engine.line(bench.seconds + READY_SECONDS).split()
            per_second += int(grants) / float(seconds)
            grants_made += int(grants)
        cpu = broker.process.cpu_seconds() - before
        return per_second, 1e6 * cpu / grants_made


def throughput(bench: Bench) -> Figures:
    at_64, cpu_64 = churn(bench, 64, 4 * KIB)
    at_1, cpu_1 = churn(bench, 1, 4 * KIB)
    large, cpu_large = churn(bench, 1, 2 * MIB)
    return {
        "handles_per_s_64": 64 * at_64,
        "grants_per_s_1": at_1,
        "grants_per_s_1_of_2mib": large,
        "broker_cpu_us_per_grant_64": cpu_64,
        "broker_cpu_us_per_grant_1": cpu_1,
        "broker_cpu_us_per_grant_1_of_2mib": cpu_large,
    }


def steals(bench: Bench, touch: bool) -> list[float]:
    """From asking for the other's only page to having it mapped, in us, sorted."""
    page = 128 * MIB
    with Broker(bench, page) as broker:
        engines = [broker.engine("steal", name, page, int(touch)) for name in ("a", "b")]
        micros = []
        for turn in range(_STEAL_ROUNDS + 2):
            engines[turn % 2].order("take")
            micros.append(float(engines[turn % 2].line()))
            time.sleep(_STEAL_SETTLE_SECONDS)
        # The first was free memory, the second has seen no reclaim before.
        return sorted(micros[2:])


def steal(bench: Bench) -> Figures:
    touched = steals(bench, touch=True)
    untouched = steals(bench, touch=False)
    return {
        "steal_128mib_p50_us": statistics.median(touched),
        "steal_128mib_p99_us": touched[int(0.99 * len(touched))],
        "steal_128mib_untouched_p50_us": statistics.median(untouched),
        "steal_128mib_untouched_p99_us": untouched[int(0.99 * len(untouched))],
    }


def idle(bench: Bench) -> Figures:
    seconds = max(_IDLE_SECONDS, bench.seconds)
    with Broker(bench, 256 * MIB) as broker:
        start_at = time.time() + seconds + 120
        for i in range(_CLIENTS):
            broker.idle_engine(f"idle{i}", i, start_at)
        deadline = time.monotonic() + READY_SECONDS
        while broker.listed() < _CLIENTS:
            if time.monotonic() > deadline:
                raise BenchError("the idle engines did not connect")
            time.sleep(0.2)
        time.sleep(3)  # what follows an Open, and stock that decays
        cpu, ticks, began = (
            broker.process.cpu_seconds(),
            broker.process.cpu_ticks(),
            time.monotonic(),
        )
        time.sleep(seconds)
        elapsed = time.monotonic() - began
        return {
            "idle_cpu_percent": 100 * (broker.process.cpu_seconds() - cpu) / elapsed,
            "idle_cpu_percent_by_ticks": 100
            * (broker.process.cpu_ticks() - ticks)
            / os.sysconf("SC_CLK_TCK")
            / elapsed,
        }


def grant_cost(bench: Bench) -> Figures:
    """The broker's CPU for a page granted and returned, in us: medians of interleaved rounds."""
    with contextlib.ExitStack() as stack:

        def setting(
            *holders: tuple[int, int], free_handles: bool = False, waiting: bool = False
        ) -> tuple[Broker, Process]:
            capacity = _WAITER_PAGES * 4 * KIB if waiting else GIB
            broker = stack.enter_context(Broker(bench, capacity, free_handles=free_handles))
            for i, (sessions, pages) in enumerate(holders):
                broker.engine("hold", f"holder{i}", sessions, pages)
            churner = broker.engine("churn", "churner", 1, 4 * KIB)
            if waiting:
                broker.engine("wait", "waiter", _WAITER_PAGES, 0)
            return broker, churner

        settings = {
            "grant_us_at_1_instance": setting(),
            "grant_us_at_64_instances": setting((63, 1)),
            # A page of the host backend is a descriptor: 70,000 are more than most may open.
            "grant_us_at_100_pages": setting((1, 100), free_handles=True),
            "grant_us_at_70000_pages": setting(
                *[(1, _HOLDER_PAGES)] * (_OUTSTANDING // _HOLDER_PAGES), free_handles=True
            ),
        }
        settings["grant_us_while_one_waits_at_3_instances"] = setting(
            (1, 1), free_handles=True, waiting=True
        )
        settings["grant_us_while_one_waits_at_64_instances"] = setting(
            (62, 1), free_handles=True, waiting=True
        )
        rounds: dict[str, list[float]] = {name: [] for name in settings}
        for _ in range(_GRANT_COST_ROUNDS):
            for name, (broker, churner) in settings.items():
                before = broker.process.cpu_seconds()
                churner.order(str(bench.seconds / _GRANT_COST_ROUNDS))
                grants = int(churner.line(bench.seconds + READY_SECONDS).split()[0])
                rounds[name].append(1e6 * (broker.process.cpu_seconds() - before) / grants)
        return {name: statistics.median(each) for name, each in rounds.items()}


# ---- the machine ------------------------------------------------------------


def busy_percent(seconds: float = 1.0) -> float:
    """CPU that all programs use together, in percent of the machine."""

    def times() -> tuple[int, int]:
        words = Path("/proc/stat").read_text(encoding="ascii").splitlines()[0].split()[1:9]
        numbers = [int(word) for word in words]
        return sum(numbers), numbers[3] + numbers[4]

    total, at_rest = times()
    time.sleep(seconds)
    total_after, at_rest_after = times()
    return 100 * (1 - (at_rest_after - at_rest) / max(1, total_after - total))


def cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


def machine() -> dict[str, object]:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cores": len(os.sched_getaffinity(0)),
        "cpu": cpu_model(),
        "kernel": platform.release(),
        "memory_gib": round(memory / GIB, 1),
        "load_1min_at_start": os.getloadavg()[0],
        "others_cpu_percent_at_start": round(busy_percent(), 1),
        "open_files_limit": resource.getrlimit(resource.RLIMIT_NOFILE)[1],
    }


# ---- the report -------------------------------------------------------------

# key, what it is, unit, decimals, goal.
ROWS = [
    ("alloc_free_16_us", "Alloc + Free of 16 blocks, pages mapped", "us CPU", 3, "<= 0.5"),
    ("rpcs_per_warm_alloc", "messages an Alloc, over a million", "", 3, "0"),
    ("handles_per_s_64", "64 handles of 4 KiB a grant, 8 processes", "handles/s", 0, ">= 50,000"),
    ("grants_per_s_1", "1 handle of 4 KiB a grant, 8 processes", "grants/s", 0, ">= 5,000"),
    ("grants_per_s_1_of_2mib", "1 handle of 2 MiB a grant, 8 processes", "grants/s", 0, ""),
    ("steal_128mib_p50_us", "take 128 MiB from another, p50", "us", 0, ""),
    ("steal_128mib_p99_us", "the same, p99", "us", 0, ""),
    ("steal_128mib_untouched_p50_us", "the same, never touched, p50", "us", 0, ""),
    ("steal_128mib_untouched_p99_us", "the same, never touched, p99", "us", 0, ""),
    ("idle_cpu_percent", "broker with 8 idle engines", "% of a core", 3, "< 1"),
    ("grant_us_at_1_instance", "a page granted and returned, 1 instance", "us CPU", 1, ""),
    ("grant_us_at_64_instances", "the same, 64 instances", "us CPU", 1, "<= 1.5 x"),
    ("grant_us_at_100_pages", "the same, 100 pages lent", "us CPU", 1, ""),
    ("grant_us_at_70000_pages", "the same, 70,000 pages lent", "us CPU", 1, "<= 1.5 x"),
    ("grant_us_while_one_waits_at_3_instances", "the same, another waits, 3", "us CPU", 1, ""),
    ("grant_us_while_one_waits_at_64_instances", "the same, another waits, 64", "us CPU", 1, ""),
]


def print_table(figures: Figures) -> None:
    print(f"{'what':<44}{'figure':>12}  {'unit':<13}{'goal':<11}")
    for key, what, unit, decimals, goal in ROWS:
        print(f"{what:<44}{figures[key]:>12,.{decimals}f}  {unit:<13}{goal:<11}".rstrip())


def run(bench: Bench) -> Iterator[Figures]:
    for what, measure in [
        ("blocks on mapped pages", blocks),
        ("grants through the broker", throughput),
        ("a page from one engine to another", steal),
        ("an idle broker", idle),
        ("a grant's cost beside others", grant_cost),
    ]:
        note(what)
        figures = measure(bench)
        for key, figure in figures.items():
            note(f"   {key} {figure:.5g}")
        yield figures


def main() -> int:
    parser = argparse.ArgumentParser(prog="deploy/bench.sh", description=__doc__)
    parser.add_argument("--bin", type=Path, required=True, help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--seconds", type=float, default=5.0, help="time a figure, default 5")
    options = parser.parse_args()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, interrupt)

    facts = machine()
    print(
        f"{facts['cores']} cores of {facts['cpu']}, Linux {facts['kernel']}, "
        f"{facts['memory_gib']} GiB; load {facts['load_1min_at_start']:.2f}, "
        f"others use {facts['others_cpu_percent_at_start']} % of the CPU"
    )
    if float(str(facts["others_cpu_percent_at_start"])) > _BUSY_PERCENT:
        print("WARNING: the machine is busy; times will be worse than on an idle one")

    folder = Path(tempfile.mkdtemp(prefix="kvb", dir="/tmp"))
    figures: Figures = {}
    try:
        for measured in run(Bench(folder, options.bin, options.seconds)):
            figures.update(measured)
    except BenchError as error:
        print(f"bench.sh: {error}", file=sys.stderr)
        return 1
    except Interrupted as interrupted:
        print("bench.sh: interrupted", file=sys.stderr)
        return interrupted.exit_status
    finally:
        shutil.rmtree(folder, ignore_errors=True)

    print_table(figures)
    if options.json:
        text = json.dumps({"machine": facts, **figures}, indent=2)
        options.json.write_text(text + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
