"""Measures the driver, kvcached and kvbroker on one GPU; see run.sh --help.

Everything runs in processes of its own, the broker too, whose sockets and locks lie in a
temporary folder. Nothing outlives this program. What cannot be measured is named with the
reason, and the rest goes on.
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
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from processes import (  # noqa: E402
    READY_SECONDS,
    BenchError,
    Interrupted,
    Process,
    die_with_parent,
    environment_without,
    interrupt,
    tail,
)

MIB = 1 << 20
GIB = 1 << 30

_PAGE_MIB = 128
_OTHER_PAGE_MIB = 144
_PER_LAYER_HANDLES = 64
_RAMP_PAGES = 64
_SETTLE_SECONDS = 0.006
# After this the broker has given its stock back to the driver.
_STOCK_DECAY_SECONDS = 1.5
_CHURN_PAGES = 8
_BURST_PAGES = 16
_BURST_STEP_US = 2000
_BURST_RESERVE = 8
# What the measurements with kvcached need, once it is built.
_KVCACHED_SECONDS = 40.0


Figures = dict[str, float]


_began = time.monotonic()


def note(text: str) -> None:
    print(f"[{time.monotonic() - _began:5.1f} s] {text}", file=sys.stderr, flush=True)


def p50(samples: Sequence[float]) -> float:
    return statistics.median(samples)


def p99(samples: Sequence[float]) -> float:
    return sorted(samples)[min(len(samples) - 1, int(0.99 * len(samples)))]


# ---- the broker and its engines ---------------------------------------------


class Bench:
    def __init__(self, folder: Path, options: argparse.Namespace) -> None:
        self.folder = folder
        self.seconds: float = options.seconds
        self.fake: Path | None = options.fake
        self.sdist: Path | None = options.kvcached
        self.deadline = _began + options.limit
        self._bin: Path = options.bin
        self._logs = 0
        self._environment = environment_without("KVBROKER", "KVCACHED")
        if self.fake is not None:
            gpu = folder / "gpu"
            gpu.mkdir()
            self._environment |= {
                "KVBROKER_CUDA_DRIVER": str(self.fake),
                "KVBROKER_NVML": str(self.fake),
                "KVBROKER_FAKE_CUDA_DIR": str(gpu),
                "KVBROKER_FAKE_CUDA_TOTAL": str(160 * GIB),
            }

    def program(self, name: str) -> Path:
        """By its label's path: a bundle has all programs in one folder."""
        for path in (self._bin / name, self._bin / Path(name).name):
            if path.exists():
                return path
        raise BenchError(f"there is no {name} in {self._bin}")

    def log(self) -> Path:
        self._logs += 1
        return self.folder / f"{self._logs}.log"

    def start(self, command: Sequence[str | Path]) -> Process:
        return Process(command, self.log(), self._environment, ends_with_stdin=True)

    def start_broker(self, command: Sequence[str | Path], ready_fd: int) -> Process:
        return Process(command, self.log(), self._environment, [ready_fd])

    def output(self, name: str, *arguments: str, within: float = 120) -> dict:
        """What a program that ends by itself prints."""
        log = self.log()
        command = [str(self.program(name)), *arguments]
        with open(log, "wb") as log_file:
            try:
                run = subprocess.run(
                    command,
                    stdout=subprocess.PIPE,
                    stderr=log_file,
                    env=self._environment,
                    timeout=within,
                    check=False,
                    preexec_fn=die_with_parent,
                )
            except subprocess.TimeoutExpired as error:
                raise BenchError(f"{name} took longer than {within:g} s") from error
        if run.returncode != 0:
            raise BenchError(f"{' '.join(command)} failed:{tail(log)}")
        return json.loads(run.stdout)

    def gpu(self, *arguments: str) -> dict:
        return self.output("tests/bench/gpu/bench_gpu", *arguments)

    def rounds(self, on_a_gpu: int) -> int:
        """A fake driver's figures mean nothing: it is only tried."""
        return on_a_gpu if self.fake is None else max(2, on_a_gpu // 10)


class Broker:
    """A kvbrokerd, and the engines that are connected to it."""

    def __init__(self, bench: Bench, capacity_mib: int) -> None:
        self._bench = bench
        self._stack = contextlib.ExitStack()
        self.folder = Path(tempfile.mkdtemp(dir=bench.folder))
        ready, ready_writer = os.pipe()
        try:
            self.process = bench.start_broker(
                [
                    bench.program("broker/server/kvbrokerd"),
                    f"--capacity={capacity_mib}M",
                    f"--socket-dir={self.folder}",
                    f"--lock-dir={self.folder}",
                    "--state-dir=none",
                    f"--ready-fd={ready_writer}",
                ],
                ready_writer,
            )
            self._stack.callback(self.process.stop)
            os.close(ready_writer)
            ready_writer = -1
            if not select.select([ready], [], [], READY_SECONDS)[0] or not os.read(ready, 64):
                self._stack.close()
                raise self.process.failure()
        finally:
            os.close(ready)
            if ready_writer >= 0:
                os.close(ready_writer)

    def __enter__(self) -> Broker:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def start_engine(self, name: str, **settings: int) -> Process:
        process = self._bench.start(
            [
                self._bench.program("tests/bench/gpu/bench_gpu"),
                "engine",
                self.folder,
                name,
                *(f"{key}={value}" for key, value in settings.items()),
            ]
        )
        self._stack.callback(process.stop)
        return process

    def engines(self, count: int, **settings: int) -> list[Process]:
        """Started together: most of their time is the driver's."""
        started = [self.start_engine(f"engine{i}", **settings) for i in range(count)]
        for process in started:
            if process.line(READY_SECONDS) != "ready":
                raise process.failure()
        return started

    def engine(self, **settings: int) -> Process:
        return self.engines(1, **settings)[0]


# ---- the driver -------------------------------------------------------------


def driver_calls(bench: Bench) -> Figures:
    """What the driver's calls take, one by one, and our backend's and mapper's around them."""
    small = ["--calls", "20", "--processes", "2", "--gib", "1"]
    floor = bench.output(
        "tests/bench/gpu/cuda_floor", *([] if bench.fake is None else small)
    )
    ramp = floor["ramp"]["figures"]
    ours = floor["ours"]
    figures = {
        "floor_ramp_sent_ahead_us": ramp["ramp_sent_ahead"]["p50"],
        "floor_ramp_cold_us": ramp["ramp_cold"]["p50"],
        "work_shrink_us": ours["contiguous_unmap"]["p50"] + ours["contiguous_release"]["p50"],
        "work_per_layer_grow_us": ours["per_layer_create_export"]["p50"]
        + ours["per_layer_map"]["p50"],
        "work_per_layer_shrink_us": ours["per_layer_unmap"]["p50"]
        + ours["per_layer_release"]["p50"],
    }
    for name, times in floor["calls_128MiB"].items():
        figures[f"call_{name}_us"] = times["p50"]
    for name, times in floor["calls_without_another_descriptor"].items():
        figures[f"call_alone_{name}_us"] = times["p50"]
    return figures


def driver_pages(bench: Bench) -> Figures:
    samples = bench.gpu("floor", str(bench.rounds(100)))
    figures = {f"floor_{name}_us": p50(times) for name, times in samples.items()}
    figures["floor_take_p99_us"] = p99(samples["take"])
    return figures


def reserve(bench: Bench) -> Figures:
    """128 GiB of addresses by CudaMapper."""
    samples = bench.gpu("reserve", str(bench.rounds(100)))
    return {f"ours_{name}_reserve_us": p50(times) for name, times in samples.items()}


# ---- one engine -------------------------------------------------------------


def capacity(pages: int) -> int:
    return pages * _PAGE_MIB


def blocks(bench: Bench) -> Figures:
    with Broker(bench, capacity(4)) as broker:
        engine = broker.engine()
        engine.ask("grow 1")
        engine.ask("free")
        pairs = engine.ask(f"warm {bench.rounds(20000)}")["pair_ns"]
    return {"ours_alloc_free_us": p50(pairs) / 1000}


def ramps(bench: Bench) -> Figures:
    """To 8 GiB in 64 steps."""
    pages = _RAMP_PAGES if bench.fake is None else 8
    room = capacity(2 * pages)
    mapped, cold, one_by_one, page, claim, ahead = [], [], [], [], [], []
    rounds = bench.rounds(5)
    with Broker(bench, room) as broker:
        engine = broker.engine()
        engine.ask(f"grow {pages}")
        for _ in range(4 * rounds):
            engine.ask("free")
            mapped += engine.ask(f"grow {pages}")["all"]
    with Broker(bench, room) as broker:
        engine = broker.engine(keep=0)
        for _ in range(rounds):
            time.sleep(_STOCK_DECAY_SECONDS)
            grown = engine.ask(f"grow {pages}")
            one_by_one += grown["all"]
            page += grown["page"]
            engine.ask("free")
        for _ in range(rounds):
            time.sleep(_STOCK_DECAY_SECONDS)
            claim += engine.ask(f"claim {pages}")["all"]
            engine.ask("free")
    for _ in range(rounds):
        with Broker(bench, room) as broker:
            engine = broker.engine(ahead=1)
            cold += engine.ask(f"grow {pages}")["all"]
        with Broker(bench, room) as broker:
            engine = broker.engine(ahead=1)
            engine.ask("grow 1")  # calls for its reserve
            time.sleep(0.2)
            ahead += engine.ask(f"grow {pages}")["all"]
    return {
        "ours_ramp_mapped_us": p50(mapped),
        "ours_ramp_ahead_us": p50(ahead),
        "ours_ramp_cold_us": p50(cold),
        "ours_ramp_one_by_one_us": p50(one_by_one),
        "ours_ramp_claim_us": p50(claim),
        "ours_grow_us": p50(page),
        "ours_grow_p99_us": p99(page),
    }


def shrink(bench: Bench) -> Figures:
    pages = _RAMP_PAGES if bench.fake is None else 8
    until, work = [], []
    with Broker(bench, capacity(2 * pages)) as broker:
        engine = broker.engine(keep=0)
        for _ in range(bench.rounds(3)):
            engine.ask(f"grow {pages}")
            shrunk = engine.ask("shrink")
            until += shrunk["until_unmapped"]
            work += shrunk["mapper_unmap"]
    return {
        "ours_shrink_us": p50(until),
        "ours_shrink_p99_us": p99(until),
        "ours_mapper_unmap_us": p50(work),
    }


def per_layer(bench: Bench) -> Figures:
    grow, shrunk = [], []
    pages = 16 if bench.fake is None else 4
    with Broker(bench, capacity(2 * pages)) as broker:
        engine = broker.engine(handles=_PER_LAYER_HANDLES, keep=0)
        for _ in range(bench.rounds(3)):
            time.sleep(_STOCK_DECAY_SECONDS)
            grow += engine.ask(f"grow {pages}")["page"]
            shrunk += engine.ask("shrink")["until_unmapped"]
    return {
        "ours_per_layer_grow_us": p50(grow),
        "ours_per_layer_shrink_us": p50(shrunk),
    }


def null_page(bench: Bench) -> Figures:
    """The first page of a pool that has just been opened."""
    figures = {}
    for name, handles in (("contiguous", 1), ("per_layer", _PER_LAYER_HANDLES)):
        first = []
        for _ in range(bench.rounds(5)):
            with Broker(bench, capacity(2)) as broker:
                first += broker.engine(handles=handles).ask("grow 1")["all"]
        figures[f"ours_{name}_first_page_us"] = p50(first)
    return figures


# ---- engines beside each other ----------------------------------------------


def take(bench: Bench, a_mib: int, b_mib: int) -> list[float]:
    """Two engines take the only memory from each other, a page at a time; when b takes."""
    took: list[float] = []
    rounds = bench.rounds(300)
    with Broker(bench, max(a_mib, b_mib)) as broker:
        a = broker.start_engine("a", page_mib=a_mib, max_pages=4)
        b = broker.start_engine("b", page_mib=b_mib, max_pages=4)
        for process in (a, b):
            if process.line(READY_SECONDS) != "ready":
                raise process.failure()
        for turn in range(2 * rounds + 2):
            answer = (a, b)[turn % 2].ask("take")
            # The first is free memory, the second has seen no reclaim before.
            if turn >= 2 and (turn % 2 == 1 or a_mib == b_mib):
                if answer["mapped"] != 1:
                    raise BenchError("an engine's page was not taken")
                took.append(answer["took"])
            time.sleep(_SETTLE_SECONDS)
    return took


def takes(bench: Bench) -> Figures:
    same = take(bench, _PAGE_MIB, _PAGE_MIB)
    other = take(bench, _OTHER_PAGE_MIB, _PAGE_MIB)
    together: list[float] = []
    # One page fewer than engines: some other's idle page is always the one.
    with Broker(bench, capacity(3)) as broker:
        engines = broker.engines(4)
        for engine in engines:
            engine.order(f"takes {bench.seconds}")
        for engine in engines:
            together += engine.answer(bench.seconds + READY_SECONDS).get("took", [])
    if not together:
        raise BenchError("four engines took nothing from each other")
    return {
        "ours_take_p50_us": p50(same),
        "ours_take_p99_us": p99(same),
        "ours_take_other_size_p50_us": p50(other),
        "ours_take_other_size_p99_us": p99(other),
        "ours_take_4_engines_p50_us": p50(together),
        "ours_take_4_engines_p99_us": p99(together),
        "takes_of_4_engines": float(len(together)),
    }


def churn(bench: Bench, processes: list[Process]) -> dict[str, list[float]]:
    for process in processes:
        process.order(f"churn {bench.seconds} {_CHURN_PAGES}")
    all_samples: dict[str, list[float]] = {}
    for process in processes:
        answer = process.answer(bench.seconds + READY_SECONDS)
        for name, samples in answer.items():
            all_samples.setdefault(name, []).extend(samples)
    return all_samples


def at_once(bench: Bench) -> Figures:
    """Processes that grow and shrink by bursts of pages, without a pause."""
    figures: Figures = {}
    for count in (4, 8):
        with contextlib.ExitStack() as stack:
            alone = [
                bench.start([bench.program("tests/bench/gpu/bench_gpu"), "alone"])
                for _ in range(count)
            ]
            for process in alone:
                stack.callback(process.stop)
            for process in alone:
                if process.line(READY_SECONDS) != "ready":
                    raise process.failure()
            floor = churn(bench, alone)
        with Broker(bench, capacity(2 * count * _CHURN_PAGES)) as broker:
            ours = churn(bench, broker.engines(count, keep=0))
        for name, samples in (("floor", floor), ("ours", ours)):
            figures[f"{name}_map_at_{count}_p50_us"] = p50(samples["map"])
            figures[f"{name}_map_at_{count}_p99_us"] = p99(samples["map"])
            figures[f"{name}_unmap_at_{count}_p99_us"] = p99(samples["unmap"])
            figures[f"{name}_pages_per_s_at_{count}"] = len(samples["map"]) / bench.seconds
        figures[f"mapper_map_at_{count}_p99_us"] = p99(ours["mapper_map"])
    return figures


def bursts(bench: Bench) -> Figures:
    """Two engines in turn, 10 times a second, in the memory of one."""

    def run(halves: Sequence[int]) -> list[dict]:
        with Broker(bench, capacity(_BURST_PAGES + _BURST_RESERVE)) as broker:
            engines = broker.engines(len(halves), ahead=1)
            start = time.monotonic() + 0.2
            for engine, half in zip(engines, halves, strict=True):
                engine.order(
                    f"bursts {start} {bench.seconds} {half} {_BURST_PAGES} {_BURST_STEP_US}"
                )
            return [engine.answer(bench.seconds + READY_SECONDS) for engine in engines]

    together = run((0, 1))
    apart = run((0,)) + run((1,))
    if any(result["steps"] == 0 for result in apart):
        raise BenchError("no step ended within a burst")

    def each(results: list[dict], what: str) -> float:
        return sum(result[what] for result in results) / sum(r["bursts"] for r in results)

    return {
        "burst_steps_together": each(together, "steps"),
        "burst_steps_apart": each(apart, "steps"),
        "burst_wait_together_us": each(together, "waited_us"),
        "burst_wait_apart_us": each(apart, "waited_us"),
        "burst_pages_mapped_together": each(together, "mapped"),
        "burst_loss_percent": 100 * (1 - each(together, "steps") / each(apart, "steps")),
    }


def broker_memory(bench: Bench) -> Figures:
    """GPU memory in use with a broker that lends nothing, less that without one."""

    def used() -> int:
        return int(bench.gpu("used")["used_bytes"])

    before = used()
    with Broker(bench, capacity(8)) as broker:
        time.sleep(1)
        held = used() - before
        engine = broker.engine(keep=0)
        engine.ask("grow 4")
        engine.ask("free")
        engine.stop()
        time.sleep(_STOCK_DECAY_SECONDS)
        held = max(held, used() - before)
    return {"broker_mib": held / MIB}


# ---- kvcached ---------------------------------------------------------------


def _extract(sdist: Path, folder: Path) -> Path:
    with tarfile.open(sdist) as archive:
        if hasattr(tarfile, "data_filter"):
            archive.extractall(folder, filter="data")
        else:
            archive.extractall(folder)
    setups = sorted(folder.glob("*/setup.py"))
    if len(setups) != 1:
        raise BenchError(f"{sdist.name} is no source distribution")
    # Its metadata asks for a newer setuptools; the build of the extension does not.
    setups[0].with_name("pyproject.toml").unlink(missing_ok=True)
    return setups[0].parent


def build_kvcached(bench: Bench) -> tuple[Path, dict[str, str]]:
    """The folder of its package and the environment to import it in."""
    if bench.fake is not None:
        raise BenchError("it does not run on the fake driver")
    if bench.sdist is None:
        raise BenchError("its source distribution is not here (see pack.sh)")
    within = bench.deadline - time.monotonic() - _KVCACHED_SECONDS
    if within < 15:
        raise BenchError("no time is left to build it")
    source = _extract(bench.sdist, bench.folder / "kvcached")
    cuda = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))
    stubs = [str(cuda / part) for part in ("lib64/stubs", "targets/x86_64-linux/lib/stubs")]
    environment = dict(os.environ) | {
        "CC": "/usr/bin/gcc",
        "CXX": "/usr/bin/g++",
        "CUDA_HOME": str(cuda),
        "TORCH_CUDA_ARCH_LIST": "9.0",
        "MAX_JOBS": str(len(os.sched_getaffinity(0))),
        "LIBRARY_PATH": ":".join([*stubs, os.environ.get("LIBRARY_PATH", "")]).rstrip(":"),
    }
    log = bench.log()
    with open(log, "wb") as log_file:
        try:
            status = subprocess.run(
                [sys.executable, "setup.py", "build_ext", "--inplace"],
                cwd=source,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log_file,
                stderr=subprocess.STDOUT,
                timeout=within,
                check=False,
                preexec_fn=die_with_parent,
            ).returncode
        except subprocess.TimeoutExpired as error:
            raise BenchError(f"its build took longer than {within:.0f} s") from error
    if status != 0:
        raise BenchError(f"its build failed:{tail(log)}")
    return source, environment


def kvcached(bench: Bench) -> Figures:
    source, environment = build_kvcached(bench)
    note("   kvcached is built")
    figures: Figures = {}
    for name, contiguous in (("contiguous", "true"), ("per_layer", "false")):
        within = bench.deadline - time.monotonic()
        if within < 5:
            raise BenchError("no time is left")
        log = bench.log()
        with open(log, "wb") as log_file:
            try:
                run = subprocess.run(
                    [sys.executable, Path(__file__).with_name("bench_kvcached.py")],
                    env=environment
                    | {"PYTHONPATH": str(source), "KVCACHED_CONTIGUOUS_LAYOUT": contiguous},
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=log_file,
                    timeout=within,
                    check=False,
                    preexec_fn=die_with_parent,
                )
            except subprocess.TimeoutExpired as error:
                raise BenchError(f"{name}: it took longer than {within:.0f} s") from error
        if run.returncode != 0:
            raise BenchError(f"{name}: it failed:{tail(log)}")
        # It prints lines of its own.
        samples = json.loads(run.stdout.decode().strip().splitlines()[-1])
        for what, times in samples.items():
            figures[f"kvcached_{name}_{what}_us"] = p50(times)
    return figures


# ---- the report -------------------------------------------------------------

# What it is, the keys of floor, kvcached and ours, their unit and its divisor, decimals, goal.
Row = tuple[str, str, str, str, str, float, int, str]
_US, _MS = ("us", 1.0, 1), ("ms", 1000.0, 2)
ROWS: list[Row] = [
    ("alloc + free of 16 blocks, warm", "", "kvcached_contiguous_alloc_free_us",
     "ours_alloc_free_us", "us", 1.0, 3, "<= 0.5"),
    ("ramp to 8 GiB in 64 steps, pages mapped", "", "", "ours_ramp_mapped_us",
     "ms", 1000.0, 3, "<= 0.2"),
    ("the same, sent / mapped ahead", "floor_ramp_sent_ahead_us", "", "ours_ramp_ahead_us",
     *_MS, "<= 4"),
    ("the same, cold", "floor_ramp_cold_us", "kvcached_contiguous_ramp_us",
     "ours_ramp_cold_us", *_MS, "<= 5.5"),
    ("the same, nothing mapped ahead", "floor_ramp_cold_us", "", "ours_ramp_one_by_one_us",
     *_MS, ""),
    ("8 GiB by one claim, cold", "floor_ramp_cold_us", "", "ours_ramp_claim_us", *_MS, ""),
    ("grow by a page of 128 MiB", "floor_contiguous_grow_us", "kvcached_contiguous_grow_us",
     "ours_grow_us", *_US, ""),
    ("shrink by it, engine and broker's work", "floor_contiguous_shrink_us",
     "kvcached_contiguous_shrink_us", "work_shrink_us", *_US, "<= 90"),
    ("shrink by it, free until unmapped", "floor_contiguous_shrink_us",
     "kvcached_contiguous_shrink_us", "ours_shrink_us", *_US, "<= 90"),
    ("grow by a page of 64 x 2 MiB", "floor_per_layer_grow_us", "kvcached_per_layer_grow_us",
     "ours_per_layer_grow_us", *_MS, "<= 4.2"),
    ("shrink by it, engine and broker's work", "floor_per_layer_shrink_us",
     "kvcached_per_layer_shrink_us", "work_per_layer_shrink_us", *_MS, "<= 2.2"),
    ("shrink by it, free until unmapped", "floor_per_layer_shrink_us",
     "kvcached_per_layer_shrink_us", "ours_per_layer_shrink_us", *_MS, "<= 2.2"),
    ("reserve 128 GiB, contiguous", "floor_contiguous_reserve_us",
     "kvcached_contiguous_reserve_us", "ours_contiguous_reserve_us", *_MS, "<= 1"),
    ("the same with the null page", "floor_contiguous_reserve_and_page_us",
     "kvcached_contiguous_reserve_us", "ours_contiguous_reserve_and_page_us", *_MS, "<= 8"),
    ("reserve 128 GiB, per layer", "floor_per_layer_reserve_us",
     "kvcached_per_layer_reserve_us", "ours_per_layer_reserve_us", *_MS, "<= 1"),
    ("the same with the null page", "floor_per_layer_reserve_and_page_us",
     "kvcached_per_layer_reserve_us", "ours_per_layer_reserve_and_page_us", *_MS, "<= 8"),
    ("take 128 MiB from another, 2 engines, p50", "floor_take_us", "not possible",
     "ours_take_p50_us", *_US, "<= 300"),
    ("the same, p99", "floor_take_p99_us", "not possible", "ours_take_p99_us", *_US, ""),
    ("the same, 4 engines at it, p50", "floor_take_us", "not possible",
     "ours_take_4_engines_p50_us", *_US, ""),
    ("the same, 4 engines at it, p99", "floor_take_p99_us", "not possible",
     "ours_take_4_engines_p99_us", *_US, "<= 2,000"),
    ("take 128 MiB of pages of 144 MiB, p50", "floor_take_made_anew_us", "not possible",
     "ours_take_other_size_p50_us", *_US, "<= 450"),
    ("the same, p99", "floor_take_made_anew_us", "not possible",
     "ours_take_other_size_p99_us", *_US, ""),
    ("4 grow and shrink at once: map, p50", "floor_map_at_4_p50_us", "",
     "ours_map_at_4_p50_us", *_US, ""),
    ("the same, p99", "floor_map_at_4_p99_us", "", "ours_map_at_4_p99_us", *_US, "<= floor"),
    ("of which the mapper, p99", "floor_map_at_4_p99_us", "", "mapper_map_at_4_p99_us",
     *_US, ""),
    ("8 grow and shrink at once: map, p50", "floor_map_at_8_p50_us", "",
     "ours_map_at_8_p50_us", *_US, ""),
    ("the same, p99", "floor_map_at_8_p99_us", "", "ours_map_at_8_p99_us", *_US, "<= floor"),
    ("of which the mapper, p99", "floor_map_at_8_p99_us", "", "mapper_map_at_8_p99_us",
     *_US, ""),
    ("two in turn at 10 Hz: steps a burst (floor: apart)", "burst_steps_apart", "",
     "burst_steps_together", "", 1.0, 2, ""),
    ("the same, loss", "", "", "burst_loss_percent", "%", 1.0, 1, ""),
    ("GPU memory held by the broker", "", "", "broker_mib", "MiB", 1.0, 0, "0"),
]

# Measurements, in order, and the beginnings of the keys that they give.
PARTS: list[tuple[str, Callable[[Bench], Figures], tuple[str, ...]]] = [
    ("GPU memory of a broker", broker_memory, ("broker_mib",)),
    ("the driver's pages", driver_pages,
     ("floor_contiguous", "floor_per_layer", "floor_take")),
    ("the driver's calls", driver_calls, ("floor_ramp", "work_", "call_")),
    ("addresses", reserve, ("ours_contiguous_reserve", "ours_per_layer_reserve")),
    ("blocks on mapped pages", blocks, ("ours_alloc_free",)),
    ("ramps", ramps, ("ours_ramp", "ours_grow")),
    ("shrink", shrink, ("ours_shrink", "ours_mapper_unmap")),
    ("pages per layer", per_layer, ("ours_per_layer_grow", "ours_per_layer_shrink")),
    ("a pool's first page", null_page,
     ("ours_contiguous_first_page", "ours_per_layer_first_page",
      "ours_contiguous_reserve_and", "ours_per_layer_reserve_and")),
    ("memory from one engine to another", takes, ("ours_take", "takes_")),
    ("4 and 8 engines at once", at_once,
     ("floor_map_at", "floor_unmap_at", "ours_map_at", "ours_unmap_at", "mapper_map_at",
      "floor_pages_per_s", "ours_pages_per_s")),
    ("two engines in turn", bursts, ("burst_",)),
    ("kvcached", kvcached, ("kvcached_",)),
]


def add_sums(figures: Figures) -> None:
    for name in ("contiguous", "per_layer"):
        parts = (f"ours_{name}_reserve_us", f"ours_{name}_first_page_us")
        if all(part in figures for part in parts):
            figures[f"ours_{name}_reserve_and_page_us"] = sum(figures[part] for part in parts)


def measure(bench: Bench, figures: Figures, reasons: dict[str, str]) -> None:
    """Fills both as it goes: an interrupt leaves what there is by then."""
    reasons.update({what: "interrupted" for what, _, _ in PARTS})
    for what, part, _ in PARTS:
        if time.monotonic() > bench.deadline - 5:
            reasons[what] = "no time was left"
            note(f"{what}: {reasons[what]}")
            continue
        note(what)
        try:
            part_figures = part(bench)
        except (BenchError, OSError, ValueError, KeyError, statistics.StatisticsError) as error:
            reasons[what] = str(error) or repr(error)
            note(f"{what}: not measured: {reasons[what]}")
            continue
        for key, figure in part_figures.items():
            note(f"   {key} {figure:,.5g}")
        figures.update(part_figures)
        add_sums(figures)
        del reasons[what]


def part_of(key: str) -> str | None:
    """The measurement that gives it: the one that names the most of it."""
    named = [
        (len(beginning), what)
        for what, _, beginnings in PARTS
        for beginning in beginnings
        if key.startswith(beginning)
    ]
    return max(named)[1] if named else None


def table(figures: Figures, reasons: dict[str, str]) -> Iterator[str]:
    yield (
        f"{'what':<52}{'floor':>10}{'kvcached':>14}{'ours':>10} {'':<5}"
        f"{'/floor':>8}{'/kvcached':>11}  goal"
    )
    missing: dict[str, None] = {}
    for what, floor_key, kvcached_key, ours_key, unit, divisor, decimals, goal in ROWS:

        def cell(key: str, divisor: float = divisor, decimals: int = decimals) -> str:
            if key in figures:
                return f"{figures[key] / divisor:,.{decimals}f}"
            if not key or " " in key:
                return key or "-"
            missing[part_of(key) or key] = None
            return "?"

        def ratio(key: str, ours_key: str = ours_key) -> str:
            if key not in figures or ours_key not in figures or figures[key] <= 0:
                return ""
            return f"{figures[ours_key] / figures[key]:.2f}"

        yield (
            f"{what:<52}{cell(floor_key):>10}{cell(kvcached_key):>14}{cell(ours_key):>10} "
            f"{unit:<5}{ratio(floor_key):>8}{ratio(kvcached_key):>11}  {goal}"
        ).rstrip()
    yield (
        "alloc + free of 16 blocks from Python: not measured: this is the C++ library"
    )
    for what in missing:
        yield f"?  {what}: not measured: {reasons.get(what, 'it gave no such figure')}"


def machine(bench: Bench) -> dict[str, object]:
    facts: dict[str, object] = {
        "cores": len(os.sched_getaffinity(0)),
        "kernel": platform.release(),
        "open_files_limit": resource.getrlimit(resource.RLIMIT_NOFILE)[1],
        "load_1min_at_start": os.getloadavg()[0],
        "fake_driver": bench.fake is not None,
    }
    return facts | bench.gpu("facts")


def main() -> int:
    parser = argparse.ArgumentParser(prog="run.sh", description=__doc__)
    parser.add_argument("--bin", type=Path, required=True, help=argparse.SUPPRESS)
    parser.add_argument("--fake", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--kvcached", type=Path, help="its source distribution")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--seconds", type=float, default=3.0, help="time a figure, default 3")
    parser.add_argument("--limit", type=float, default=285.0, help="seconds in all")
    options = parser.parse_args()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, interrupt)

    folder = Path(tempfile.mkdtemp(prefix="kvb", dir="/tmp"))
    figures: Figures = {}
    reasons: dict[str, str] = {}
    status = 0
    try:
        bench = Bench(folder, options)
        facts = machine(bench)
        print(
            f"{facts['gpu']}, driver {facts['driver']}, CUDA {facts['cuda']}; "
            f"{facts['cores']} cores, Linux {facts['kernel']}; "
            f"load {facts['load_1min_at_start']:.2f}",
            flush=True,
        )
        if bench.fake is not None:
            print("on the fake driver: no figure means anything", flush=True)
        try:
            measure(bench, figures, reasons)
        except Interrupted as interrupted:
            # What there is by now is printed.
            status = interrupted.exit_status
    except BenchError as error:
        print(f"run.sh: {error}", file=sys.stderr)
        return 1
    except Interrupted as interrupted:
        return interrupted.exit_status
    finally:
        shutil.rmtree(folder, ignore_errors=True)

    lines = list(table(figures, reasons))
    print("\n".join(lines))
    if options.json:
        text = json.dumps(
            {"machine": facts, "figures": figures, "not_measured": reasons}, indent=2
        )
        options.json.write_text(text + "\n", encoding="utf-8")
    return status or int(not set(reasons) <= {"kvcached"})


if __name__ == "__main__":
    sys.exit(main())
