"""Bytes stay what they are while another process takes memory.

On host memory; with KVCACHED_TEST_DEVICE=cuda:0 on a GPU. KVCACHED_TEST_BLOCKS says how many
blocks each of two processes may have. Prints how long taking took.
"""

from __future__ import annotations

import ctypes
import os
import random
import statistics
import subprocess
import sys
import textwrap
import threading
import time
import unittest

import torch
from broker import DEVICE, TIMEOUT_S, BrokerTest, take

from kvcached.integration.vllm import interfaces as vllm

BLOCKS = int(os.environ.get("KVCACHED_TEST_BLOCKS", "2000"))
LAYERS = 2
BLOCK_TOKENS = 16
HEADS = 8
DIM = 64
CELL = HEADS * DIM * 2  # bytes of a token in one layer's K or V
PAGE_BYTES = (2 << 20) * LAYERS * 2
PAGE_BLOCKS = (2 << 20) // (BLOCK_TOKENS * CELL)
PAGES = BLOCKS // PAGE_BLOCKS

PRELUDE = f"""
import ctypes, os, random, sys, time
sys.path.insert(0, {os.path.dirname(os.path.abspath(__file__))!r})
from broker import eventually
from kvcached import _C
from kvcached.integration.vllm import interfaces as vllm
from kvcached.kv_cache_manager import KVCacheManager
vllm.init_kvcached(device={DEVICE!r})
mine = KVCacheManager({BLOCKS}, {BLOCK_TOKENS}, {CELL}, {LAYERS}, reserve_null_block=True)
"""


class Cache:
    """KV tensors whose blocks carry a number, and who must have which."""

    def __init__(self) -> None:
        vllm.init_kvcached(device=DEVICE)
        shape = (2, BLOCKS, BLOCK_TOKENS, HEADS, DIM)
        self.tensors = vllm.alloc_kv_cache(shape, BLOCK_TOKENS, torch.int16, DEVICE, LAYERS)
        self.manager = vllm.get_kv_cache_manager(BLOCKS, BLOCK_TOKENS, CELL, LAYERS)
        self.numbers: dict[int, int] = {}
        self._next = 0

    def write(self, blocks: list[int]) -> None:
        """A number of its own to all elements of each block."""
        for block in blocks:
            self._next = self._next % 30_000 + 1
            self.numbers[block] = self._next
        ids = torch.tensor(blocks, device=DEVICE)
        values = torch.tensor([self.numbers[b] for b in blocks], dtype=torch.int16, device=DEVICE)
        for layer, tensor in enumerate(self.tensors):
            for kv in range(2):
                tensor[kv, ids] = (values + 2 * layer + kv).view(-1, 1, 1, 1)

    def wrong(self, blocks: list[int]) -> int:
        """How many elements of these blocks are not what was written."""
        if not blocks:
            return 0
        ids = torch.tensor(blocks, device=DEVICE)
        values = torch.tensor([self.numbers[b] for b in blocks], dtype=torch.int16, device=DEVICE)
        count = 0
        for layer, tensor in enumerate(self.tensors):
            for kv in range(2):
                want = (values + 2 * layer + kv).view(-1, 1, 1, 1)
                count += int((tensor[kv, ids] != want).sum())
        return count

    def take(self, count: int) -> list[int]:
        return take(self.manager, count)


class Neighbour:
    """Another process; runs a program whose ``mine`` is a manager."""

    def __init__(self, program: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", PRELUDE + textwrap.dedent(program)],
            env={**os.environ, "KVCACHED_IPC_NAME": "neighbour"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def say(self, text: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(text + "\n")
        self.process.stdin.flush()

    def end(self) -> int:
        try:
            self.process.communicate(timeout=TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.communicate()
        return self.process.returncode


class WithNeighbour(BrokerTest):
    def neighbour(self, program: str) -> Neighbour:
        """That has said it is ready."""
        neighbour = Neighbour(program)
        self.addCleanup(neighbour.end)
        self.addCleanup(neighbour.process.kill)
        self.assertEqual(neighbour.line(), "ready")
        return neighbour


class Reclaim(WithNeighbour):
    # Of what the two want.
    CAPACITY = str(PAGES * 4 // 3 * PAGE_BYTES)

    def test_random_blocks_are_byte_exact_while_another_process_takes_memory(self) -> None:
        cache = Cache()
        manager, pool = cache.manager, cache.manager.pool
        neighbour = self.neighbour(
            """
            rng = random.Random(5)
            print("ready", flush=True)
            taken, rounds = [], 0
            import select
            while not select.select([sys.stdin], [], [], 0)[0]:
                got = mine.alloc(rng.randrange(1, mine.num_blocks // 3))
                if got is not None:
                    taken.append(got)
                    rounds += 1
                while taken and (got is None or len(taken) > 2):
                    mine.free(taken.pop(0))
                    got = got or []
            print(rounds, flush=True)
            """
        )
        rng = random.Random(7)
        live: list[list[int]] = []  # requests
        prefixes: dict[int, tuple[list[int], list[int]]] = {}  # cached: blocks, generations
        wrote = wrong = hits = lost = missed = 0
        key = 0
        deadline = time.monotonic() + TIMEOUT_S
        while (wrote < 5 * BLOCKS or hits == 0 or lost == 0) and time.monotonic() < deadline:
            action = rng.random()
            if action < 0.45:
                blocks = manager.alloc(rng.randrange(1, 64))
                if blocks is None:
                    missed += 1
                    for request in live[: len(live) // 2]:
                        wrong += cache.wrong(request)
                        manager.free(request)
                    del live[: len(live) // 2]
                    continue
                cache.write(blocks)
                wrote += len(blocks)
                live.append(blocks)
            elif action < 0.6 and live:
                request = live.pop(rng.randrange(len(live)))
                wrong += cache.wrong(request)
                manager.free(request)
            elif action < 0.8 and live:
                request = live.pop(rng.randrange(len(live)))
                generations = pool.generations(request)
                pool.cache(request)
                key += 1
                prefixes[key] = (request, generations)
            elif prefixes:
                blocks, generations = prefixes.pop(rng.choice(list(prefixes)))
                if pool.touch(blocks, generations):
                    hits += 1
                    wrong += cache.wrong(blocks)
                    live.append(blocks)
                else:
                    lost += 1
                    # What of it is still there is of no use by itself.
                    for block, generation in zip(blocks, generations):
                        if pool.touch([block], [generation]):
                            wrong += cache.wrong([block])
                            manager.free([block])
        for request in live:
            wrong += cache.wrong(request)
        neighbour.say("enough")
        rounds = int(neighbour.line())
        print(
            f"\n  {wrote} blocks written, {missed} allocs without memory; cached prefixes: {hits} "
            f"found, {lost} taken; the neighbour took memory {rounds} times; wrong: {wrong}"
        )
        self.assertEqual(wrong, 0)
        self.assertGreater(hits, 0)
        self.assertGreater(lost, 0)
        self.assertGreater(rounds, 0)


class StandingStill(WithNeighbour):
    # All of the holder's, and the neighbour's page with its null block.
    CAPACITY = str((PAGES + 1) * PAGE_BYTES)

    def test_cached_pages_leave_while_the_holders_python_stands_still(self) -> None:
        neighbour = self.neighbour(
            f"""
            pool = mine.pool
            assert eventually(lambda: mine.alloc(1))
            print("ready", flush=True)
            while sys.stdin.readline():
                start = time.perf_counter()
                got = None
                while got is None:
                    got = pool.alloc({2 * PAGE_BLOCKS}, _C.RUNNING)
                print((time.perf_counter() - start) * 1e3, flush=True)
                mine.free(got)
                mine.trim()
            """
        )
        cache = Cache()
        pool = cache.manager.pool
        # No thread of this interpreter runs while this sleeps.
        holds_the_gil = ctypes.PyDLL(None)
        times = []
        for _ in range(10):
            held = []
            while sum(pool.usage()[:3]) < PAGES * PAGE_BYTES or pool.available() > PAGE_BLOCKS:
                held.extend(cache.take(PAGE_BLOCKS))
            cache.write(held)
            pool.cache(held)
            generations = pool.generations(held)
            cached = pool.usage()[1]
            neighbour.say("take")
            holds_the_gil.usleep(300_000)
            self.assertLess(pool.usage()[1], cached)
            times.append(float(neighbour.line()))
            self.assertFalse(pool.touch(held, generations))
            still = [b for b, g in zip(held, generations) if pool.touch([b], [g])]
            self.assertEqual(cache.wrong(still), 0)
            cache.manager.free(still)
            cache.numbers.clear()
        print(
            f"\n  {len(times)} times {2 * PAGE_BYTES >> 20} MiB of cached pages from who "
            f"holds its GIL: p50 {statistics.median(times):.2f} ms, most {max(times):.2f} ms"
        )


class UnderLoad(BrokerTest):
    CAPACITY = str(PAGES * PAGE_BYTES)

    def test_a_manager_allocates_frees_resizes_and_trims_while_kernels_run(self) -> None:
        cache = Cache()
        manager = cache.manager
        rng = random.Random(11)
        stop = threading.Event()
        failures: list[BaseException] = []

        def compute() -> None:
            try:
                if DEVICE != "cpu":
                    torch.cuda.set_stream(torch.cuda.Stream())
                a = torch.randn(512, 512, device=DEVICE)
                while not stop.is_set():
                    for _ in range(16):
                        a = torch.tanh(a @ a)
                    a = torch.randn(512, 512, device=DEVICE)
            except BaseException as error:
                failures.append(error)

        worker = threading.Thread(target=compute)
        worker.start()
        live: list[list[int]] = []
        wrong = trims = resizes = 0
        page = manager.page_size
        most = manager.num_blocks * manager.block_mem_size
        try:
            for step in range(400):
                blocks = manager.alloc(rng.randrange(1, 100))
                if blocks is not None:
                    cache.write(blocks)
                    live.append(blocks)
                while live and (blocks is None or len(live) > 12):
                    request = live.pop(rng.randrange(len(live)))
                    wrong += cache.wrong(request)
                    manager.free(request)
                    blocks = blocks or []
                if step % 20 == 7:
                    manager.trim()
                    trims += 1
                if step % 40 == 13:
                    manager.resize(max(page, most // rng.randrange(1, 8)))
                    resizes += 1
                self.assertGreaterEqual(manager.available_size(), 0)
            for request in live:
                wrong += cache.wrong(request)
                manager.free(request)
        finally:
            stop.set()
            worker.join()
        self.assertEqual(failures, [])
        self.assertEqual(wrong, 0)
        self.assertTrue(manager.resize(most))
        manager.trim()
        in_use = manager.pool.usage()[0]
        print(f"\n  {trims} trims, {resizes} resizes; in use at the end: {in_use >> 20} MiB")
        self.assertLessEqual(in_use, PAGE_BYTES)  # the null block's page


if DEVICE != "cpu":

    class Graphs(BrokerTest):
        CAPACITY = str(PAGES * PAGE_BYTES)

        def test_graphs_are_captured_while_pages_come_and_go(self) -> None:
            cache = Cache()
            manager = cache.manager
            stop = threading.Event()
            cycles = [0]
            failures: list[BaseException] = []

            def churn() -> None:
                try:
                    while not stop.is_set():
                        blocks = manager.alloc(2 * PAGE_BLOCKS)
                        if blocks is not None:
                            manager.free(blocks)
                            manager.trim()
                            cycles[0] += 1
                except BaseException as error:
                    failures.append(error)

            keep = cache.take(8)
            cache.write(keep)
            a = torch.randn(256, 256, device=DEVICE)
            # What the first use of a library makes cannot be made in a capture.
            side = torch.cuda.Stream()
            with torch.cuda.stream(side):
                for _ in range(3):
                    torch.tanh(a @ a)
            torch.cuda.synchronize()
            worker = threading.Thread(target=churn)
            worker.start()
            captured = 0
            try:
                for _ in range(20):
                    graph = torch.cuda.CUDAGraph()
                    with torch.cuda.graph(graph, stream=side):
                        b = a
                        for _ in range(200):
                            b = torch.tanh(b @ a)
                    graph.replay()
                    captured += 1
            finally:
                stop.set()
                worker.join()
            torch.cuda.synchronize()
            print(f"\n  {captured} graphs captured while pages came and went {cycles[0]} times")
            self.assertEqual(failures, [])
            self.assertGreater(cycles[0], 0)
            self.assertEqual(cache.wrong(keep), 0)


if __name__ == "__main__":
    unittest.main()
