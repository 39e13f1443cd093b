"""What control planes made for kvcached do with an engine: its 24 bytes in /dev/shm,
kvctl, and the signals of a supervisor.

Nothing of the package is used on their side, but where a test says so.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import stat
import struct
import subprocess
import sys
import unittest
from pathlib import Path
from typing import Any

from broker import MIB, BrokerTest, environment, eventually, program

# A page is this much: K and V of one layer.
PAGE = 2 * 2 * MIB
BLOCKS_OF_A_PAGE = 32

# Takes blocks as it is told: `try N` answers at once, `take N` keeps trying.
ENGINE = """
import sys, time
from kvcached.integration.vllm import interfaces as kvi

kvi.init_kvcached(device="cpu")
manager = kvi.get_kv_cache_manager(num_blocks=512, block_size=16, cell_size=4096, num_layers=1)
print("serving", manager.available_size() >= 0, flush=True)
for line in sys.stdin:
    verb, count = line.split()
    deadline = time.monotonic() + (20 if verb == "take" else 0)
    while True:
        blocks = manager.alloc(int(count))
        if blocks is not None or time.monotonic() > deadline:
            break
        time.sleep(0.01)
    print("none" if blocks is None else len(blocks), flush=True)
"""


class Engine:
    """A process group of its own, as supervisors start them."""

    def __init__(self, env: dict[str, str]) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", ENGINE],
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        assert self.process.stdout is not None
        self.serving = self.process.stdout.readline().startswith("serving")

    def ask(self, verb: str, count: int) -> str:
        assert self.process.stdin is not None and self.process.stdout is not None
        print(verb, count, file=self.process.stdin, flush=True)
        return self.process.stdout.readline().strip()

    def end(self) -> None:
        """As an engine that is told to stop."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()

    def kill(self) -> None:
        """As a supervisor that has lost its patience."""
        if self.process.returncode is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.end()


class ThirdParty(BrokerTest):
    CAPACITY = "64M"

    def setUp(self) -> None:
        super().setUp()
        self.name = f"third-party.{os.getpid()}_{self._testMethodName}"
        self.view = Path("/dev/shm", self.name)
        self.addCleanup(self.view.unlink, missing_ok=True)

    def engine(self, **variables: str) -> Engine:
        settings = {
            "KVCACHED_IPC_NAME": self.name,
            "KVBROKER_SHM_COMPAT": "auto",
            "KVCACHED_MIN_RESERVED_PAGES": "0",
            "PYTHONPATH": os.environ.get("PYTHONPATH", ""),
        }
        engine = Engine(environment(self.broker, **{**settings, **variables}))
        self.addCleanup(engine.kill)
        self.assertTrue(engine.serving)
        return engine

    def kvctl(self, *arguments: str) -> str:
        done = subprocess.run(
            [program("kvctl"), *arguments],
            env=environment(self.broker),
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
        self.assertEqual(done.returncode, 0, done.stderr)
        return done.stdout

    def listed(self) -> dict[str, Any]:
        found = [one for one in json.loads(self.kvctl("list", "--json")) if one["ipc"] == self.name]
        self.assertEqual(len(found), 1)
        return found[0]

    def figures(self) -> tuple[int, int, int]:
        """Limit, used, preallocated, as everybody reads them."""
        with self.view.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH)
            content = file.read()
        self.assertEqual(len(content), 24)
        limit, used, preallocated = struct.unpack("3q", content)
        return limit, used, preallocated

    def test_the_view_is_there_before_the_engine_serves(self) -> None:
        self.engine()
        status = self.view.lstat()
        self.assertTrue(stat.S_ISREG(status.st_mode))
        umask = os.umask(0)
        os.umask(umask)
        self.assertEqual(stat.S_IMODE(status.st_mode), 0o666 & ~umask)
        limit, used, preallocated = self.figures()
        self.assertEqual((limit, preallocated), (self.listed()["limit_bytes"], 0))
        self.assertIn(used, (0, PAGE))  # The page of the null block, once it is reported.

    def test_the_view_follows_what_is_used(self) -> None:
        engine = self.engine()
        self.assertEqual(engine.ask("take", BLOCKS_OF_A_PAGE + 1), str(BLOCKS_OF_A_PAGE + 1))
        self.assertTrue(eventually(lambda: self.figures()[1] == 2 * PAGE), self.view.read_bytes())
        self.assertTrue(eventually(lambda: self.listed()["used_bytes"] == 2 * PAGE))

    def test_the_view_ends_with_the_engine(self) -> None:
        self.engine().end()
        self.assertFalse(self.view.exists())

    def test_a_limit_that_is_written_there_is_set(self) -> None:
        self.engine()
        limit = 3 * PAGE + 5
        with self.view.open("r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.write(struct.pack("q", limit))
        self.assertTrue(eventually(lambda: self.listed()["limit_bytes"] == limit))
        self.assertEqual(self.figures()[0], limit)

    def test_a_limit_of_kvctl_is_the_same_number_everywhere(self) -> None:
        self.engine()
        for limit in (12_345_678, 0, 1 << 45):
            said = self.kvctl("limit", self.name, str(limit))
            self.assertIn(str(limit), said)
            self.assertEqual(self.listed()["limit_bytes"], limit)
            self.assertTrue(eventually(lambda want=limit: self.figures()[0] == want))

    def test_an_engine_that_starts_anew_has_its_limit_from_the_first_grant_on(self) -> None:
        first = self.engine()
        limit = 2 * PAGE
        self.kvctl("limit", self.name, str(limit))
        self.assertEqual(first.ask("take", BLOCKS_OF_A_PAGE), str(BLOCKS_OF_A_PAGE))
        os.killpg(first.process.pid, signal.SIGKILL)
        # At once: the first one may not even be dead.
        second = self.engine()
        self.assertEqual(self.listed()["limit_bytes"], limit)
        self.assertEqual(self.figures()[0], limit)
        self.assertEqual(second.ask("try", 3 * BLOCKS_OF_A_PAGE), "none")
        # Block 0 is nobody's.
        most = 2 * BLOCKS_OF_A_PAGE - 1
        self.assertEqual(second.ask("take", most), str(most))
        self.assertEqual(second.ask("try", 1), "none")
        self.assertTrue(eventually(lambda: self.listed()["pids"] == [second.process.pid]))
        self.assertLessEqual(self.listed()["held_bytes"], limit)

    def test_two_engines_of_one_name_share_one_limit(self) -> None:
        one, other = self.engine(), self.engine()
        self.assertEqual(
            sorted(self.listed()["pids"]), sorted([one.process.pid, other.process.pid])
        )
        self.kvctl("limit", self.name, str(4 * PAGE))
        self.assertEqual(one.ask("take", 2 * BLOCKS_OF_A_PAGE - 1), str(2 * BLOCKS_OF_A_PAGE - 1))
        self.assertEqual(other.ask("take", 2 * BLOCKS_OF_A_PAGE - 1), str(2 * BLOCKS_OF_A_PAGE - 1))
        self.assertEqual(one.ask("try", 1), "none")
        self.assertEqual(other.ask("try", 1), "none")
        self.assertTrue(eventually(lambda: self.listed()["used_bytes"] == 4 * PAGE))
        # What one gives back is the other's.
        one.end()
        self.assertEqual(other.ask("take", BLOCKS_OF_A_PAGE), str(BLOCKS_OF_A_PAGE))

    def test_no_view_where_it_is_off(self) -> None:
        self.engine(KVBROKER_SHM_COMPAT="off")
        self.assertFalse(self.view.exists())

    def test_the_packages_own_reader_works_with_and_without_a_file(self) -> None:
        from kvcached.cli import utils

        for compat in ("on", "off"):
            with self.subTest(KVBROKER_SHM_COMPAT=compat):
                engine = self.engine(KVBROKER_SHM_COMPAT=compat)
                self.assertEqual(self.view.exists(), compat == "on")
                self.assertIn(self.name, utils.get_all_ipc_names())
                self.kvctl("limit", self.name, str(5 * PAGE))
                engine.ask("take", 1)

                def seen() -> tuple[int, ...]:
                    with utils.RwLockedShm(f"/dev/shm/{self.name}", "rb") as view:
                        self.assertEqual(len(view), 24)
                        return struct.unpack("3q", view)

                self.assertTrue(eventually(lambda: seen() == (5 * PAGE, PAGE, 0)), seen())
                with utils.RwLockedShm(
                    self.name, utils.MemInfoStruct.SHM_SIZE, utils.RwLockedShm.WLOCK
                ) as buffer:
                    info = utils.MemInfoStruct.from_buffer(buffer)
                    info.total_size = 6 * PAGE
                    info.write_to_buffer(buffer)
                self.assertTrue(eventually(lambda: self.listed()["limit_bytes"] == 6 * PAGE))
                engine.end()


if __name__ == "__main__":
    unittest.main()
