"""`python -m kvcached.controller --config FILE`: hands over to the program."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from kvcached import programs


def main(argv: Sequence[str] | None = None) -> int:
    found = programs.find("kvcontroller")
    if found is None:
        print(
            "kvcontroller: this release has no controller yet; start engines by hand, and use "
            "kvctl for their limits",
            file=sys.stderr,
        )
        return 1
    os.execv(found, ["kvcontroller", *(sys.argv[1:] if argv is None else argv)])


if __name__ == "__main__":
    sys.exit(main())
