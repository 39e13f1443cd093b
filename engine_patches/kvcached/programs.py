"""Where the programs are that come with the package."""

from __future__ import annotations

import os
import shutil
from pathlib import Path


def find(name: str) -> Path | None:
    """``kvbrokerd``, ``kvctl``, ...: the package's own, else in KVBROKER_BIN_DIR, else in PATH."""
    folders = [Path(__file__).parent / "bin"]
    if os.environ.get("KVBROKER_BIN_DIR"):
        folders.append(Path(os.environ["KVBROKER_BIN_DIR"]))
    for folder in folders:
        program = folder / name
        if program.is_file() and os.access(program, os.X_OK):
            return program
    found = shutil.which(name)
    return Path(found) if found else None
