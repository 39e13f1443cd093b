"""A broker and its engines as processes, to be killed: what the programs here stand on.

    with Fleet(options) as fleet:
        fleet.start_broker()
        engine = fleet.start_engine("a", trace="builtin:conv")
        fleet.kill_broker(); fleet.start_broker()
        fleet.await_agreement()

All of them record their history, and `check_history` compares it with what is promised.

What is true is asked of the kernel: how much an engine maps is read from its /proc/PID/maps,
not from what it or the broker says. On a GPU the driver is asked, how much of it is in use;
devices.py has the kinds of memory.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import devices

MIB = 1 << 20
# Somebody who needs longer than this has hung.
PATIENCE_S = 60.0


class ChaosError(Exception):
    """A promise was broken; the text says which."""


@dataclasses.dataclass
class Engine:
    """A replay process: a real engine's scheduler and memory without its GPU."""

    name: str
    process: subprocess.Popen[bytes]
    log: pathlib.Path
    device: devices.Device

    @property
    def pid(self) -> int:
        return self.process.pid

    def alive(self) -> bool:
        return self.process.poll() is None

    def mapped_bytes(self) -> int | None:
        """Bytes of broker memory that the process maps, by the kernel's word. None: it has none to say."""
        return self.device.mapped_bytes(self.pid)

    def summary(self) -> dict[str, object]:
        """What it said at its end; nothing where it said nothing."""
        try:
            summary: dict[str, object] = json.loads(self.log.read_text(errors="replace").splitlines()[-1])
        except (IndexError, ValueError):
            summary = {}
        return summary

    def check_ended_well(self) -> dict[str, object]:
        """Its summary. Raises where it failed or its data was not what it had written."""
        status = self.process.wait(PATIENCE_S)
        text = self.log.read_text(errors="replace")
        summary = self.summary()
        if status == -signal.SIGTERM and not text:
            return {}  # ended before it had begun
        if status != 0 or summary.get("integrity_errors") != 0:
            raise ChaosError(f"engine {self.name} (pid {self.pid}) ended with {status}: {text[-2000:]}")
        return summary


def parse_arguments(
    parser: argparse.ArgumentParser, capacity: str = devices.Device.capacity, gpu: bool = False
) -> tuple[argparse.Namespace, random.Random]:
    """Reads the program's own arguments and those of all; prints the seed of the chance returned.

    `gpu`: the program runs on GPUs too, with another capacity.
    """
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "--bin", type=pathlib.Path, default=None, metavar="DIR",
        help="where bazel has put the programs [bazel-bin of this checkout]",
    )
    parser.add_argument("--seed", type=int, default=None, help="of all chance [the clock]; printed")
    usual = ", ".join(f"{name}: {kind.capacity}" for name, kind in devices.KINDS.items())
    parser.add_argument(
        "--capacity", metavar="SIZE", help=f"what the broker may lend [{usual if gpu else capacity}]"
    )
    if gpu:
        parser.add_argument(
            "--backend", choices=devices.BACKENDS, default="host",
            help="whose memory: the host's, a fake GPU's, or a GPU's that nobody else uses [host]",
        )
        parser.add_argument("--gpu", metavar="UUID", help="with cuda: which one [NVML's first]")
        parser.add_argument(
            "--slack", type=float, default=1.0, metavar="MIB",
            help="so much may the driver's figure be off the broker's books [1, less than a page]",
        )
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="the counts, as JSON too")
    parser.add_argument("--keep", action="store_true", help="leave the logs where they are")
    arguments = parser.parse_args()
    if arguments.capacity is None:
        arguments.capacity = devices.KINDS[arguments.backend].capacity if gpu else capacity
    if arguments.seed is None:
        arguments.seed = time.time_ns() % 1_000_000
    print(f"seed {arguments.seed}", flush=True)
    return arguments, random.Random(arguments.seed)


def report(counts: dict[str, object], arguments: argparse.Namespace) -> None:
    """What was counted, at the end of a run that broke no promise."""
    counts["seed"] = arguments.seed
    print(json.dumps(counts, indent=2))
    if arguments.json:
        arguments.json.write_text(json.dumps(counts) + "\n")
    print("PASSED")


class Fleet:
    """A broker, engines, and the folder they live in. Ends all of them when it is left."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        checkout = pathlib.Path(__file__).resolve().parents[2]
        runfiles = os.environ.get("TEST_SRCDIR")
        bin_dir = arguments.bin or (
            pathlib.Path(runfiles) / os.environ["TEST_WORKSPACE"] if runfiles else checkout / "bazel-bin"
        )
        self._bin_dir = bin_dir
        self._broker_program = self.program("broker/server/kvbrokerd")
        self._kvctl = self.program("client/cli/kvctl")
        self._replay = self.program("client/replay/kvbroker-replay")
        self._history_check = self.program("tests/history/history_check")
        self._capacity = arguments.capacity
        self._keep = arguments.keep
        # A broker that leaves no history of its part would make nonsense of the others'.
        self._recorded = getattr(arguments, "upgrade_from", None) is None
        # Short: sockets live in it.
        self.folder = pathlib.Path(tempfile.mkdtemp(prefix="kvb", dir="/tmp"))
        self.sockets = self.folder / "sockets"
        try:
            self.device = devices.open_device(
                arguments, self.folder, bin_dir / "tests/fake_cuda/libfake_cuda.so"
            )
        except devices.DeviceError as error:
            raise ChaosError(str(error)) from error
        self._slack = int(getattr(arguments, "slack", 0) * MIB)
        self._used_at_start = self.device.used_bytes()
        # What the driver takes for a broker's process, which lends nothing yet.
        self._used_by_broker = 0
        self._device_agreements = 0
        self._largest_difference = 0
        self.broker: subprocess.Popen[bytes] | None = None
        self.broker_starts = 0
        self.engines: list[Engine] = []
        self._started = 0

    def __enter__(self) -> Fleet:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: types.TracebackType | None,
    ) -> None:
        for engine in self.engines:
            engine.process.kill()
            engine.process.wait()
        if self.broker is not None:
            self.broker.kill()
            self.broker.wait()
        self.device.close()
        if kind is not None and issubclass(kind, Exception):
            log = self.broker_log()
            print(f"---- the broker's last lines, of {log}", file=sys.stderr)
            with contextlib.suppress(OSError):
                print("\n".join(log.read_text().splitlines()[-30:]), file=sys.stderr)
        if self._keep:
            print(f"logs are in {self.folder}")
        else:
            shutil.rmtree(self.folder, ignore_errors=True)

    def program(self, path: str) -> pathlib.Path:
        program = self._bin_dir / path
        if not program.exists():
            raise ChaosError(f"{program} is not there; run: bazel build //broker/... //client/... //tests/history/...")
        return program

    @property
    def is_gpu(self) -> bool:
        return self.device.name != devices.Device.name

    @property
    def limit_unit(self) -> int:
        """What is 1 MiB to the host's engines."""
        return MIB * devices.Device.scale // self.device.scale

    def share_device(self) -> None:
        """So that engines of other users may use it, too."""
        self.device.share()

    # ---- the broker ----

    def broker_log(self) -> pathlib.Path:
        return self.folder / f"broker{self.broker_starts}.log"

    def start_broker(
        self, *flags: str, program: pathlib.Path | None = None, environment: Mapping[str, str] | None = None,
    ) -> None:
        """Starts one and waits until it is ready. `environment` is added to ours."""
        self.broker_starts += 1
        # Of thousands of starts only the last few logs are of interest.
        if self.broker_starts > 5 and not self._keep:
            (self.folder / f"broker{self.broker_starts - 5}.log").unlink(missing_ok=True)
        reader, writer = os.pipe()
        with self.broker_log().open("wb") as log:
            self.broker = subprocess.Popen(
                [
                    program or self._broker_program, *self.device.broker_flags,
                    f"--capacity={self._capacity}",
                    f"--socket-dir={self.sockets}", f"--lock-dir={self.folder / 'locks'}",
                    f"--state-dir={self.folder / 'state'}", f"--ready-fd={writer}",
                    *([f"--history-file={self.folder / 'broker.history'}"] if self._recorded else []),
                    *flags,
                ],
                stdout=log, stderr=log, pass_fds=[writer], env={**os.environ, **(environment or {})},
            )
        os.close(writer)
        with os.fdopen(reader, "rb") as ready:
            if not ready.readline().startswith(b"kvbrokerd ready"):
                raise ChaosError(f"the broker does not start: {self.broker_log().read_text()[-2000:]}")
        if self._used_at_start is not None and self._started == 0:
            self._used_by_broker = self.device.used_bytes() - self._used_at_start

    def kill_broker(self, sig: signal.Signals = signal.SIGKILL) -> None:
        assert self.broker is not None
        self.broker.send_signal(sig)
        try:
            self.broker.wait(PATIENCE_S)
        except subprocess.TimeoutExpired as error:
            raise ChaosError(f"the broker does not end after {sig.name}") from error
        self.broker = None

    def broker_descriptors(self) -> int:
        assert self.broker is not None
        return len(os.listdir(f"/proc/{self.broker.pid}/fd"))

    def broker_memory_bytes(self) -> int:
        assert self.broker is not None
        status = pathlib.Path(f"/proc/{self.broker.pid}/status").read_text()
        match = re.search(r"^RssAnon:\s+(\d+) kB$", status, re.MULTILINE)
        assert match is not None
        return int(match[1]) * 1024

    def kvctl(self, *words: str, check: bool = True) -> str:
        done = subprocess.run(
            [self._kvctl, "--address", self.sockets, *words],
            capture_output=True, text=True, timeout=PATIENCE_S, check=False,
        )
        if check and done.returncode != 0:
            raise ChaosError(f"kvctl {' '.join(words)}: {done.stderr}")
        return done.stdout

    def instances(self) -> dict[str, dict[str, object]]:
        """`kvctl list --json`, by name."""
        return {instance["ipc"]: instance for instance in json.loads(self.kvctl("list", "--json"))}

    # ---- engines ----

    def start_engine(
        self, name: str, *flags: str, trace: str = "builtin:conv", seed: int = 1,
        environment: Mapping[str, str] | None = None, prefix: Sequence[str] = (),
    ) -> Engine:
        """`prefix`: a command that runs it, such as unshare. Without --scale it is the device's."""
        self._started += 1
        log = self.folder / f"{name}.{self._started}.log"
        if not any(flag.startswith("--scale") for flag in flags):
            flags = (*flags, f"--scale={self.device.scale}")
        if self.device.engines_recorded:
            flags = (*flags, f"--history={log.with_suffix('.history')}")
        with log.open("wb") as out:
            process = subprocess.Popen(
                [
                    *prefix, self._replay, "--name", name, "--address", self.sockets, "--trace", trace,
                    "--seed", str(seed), "--json", *flags,
                ],
                stdout=out, stderr=out, env={**os.environ, **(environment or {})},
            )
        engine = Engine(name, process, log, self.device)
        self.engines.append(engine)
        return engine

    def note_exit(self, engine: Engine) -> None:
        """Of one that has just been waited for: from now on its memory must become free."""
        event = {"event": "exited", "at": time.monotonic_ns(), "pid": engine.pid}
        with (self.folder / "exits.history").open("a") as history:
            history.write(json.dumps(event) + "\n")

    def forget(self, engine: Engine) -> None:
        """Of one that has ended."""
        self.engines.remove(engine)
        engine.log.unlink(missing_ok=True)

    # ---- what must be so ----

    def eventually(self, what: str, holds: Callable[[], bool], within_s: float = PATIENCE_S) -> float:
        """Seconds until it held. Raises when it does not."""
        start = time.monotonic()
        while not holds():
            if time.monotonic() - start > within_s:
                raise ChaosError(f"not within {within_s:g} s: {what}; kvctl list: {self.kvctl('list', check=False)}")
            time.sleep(0.005)
        return time.monotonic() - start

    def gone(self, pid: int) -> bool:
        """No instance counts the process any more."""
        return all(pid not in instance["pids"] for instance in self.instances().values())

    def await_connected(self) -> None:
        """Until the broker counts every engine that has not come to the end of its trace meanwhile."""

        def connected(engine: Engine) -> bool:
            if engine.alive():
                return not self.gone(engine.pid)
            engine.check_ended_well()
            return True

        for engine in self.engines:
            self.eventually(f"engine {engine.name} is connected", lambda engine=engine: connected(engine))

    def agreed(self, engine: Engine) -> bool:
        """The broker's figure for the engine is what the kernel says, and stood still meanwhile."""

        def held() -> object:
            return self.instances().get(engine.name, {}).get("held_bytes")

        before = held()
        mapped = engine.mapped_bytes()
        return before == mapped and held() == before

    def await_agreement(self, engines: Iterable[Engine] | None = None) -> None:
        """Of broker and kernel, on each engine [all]; on a real GPU there is nothing to compare."""
        for engine in self.engines if engines is None else engines:
            if engine.alive() and engine.mapped_bytes() is not None:
                self.eventually(
                    f"the ledger agrees with what {engine.name} maps, {engine.mapped_bytes()} bytes",
                    lambda engine=engine: not engine.alive() or self.agreed(engine),
                )

    def books(self) -> dict[str, int]:
        """The broker's sums in bytes, after the last that it decided, by its history."""
        with (self.folder / "broker.history").open("rb") as history:
            history.seek(0, os.SEEK_END)
            # Some last lines are enough; each is as long as its list of pages.
            history.seek(max(0, history.tell() - MIB))
            lines = history.read().split(b"\n")[:-1]
        # Several threads write: the order is that of the numbers, from each broker's start on.
        latest, last = 0, b"{}"
        for line in lines:
            match = re.search(rb'"number":(\d+),', line)
            if match and (b'"event":"start"' in line or int(match[1]) > latest):
                latest, last = int(match[1]), line
        sums = json.loads(last)
        return {name: sums.get(name, 0) for name in ("lent", "stock", "releasing")}

    def await_device_agreement(self) -> None:
        """What is in use of the GPU, above what was at first, is what the broker has lent or in stock.

        For when no engine is alive: each takes memory that is not the broker's.
        """
        if self._used_at_start is None or not self._recorded:
            return

        def agree() -> bool:
            before = self.books()
            seen.update(above_start=self.device.used_bytes() - self._used_at_start)
            seen.update(self.books())
            difference = abs(seen["above_start"] - self._used_by_broker - seen["lent"] - seen["stock"])
            if seen["releasing"] != 0 or before != self.books() or difference > self._slack:
                return False
            self._largest_difference = max(self._largest_difference, difference)
            return True

        seen: dict[str, int] = {}
        try:
            self.eventually("the driver and the broker's books agree", agree)
        except ChaosError as error:
            raise ChaosError(f"{error}; in bytes: {seen}") from error
        self._device_agreements += 1

    def check_device(self) -> dict[str, object]:
        """Ends all that runs. The GPU's memory is as free as it was at first; figures of that."""
        for engine in self.engines:
            engine.process.kill()
            engine.process.wait()
        if self.broker is not None:
            self.kill_broker(signal.SIGTERM)
        if self._used_at_start is None:
            return {}
        start = time.monotonic()
        while (used := self.device.used_bytes()) - self._used_at_start > self._slack:
            if time.monotonic() - start > PATIENCE_S:
                raise ChaosError(
                    f"of the GPU {used} bytes are in use when all have ended, {self._used_at_start} were at first"
                )
            time.sleep(0.05)
        return {
            "used_mib_at_start": round(self._used_at_start / MIB, 1),
            "used_mib_by_broker": round(self._used_by_broker / MIB, 2),
            "used_mib_at_end": round(used / MIB, 1),
            "times_books_agreed_with_the_driver": self._device_agreements,
            "largest_difference_mib": round(self._largest_difference / MIB, 1),
        }

    def check_history(self, free_within_s: float = 1.0) -> dict[str, object]:
        """Ends the broker and checks the history of all that was. What was seen, by history_check."""
        self.kill_broker(signal.SIGTERM)
        if not self._recorded:
            return {}
        checked = subprocess.run(
            [
                self._history_check, "--json", f"--free-within={free_within_s}",
                *self.folder.glob("*.history"),
            ],
            capture_output=True, text=True, check=False,
        )
        if checked.returncode != 0:
            raise ChaosError(f"the history breaks a promise: {checked.stdout[:5000]}{checked.stderr}")
        seen: dict[str, object] = json.loads(checked.stdout)
        return {key: seen[key] for key in ("events", "mappings", "passed_on", "orders", "deaths", "unjudged_deaths")}

    def start_over(self) -> None:
        """After a broken promise: ends all that runs, and nothing of before counts."""
        for engine in list(self.engines):
            engine.process.kill()
            engine.process.wait()
            self.forget(engine)
        if self.broker is not None:
            self.kill_broker()
        self.forget_history()

    def forget_history(self) -> None:
        """What comes next is another one. Between two brokers, with no engine alive."""
        for file in self.folder.glob("*.history"):
            file.unlink()

    def await_empty(self, remembered: tuple[str, ...] = ()) -> None:
        """Nobody is connected and nothing is lent; only the limits of some are remembered."""

        def empty() -> bool:
            listed = self.instances()
            return set(listed) <= set(remembered) and not any(
                instance["pids"] or instance["held_bytes"] for instance in listed.values()
            )

        self.eventually("nobody is connected and nothing is lent", empty)


@contextlib.contextmanager
def reported() -> Iterator[None]:
    """Turns broken promises and Ctrl-C into an exit status."""
    try:
        yield
    except ChaosError as error:
        print(f"FAILED: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


class Progress:
    """A line now and then, on a terminal and in a log alike."""

    def __init__(self, every_s: float = 10.0) -> None:
        self._every_s = every_s
        self._last = time.monotonic()

    def say(self, line: str) -> None:
        if time.monotonic() - self._last >= self._every_s:
            self._last = time.monotonic()
            print(line, flush=True)
