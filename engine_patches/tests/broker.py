"""A kvbrokerd of a test's own."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
import unittest
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from kvcached import programs

if TYPE_CHECKING:
    from kvcached.kv_cache_manager import KVCacheManager

MIB = 1 << 20
# What tests with tensors use: on a machine with a GPU it may be "cuda:0".
DEVICE = os.environ.get("KVCACHED_TEST_DEVICE", "cpu")
# For giving up only.
TIMEOUT_S = 60.0


def program(name: str) -> str:
    found = programs.find(name)
    if found is None:
        raise FileNotFoundError(f"{name} is not in KVBROKER_BIN_DIR")
    return str(found)


def eventually(done: Callable[[], object], timeout_s: float = TIMEOUT_S) -> bool:
    """Whether ``done`` becomes true."""
    deadline = time.monotonic() + timeout_s
    while not done():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def take(mine: KVCacheManager, count: int) -> list[int]:
    """Blocks, once there are so many: memory may take longer than an alloc waits."""
    got: list[list[int]] = []

    def taken() -> bool:
        blocks = mine.alloc(count)
        if blocks is not None:
            got.append(blocks)
        return blocks is not None

    if not eventually(taken):
        raise AssertionError(f"no {count} blocks; there are {mine.available_size()}")
    return got[0]


class Broker:
    """Started by start(), ended by stop() or kill(); may be started again."""

    def __init__(self, folder: Path, device: list[str]) -> None:
        self.folder = folder
        self.address = str(folder / "sockets")
        self._device = device
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        read, write = os.pipe()
        log = open(self.folder / "log", "ab")
        try:
            self._process = subprocess.Popen(
                [
                    program("kvbrokerd"),
                    *self._device,
                    *("--socket-dir", self.address, "--lock-dir", str(self.folder / "locks")),
                    *("--state-dir", str(self.folder / "state"), "--ready-fd", str(write)),
                ],
                pass_fds=[write],
                stderr=log,
            )
        finally:
            log.close()
            os.close(write)
        with os.fdopen(read) as ready:
            line = ready.readline()
        if not line.startswith("kvbrokerd ready"):
            raise RuntimeError((self.folder / "log").read_text())

    def stop(self) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait()
            self._process = None

    def kill(self) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.wait()
        self._process = None

    def kvctl(self, *arguments: str) -> str:
        command = [program("kvctl"), "--address", self.address, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"kvctl {arguments}: {done.stderr}")
        return done.stdout


def memory(capacity: str) -> list[str]:
    """A broker's options: so much of DEVICE."""
    kind, _, index = DEVICE.partition(":")
    if kind == "cuda":
        return ["--backend", "cuda", "--gpu", index or "0", "--capacity", capacity]
    return ["--backend", "host", "--device-uuid", f"TEST-{os.getpid()}", "--capacity", capacity]


@contextmanager
def running_broker(capacity: str, device: list[str] | None = None) -> Iterator[Broker]:
    """``device``: options of a broker for another one than DEVICE, of this size."""
    folder = Path(tempfile.mkdtemp(prefix="kvb", dir="/tmp"))
    broker = Broker(folder, memory(capacity) if device is None else device)
    try:
        broker.start()
        yield broker
    finally:
        broker.stop()
        shutil.rmtree(folder)


def environment(broker: Broker, **more: str) -> dict[str, str]:
    """For a process that uses the broker: nothing of kvcached's but this."""
    clean = {
        name: value
        for name, value in os.environ.items()
        if name in ("KVBROKER_BIN_DIR", "KVCACHED_TEST_DEVICE")
        or not name.startswith(("KVBROKER_", "KVCACHED_"))
    }
    return {
        **clean,
        "KVBROKER_ADDRESS": broker.address,
        "KVBROKER_SHM_COMPAT": "off",
        "KVCACHED_IPC_NAME": "test",
        "KVCACHED_LOG_LEVEL": "ERROR",
        **more,
    }


def use_environment(test: unittest.TestCase, new: dict[str, str]) -> None:
    """``os.environ`` is ``new`` until the test is over."""
    old = dict(os.environ)

    def restore() -> None:
        os.environ.clear()
        os.environ.update(old)

    test.addCleanup(restore)
    os.environ.clear()
    os.environ.update(new)


class BrokerTest(unittest.TestCase):
    """Has ``self.broker``, with CAPACITY, and an environment that leads to it."""

    CAPACITY = "64M"

    def setUp(self) -> None:
        context = running_broker(self.CAPACITY)
        self.broker = context.__enter__()
        self.addCleanup(context.__exit__, None, None, None)
        use_environment(self, environment(self.broker))
        from kvcached.runtime import runtime

        self.addCleanup(runtime.shutdown)

    def setenv(self, **variables: str) -> None:
        os.environ.update(variables)
