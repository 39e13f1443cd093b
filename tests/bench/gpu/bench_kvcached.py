"""Times kvcached through its own Python interface; prints JSON, microseconds.

One process measures one layout: KVCACHED_CONTIGUOUS_LAYOUT says which. The geometry is that of
bench_gpu: 32 layers, 8 KV heads of 128 elements of 2 bytes, blocks of 16 tokens, 64 of them a
page. Pages are mapped and unmapped where they are asked for and freed: nothing is kept or
prepared, as in bench_gpu's cold figures.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

os.environ["KVCACHED_PAGE_PREALLOC_ENABLED"] = "false"
os.environ["KVCACHED_MIN_RESERVED_PAGES"] = "0"
os.environ["KVCACHED_MAX_RESERVED_PAGES"] = "0"
_SEGMENT = f"bench_{os.getpid()}"
os.environ["KVCACHED_IPC_NAME"] = _SEGMENT

import torch
from kvcached import vmm_ops
from kvcached.integration.sglang import interfaces

_GIB = 1 << 30
_DEVICE = "cuda:0"
_LAYERS = 32
_BUFFERS = 2
_BLOCK_TOKENS = 16
_TOKEN_BYTES = 8 * 128 * 2
_BLOCKS_PER_PAGE = 64
_PAGES = 64
_ROUNDS = 5
_BATCHES = 20
_PAIRS = 500


def _now() -> float:
    return time.perf_counter() * 1e6


def main() -> None:
    samples: dict[str, list[float]] = {
        name: [] for name in ("reserve", "alloc_free", "grow", "ramp", "shrink")
    }
    torch.zeros(1, device=_DEVICE)
    interfaces.init_kvcached(device=_DEVICE)
    buffer_bytes = 128 * _GIB // _LAYERS // _BUFFERS
    start = _now()
    tensors = vmm_ops.create_kv_tensors(
        buffer_bytes * _BUFFERS, 2, _DEVICE, _LAYERS, num_kv_buffers=_BUFFERS
    )
    torch.cuda.synchronize()
    samples["reserve"].append(_now() - start)
    manager = interfaces.get_kv_cache_manager(
        num_blocks=buffer_bytes // (_BLOCK_TOKENS * _TOKEN_BYTES),
        block_size=_BLOCK_TOKENS,
        cell_size=_TOKEN_BYTES,
        num_layers=_LAYERS,
        reserve_null_block=False,
    )

    def alloc(blocks: int) -> list[int]:
        taken = manager.alloc(blocks)
        if taken is None:
            raise RuntimeError(f"kvcached has no {blocks} blocks")
        return taken

    manager.free(alloc(_BLOCKS_PER_PAGE))  # waits until it is ready
    keeps_the_page = alloc(16)
    for _ in range(_BATCHES):
        start = _now()
        for _ in range(_PAIRS):
            manager.free(alloc(16))
        samples["alloc_free"].append((_now() - start) / _PAIRS)
    manager.free(keeps_the_page)

    for _ in range(_ROUNDS):
        pages = []
        begin = _now()
        for _ in range(_PAGES):
            start = _now()
            pages.append(alloc(_BLOCKS_PER_PAGE))
            samples["grow"].append(_now() - start)
        samples["ramp"].append(_now() - begin)
        for page in pages:
            start = _now()
            manager.free(page)
            samples["shrink"].append(_now() - start)
    del tensors
    print(flush=True)
    print(json.dumps(samples), flush=True)
    Path("/dev/shm", _SEGMENT).unlink(missing_ok=True)
    # Its threads and its tensors' deleters do not always end well together.
    os._exit(0)


if __name__ == "__main__":
    main()
