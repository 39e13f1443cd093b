"""Times a block manager from Python; prints JSON, microseconds.

The same program runs with kvbroker's package and with kvcached: PYTHONPATH says which one is
imported. The geometry is that of bench_gpu: 32 layers, 8 KV heads of 128 elements of 2 bytes,
blocks of 16 tokens, 64 of them a page. On a machine without a GPU, --device cpu measures
kvbroker's package on host memory.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time

os.environ.setdefault("KVCACHED_IPC_NAME", f"bench_{os.getpid()}")

from kvcached.integration.sglang import interfaces  # noqa: E402  (after the name is set)

_LAYERS = 32
_BLOCK_TOKENS = 16
_TOKEN_BYTES = 8 * 128 * 2
_BLOCKS = 8 * 64
_BATCHES = 40


def _time(repeats: int, action: object) -> float:
    """The median over batches of one call's microseconds."""
    batches = []
    for _ in range(_BATCHES):
        start = time.perf_counter()
        for _ in range(repeats):
            action()  # type: ignore[operator]
        batches.append((time.perf_counter() - start) / repeats * 1e6)
    return statistics.median(batches)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda:0")
    options = parser.parse_args()
    interfaces.init_kvcached(device=options.device)
    tensors = None
    if options.device != "cpu":
        import torch

        shape = (_BLOCKS * _BLOCK_TOKENS, 8, 128)
        tensors = interfaces.alloc_kv_cache(
            shape, torch.bfloat16, options.device, _LAYERS, page_size=_BLOCK_TOKENS
        )
    manager = interfaces.get_kv_cache_manager(
        num_blocks=_BLOCKS,
        block_size=_BLOCK_TOKENS,
        cell_size=_TOKEN_BYTES,
        num_layers=_LAYERS,
    )
    deadline = time.monotonic() + 20
    while (held := manager.alloc(16)) is None:
        if time.monotonic() > deadline:
            sys.exit("no blocks within 20 s")
        time.sleep(0.01)

    def pair() -> None:
        manager.free(manager.alloc(16))

    figures = {
        "alloc_free_16_us": _time(500, pair),
        "available_size_us": _time(2000, manager.available_size),
    }
    manager.free(held)
    print(flush=True)
    print(json.dumps(figures), flush=True)
    del tensors
    # kvcached's threads and its tensors' deleters do not always end well together.
    os._exit(0)


if __name__ == "__main__":
    main()
