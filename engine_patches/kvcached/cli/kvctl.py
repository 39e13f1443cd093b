"""`python -m kvcached.cli.kvctl ...`: hands over to the program kvctl.

``kvctl`` from a shell does not come this way: the script of that name starts the
program itself, which is done before an interpreter has started.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from kvcached import programs


def program() -> Path | None:
    """The program, None where there is none; the script of its name is not it."""
    found = programs.find("kvctl")
    if found is None:
        return None
    with found.open("rb") as file:
        return found if file.read(4) == b"\x7fELF" else None


def main(argv: Sequence[str] | None = None) -> int:
    """Does not return where the program takes over; its exit status is kvctl's."""
    arguments: list[str] = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["kvtop"]:
        from kvcached.cli import kvtop

        return kvtop.main(arguments[1:])
    found = program()
    if found is None:
        print(
            "kvctl: this installation carries no kvctl; KVBROKER_BIN_DIR can name the folder "
            "that it is in",
            file=sys.stderr,
        )
        return 1
    _become(found, arguments)


def _become(found: Path, arguments: Sequence[str]) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(found, ["kvctl", *arguments])


if __name__ == "__main__":
    sys.exit(main())
