from __future__ import annotations

import os
import tempfile
import unittest
from pathlib import Path
from unittest import mock

from kvcached import programs


class Find(unittest.TestCase):
    def setUp(self) -> None:
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)

    def make(self, folder: str, mode: int = 0o755) -> Path:
        program = self.folder / folder / "no-such-program"
        program.parent.mkdir()
        program.touch(mode=mode)
        return program

    def test_the_folder_that_is_set_comes_before_the_path(self) -> None:
        mine, other = self.make("mine"), self.make("other")
        with mock.patch.dict(os.environ, {"PATH": str(other.parent)}, clear=True):
            self.assertEqual(programs.find(mine.name), other)
            with mock.patch.dict(os.environ, {"KVBROKER_BIN_DIR": str(mine.parent)}):
                self.assertEqual(programs.find(mine.name), mine)

    def test_what_cannot_be_run_is_not_found(self) -> None:
        mine = self.make("mine", mode=0o644)
        with mock.patch.dict(
            os.environ, {"KVBROKER_BIN_DIR": str(mine.parent), "PATH": ""}, clear=True
        ):
            self.assertIsNone(programs.find(mine.name))

    def test_the_packages_own_comes_first(self) -> None:
        mine, own = self.make("mine"), self.make("bin")
        with mock.patch.object(programs, "__file__", str(self.folder / "programs.py")):
            with mock.patch.dict(os.environ, {"KVBROKER_BIN_DIR": str(mine.parent)}):
                self.assertEqual(programs.find(mine.name), own)


if __name__ == "__main__":
    unittest.main()
