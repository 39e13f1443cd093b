"""`python -m kvcached`."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path
from unittest import mock

from broker import TIMEOUT_S, BrokerTest, eventually

from kvcached import _C, __version__
from kvcached import __main__ as doctor


class Doctor(BrokerTest):
    def run_it(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "kvcached", *arguments],
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )

    def said(self, topic: str) -> list[doctor.Finding]:
        return [finding for finding in doctor.examine() if finding.topic == topic]

    def problems(self) -> list[doctor.Finding]:
        return [finding for finding in doctor.examine() if finding.status == doctor.PROBLEM]

    def test_nothing_is_wrong(self) -> None:
        done = self.run_it()
        self.assertEqual(done.returncode, 0, done.stdout + done.stderr)
        self.assertTrue(done.stdout.endswith("\nno problems\n"), done.stdout)
        self.assertIn("backend host", done.stdout)

    def test_for_programs(self) -> None:
        said = json.loads(self.run_it("--json").stdout)
        self.assertEqual((said["version"], said["problems"]), (__version__, 0))
        for finding in said["findings"]:
            self.assertEqual(set(finding), {"status", "topic", "text", "mend"})

    def test_usage(self) -> None:
        self.assertEqual(self.run_it("--no-such").returncode, 2)

    def test_a_problem_has_a_mend_and_exit_status_1(self) -> None:
        self.setenv(KVCACHED_PAGE_SIZE_MB="3")
        done = self.run_it()
        self.assertEqual(done.returncode, 1)
        self.assertIn("KVCACHED_PAGE_SIZE_MB", done.stdout)
        for finding in self.problems():
            self.assertTrue(finding.mend, finding)

    def test_a_name_that_is_misspelt(self) -> None:
        self.setenv(KVCACHED_PAGE_SIZE="4")
        (finding,) = [f for f in self.said("variable") if "KVCACHED_PAGE_SIZE is" in f.text]
        self.assertEqual(finding.status, doctor.NOTE)
        self.assertIn("KVCACHED_PAGE_SIZE_MB", finding.mend)

    def test_a_malformed_address_setting_does_not_end_it(self) -> None:
        self.setenv(KVBROKER_ADDRESS="/dev/null/x", KVBROKER_AUTOSTART="maybe")
        self.assertEqual(self.run_it().returncode, 1)

    def test_nobody_at_the_address(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            self.setenv(KVBROKER_ADDRESS=folder)
            (finding,) = self.said("broker")
        self.assertEqual(finding.status, doctor.PROBLEM)
        self.assertIn(folder, finding.text)

    def test_a_broker_that_would_be_started(self) -> None:
        with (
            tempfile.TemporaryDirectory() as folder,
            mock.patch.object(doctor, "_ask", return_value=[]),
        ):
            self.setenv(KVBROKER_ADDRESS="", XDG_RUNTIME_DIR=folder)
            (finding,) = self.said("broker")
            self.assertEqual(finding.status, doctor.OK)
            self.assertIn("--start", finding.text)
            self.setenv(KVBROKER_AUTOSTART="0")
            (finding,) = self.said("broker")
            self.assertEqual(finding.status, doctor.PROBLEM)

    def test_one_is_started_when_told_to(self) -> None:
        folder = tempfile.TemporaryDirectory(prefix="kvb", dir="/tmp")
        self.addCleanup(folder.cleanup)
        del os.environ["KVBROKER_ADDRESS"]
        nowhere = {"KVBROKER_CUDA_DRIVER": "/nonexistent", "KVBROKER_NVML": "/nonexistent"}
        self.setenv(
            XDG_RUNTIME_DIR=folder.name,
            KVBROKERD_LOCK_DIR=f"{folder.name}/locks",
            KVBROKERD_STATE_DIR="none",
            KVBROKERD_CAPACITY="64M",
            **nowhere,
        )
        done = self.run_it("--start", "--json")
        said = json.loads(done.stdout)
        texts = [one["text"] for one in said["findings"] if one["topic"] == "broker"]
        self.assertEqual(done.returncode, 0, texts)
        started, described = texts
        self.assertIn("was started", started)
        pid = int(re.search(r"pid (\d+)", described).group(1))  # type: ignore[union-attr]
        os.kill(pid, signal.SIGTERM)
        self.assertTrue(eventually(lambda: not Path(f"/proc/{pid}").exists()))

    def test_a_native_part_of_another_release(self) -> None:
        with mock.patch.object(_C, "VERSION", "0.0.0"):
            (finding,) = self.said("native")
        self.assertEqual(finding.status, doctor.PROBLEM)

    def test_an_engine_that_runs_unpatched(self) -> None:
        self.setenv(ENABLE_KVCACHED="1")
        with (
            mock.patch("kvcached.autopatch.engine_version", return_value="1.2.3"),
            mock.patch("kvcached.autopatch.carries_patches", return_value=False),
        ):
            (finding,) = self.said("vllm")
            self.assertEqual(finding.status, doctor.PROBLEM)
            self.assertIn("1.2.3", finding.text)
            self.setenv(ENABLE_KVCACHED="0")
            (finding,) = self.said("vllm")
            self.assertEqual(finding.status, doctor.NOTE)

    def test_views_that_nobody_has(self) -> None:
        pool: _C.PoolOptions = {"handle_bytes": 1 << 20, "max_pages": 1, "block_bytes": 1 << 20}
        session = _C.Session("alive", [pool], address=os.environ["KVBROKER_ADDRESS"])
        with tempfile.TemporaryDirectory() as folder:
            for name, size in (("alive", 24), ("stale", 24), ("another", 25)):
                Path(folder, name).write_bytes(bytes(size))
            (finding,) = doctor.check_shm(folder)
            self.assertEqual(finding.mend, f"rm {folder}/stale")
        session.close()


if __name__ == "__main__":
    unittest.main()
