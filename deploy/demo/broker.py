"""The demo's own kvbrokerd: its flags, its socket directory, its start and end."""

from __future__ import annotations

import os
import select
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from processes import Child, Children, DemoError

_READY_SECONDS = 20.0
_POLL_SECONDS = 0.1

# kvbrokerd's times about how long requests take, and their defaults in seconds. A replay
# compresses requests in time, so these are divided by its speed-up. Not in the list: how long
# a process has to answer, since processes are as quick as ever.
_REQUEST_TIMES = {
    "--policy-reclaim-patience": 1.0,
    "--policy-hold-off": 5.0,
    "--policy-ageing": 10.0,
    "--policy-limit-patience": 0.25,
}


@dataclass(frozen=True)
class Broker:
    sockets: Path
    child: Child


def request_time_flags(speedup: float) -> list[str]:
    return [
        f"{flag}={max(1, round(seconds / speedup * 1e6))}us"
        for flag, seconds in _REQUEST_TIMES.items()
    ]


def request_times_in_words(speedup: float) -> str:
    def milliseconds(seconds: float) -> str:
        return f"{seconds / speedup * 1e3:g} ms"

    return (
        f"the broker's waits are divided by the speed-up, as requests are: "
        f"patience {milliseconds(1)} for 1 s, hold-off {milliseconds(5)} for 5 s"
    )


@contextmanager
def running_broker(
    children: Children, program: Path, folder: Path, capacity_bytes: int, speedup: float
) -> Iterator[Broker]:
    """A broker of the host backend that nobody else finds, ready to be called.

    On the way out it is asked to end. Raises DemoError where it fails, then too.
    """
    sockets = folder / "sockets"
    locks = folder / "locks"
    sockets.mkdir(mode=0o750)
    locks.mkdir()
    ready, ready_writer = os.pipe()
    try:
        command: list[str | Path] = [
            program,
            "--backend=host",
            f"--capacity={capacity_bytes}",
            f"--socket-dir={sockets}",
            # Never the device of a real broker, nor of another demo.
            f"--device-uuid=DEMO-{uuid.uuid4()}",
            f"--lock-dir={locks}",
            "--state-dir=none",
            f"--ready-fd={ready_writer}",
            *request_time_flags(speedup),
        ]
        child = children.start(
            "kvbrokerd", command, folder / "kvbrokerd.log", keep_fds=[ready_writer]
        )
        os.close(ready_writer)
        ready_writer = -1
        _wait_ready(child, ready)
    finally:
        os.close(ready)
        if ready_writer >= 0:
            os.close(ready_writer)
    yield Broker(sockets, child)
    check_alive(child)
    children.stop([child])
    status = child.exit_status()
    if status != 0:
        raise child.failure(f"ended with exit status {status}")


def check_alive(broker: Child) -> None:
    status = broker.exit_status()
    if status is not None:
        raise broker.failure(f"ended in mid-run with exit status {status}")


def _wait_ready(child: Child, ready: int) -> None:
    """It writes a line once it listens, and closes its end if it never will."""
    deadline = time.monotonic() + _READY_SECONDS
    while time.monotonic() < deadline:
        if select.select([ready], [], [], _POLL_SECONDS)[0]:
            if os.read(ready, 64):
                return
            child.process.wait(_READY_SECONDS)
        if (status := child.exit_status()) is not None:
            raise child.failure(f"did not start, exit status {status}")
    raise child.failure(f"was not ready after {_READY_SECONDS:g} s")


def socket_of(broker: Broker) -> Path:
    for path in sorted(broker.sockets.glob("*.sock")):
        if not path.name.endswith(".fd.sock"):
            return path
    raise DemoError(f"kvbrokerd has no socket in {broker.sockets}")
