"""The tensors that engines get, on memory that a broker lends."""

from __future__ import annotations

import itertools
import json
import os
import unittest

import torch
from broker import DEVICE, MIB, BrokerTest, eventually, take

from kvcached import vmm_ops
from kvcached.errors import KVCachedConfigError
from kvcached.integration.sglang import interfaces as sglang
from kvcached.integration.vllm import interfaces as vllm
from kvcached.kv_cache_manager import KVCacheManager
from kvcached.runtime import runtime

# Blocks of 16 tokens with 64 heads of 64 elements: some of them on a page, whatever the type.
BLOCK, HEADS, DIM, LAYERS = 16, 64, 64, 2
DTYPES = [
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.uint8,
    torch.int8,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2fnuz,
]


def raw(tensor: torch.Tensor) -> torch.Tensor:
    """Its elements' bytes."""
    return tensor.contiguous().cpu().view(torch.uint8)


def noise(tensor: torch.Tensor, seed: int) -> torch.Tensor:
    """Bytes to fill it with."""
    generator = torch.Generator().manual_seed(seed)
    count = tensor.numel() * tensor.element_size()
    return torch.randint(0, 256, (count,), generator=generator, dtype=torch.uint8)


def fill(tensor: torch.Tensor, seed: int) -> None:
    """By bytes, as types of 8 bits cannot do much else."""
    values = noise(tensor, seed).view(tensor.dtype).view(tensor.shape)
    same_size = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    kind = same_size[tensor.element_size()]
    tensor.view(kind).copy_(values.view(kind))


def has(tensor: torch.Tensor, seed: int) -> bool:
    return torch.equal(raw(tensor).flatten(), noise(tensor, seed))


class Base(BrokerTest):
    CAPACITY = "256M"

    def begin(self, contiguous: bool, **more: str) -> None:
        vllm.shutdown_kvcached()
        self.setenv(KVCACHED_CONTIGUOUS_LAYOUT=str(contiguous).lower(), **more)
        vllm.init_kvcached(device=DEVICE)


class Tensors(Base):
    def check_blocks(
        self, parts: list[list[torch.Tensor]], mine: KVCacheManager, per_block: int = 1
    ) -> None:
        """``parts``: tensors whose first dimension is (kernel) blocks, or tokens, by layer.

        Each block has its own bytes, which are those of the pool's block.
        """
        blocks = take(mine, 5)
        pieces = [
            (layer, part, block)
            for layer, tensors in enumerate(parts)
            for part in range(len(tensors))
            for block in blocks
        ]

        def piece(layer: int, part: int, block: int) -> torch.Tensor:
            return parts[layer][part][block * per_block : (block + 1) * per_block]

        for seed, where in enumerate(pieces):
            fill(piece(*where), seed)
        for seed, where in enumerate(pieces):
            self.assertTrue(has(piece(*where), seed), where)
        layout = mine.group.layout
        flat = mine.group.flat()
        for block in blocks:
            if layout.contiguous:
                start = block * layout.block_bytes
                want = flat[start : start + layout.block_bytes]
                have = sorted(
                    piece(layer, part, b).data_ptr() - flat.data_ptr()
                    for layer, part, b in pieces
                    if b == block
                )
                self.assertEqual(have[0], start)
                self.assertTrue(all(start <= at < start + len(want) for at in have), have)
            else:
                starts = {
                    region * layout.region_bytes + block * layout.unit_bytes
                    for region in range(layout.handles_per_page)
                }
                have = [
                    piece(layer, part, b).data_ptr() - flat.data_ptr()
                    for layer, part, b in pieces
                    if b == block
                ]
                self.assertTrue(starts <= set(have), (starts, have))
        mine.free(blocks)

    def test_key_and_value_before_and_after_blocks(self) -> None:
        for contiguous, dtype, first in itertools.product((True, False), DTYPES, (True, False)):
            with self.subTest(contiguous=contiguous, dtype=dtype, first=first):
                self.begin(contiguous)
                shape = (2, 30, BLOCK, HEADS, DIM) if first else (30, 2, BLOCK, HEADS, DIM)
                tensors = vllm.alloc_kv_cache(shape, BLOCK, dtype, DEVICE, LAYERS)
                self.assertEqual(len(tensors), LAYERS)
                for tensor in tensors:
                    self.assertEqual((tuple(tensor.shape), tensor.dtype), (shape, dtype))
                    self.assertEqual(tensor.device, torch.device(DEVICE))
                cell = HEADS * DIM * dtype.itemsize
                mine = vllm.get_kv_cache_manager(None, BLOCK, cell, LAYERS)
                self.assertEqual(mine.num_blocks, 30)
                parts = [[t[0], t[1]] if first else [t[:, 0], t[:, 1]] for t in tensors]
                self.check_blocks(parts, mine)

    def test_latent_attention(self) -> None:
        for contiguous, dtype in itertools.product((True, False), DTYPES):
            with self.subTest(contiguous=contiguous, dtype=dtype):
                self.begin(contiguous)
                shape = (40, BLOCK, 576)
                tensors = vllm.alloc_kv_cache(shape, BLOCK, dtype, DEVICE, LAYERS, "MLA")
                self.assertEqual([tuple(tensor.shape) for tensor in tensors], [shape] * LAYERS)
                cell = 576 * dtype.itemsize
                mine = vllm.get_kv_cache_manager(40, BLOCK, cell, LAYERS, num_kv_buffers=1)
                self.check_blocks([[tensor] for tensor in tensors], mine)

    def test_packed(self) -> None:
        for contiguous, layout in itertools.product((True, False), ("NHD", "HND")):
            with self.subTest(contiguous=contiguous, layout=layout):
                self.begin(contiguous)
                shape = (30, HEADS, BLOCK, 2 * DIM)
                tensors = vllm.alloc_kv_cache(
                    shape, BLOCK, torch.bfloat16, DEVICE, LAYERS, kv_layout=layout
                )
                self.assertEqual([tuple(tensor.shape) for tensor in tensors], [shape] * LAYERS)
                cell = HEADS * 2 * DIM * 2
                mine = vllm.get_kv_cache_manager(30, BLOCK, cell, LAYERS, num_kv_buffers=1)
                self.check_blocks([[tensor] for tensor in tensors], mine)

    def test_kernel_blocks(self) -> None:
        for contiguous in (True, False):
            with self.subTest(contiguous=contiguous):
                self.begin(contiguous)
                tensors = vllm.alloc_kv_cache(
                    (2, 30, BLOCK, HEADS, DIM),
                    BLOCK,
                    torch.float16,
                    DEVICE,
                    LAYERS,
                    kernel_block_size=4,
                )
                self.assertEqual(tuple(tensors[0].shape), (2, 120, 4, HEADS, DIM))
                mine = vllm.get_kv_cache_manager(None, BLOCK, HEADS * DIM * 2, LAYERS)
                self.check_blocks([[t[0], t[1]] for t in tensors], mine, per_block=4)

    def test_hybrid(self) -> None:
        for contiguous in (True, False):
            with self.subTest(contiguous=contiguous):
                self.begin(contiguous)
                shape = (2, 30, BLOCK, HEADS, DIM)
                tensors, info = vllm.alloc_kv_cache(
                    shape, BLOCK, torch.float16, DEVICE, LAYERS, "HYBRID_LINEAR"
                )
                page = 2 * BLOCK * HEADS * DIM * 2
                self.assertEqual(info["page_size_bytes"], page)
                self.assertEqual(info["num_blocks"], 30)
                self.assertEqual(info["num_pools"], LAYERS)
                self.assertEqual(info["is_contiguous"], contiguous)
                mine = vllm.get_kv_cache_manager(
                    None, BLOCK, 2 * HEADS * DIM * 2, LAYERS, num_kv_buffers=1
                )
                self.check_blocks([[t[0], t[1]] for t in tensors], mine)
                # A block that a state-space layer has: the same bytes, through the buffers.
                (block,) = take(mine, 1)
                for layer, tensor in enumerate(tensors):
                    buffer = info["buffers"][0 if contiguous else layer]
                    self.assertEqual(buffer.dtype, torch.int8)
                    start = block * info["block_stride_bytes"] + (layer * page if contiguous else 0)
                    fill(buffer[start : start + page], layer)
                    self.assertTrue(has(tensor[:, block], layer))

    def test_tokens(self) -> None:
        for contiguous, dtype, page in itertools.product((True, False), DTYPES, (1, 16)):
            with self.subTest(contiguous=contiguous, dtype=dtype, page=page):
                sglang.shutdown_kvcached()
                self.setenv(KVCACHED_CONTIGUOUS_LAYOUT=str(contiguous).lower())
                sglang.init_kvcached(device=DEVICE)
                shape = (800, 8, DIM)
                k, v = sglang.alloc_kv_cache(shape, dtype, DEVICE, LAYERS, page_size=page)
                for tensor in (*k, *v):
                    self.assertEqual((tuple(tensor.shape), tensor.dtype), (shape, dtype))
                cell = 8 * DIM * dtype.itemsize
                mine = sglang.get_kv_cache_manager(800 // page, page, cell, LAYERS)
                self.check_blocks([[a, b] for a, b in zip(k, v)], mine, per_block=page)

    def test_tokens_of_latent_attention(self) -> None:
        self.begin(True)
        tensors = sglang.alloc_kv_cache((800, 1, 576), torch.bfloat16, DEVICE, LAYERS, 4, "MLA")
        self.assertEqual([tuple(tensor.shape) for tensor in tensors], [(800, 1, 576)] * LAYERS)
        mine = sglang.get_kv_cache_manager(200, 4, 1152, LAYERS, num_kv_buffers=1)
        self.check_blocks([[tensor] for tensor in tensors], mine, per_block=4)

    def test_meta(self) -> None:
        for contiguous in (True, False):
            self.begin(contiguous)
            tensors, meta = vllm.alloc_kv_cache(
                (2, 30, BLOCK, HEADS, DIM), BLOCK, torch.float16, DEVICE, LAYERS, return_meta=True
            )
            unit = BLOCK * HEADS * DIM * 2
            k_or_v = meta["gpu_mem_bytes_per_layer_k_or_v"]
            self.assertEqual(k_or_v % (2 * MIB), 0)
            self.assertGreaterEqual(k_or_v, 30 * unit)
            self.assertEqual(meta["num_blocks_per_layer"], 30)
            self.assertEqual((meta["num_layers"], meta["dtype"]), (LAYERS, torch.float16))
            self.assertEqual(len(meta["raw_kv_tensors"]), 1 if contiguous else LAYERS)
            self.assertEqual(meta["raw_kv_tensors"][0].data_ptr(), tensors[0].data_ptr())
            if not contiguous:
                self.assertEqual(
                    meta["raw_kv_tensors"][1].data_ptr() + k_or_v, tensors[1][1].data_ptr()
                )

    def test_the_null_block_may_be_touched_at_once(self) -> None:
        for manager_first in (True, False):
            self.begin(True)
            cell = HEADS * DIM * 2
            shape = (2, 30, BLOCK, HEADS, DIM)
            if manager_first:
                mine = vllm.get_kv_cache_manager(30, BLOCK, cell, LAYERS)
            tensors = vllm.alloc_kv_cache(shape, BLOCK, torch.float16, DEVICE, LAYERS)
            if not manager_first:
                mine = vllm.get_kv_cache_manager(30, BLOCK, cell, LAYERS)
            fill(tensors[1][:, 0], 1)
            self.assertTrue(has(tensors[1][:, 0], 1))
            self.assertNotIn(0, take(mine, 5))

    def test_groups_do_not_share_bytes(self) -> None:
        self.begin(True)
        made = []
        for group in range(3):
            shape = (2, 10, BLOCK, HEADS, DIM)
            tensors = vllm.alloc_kv_cache(
                shape, BLOCK, torch.float16, DEVICE, LAYERS, group_id=group
            )
            mine = vllm.get_kv_cache_manager(None, BLOCK, HEADS * DIM * 2, LAYERS, group_id=group)
            blocks = take(mine, 3)
            for block in blocks:
                fill(tensors[0][:, block], group * 100 + block)
            made.append((tensors, mine, blocks))
        for group, (tensors, _, blocks) in enumerate(made):
            for block in blocks:
                self.assertTrue(has(tensors[0][:, block], group * 100 + block))


class WrongInput(Base):
    def setUp(self) -> None:
        super().setUp()
        self.begin(True)

    def test_nothing_is_left_of_what_fails(self) -> None:
        good = ((2, 30, BLOCK, HEADS, DIM), BLOCK, torch.float16, DEVICE, LAYERS)
        for position, wrong, error in (
            (0, (3, 30, BLOCK, HEADS, DIM), ValueError),
            (0, (2, 30, BLOCK), ValueError),
            (0, (2, -1, BLOCK, HEADS, DIM), ValueError),
            (1, 0, ValueError),
            (1, 8, ValueError),
            (2, "float16", ValueError),
            (2, torch.complex128, ValueError),
            (3, "cuda:0" if DEVICE == "cpu" else "cpu", ValueError),
            (3, "tpu", ValueError),
            (4, 0, ValueError),
            (4, -1, ValueError),
        ):
            arguments = list(good)
            arguments[position] = wrong  # type: ignore[call-overload]
            with self.subTest(wrong=wrong), self.assertRaises(error):
                vllm.alloc_kv_cache(*arguments)
        for wrong in ({"group_id": -1}, {"attention_type": "NSA"}, {"kernel_block_size": 3}):
            with self.subTest(wrong=wrong), self.assertRaises(ValueError):
                vllm.alloc_kv_cache(*good, **wrong)
        with self.assertRaises(KVCachedConfigError):
            vllm.alloc_kv_cache((2, 30, 1024, HEADS, DIM), 1024, torch.float16, DEVICE, 1)
        self.assertEqual(runtime.groups(), [])
        self.assertEqual(json.loads(self.broker.kvctl("list", "--json")), [])
        self.assertEqual(len(vllm.alloc_kv_cache(*good)), LAYERS)

    def test_managers_have_to_fit(self) -> None:
        shape = (2, 30, BLOCK, HEADS, DIM)
        vllm.alloc_kv_cache(shape, BLOCK, torch.float16, DEVICE, LAYERS)
        cell = HEADS * DIM * 2
        for arguments, more in (
            ((31, BLOCK, cell, LAYERS), {}),
            ((30, BLOCK, cell, LAYERS + 1), {}),
            ((30, BLOCK, cell, LAYERS), {"num_kv_buffers": 1}),
            ((30, 2 * BLOCK, cell, LAYERS), {}),
        ):
            with self.subTest(arguments=arguments, more=more), self.assertRaises(ValueError):
                vllm.get_kv_cache_manager(*arguments, **more)
        mine = vllm.get_kv_cache_manager(15, 2 * BLOCK, cell, LAYERS)
        self.assertLess(max(take(mine, 5)), 15)

    def test_tensors_have_to_fit_a_manager(self) -> None:
        cell = HEADS * DIM * 2
        mine = vllm.get_kv_cache_manager(30, BLOCK, cell, LAYERS)
        with self.assertRaises(ValueError):
            vllm.alloc_kv_cache((2, 29, BLOCK, HEADS, DIM), BLOCK, torch.float16, DEVICE, LAYERS)
        take(mine, 1)
        with self.assertRaises(KVCachedConfigError):
            vllm.alloc_kv_cache((2, 300, BLOCK, HEADS, DIM), BLOCK, torch.float16, DEVICE, LAYERS)
        with self.assertRaises(ValueError):
            vllm.alloc_kv_cache((2, 30, BLOCK, HEADS, DIM), BLOCK, torch.float16, DEVICE, 1)
        tensors = vllm.alloc_kv_cache(
            (2, 30, BLOCK, HEADS, DIM), BLOCK, torch.float16, DEVICE, LAYERS
        )
        fill(tensors[0][:, 0], 1)


class Ends(Base):
    def test_tensors_outlive_their_pool(self) -> None:
        self.begin(True)
        shape = (2, 30, BLOCK, HEADS, DIM)
        tensors = vllm.alloc_kv_cache(shape, BLOCK, torch.float16, DEVICE, LAYERS)
        mine = vllm.get_kv_cache_manager(None, BLOCK, HEADS * DIM * 2, LAYERS)
        block = take(mine, 1)[0]
        tensors[0][:, block] = 1
        vllm.shutdown_kvcached()
        self.assertEqual(tuple(tensors[0].shape), shape)
        if DEVICE == "cpu":  # a GPU's must not be touched
            self.assertEqual(tensors[0][:, block].sum().item(), 0)
        vllm.init_kvcached(device=DEVICE)
        again = vllm.alloc_kv_cache(shape, BLOCK, torch.float16, DEVICE, LAYERS)
        mine = vllm.get_kv_cache_manager(None, BLOCK, HEADS * DIM * 2, LAYERS)
        block = take(mine, 1)[0]
        again[0][:, block] = 2
        if DEVICE == "cpu":
            self.assertEqual(tensors[0][:, block].sum().item(), 0)
        self.assertNotEqual(again[0].data_ptr(), tensors[0].data_ptr())

    def test_the_interpreter_ends_with_live_tensors(self) -> None:
        from test_processes import start

        process = start(
            """
            import torch
            tensors = vllm.alloc_kv_cache((2, 30, 16, 64, 64), 16, torch.float16, DEVICE, 2)
            mine = vllm.get_kv_cache_manager(None, 16, 64 * 64 * 2, 2)
            blocks = []
            assert eventually(lambda: blocks.extend(mine.alloc(3) or []) or blocks)
            tensors[0][:, blocks] = 1
            def use():
                while True:
                    mine.free(mine.alloc(3) or [])
            threading.Thread(target=use, daemon=True).start()
            sys.keep = tensors
            """,
            PYTHONWARNINGS="ignore",  # torch has some to say without NumPy
        )
        out, err = process.communicate(timeout=60)
        self.assertEqual((process.returncode, out, err), (0, "", ""))


class ByHand(Base):
    PAGE = 2 * MIB

    def begin(self, contiguous: bool, **more: str) -> None:
        vmm_ops.shutdown_kvcached()
        self.setenv(**more)
        vmm_ops.init_kvcached(DEVICE, contiguous_layout=contiguous)

    def test_before_init(self) -> None:
        self.assertTrue(vmm_ops.is_available())
        for call in (
            lambda: vmm_ops.create_kv_tensors(self.PAGE, 2, DEVICE, 1),
            lambda: vmm_ops.map_to_kv_tensors([0]),
            lambda: vmm_ops.unmap_from_kv_tensors([0]),
            vmm_ops.kv_tensors_created,
        ):
            with self.assertRaises(RuntimeError) as raised:
                call()
            self.assertIn("Please call init_kvcached() first", str(raised.exception))

    def test_per_layer(self) -> None:
        self.begin(False)
        self.assertFalse(vmm_ops.kv_tensors_created())
        tensors = vmm_ops.create_kv_tensors(8 * self.PAGE, 2, DEVICE, 3)
        self.assertTrue(vmm_ops.kv_tensors_created())
        self.assertEqual([t.numel() * 2 for t in tensors], [8 * self.PAGE] * 3)
        self.assertEqual({t.dtype for t in tensors}, {torch.int16})
        self.assertTrue(vmm_ops.map_to_kv_tensors([self.PAGE, 3 * self.PAGE]))
        self.assertTrue(vmm_ops.map_to_kv_tensors([self.PAGE]))
        elements = self.PAGE // 2
        for page in (1, 3):
            for i, tensor in enumerate(tensors):
                for half in (0, 4):
                    start = (half + page) * elements
                    fill(tensor[start : start + elements], page * 100 + i * 10 + half)
        for page in (1, 3):
            for i, tensor in enumerate(tensors):
                for half in (0, 4):
                    start = (half + page) * elements
                    self.assertTrue(
                        has(tensor[start : start + elements], page * 100 + i * 10 + half)
                    )
        self.assertTrue(vmm_ops.unmap_from_kv_tensors([self.PAGE]))
        self.assertTrue(vmm_ops.unmap_from_kv_tensors([self.PAGE]))
        pool = runtime.group(0).pool
        self.assertTrue(eventually(lambda: pool.usage()[:4] == (6 * self.PAGE, 0, 0, 0)))

    def test_contiguous(self) -> None:
        self.begin(True)
        (tensor,) = vmm_ops.create_kv_tensors(8 * self.PAGE, 1, DEVICE, 3)
        self.assertEqual((tensor.numel(), tensor.dtype), (24 * self.PAGE, torch.int8))
        whole = 6 * self.PAGE
        self.assertTrue(vmm_ops.map_to_kv_tensors([0, 2 * whole]))
        for start in (0, 2 * whole):
            fill(tensor[start : start + whole], start)
        for start in (0, 2 * whole):
            self.assertTrue(has(tensor[start : start + whole], start))
        with self.assertRaises(ValueError):
            vmm_ops.map_to_kv_tensors([self.PAGE])

    def test_unified(self) -> None:
        self.begin(False)
        tensors = vmm_ops.create_kv_tensors(3 * self.PAGE + 1, 4, DEVICE, 2, unified_pool=True)
        self.assertEqual([t.numel() * 4 for t in tensors], [4 * self.PAGE] * 2)
        self.assertTrue(vmm_ops.map_to_kv_tensors([3 * self.PAGE]))
        for tensor in tensors:
            fill(tensor[-self.PAGE // 4 :], 5)

    def test_two_lists_are_page_ids(self) -> None:
        self.begin(False)
        tensors = vmm_ops.create_kv_tensors(8 * self.PAGE, 1, DEVICE, 1)
        with self.assertWarns(DeprecationWarning):
            self.assertTrue(vmm_ops.map_to_kv_tensors([0, 2], [0, 0]))
        fill(tensors[0][2 * self.PAGE : 3 * self.PAGE], 3)
        with self.assertWarns(DeprecationWarning):
            self.assertTrue(vmm_ops.unmap_from_kv_tensors([0, 2], []))
        self.assertEqual(runtime.group(0).pool.used_blocks(), [])

    def test_what_cannot_be_had_changes_nothing(self) -> None:
        self.begin(False, KVCACHED_IPC_TIMEOUT="0.5")
        vmm_ops.create_kv_tensors(512 * self.PAGE, 1, DEVICE, 1)
        # 256 pages of 2 MB of K and V each, on a broker with 64 of them.
        self.assertFalse(vmm_ops.map_to_kv_tensors([i * self.PAGE for i in range(200)]))
        self.assertEqual(runtime.group(0).pool.used_blocks(), [])
        self.assertTrue(vmm_ops.map_to_kv_tensors([i * self.PAGE for i in range(4)]))

    def test_wrong_input(self) -> None:
        self.begin(False)
        for arguments in ((0, 2, DEVICE, 1), (1, 3, DEVICE, 1), (1, 2, DEVICE, 0), (1, 2, "x", 1)):
            with self.subTest(arguments=arguments), self.assertRaises(ValueError):
                vmm_ops.create_kv_tensors(*arguments)
        with self.assertRaises(KVCachedConfigError):
            vmm_ops.map_to_kv_tensors([0])
        vmm_ops.create_kv_tensors(8 * self.PAGE, 1, DEVICE, 1)
        for offsets in ([1], [-self.PAGE], [4 * self.PAGE]):
            with self.subTest(offsets=offsets), self.assertRaises(ValueError):
                vmm_ops.map_to_kv_tensors(offsets)
        with self.assertRaises(KVCachedConfigError):
            vmm_ops.map_to_kv_tensors([0], group_id=7)

    def test_a_manager_takes_over(self) -> None:
        self.begin(True)
        vmm_ops.create_kv_tensors(8 * self.PAGE, 1, DEVICE, 2)
        self.assertTrue(vmm_ops.map_to_kv_tensors([0]))
        mine = KVCacheManager(64, 16, 8192, 2)
        self.assertEqual(mine.pool.used_blocks(), [])
        blocks = take(mine, 40)
        self.assertEqual(len(set(blocks)), 40)
        with self.assertRaises(KVCachedConfigError):
            vmm_ops.map_to_kv_tensors([0])
        mine.shutdown()
        self.assertTrue(vmm_ops.map_to_kv_tensors([0]))


if __name__ == "__main__":
    os.environ.setdefault("KVCACHED_LOG_LEVEL", "ERROR")
    unittest.main()
