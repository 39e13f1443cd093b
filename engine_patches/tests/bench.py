"""Prints what the package's calls cost, on a broker with the host backend.

Run it with the environment that run.sh makes: `run.sh --bench`.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

from broker import environment, eventually, running_broker

BLOCKS = 16


def microseconds(call: Callable[[], object], calls: int = 20_000, rounds: int = 7) -> float:
    """The median round's mean."""
    taken = []
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in range(calls):
            call()
        taken.append((time.perf_counter() - start) / calls * 1e6)
    return statistics.median(taken)


def import_milliseconds(module: str) -> float:
    """In a fresh interpreter, the quickest of several."""
    program = (
        f"import time; start = time.perf_counter(); import {module}; "
        "print((time.perf_counter() - start) * 1e3)"
    )
    command = [sys.executable, "-W", "error", "-c", program]
    return min(
        float(subprocess.run(command, check=True, capture_output=True).stdout) for _ in range(7)
    )


def main() -> None:
    for module in ("kvcached", "kvcached.integration.vllm.interfaces"):
        print(f"import {module}: {import_milliseconds(module):.1f} ms")
    with running_broker("256M") as broker:
        os.environ.update(environment(broker))
        from kvcached.integration.vllm import interfaces
        from kvcached.kv_cache_manager import KVCacheManager

        interfaces.init_kvcached(device="cpu")
        mine = KVCacheManager(4096, BLOCKS, 4096, 2)
        if not eventually(lambda: mine.alloc(4 * BLOCKS)):
            raise RuntimeError("no blocks")
        both = microseconds(lambda: mine.free(mine.alloc(BLOCKS) or []))
        print(f"alloc + free of {BLOCKS} blocks: {both:.2f} us")
        print(f"available_size: {microseconds(mine.available_size):.2f} us")
        interfaces.shutdown_kvcached()


if __name__ == "__main__":
    main()
