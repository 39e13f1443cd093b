"""Puts fault_injector.cc into programs, changes its rules while they run, and counts its faults."""

from __future__ import annotations

import collections
import os
import pathlib

STAMP_BYTES = 8
FILE_BYTES = 4096


class Injector:
    """The rules of one group of processes, and what was done to them.

    Start the processes with `environment()`; then `set("fallocate=ENOSPC/7")`, `set("")`.
    """

    def __init__(self, library: pathlib.Path, folder: pathlib.Path, name: str, state: pathlib.Path) -> None:
        self._library = library
        self._rules = folder / f"{name}.rules"
        self._report = folder / f"{name}.faults"
        self._state = state
        self._stamp = 0
        self._rules.write_bytes(bytes(FILE_BYTES))
        self._report.touch()
        self._seen = 0

    def environment(self) -> dict[str, str]:
        # Sanitizers want to be the first library, which only a preload's absence allows.
        options = os.environ.get("ASAN_OPTIONS", "")
        return {
            "LD_PRELOAD": str(self._library),
            "KVB_FAULT_FILE": str(self._rules),
            "KVB_FAULT_REPORT": str(self._report),
            "KVB_FAULT_STATE": str(self._state),
            "ASAN_OPTIONS": ":".join(filter(None, [options, "verify_asan_link_order=0"])),
        }

    def set(self, rules: str) -> None:
        """In force from now on, with all counts at zero, in processes alive and to come."""
        text = rules.encode() + b"\0"
        if STAMP_BYTES + len(text) > FILE_BYTES:
            raise ValueError(f"too many rules: {rules}")
        self._stamp += 1
        with self._rules.open("r+b") as file:
            file.seek(STAMP_BYTES)
            file.write(text)
            file.flush()
            file.seek(0)
            file.write(self._stamp.to_bytes(STAMP_BYTES, "little"))
            file.flush()
        self._seen = self._report.stat().st_size

    def hits(self) -> collections.Counter[str]:
        """How often which "CALL ERROR" happened since the last `set`."""
        with self._report.open() as file:
            file.seek(self._seen)
            return collections.Counter(
                line.split(" ", 1)[1].strip() for line in file if line.endswith("\n")
            )
