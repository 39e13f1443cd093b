"""The examples of docs/api/python.md run, each in a process of its own.

test_torch_docs.py runs those that say that they need torch.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import unittest
from pathlib import Path

from broker import TIMEOUT_S, BrokerTest

from kvcached import config

FOLDER = Path(__file__).resolve().parents[2] / "docs" / "api"
PAGE = FOLDER / "python.md"
NEEDS_TORCH = "# needs torch\n"


def examples(torch: bool) -> list[tuple[int, str]]:
    """Line of the page, and code."""
    page = PAGE.read_text(encoding="utf-8")
    return [
        (page.count("\n", 0, found.start(1)) + 1, found.group(1))
        for found in re.finditer(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
        if found.group(1).startswith(NEEDS_TORCH) == torch
    ]


class Variables(unittest.TestCase):
    def test_all_are_described(self) -> None:
        text = (FOLDER / "variables.md").read_text(encoding="utf-8")
        rows = "".join(line for line in text.splitlines() if line.startswith("| `"))
        described = set(re.findall(r"`([A-Z_]+)`", rows.replace("` | `", "`, `")))
        self.assertEqual(set(config.VARIABLES) - described, set())


class Examples(BrokerTest):
    TORCH = False

    def test_each_runs(self) -> None:
        found = examples(self.TORCH)
        self.assertTrue(found)
        for line, code in found:
            with self.subTest(line=line):
                done = subprocess.run(
                    [sys.executable, "-c", "\n" * (line - 1) + code],
                    env=dict(os.environ),
                    capture_output=True,
                    text=True,
                    timeout=TIMEOUT_S,
                    check=False,
                )
                self.assertEqual((done.returncode, done.stderr), (0, ""), f"{PAGE}:{line}")
                # The next one is to find nothing of it.
                self.broker.stop()
                self.broker.start()


if __name__ == "__main__":
    unittest.main()
