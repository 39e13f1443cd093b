"""What the import hook's .pth file costs at the start of an interpreter.

usage: python_startup.py [--runs N] [--pth FILE]

Starts this Python again and again in two environments that differ in the file only,
in turns, with the variables off, and compares the medians.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path

PTH = Path(__file__).resolve().parents[2] / "deploy" / "packaging" / "kvcached_autopatch.pth"
_WARM_UP = 10


def start_ms(python: str, env: dict[str, str]) -> float:
    begin = time.perf_counter()
    subprocess.run([python, "-c", "pass"], env=env, check=True)
    return (time.perf_counter() - begin) * 1000


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=300, help="of each kind")
    parser.add_argument("--pth", type=Path, default=PTH)
    options = parser.parse_args()

    env = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("KVCACHED_", "PYTHON")) and name != "ENABLE_KVCACHED"
    }
    with tempfile.TemporaryDirectory() as folder:
        pythons = {}
        for kind in ("without", "with", "also without"):
            place = Path(folder, kind.replace(" ", "_"))
            venv.create(place, symlinks=True)
            pythons[kind] = str(place / "bin" / "python")
            (site,) = place.glob("lib/python*/site-packages")
            if kind == "with":
                shutil.copy(options.pth, site)
        kinds = {kind: (python, env) for kind, python in pythons.items()}
        kinds["with, ENABLE_KVCACHED=0"] = (pythons["with"], {**env, "ENABLE_KVCACHED": "0"})
        times: dict[str, list[float]] = {kind: [] for kind in kinds}
        for run in range(-_WARM_UP, options.runs):
            for kind, started in kinds.items():
                taken = start_ms(*started)
                if run >= 0:
                    times[kind].append(taken)

    median = {kind: statistics.median(taken) for kind, taken in times.items()}
    print(
        f"{sys.version.split()[0]}, {options.runs} starts of each, with and without the .pth file, medians in ms"
    )
    for kind, value in median.items():
        print(f"  {kind:<24} {value:8.3f}")
    print(f"growth: {median['with'] - median['without']:.3f} ms", end="")
    print(
        f" (two environments without it differ by {median['also without'] - median['without']:.3f})"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
