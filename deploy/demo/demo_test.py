"""The demo as a whole, with stand-ins for its programs."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import tempfile
import unittest
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from unittest import mock

import demo
import fakes

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class DemoTest(unittest.TestCase):
    def setUp(self) -> None:
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)
        self.temporary = self.folder / "tmp"
        self.temporary.mkdir()
        self.results = self.folder / "results.json"
        fakes.install(self.folder / "bin")
        for number in _SIGNALS:
            self.addCleanup(signal.signal, number, signal.getsignal(number))
        # What others on this machine do is not to fail tests.
        self._patch(mock.patch.object(demo, "shmem_bytes", return_value=1 << 20))
        self._patch(mock.patch.object(tempfile, "tempdir", str(self.temporary)))

    def _patch(self, patch: contextlib.AbstractContextManager[object]) -> None:
        patch.__enter__()
        self.addCleanup(patch.__exit__, None, None, None)

    def run_demo(self, *arguments: str, **environment: str) -> int:
        self.out, self.err = io.StringIO(), io.StringIO()
        with (
            mock.patch.dict(os.environ, environment),
            contextlib.redirect_stdout(self.out),
            contextlib.redirect_stderr(self.err),
        ):
            status = demo.main(
                [f"--bin={self.folder / 'bin'}", f"--json={self.results}", *arguments]
            )
        self.assertEqual(list(self.temporary.iterdir()), [], "temporary files are left")
        return status

    def test_plays_both_acts_and_writes_what_was_asked_for(self) -> None:
        requests = self.folder / "requests"
        logs = self.folder / "logs"
        status = self.run_demo(f"--requests={requests}", f"--logs={logs}", FAKE_REPLAY="flood:hang")
        self.assertEqual((status, self.err.getvalue()), (0, ""))

        results = json.loads(self.results.read_text())
        self.assertEqual(results["integrity_errors"], 0)
        self.assertEqual(results["leaked_bytes"], 0)
        self.assertEqual(results["capacity_tokens"], 2400)
        self.assertEqual(list(results["engines"]), ["conv", "code", "code2"])
        self.assertEqual(results["engines"]["code"]["static"]["wait_p99_ms"], 2000)
        self.assertEqual(results["engines"]["code"]["elastic"]["preemptions"], 1)
        self.assertEqual(results["neighbour"]["elastic_wait_p99_ms"], 10)
        self.assertTrue(all(bar["passed"] for bar in results["bars"]))
        self.assertGreater(results["seconds"], 0)
        self.assertIn("machine", results)
        self.assertNotIn("--bin", results["command"])

        self.assertEqual(len(list(requests.iterdir())), 3 + 3 + 2 + 2)
        self.assertIn(logs / "act1-broker-kvbrokerd.log", list(logs.iterdir()))
        ElementTree.parse(self.results.with_suffix(".svg"))
        self.assertIn("capacity: 2,400 tokens", self.out.getvalue())

    def test_plays_one_act(self) -> None:
        self.assertEqual(self.run_demo("--only=2", FAKE_REPLAY="flood:hang"), 0)
        results = json.loads(self.results.read_text())
        self.assertEqual(results["engines"], {})
        self.assertEqual(results["neighbour"]["static_wait_p99_ms"], 2000)

    def test_engines_are_those_of_the_traces(self) -> None:
        self.assertEqual(
            self.run_demo(
                "--only=1",
                "--capacity=9,600",
                "--trace=a=builtin:code@5",
                "--trace=b=builtin:conv",
            ),
            0,
        )
        results = json.loads(self.results.read_text())
        self.assertEqual(list(results["engines"]), ["a", "b"])
        self.assertEqual(results["capacity_tokens"], 9600)

    def test_overwritten_blocks_are_reported_and_fail(self) -> None:
        self.assertEqual(self.run_demo("--only=1", FAKE_REPLAY="code:overwritten"), 1)
        results = json.loads(self.results.read_text())
        self.assertEqual(results["integrity_errors"], 14)

    def test_leaked_memory_is_reported_and_fails(self) -> None:
        with (
            mock.patch.object(demo, "shmem_bytes", side_effect=[1000, *[5096] * 1000]),
            mock.patch.object(demo, "_SETTLE_SECONDS", 0.0),
        ):
            self.assertEqual(self.run_demo("--only=1"), 1)
        self.assertEqual(json.loads(self.results.read_text())["leaked_bytes"], 4096)

    def test_a_failed_engine_is_named_with_its_log(self) -> None:
        self.assertEqual(self.run_demo(FAKE_REPLAY="code2:fail"), 1)
        self.assertIn("code2 failed with exit status 1", self.err.getvalue())
        self.assertIn("cannot go on", self.err.getvalue())

    def test_a_failed_broker_is_named_with_its_log(self) -> None:
        self.assertEqual(self.run_demo(FAKE_BROKER="refuse"), 1)
        self.assertIn("kvbrokerd did not start, exit status 2", self.err.getvalue())
        self.assertIn("no such backend", self.err.getvalue())

    def test_a_broker_that_ends_in_mid_run_fails(self) -> None:
        self.assertEqual(self.run_demo("--only=1", FAKE_BROKER="die", FAKE_REPLAY="conv:wait"), 1)
        self.assertIn("kvbrokerd ended in mid-run with exit status 3", self.err.getvalue())

    def test_a_broker_that_does_not_end_well_fails(self) -> None:
        self.assertEqual(self.run_demo("--only=1", FAKE_BROKER="fail"), 1)
        self.assertIn("kvbrokerd ended with exit status 1", self.err.getvalue())

    def test_missing_programs_are_named(self) -> None:
        self.assertEqual(self.run_demo(f"--bin={self.folder}"), 1)
        self.assertIn("kvbroker-replay", self.err.getvalue())


class InterruptTest(unittest.TestCase):
    def test_ctrl_c_ends_all_processes(self) -> None:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            fakes.install(folder / "bin")
            (folder / "tmp").mkdir()
            process = subprocess.Popen(
                [sys.executable, demo.__file__, f"--bin={folder / 'bin'}", "--only=1"],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                cwd=folder,
                env={**os.environ, "TMPDIR": str(folder / "tmp"), "FAKE_REPLAY": "conv:hang"},
                text=True,
            )
            assert process.stdout is not None
            # The first figures of a running engine.
            while "waiting" not in (line := process.stdout.readline()):
                self.assertTrue(line, "the demo ended")
            process.send_signal(signal.SIGINT)
            _, err = process.communicate()
            self.assertEqual(process.returncode, 130)
            self.assertIn("interrupted", err)
            self.assertEqual(list((folder / "tmp").iterdir()), [])
            self.assertEqual(self._processes_of(folder), [])

    def _processes_of(self, folder: Path) -> list[str]:
        found = []
        for entry in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                command = entry.read_bytes().decode(errors="replace")
                if str(folder) in command:
                    found.append(command)
        return found


class LeakTest(unittest.TestCase):
    def test_waits_for_the_kernel_to_settle(self) -> None:
        with mock.patch.object(demo, "shmem_bytes", side_effect=[300, 200, 100]):
            self.assertEqual(demo.leaked_since(100), 0)

    def test_less_than_before_is_no_leak(self) -> None:
        with mock.patch.object(demo, "shmem_bytes", return_value=50):
            self.assertEqual(demo.leaked_since(100), 0)

    def test_reads_the_kernels_count(self) -> None:
        self.assertGreaterEqual(demo.shmem_bytes(), 0)


if __name__ == "__main__":
    unittest.main()
