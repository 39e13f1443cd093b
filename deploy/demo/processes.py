"""Children: the processes that the demo starts, none of which outlives it.

    with Children() as children:
        child = children.start("conv", [program, "--name", "conv"], folder / "conv.log")
        ...
        children.stop([child])      # here, or on the way out

Should the demo itself be killed, the kernel kills them. One thread.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType

_PR_SET_PDEATHSIG = 1
_STOP_SECONDS = 10.0
_TAIL_LINES = 15

_libc = ctypes.CDLL(None)


class DemoError(Exception):
    """Something went wrong; the message is for whoever runs the demo."""


class Child:
    """One process; what it says on standard error goes to `log`."""

    def __init__(self, name: str, process: subprocess.Popen[bytes], log: Path) -> None:
        self.name = name
        self.process = process
        self.log = log

    def exit_status(self) -> int | None:
        """None while it runs."""
        return self.process.poll()

    def failure(self, what: str) -> DemoError:
        """An error that names it and shows the end of its log."""
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        tail = lines[-_TAIL_LINES:] or ["(empty)"]
        return DemoError("\n  | ".join([f"{self.name} {what}; the end of its log:", *tail]))


class Children:
    def __init__(self) -> None:
        self._children: list[Child] = []

    def __enter__(self) -> Children:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop(self._children)

    def start(
        self,
        name: str,
        command: Sequence[str | Path],
        log: Path,
        *,
        stdout: Path | None = None,
        keep_fds: Sequence[int] = (),
    ) -> Child:
        """Starts a process whose standard output goes to `stdout`, else to its log."""
        parent = os.getpid()
        # Settings of this machine's real broker and engines are none of the demo's.
        environment = {
            name: value for name, value in os.environ.items() if not name.startswith("KVBROKER")
        }

        def die_with_parent() -> None:
            _libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
            if os.getppid() != parent:
                os._exit(1)

        with open(log, "wb") as log_file, open(stdout or os.devnull, "wb") as out_file:
            try:
                process = subprocess.Popen(
                    [str(word) for word in command],
                    stdin=subprocess.DEVNULL,
                    stdout=out_file if stdout else log_file,
                    stderr=log_file,
                    pass_fds=keep_fds,
                    env=environment,
                    # A terminal's Ctrl-C is for the demo, which ends them in order.
                    process_group=0,
                    preexec_fn=die_with_parent,
                )
            except OSError as error:
                raise DemoError(f"cannot start {name}: {command[0]}: {error.strerror}") from error
        child = Child(name, process, log)
        self._children.append(child)
        return child

    def stop(self, children: Iterable[Child]) -> None:
        """Asks those that run to end, and kills those that do not."""
        running = [child for child in children if child.exit_status() is None]
        for child in running:
            child.process.terminate()
        deadline = time.monotonic() + _STOP_SECONDS
        for child in running:
            try:
                child.process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                child.process.kill()
                child.process.wait()
