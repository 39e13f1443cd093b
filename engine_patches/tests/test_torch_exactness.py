"""No byte of a block changes while another process takes memory and gives it back."""

from __future__ import annotations

import random

import torch
from broker import BrokerTest, eventually
from test_processes import start
from test_torch_tensors import fill, has

from kvcached.integration.vllm import interfaces as vllm

BLOCK, HEADS, DIM, LAYERS, BLOCKS = 16, 64, 64, 2, 200

NEIGHBOUR = """
    rng = random.Random(7)
    mine = KVCacheManager(1000, 16, CELL, 2)
    print("ready", flush=True)
    done = threading.Event()
    def stop():
        sys.stdin.readline()
        done.set()
    threading.Thread(target=stop, daemon=True).start()
    most = 0
    while not done.is_set():
        held = []
        while (got := mine.alloc(rng.randrange(1, 20))) and len(held) < 60:
            held += got
        most = max(most, len(held) + len(got or []))
        mine.free(held + (got or []))
        if rng.random() < 0.3:
            mine.trim()
    print(most)
    """


class Reclaim(BrokerTest):
    CAPACITY = "96M"  # 12 pages of this size

    def use(self, contiguous: bool) -> None:
        self.setenv(KVCACHED_CONTIGUOUS_LAYOUT=str(contiguous).lower())
        vllm.init_kvcached(device="cpu")
        tensors = vllm.alloc_kv_cache(
            (2, BLOCKS, BLOCK, HEADS, DIM), BLOCK, torch.float16, "cpu", LAYERS
        )
        mine = vllm.get_kv_cache_manager(None, BLOCK, HEADS * DIM * 2, LAYERS)
        pool = mine.pool
        neighbour = start(NEIGHBOUR, KVCACHED_IPC_NAME="neighbour")
        assert neighbour.stdout is not None
        self.assertEqual(neighbour.stdout.readline(), "ready\n")

        rng = random.Random(3)
        held: dict[int, int] = {}  # block: what it was filled with
        cached: dict[int, tuple[int, int]] = {}  # block: that, and its generation
        counts = dict.fromkeys(("taken", "missed", "kept", "lost"), 0)

        def check(block: int, seed: int) -> None:
            for layer, tensor in enumerate(tensors):
                for part in range(2):
                    self.assertTrue(has(tensor[part, block], seed * 8 + layer * 2 + part))

        for step in range(200):
            choice = rng.random()
            if choice < 0.45:
                got = mine.alloc(rng.randrange(1, 9))
                counts["missed" if got is None else "taken"] += 1
                for block in got or []:
                    self.assertNotIn(block, held)
                    cached.pop(block, None)
                    held[block] = step * 256 + block
                    for layer, tensor in enumerate(tensors):
                        for part in range(2):
                            fill(tensor[part, block], held[block] * 8 + layer * 2 + part)
            elif choice < 0.65 and held:
                block = rng.choice(sorted(held))
                check(block, held[block])
                mine.free([block])
                del held[block]
            elif choice < 0.85 and held:
                block = rng.choice(sorted(held))
                (generation,) = pool.generations([block])
                cached[block] = held.pop(block), generation
                pool.cache([block])
            elif cached:
                block = rng.choice(sorted(cached))
                seed, generation = cached.pop(block)
                if pool.touch([block], [generation]):
                    counts["kept"] += 1
                    held[block] = seed
                    check(block, seed)
                else:
                    counts["lost"] += 1
            if len(held) > 50:
                mine.free(sorted(held)[:25])
                for block in sorted(held)[:25]:
                    del held[block]
        for block, seed in held.items():
            check(block, seed)
        assert neighbour.stdin is not None
        out, err = neighbour.communicate("stop\n", timeout=60)
        self.assertEqual((neighbour.returncode, err), (0, ""))
        self.assertGreater(int(out), 0)
        for name in ("taken", "kept"):
            self.assertGreater(counts[name], 0, counts)
        self.assertTrue(eventually(lambda: mine.alloc(20)))
        vllm.shutdown_kvcached()

    def test_contiguous(self) -> None:
        self.use(True)

    def test_per_layer(self) -> None:
        self.use(False)


if __name__ == "__main__":
    import unittest

    unittest.main()
