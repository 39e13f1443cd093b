"""KVCacheManager on a real broker."""

from __future__ import annotations

import gc
import json
import os
import random
import struct
import threading
from functools import partial
from pathlib import Path
from unittest import mock

from broker import MIB, BrokerTest, environment, eventually, take, use_environment

from kvcached import config, control, utils, vmm_ops
from kvcached.errors import KVCachedConfigError
from kvcached.integration.sglang import interfaces as sglang
from kvcached.integration.vllm import interfaces as vllm
from kvcached.kv_cache_manager import KVCacheManager
from kvcached.runtime import Group, runtime

# A block of 16 cells in 2 layers' K and V; a page of 2 MB of each holds 8 of them.
CELL = 16 << 10
LAYERS = 2
BLOCKS_PER_PAGE = 2 * MIB // (16 * CELL)
PAGE = 2 * MIB * LAYERS * 2


def manager(num_blocks: int = 1000, **more: object) -> KVCacheManager:
    return KVCacheManager(num_blocks, 16, CELL, LAYERS, **more)  # type: ignore[arg-type]


def reserve(mine: KVCacheManager, count: int) -> None:
    if not eventually(lambda: mine.try_to_reserve(count)):
        raise AssertionError(f"no {count} blocks; there are {mine.available_size()}")


class Blocks(BrokerTest):
    CAPACITY = "64M"  # 8 pages

    def setUp(self) -> None:
        super().setUp()
        vllm.init_kvcached(device="cpu")

    def test_alloc_is_for_all_or_none(self) -> None:
        mine = manager()
        blocks = take(mine, 8 * BLOCKS_PER_PAGE)
        self.assertEqual(len(set(blocks)), 8 * BLOCKS_PER_PAGE)
        self.assertIsNone(mine.alloc(1))
        self.assertEqual(mine.available_size(), 0)
        mine.free(blocks)
        self.assertEqual(mine.available_size(), 8 * BLOCKS_PER_PAGE)
        self.assertIsNone(mine.alloc(8 * BLOCKS_PER_PAGE + 1))
        self.assertEqual(mine.available_size(), 8 * BLOCKS_PER_PAGE)

    def test_who_asks_how_much_there_is_comes_to_see_all(self) -> None:
        mine = manager()
        self.assertTrue(eventually(lambda: mine.available_size() == 8 * BLOCKS_PER_PAGE))

    def test_the_null_block_is_backed_and_never_handed_out(self) -> None:
        mine = manager(reserve_null_block=True)
        self.assertEqual(mine.null_block, [0])
        blocks = take(mine, 1)
        self.assertEqual(mine.get_page_occupancy([0])[0], 2)
        mine.free(blocks)
        blocks = take(mine, 8 * BLOCKS_PER_PAGE - 1)
        self.assertNotIn(0, blocks)
        with self.assertLogs("kvcached", "ERROR") as logs:
            mine.free([0])
        self.assertIn("0", logs.output[0])
        self.assertEqual(mine.get_page_occupancy([0])[0], BLOCKS_PER_PAGE)

    def test_ids_are_below_num_blocks(self) -> None:
        mine = manager(num_blocks=5)
        self.assertIsNone(mine.alloc(6))
        self.assertEqual(sorted(take(mine, 5)), [0, 1, 2, 3, 4])

    def test_more_than_there_are_ids_is_none(self) -> None:
        mine = manager()
        for many in (1001, 10**10, 1 << 70):
            self.assertIsNone(mine.alloc(many))
            self.assertFalse(mine.try_to_reserve(many))
        self.assertEqual(len(take(mine, 1)), 1)

    def test_nothing_is_fine(self) -> None:
        mine = manager()
        self.assertEqual(mine.alloc(0), [])
        mine.free([])
        self.assertTrue(mine.try_to_reserve(0))

    def test_reserved_blocks_are_for_the_next_allocs(self) -> None:
        mine = manager()
        reserve(mine, 5)
        reserved = mine.reserved_blocks
        self.assertEqual(len(reserved), 5)
        self.assertGreaterEqual(mine.available_size(), 5)
        got = take(mine, 7)
        self.assertEqual(got[:5], reserved)
        self.assertEqual(mine.reserved_blocks, [])
        mine.free(got)
        reserve(mine, 3)
        mine.free_reserved()
        self.assertEqual(mine.reserved_blocks, [])
        self.assertEqual(mine.pool.used_blocks(), [])

    def test_a_miss_leaves_reserved_blocks_reserved(self) -> None:
        mine = manager()
        reserve(mine, 5)
        reserved = mine.reserved_blocks
        self.assertIsNone(mine.alloc(8 * BLOCKS_PER_PAGE + 1))
        self.assertEqual(mine.reserved_blocks, reserved)
        self.assertFalse(mine.try_to_reserve(8 * BLOCKS_PER_PAGE))
        self.assertEqual(mine.reserved_blocks, reserved)

    def test_wrong_frees_are_logged_and_the_others_are_done(self) -> None:
        mine = manager()
        blocks = take(mine, 4)
        mine.free(blocks[:1])
        with self.assertLogs("kvcached", "ERROR"):
            mine.free([*blocks, blocks[1], 999, 5000, -3, 1 << 40, 1 << 70, -(1 << 70)])
        self.assertEqual(mine.pool.used_blocks(), [])

    def test_reserved_blocks_are_not_freed(self) -> None:
        mine = manager()
        reserve(mine, 2)
        blocks = mine.pool.alloc(1) or []
        with self.assertLogs("kvcached", "ERROR"):
            mine.free([*mine.reserved_blocks, *blocks])
        self.assertEqual(mine.pool.used_blocks(), sorted(mine.reserved_blocks))

    def test_negative_numbers(self) -> None:
        mine = manager()
        for call in (mine.alloc, mine.try_to_reserve, mine.resize):
            with self.assertRaises(ValueError):
                call(-1)
        with self.assertRaises(ValueError):
            mine.set_memory_limit(-1, revision=1)
        with self.assertRaises(ValueError):
            mine.set_memory_limit(1, revision=-1)

    def test_figures(self) -> None:
        mine = manager()
        take(mine, BLOCKS_PER_PAGE + 1)
        self.assertEqual(mine.get_mapped_memory_size(), 2 * PAGE)
        self.assertEqual(mine.get_mapped_memory_size("kb"), 2 * PAGE / 1024)
        self.assertEqual(mine.get_mapped_memory_size("mb"), 2 * PAGE / MIB)
        self.assertEqual(mine.get_mapped_memory_size("gb"), 2 * PAGE / MIB / 1024)
        with self.assertRaises(ValueError):
            mine.get_mapped_memory_size("tb")
        occupancy = mine.get_page_occupancy([*range(125), 125, 10**6, -1])
        self.assertEqual(sum(occupancy.values()), BLOCKS_PER_PAGE + 1)
        self.assertEqual((occupancy[10**6], occupancy[-1]), (0, 0))

    def test_trim_returns_empty_pages(self) -> None:
        mine = manager()
        mine.free(take(mine, 20))
        self.assertNotEqual(mine.pool.usage()[2], 0)
        mine.trim()
        self.assertTrue(eventually(lambda: mine.pool.usage()[2] == 0))

    def test_no_more_prefixes_are_kept_than_the_environment_says(self) -> None:
        from kvcached import _C

        for tokens, kept in (("40", 2), ("0", 0), ("-1", 5)):
            vllm.shutdown_kvcached()
            self.setenv(KVCACHED_MAX_CACHED_TOKENS=tokens)
            vllm.init_kvcached(device="cpu")
            mine = manager()
            blocks = take(mine, 5)
            mine.pool.cache(blocks)
            with self.subTest(tokens=tokens):
                states = [mine.pool.state(block) for block in blocks]
                self.assertEqual(states, [_C.FREE] * (5 - kept) + [_C.CACHED] * kept)

    def test_clear_frees_everything(self) -> None:
        mine = manager(reserve_null_block=True)
        pool = mine.pool
        blocks = take(mine, 20)
        pool.cache(blocks[:10])
        reserve(mine, 2)
        mine.clear()
        self.assertEqual(mine.reserved_blocks, [])
        self.assertEqual(pool.used_blocks(), [])
        self.assertTrue(eventually(lambda: pool.usage()[:3] == (PAGE, 0, 0)))
        self.assertEqual(len(take(mine, 20)), 20)

    def test_random_use_by_threads(self) -> None:
        mine = manager()
        owners: dict[int, int] = {}
        problems: list[str] = []

        def give(who: int, gone: list[int]) -> None:
            for block in gone:
                if owners.pop(block) != who:
                    problems.append(f"block {block} was taken twice")
            mine.free(gone)

        def use(who: int) -> None:
            rng = random.Random(who)
            mine_now: list[int] = []
            for _ in range(400):
                if rng.random() < 0.5:
                    wanted = rng.randrange(1, 12)
                    got = mine.alloc(wanted)
                    if got is None:
                        continue
                    if len(got) != wanted:
                        problems.append(f"{len(got)} blocks, not {wanted}")
                    for block in got:
                        if owners.setdefault(block, who) != who:
                            problems.append(f"block {block} is {owners[block]}'s")
                    mine_now += got
                elif mine_now:
                    rng.shuffle(mine_now)
                    cut = rng.randrange(len(mine_now)) + 1
                    give(who, mine_now[:cut])
                    mine_now = mine_now[cut:]
            give(who, mine_now)

        threads = [threading.Thread(target=use, args=(who,)) for who in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.assertEqual(problems, [])
        self.assertEqual(mine.pool.used_blocks(), [])


class SanityChecks(BrokerTest):
    def test_raise_and_free_nothing(self) -> None:
        self.setenv(KVCACHED_SANITY_CHECK="1")
        vllm.init_kvcached(device="cpu")
        mine = manager(reserve_null_block=True)
        blocks = take(mine, 3)
        mine.free(blocks[:1])
        for wrong in (
            blocks,
            [blocks[1], blocks[1]],
            [0],
            [999],
            [-1],
            [10**9],
            [1 << 40],
            [1 << 70],
        ):
            with self.subTest(wrong=wrong), self.assertRaises(ValueError):
                mine.free(wrong)
        self.assertEqual(mine.pool.used_blocks(), sorted(blocks[1:]))
        reserve(mine, 1)
        with self.assertRaises(ValueError):
            mine.free(mine.reserved_blocks)
        self.assertEqual(len(mine.reserved_blocks), 1)


class Making(BrokerTest):
    def test_before_init(self) -> None:
        text = "kvcached is not initialized. Please call init_kvcached() first."
        for call in (
            lambda: vllm.get_kv_cache_manager(10, 16, CELL, LAYERS),
            lambda: sglang.get_kv_cache_manager(10, 16, CELL, LAYERS),
            lambda: manager(),
            lambda: vllm.alloc_kv_cache((2, 8, 16, 1, 8), 16, None, "cpu", 1),  # type: ignore
            lambda: sglang.alloc_kv_cache((8, 1, 8), None, "cpu", 1),  # type: ignore
            vllm.get_world_size,
        ):
            with self.assertRaises(RuntimeError) as raised:
                call()
            self.assertEqual(str(raised.exception), text)

    def test_wrong_figures(self) -> None:
        vllm.init_kvcached(device="cpu")
        for arguments in ((0, 16, CELL, 1), (9, 0, CELL, 1), (9, 16, 0, 1), (9, -1, -1, 1)):
            with self.subTest(arguments=arguments), self.assertRaises(ValueError):
                KVCacheManager(*arguments)
        with self.assertRaises(ValueError):
            KVCacheManager(9, 16, CELL, 1, num_kv_buffers=0)
        with self.assertRaises(ValueError):
            vllm.get_kv_cache_manager(None, 16, CELL, 1)
        with self.assertRaises(ValueError):
            manager(group_id=-1).alloc(1)

    def test_a_block_larger_than_a_page(self) -> None:
        vllm.init_kvcached(device="cpu")
        with self.assertRaises(utils.KVCachedConfigError) as raised:
            KVCacheManager(10, 16, 200_000, 1)
        self.assertIn("KVCACHED_PAGE_SIZE_MB=8", str(raised.exception))
        vllm.shutdown_kvcached()
        self.setenv(KVCACHED_PAGE_SIZE_MB="8")
        vllm.init_kvcached(device="cpu")
        self.assertEqual(len(take(KVCacheManager(10, 16, 200_000, 1), 2)), 2)

    def test_several_ranks(self) -> None:
        for interfaces in (vllm, sglang):
            for arguments in ({"tp_size": 2}, {"world_size": 2}, {"pp_rank": 1}):
                with self.subTest(interfaces=interfaces.__name__, arguments=arguments):
                    interfaces.init_kvcached(device="cpu", **arguments)
                    with self.assertRaises(KVCachedConfigError):
                        interfaces.get_kv_cache_manager(10, 16, CELL, 1)
                    interfaces.shutdown_kvcached()
        vllm.init_kvcached(device="cpu")
        with self.assertRaises(KVCachedConfigError):
            manager(world_size=2)

    def test_one_manager_a_group(self) -> None:
        vllm.init_kvcached(device="cpu")
        first = manager()
        take(first, 5)
        with self.assertRaises(KVCachedConfigError):
            manager()
        other = manager(group_id=1)
        take(other, 5)
        del first
        again = manager(num_blocks=30)
        self.assertEqual(again.pool.used_blocks(), [])
        self.assertEqual(len(take(again, 30)), 30)
        self.assertEqual(len(other.pool.used_blocks()), 5)

    def test_a_manager_that_is_dropped_returns_its_blocks(self) -> None:
        vllm.init_kvcached(device="cpu")
        mine = manager()
        take(mine, 5)
        reserve(mine, 2)
        pool = mine.pool
        del mine
        gc.collect()
        self.assertEqual(pool.used_blocks(), [])
        # One that is shut down has nothing any more to return.
        first = manager()
        take(first, 1)
        first.shutdown()
        self.assertTrue(vmm_ops.map_to_kv_tensors([0]))
        del first
        gc.collect()
        self.assertEqual(pool.used_blocks(), [0])

    def test_reserved_blocks_end_with_the_manager(self) -> None:
        vllm.init_kvcached(device="cpu")
        first, second = manager(), manager(group_id=1)
        for mine, end in ((first, first.shutdown), (second, vllm.shutdown_kvcached)):
            reserve(mine, 2)
            end()
            self.assertEqual(mine.reserved_blocks, [])
            for call in (
                partial(mine.alloc, 0),
                partial(mine.alloc, 1),
                partial(mine.alloc, 1 << 70),
                partial(mine.free, []),
                partial(mine.try_to_reserve, 0),
                mine.available_size,
            ):
                with self.assertRaises(RuntimeError):
                    call()

    def test_a_later_init_keeps_the_ranks(self) -> None:
        vllm.init_kvcached(tp_rank=1, tp_size=2, pp_rank=1, device="cpu")
        vmm_ops.init_kvcached("cpu")
        vllm.init_kvcached(is_worker=True)
        self.assertEqual((runtime.tp_rank, runtime.tp_size, runtime.pp_rank), (1, 2, 1))
        with self.assertRaises(ValueError):
            vllm.init_kvcached(tp_rank=2)

    def test_sglangs_manager_takes_no_more_than_the_tensors_have(self) -> None:
        sglang.init_kvcached(device="cpu")
        layout = sglang.get_kv_cache_manager(100, 16, CELL, LAYERS, group_id=1).layout
        runtime.open_for_tensors(0, layout)
        with self.assertLogs("kvcached", "WARNING") as logs:
            mine = sglang.get_kv_cache_manager(1600, 16, CELL, LAYERS)
        self.assertIn("num_blocks=1600", logs.output[0])
        self.assertEqual(mine.num_blocks, 100)
        mine.shutdown()
        with self.assertRaises(ValueError):
            vllm.get_kv_cache_manager(1600, 16, CELL, LAYERS)
        self.assertEqual(sglang.get_kv_cache_manager(100, 16, CELL, LAYERS).num_blocks, 100)

    def test_what_kvcacheds_own_callers_find(self) -> None:
        vllm.init_kvcached(device="cpu")
        mine = vllm.get_kv_cache_manager(100, 16, CELL, LAYERS, pool_name="kv")
        self.assertEqual(mine.ipc_name, "test")
        self.assertFalse(mine.defer_physical_release)
        self.assertIsNone(mine.physical_release_barrier)
        mine.release_retired_pages_through(mine.capture_physical_release_marker())
        blocks = take(mine, 3)
        self.assertEqual(mine.observability_snapshot().allocated_blocks, 3)
        shown = mine.observability_snapshot_dict(integration="other")
        self.assertEqual((shown["integration"], shown["pool_name"]), ("other", "kv"))
        self.assertEqual(mine.observability_snapshot_dict()["integration"], "vllm")
        mine.free(blocks)

    def test_a_manager_that_was_never_used_leaves_no_trace(self) -> None:
        vllm.init_kvcached(device="cpu")
        gc.disable()
        self.addCleanup(gc.enable)
        for _ in range(3):
            manager()
        self.assertEqual(runtime.managers(), [])
        self.assertEqual(runtime.groups(), [])

    def test_the_guarantee_is_that_of_the_environment(self) -> None:
        self.setenv(KVBROKER_MIN="10M")
        vllm.init_kvcached(device="cpu")
        self.assertEqual(manager().group.session.limits()[0], 10 * MIB)

    def test_a_guarantee_may_be_a_fraction(self) -> None:
        total = self.limit_with(KVCACHED_IPC_NAME="whole", KVCACHED_GPU_UTILIZATION="1")
        percent = 16 * MIB * 100 / total
        self.setenv(KVCACHED_IPC_NAME="part", KVBROKER_MIN=f"{percent:.6f}%")
        vllm.init_kvcached(device="cpu")
        self.assertAlmostEqual(
            manager().group.session.limits()[0], 16 * MIB, delta=total * 1e-8 + 1
        )

    def test_labels_are_told(self) -> None:
        self.setenv(KVBROKER_LABELS="model=llama,pod=p-1")
        vllm.init_kvcached(device="cpu")
        take(manager(), 1)
        (listed,) = json.loads(self.broker.kvctl("list", "--json"))
        self.assertEqual(listed["labels"], {"model": "llama", "pod": "p-1"})

    def test_the_view_for_others_lasts_as_long_as_the_instance(self) -> None:
        name = f"kvcached-test-{os.getpid()}"
        view = Path("/dev/shm") / name
        self.setenv(KVCACHED_IPC_NAME=name, KVBROKER_SHM_COMPAT="auto")
        vllm.init_kvcached(device="cpu")
        mine = manager()
        mine.set_memory_limit(5 * PAGE, revision=1)
        take(mine, 1)
        self.assertTrue(
            eventually(lambda: struct.unpack("3q", view.read_bytes())[:2] == (5 * PAGE, PAGE))
        )
        view.write_bytes(struct.pack("3q", 4 * PAGE, 0, 0))
        self.assertTrue(eventually(lambda: mine.group.session.limits()[1] == 4 * PAGE))
        vllm.shutdown_kvcached()
        self.assertFalse(view.exists())

    def test_a_manager_that_is_shut_down_makes_room_for_another(self) -> None:
        vllm.init_kvcached(device="cpu")
        first = manager()
        take(first, 5)
        self.assertTrue(first.shutdown())
        self.assertTrue(first.shutdown())
        with self.assertRaises(RuntimeError):
            first.alloc(1)
        self.assertEqual(len(take(KVCacheManager(40, 8, CELL, LAYERS), 40)), 40)

    def test_groups_are_members_of_one_instance(self) -> None:
        vllm.init_kvcached(device="cpu")
        managers = [manager(group_id=group) for group in range(3)]
        for mine in managers:
            take(mine, 1)
        self.assertEqual({group.session.instance for group in runtime.groups()}, {"test"})
        listed = self.broker.kvctl("list", "--json")
        self.assertEqual(listed.count('"ipc"'), 1)
        self.assertIn(str(os.getpid()), listed)

    def limit_with(self, **variables: str) -> int:
        use_environment(self, environment(self.broker, **variables))
        vllm.init_kvcached(device="cpu")
        try:
            return manager().group.session.limits()[1]
        finally:
            vllm.shutdown_kvcached()

    def test_the_instances_limit_is_that_of_the_environment(self) -> None:
        total = self.limit_with(KVCACHED_IPC_NAME="whole", KVCACHED_GPU_UTILIZATION="1")
        self.assertGreaterEqual(total, 64 * MIB)
        self.assertEqual(self.limit_with(KVCACHED_IPC_NAME="a"), int(total * 0.95))
        half = self.limit_with(KVCACHED_IPC_NAME="b", KVCACHED_GPU_UTILIZATION="0.5")
        self.assertEqual(half, total // 2)
        self.assertEqual(self.limit_with(KVCACHED_IPC_NAME="c", KVBROKER_LIMIT="16M"), 16 * MIB)
        self.assertEqual(self.limit_with(KVCACHED_IPC_NAME="d", KVBROKER_LIMIT="25%"), total // 4)

    def test_a_limit_outlives_its_processes(self) -> None:
        vllm.init_kvcached(device="cpu")
        mine = manager()
        mine.set_memory_limit(3 * PAGE, revision=1)
        vllm.shutdown_kvcached()
        self.assertEqual(self.limit_with(), 3 * PAGE)

    def test_no_broker_is_one_clear_error_and_leaves_nothing(self) -> None:
        self.broker.stop()
        self.setenv(KVCACHED_IPC_TIMEOUT="0.2")
        vllm.init_kvcached(device="cpu")
        mine = manager()
        with self.assertRaises(RuntimeError) as raised:
            mine.alloc(1)
        self.assertIn(self.broker.address, str(raised.exception))
        self.broker.start()
        self.assertEqual(len(take(mine, 1)), 1)


class NoMemory(BrokerTest):
    """Managers with a null block, where there is nothing to back it."""

    def setUp(self) -> None:
        super().setUp()
        self.setenv(KVBROKER_LIMIT="0", KVCACHED_IPC_TIMEOUT="3600")
        vllm.init_kvcached(device="cpu")

    def test_the_first_use_is_a_miss_and_the_lock_is_free(self) -> None:
        mine = manager(reserve_null_block=True)
        for _ in range(3):
            self.assertIsNone(mine.alloc(1))
            self.assertEqual(mine.available_size(), 0)
            self.assertFalse(mine.try_to_reserve(1))
        self.assertEqual(mine.memory_limit_state()["mapped_bytes"], 0)
        other = manager(group_id=1)
        self.assertIsNone(other.alloc(1))
        mine.set_memory_limit(4 * PAGE, revision=1)
        self.assertNotIn(0, take(mine, 1))
        self.assertEqual(mine.get_page_occupancy([0]), {0: 2})

    def test_who_opens_it_for_tensors_is_told(self) -> None:
        vllm.shutdown_kvcached()
        self.setenv(KVCACHED_IPC_TIMEOUT="0.2")
        vllm.init_kvcached(device="cpu")
        layout = manager().layout
        runtime.open_for_tensors(0, layout)
        with self.assertRaisesRegex(utils.KVCachePoolExhausted, r"\ACannot get 1 free blocks"):
            manager(reserve_null_block=True)
        self.assertEqual(runtime.managers(), [])
        self.assertIsNone(manager().alloc(1))
        mine = manager(reserve_null_block=True, group_id=1)
        self.assertIsNone(mine.alloc(1))
        with self.assertRaises(utils.KVCachePoolExhausted):
            runtime.open_for_tensors(1, layout)
        self.broker.kvctl("limit", "test", "32M")
        runtime.open_for_tensors(1, layout)
        self.assertEqual(mine.get_page_occupancy([0]), {0: 1})

    def test_an_end_while_somebody_waits(self) -> None:
        mine = manager(reserve_null_block=True)
        answers: list[object] = []

        def use() -> None:
            try:
                while True:
                    answers.append(mine.alloc(1))
            except RuntimeError as error:
                answers.append(error)

        thread = threading.Thread(target=use)
        thread.start()
        self.assertTrue(eventually(lambda: answers))
        vllm.shutdown_kvcached()
        thread.join()
        self.assertIsInstance(answers[-1], RuntimeError)
        with self.assertRaisesRegex(RuntimeError, "init_kvcached"):
            mine.alloc(1)


class Pages(BrokerTest):
    """vmm_ops, by several threads at once."""

    def setUp(self) -> None:
        super().setUp()
        vllm.init_kvcached(device="cpu")
        runtime.open_for_tensors(0, manager().layout)

    def test_two_that_map_the_same_page(self) -> None:
        problems: list[object] = []

        def use(who: int) -> None:
            rng = random.Random(who)
            for _ in range(100):
                pages = [PAGE * rng.randrange(4) for _ in range(3)]
                try:
                    if not rng.choice((vmm_ops.map_to_kv_tensors, vmm_ops.unmap_from_kv_tensors))(
                        pages
                    ):
                        problems.append("not all")
                except Exception as error:
                    problems.append(error)

        threads = [threading.Thread(target=use, args=(who,)) for who in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.assertEqual(problems, [])
        group = runtime.group(0)
        self.assertEqual(group.pool.used_blocks(), sorted(group.mapped_pages))
        self.assertEqual(group.coming_pages, set())

    def test_one_waits_for_the_page_that_another_is_having_mapped(self) -> None:
        group = runtime.group(0)
        self.assertTrue(vmm_ops.map_to_kv_tensors([3 * PAGE]))  # The blocks are pages now.
        pool = group.pool
        answers: list[object] = []
        others: list[threading.Thread] = []

        def other() -> None:
            try:
                answers.append(vmm_ops.map_to_kv_tensors([0, 2 * PAGE]))
                answers.append(vmm_ops.unmap_from_kv_tensors([0]))
            except Exception as error:
                answers.append(error)

        class Slow:
            """The pool, whose first alloc_at another thread overtakes, if it can."""

            def alloc_at(self, blocks: list[int], timeout_ms: int) -> bool:
                if not others:
                    others.append(threading.Thread(target=other))
                    others[0].start()
                    others[0].join(0.3)
                return pool.alloc_at(blocks, timeout_ms)

            def __getattr__(self, name: str) -> object:
                return getattr(pool, name)

        with mock.patch.object(group, "pool", Slow()):
            answers.append(vmm_ops.map_to_kv_tensors([0, PAGE]))
            others[0].join()
        self.assertEqual(answers, [True, True, True])
        self.assertEqual(pool.used_blocks(), [1, 2, 3])
        self.assertEqual(group.mapped_pages, {1, 2, 3})


class Limits(BrokerTest):
    CAPACITY = "128M"

    def setUp(self) -> None:
        super().setUp()
        vllm.init_kvcached(device="cpu")

    def test_resize_counts_one_layers_k_or_v(self) -> None:
        mine = manager()
        self.assertTrue(mine.resize(3 * 2 * MIB))
        self.assertEqual(mine.group.session.limits()[1], 3 * PAGE)
        self.assertIsNone(mine.alloc(3 * BLOCKS_PER_PAGE + 1))
        blocks = take(mine, 3 * BLOCKS_PER_PAGE)
        self.assertFalse(mine.resize(2 * MIB))
        self.assertTrue(mine.in_shrink)
        self.assertEqual(mine.target_num_blocks, BLOCKS_PER_PAGE)
        mine.free(blocks)
        self.assertTrue(eventually(lambda: mine.pool.usage()[2] + mine.pool.usage()[0] <= PAGE))
        self.assertFalse(mine.in_shrink)
        self.assertTrue(mine.resize(100 * MIB))
        self.assertIsNone(mine.target_num_blocks)
        self.assertEqual(len(take(mine, 4 * BLOCKS_PER_PAGE)), 4 * BLOCKS_PER_PAGE)

    def test_revisions(self) -> None:
        mine = manager()
        first = mine.set_memory_limit(3 * PAGE + 5, revision=3)
        self.assertEqual(
            {key: first[key] for key in ("status", "limit_bytes", "effective_limit_bytes")},
            {
                "status": "applied",
                "limit_bytes": 3 * PAGE + 5,
                "effective_limit_bytes": 3 * PAGE,
            },
        )
        self.assertEqual(mine.group.session.limits()[1], 3 * PAGE + 5)
        self.assertEqual(mine.set_memory_limit(3 * PAGE + 5, revision=3)["status"], "applied")
        self.assertEqual(mine.set_memory_limit(PAGE, revision=2)["status"], "stale")
        conflict = mine.set_memory_limit(PAGE, revision=3)
        self.assertEqual(conflict["status"], "conflict")
        self.assertEqual(conflict["reason"], "revision_reused_with_different_limit")
        self.assertEqual(mine.memory_limit_state()["limit_bytes"], 3 * PAGE + 5)
        take(mine, 3 * BLOCKS_PER_PAGE)
        deferred = mine.set_memory_limit(PAGE, revision=4)
        self.assertEqual(deferred["status"], "deferred")
        self.assertEqual(deferred["reason"], "inuse_capacity_above_limit")
        self.assertEqual(deferred["overage_bytes"], 2 * PAGE)
        self.assertEqual(deferred["remaining_bytes"], 0)

    def test_nothing_is_a_limit(self) -> None:
        mine = manager()
        self.assertEqual(mine.set_memory_limit(0, revision=1)["status"], "applied")
        self.assertIsNone(mine.alloc(1))
        self.assertEqual(mine.available_size(), 0)

    def test_the_same_words_again_leave_what_an_operator_has_set(self) -> None:
        mine = manager()
        take(mine, 1)
        for revision, set_limit in (
            (1, lambda: mine.set_memory_limit(3 * PAGE, revision=1)),
            (2, lambda: control.set_instance_memory_limit(3 * PAGE, revision=2)),
        ):
            with self.subTest(revision=revision):
                self.assertEqual(set_limit()["status"], "applied")
                self.broker.kvctl("limit", "test", str(5 * PAGE))
                self.assertTrue(eventually(lambda: mine.group.session.limits()[1] == 5 * PAGE))
                self.assertEqual(set_limit()["revision"], revision)
                self.assertEqual(mine.group.session.limits()[1], 5 * PAGE)
        self.assertTrue(mine.resize(4 * 2 * MIB))
        control.set_instance_memory_limit(3 * PAGE, revision=2)
        self.assertEqual(mine.group.session.limits()[1], 4 * PAGE)

    def test_limits_above_all_there_is_are_told_apart(self) -> None:
        manager().alloc(1)
        mine = manager()
        self.assertEqual(control.set_instance_memory_limit(1 << 40, revision=1)["revision"], 1)
        answer = control.set_instance_memory_limit(1 << 41, revision=1)
        self.assertEqual(answer["status"], "conflict")
        self.assertEqual(mine.group.session.limits()[1], 1 << 40)

    def overtaken(self, first: object, second: object) -> None:
        """``first`` sets a limit, and ``second`` comes while the broker is told so."""
        tell = runtime.set_instance_limit, runtime.set_group_limit
        started: list[threading.Thread] = []

        def hook(real: object) -> object:
            def told(*arguments: object) -> None:
                if not started:
                    started.append(threading.Thread(target=second))  # type: ignore[arg-type]
                    started[0].start()
                    started[0].join(0.3)  # It waits for first, or is done before it.
                real(*arguments)  # type: ignore[operator]

            return told

        for_all = mock.patch.object(runtime, "set_instance_limit", hook(tell[0]))
        with for_all, mock.patch.object(runtime, "set_group_limit", hook(tell[1])):
            first()  # type: ignore[operator]
            started[0].join()

    def test_an_older_revision_does_not_win_by_being_slow(self) -> None:
        mine = manager()
        take(mine, 1)
        for revision, set_limit in (
            (1, lambda limit, revision: mine.set_memory_limit(limit, revision=revision)),
            (
                3,
                lambda limit, revision: control.set_instance_memory_limit(limit, revision=revision),
            ),
        ):
            with self.subTest(revision=revision):
                self.overtaken(
                    partial(set_limit, 3 * PAGE, revision),
                    partial(set_limit, 4 * PAGE, revision + 1),
                )
                self.assertEqual(mine.group.session.limits()[1], 4 * PAGE)
                self.assertEqual(mine.memory_limit_state()["limit_bytes"], 4 * PAGE)

    def test_two_groups_that_resize_at_once_leave_their_sum(self) -> None:
        mine, other = manager(), manager(group_id=1)
        take(mine, 1)
        take(other, 1)
        started: list[threading.Thread] = []

        class Slow:
            """A session that is overtaken while it sets a limit."""

            def __init__(self, group: Group) -> None:
                self.session = group.session

            def set_max(self, limit: int) -> None:
                if not started:
                    started.append(threading.Thread(target=lambda: other.resize(2 * 2 * MIB)))
                    started[0].start()
                    started[0].join(0.3)
                self.session.set_max(limit)

        session = mine.group.session
        with mock.patch.object(mine.group, "session", Slow(mine.group)):
            mine.resize(2 * MIB)
        started[0].join()
        self.assertEqual(session.limits()[1], 3 * PAGE)

    def test_figures_beyond_what_there_can_be(self) -> None:
        mine = manager()
        take(mine, 1)
        before = mine.group.session.limits()[1]
        for call in (
            lambda: mine.resize(1 << 61),
            lambda: mine.resize(1 << 70),
            lambda: mine.set_memory_limit(1 << 63, revision=1),
            lambda: mine.set_memory_limit(1 << 70, revision=1),
            lambda: control.set_instance_memory_limit(1 << 63, revision=1),
        ):
            with self.assertRaisesRegex(ValueError, r"2\*\*63"):
                call()
        self.assertEqual(mine.group.session.limits()[1], before)
        take(manager(group_id=1), 1)
        for limit, set_limit in (
            ((1 << 63) - 1, lambda limit: mine.set_memory_limit(limit, revision=1)),
            ((1 << 63) - 2, lambda limit: control.set_instance_memory_limit(limit, revision=2)),
        ):
            self.assertEqual(mine.resize(3 * 2 * MIB), True)
            self.assertEqual(set_limit(limit)["status"], "applied")
            # More than any device has is the most that a broker can be told.
            self.assertEqual(mine.group.session.limits()[1], config.MAX_SIZE)

    def test_what_int_takes_is_a_limit(self) -> None:
        mine = manager()
        take(mine, 1)
        answer = control.set_instance_memory_limit(f"{3 * PAGE}", revision="4")  # type: ignore
        self.assertEqual((answer["limit_bytes"], answer["revision"]), (3 * PAGE, 4))
        self.assertEqual(mine.group.session.limits()[1], 3 * PAGE)
        with self.assertRaises(ValueError):
            control.set_instance_memory_limit("much", revision=5)  # type: ignore[arg-type]

    def test_a_limit_of_nothing_drains_to_nothing(self) -> None:
        mine = manager()
        take(mine, 1)
        self.assertFalse(mine.resize(0))
        self.assertEqual(mine.target_num_blocks, 0)

    def test_what_other_groups_may_have_is_added(self) -> None:
        mine, other = manager(), manager(num_blocks=2 * BLOCKS_PER_PAGE, group_id=1)
        take(other, 1)
        mine.set_memory_limit(3 * PAGE, revision=1)
        self.assertEqual(mine.group.session.limits()[1], 5 * PAGE)
        other.set_memory_limit(PAGE, revision=1)
        self.assertTrue(eventually(lambda: mine.group.session.limits()[1] == 4 * PAGE))


if __name__ == "__main__":
    import unittest

    unittest.main()
