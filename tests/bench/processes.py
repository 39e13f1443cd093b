"""Programs that benchmarks start, order about and end: what bench.py and gpu/bench_gpu.py stand on."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

# Somebody who does not answer within that has hung.
READY_SECONDS = 60.0

_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None)


class BenchError(Exception):
    """Something went wrong; the message is for whoever runs the benchmarks."""


class Interrupted(BaseException):
    def __init__(self, number: int) -> None:
        super().__init__()
        self.exit_status = 128 + number


def interrupt(number: int, _frame: FrameType | None) -> None:
    """For signal.signal."""
    raise Interrupted(number)


def environment_without(*prefixes: str) -> dict[str, str]:
    """This process's, less the settings of the machine's real brokers and engines."""
    return {name: value for name, value in os.environ.items() if not name.startswith(prefixes)}


def tail(log: Path) -> str:
    """Its last lines, to go behind an error."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return "\n  | ".join(["", *lines[-10:]])


def die_with_parent() -> None:
    """As preexec_fn: no program outlives a benchmark that was killed."""
    _libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)


class Process:
    """A program that takes orders by lines, with its standard error in a log."""

    def __init__(
        self,
        command: Sequence[str | Path],
        log: Path,
        environment: dict[str, str],
        keep_fds: Sequence[int] = (),
        *,
        ends_with_stdin: bool = False,
    ) -> None:
        """`ends_with_stdin`: it leaves by itself when nothing more can be ordered."""
        self._log = log
        self._ends_with_stdin = ends_with_stdin
        with open(log, "wb") as log_file:
            self._process = subprocess.Popen(
                [str(word) for word in command],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log_file,
                pass_fds=keep_fds,
                env=environment,
                process_group=0,
                preexec_fn=die_with_parent,
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    def order(self, line: str) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(line.encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError as error:
            raise self.failure() from error

    def line(self, within: float = READY_SECONDS) -> str:
        """The next one that it says."""
        assert self._process.stdout is not None
        if not select.select([self._process.stdout], [], [], within)[0]:
            raise BenchError(f"{self._name()} did not answer within {within:g} s")
        line = self._process.stdout.readline()
        if not line:
            raise self.failure()
        return line.decode().strip()

    def answer(self, within: float = READY_SECONDS) -> dict:
        """The next line, which is JSON."""
        return json.loads(self.line(within))

    def ask(self, line: str, within: float = READY_SECONDS) -> dict:
        self.order(line)
        return self.answer(within)

    def failure(self) -> BenchError:
        """Of a program that has ended, or is about to."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(5)
        return BenchError(f"{self._name()} ended; its log:{tail(self._log)}")

    def stop(self) -> None:
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):
                pipe.close()
        if self._ends_with_stdin:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(5)
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def cpu_seconds(self) -> float:
        """CPU of all its threads, living and ended: its process clock, in nanoseconds."""
        return time.clock_gettime((~self.pid << 3) | 2)

    def cpu_ticks(self) -> int:
        """The same from /proc/PID/stat."""
        words = Path(f"/proc/{self.pid}/stat").read_text(encoding="ascii").rsplit(")", 1)[1].split()
        return int(words[11]) + int(words[12])

    def _name(self) -> str:
        assert isinstance(self._process.args, list)
        return " ".join(
            [Path(str(self._process.args[0])).name, *map(str, self._process.args[1:])]
        )
