"""Each element's byte, compared with a model that counts from the layout's description."""

from __future__ import annotations

import itertools
import unittest
from collections.abc import Iterator

from kvcached.config import MIB
from kvcached.errors import KVCachedConfigError
from kvcached.tensors import (
    KVShape,
    PoolLayout,
    View,
    check_block,
    every_page_holds_a_block,
    read_sglang_shape,
    read_vllm_shape,
)


def address(view: View, index: tuple[int, ...], itemsize: int) -> int:
    """Of the element's first byte in the range."""
    assert len(index) == len(view.shape)
    assert all(0 <= i < length for i, length in zip(index, view.shape)), (index, view)
    return (view.offset + sum(i * s for i, s in zip(index, view.strides))) * itemsize


class Model:
    """Where K and V of a token are, counted up piece by piece."""

    def __init__(self, kind: str, layout: PoolLayout, kernel: int, token_bytes: int) -> None:
        self.split = kind == "split"  # K and V are buffers of their own
        self.pair = kind != "single"  # there are K and V
        self.layout = layout
        self.kernel = kernel
        self.token_bytes = token_bytes  # of K or V (or the one buffer) of a layer

    def token(self, layer: int, kv: int, token: int) -> int:
        """First byte of a token, numbered over all blocks."""
        kernel_block, within = divmod(token, self.kernel)
        part = self.kernel * self.token_bytes
        parts = 2 if self.pair else 1
        at = 0
        if self.layout.contiguous:
            for _ in range(kernel_block):
                at += self.layout.layers * parts * part
            for _ in range(layer):
                at += parts * part
            at += kv * part
        else:
            region = layer * (2 if self.split else 1) + (kv if self.split else 0)
            for _ in range(region):
                at += self.layout.pages * self.layout.page_bytes
            at += kernel_block * part * (1 if self.split else parts)
            at += 0 if self.split else kv * part
        return at + within * self.token_bytes


def bytes_of_block(layout: PoolLayout, block: int) -> set[int]:
    """What the pool backs and moves as one block."""
    if layout.contiguous:
        return set(range(block * layout.block_bytes, (block + 1) * layout.block_bytes))
    return {
        region * layout.region_bytes + block * layout.unit_bytes + i
        for region in range(layout.handles_per_page)
        for i in range(layout.unit_bytes)
    }


class LayoutTest(unittest.TestCase):
    LAYERS = 2
    HEADS = 2
    DIM = 3

    def check(
        self,
        shape: KVShape,
        layout: PoolLayout,
        model: Model,
        block_tokens: int,
        elements: Iterator[tuple[int, int, int, int, int, int, tuple[int, ...]]],
    ) -> None:
        """``elements``: layer, kv, block, token, byte of it, head and dim's, view's index."""
        views = shape.views(layout)
        self.assertEqual(len(views), layout.layers)
        seen: set[int] = set()
        of_block: dict[int, set[int]] = {}
        for layer, kv, block, token, inside, index in elements:  # type: ignore[misc]
            at = address(views[layer], index, shape.itemsize)
            wanted = model.token(layer, kv, block * block_tokens + token) + inside
            self.assertEqual(at, wanted, (layer, kv, block, token, inside, index))
            bytes_ = set(range(at, at + shape.itemsize))
            self.assertFalse(bytes_ & seen, "two elements share a byte")
            seen |= bytes_
            of_block.setdefault(block, set()).update(bytes_)
        for block, have in of_block.items():
            self.assertEqual(have, bytes_of_block(layout, block), f"block {block}")
        self.assertLessEqual(max(seen), layout.range_bytes - 1)

    def layouts(self, shape: KVShape) -> Iterator[PoolLayout]:
        unit = shape.layer_block_bytes // shape.buffers
        for page_bytes in (unit, 2 * unit, 2 * unit + unit // 2 + 1):
            for contiguous in (True, False):
                layout = shape.layout(page_bytes, contiguous)
                if not contiguous and layout.region_bytes % shape.itemsize:
                    continue  # pages are multiples of 2 MB
                yield layout

    def heads_and_dims(self, itemsize: int) -> Iterator[tuple[int, int, int]]:
        for head, dim in itertools.product(range(self.HEADS), range(self.DIM)):
            yield head, dim, (head * self.DIM + dim) * itemsize

    def test_key_and_value_before_or_after_blocks(self) -> None:
        for itemsize, first, kernel, kind, blocks in itertools.product(
            (1, 2, 4, 8), (True, False), (4, 2, 1), ("MHA", "GQA", "HYBRID_LINEAR"), (1, 4)
        ):
            asked = (2, blocks, 4, self.HEADS, self.DIM)
            if not first:
                asked = (blocks, 2, 4, self.HEADS, self.DIM)
            shape = read_vllm_shape(asked, 4, itemsize, self.LAYERS, kind, "NHD", kernel)
            ratio = 4 // kernel
            wanted = [2, blocks * ratio] if first else [blocks * ratio, 2]
            for layout in self.layouts(shape):
                views = shape.views(layout)
                self.assertEqual(
                    {view.shape for view in views}, {(*wanted, kernel, self.HEADS, self.DIM)}
                )
                token_bytes = self.HEADS * self.DIM * itemsize
                split = "pair" if kind == "HYBRID_LINEAR" else "split"
                self.assertEqual(layout.buffers, 1 if kind == "HYBRID_LINEAR" else 2)

                def elements(
                    itemsize: int = itemsize,
                    ratio: int = ratio,
                    kernel: int = kernel,
                    first: bool = first,
                    blocks: int = blocks,
                ) -> Iterator[tuple]:
                    for layer, kv, block, token in itertools.product(
                        range(self.LAYERS), range(2), range(blocks), range(4)
                    ):
                        k = block * ratio + token // kernel
                        for head, dim, inside in self.heads_and_dims(itemsize):
                            pair = (kv, k) if first else (k, kv)
                            index = (*pair, token % kernel, head, dim)
                            yield layer, kv, block, token, inside, index

                with self.subTest(asked=asked, itemsize=itemsize, kernel=kernel, layout=layout):
                    model = Model(split, layout, kernel, token_bytes)
                    self.check(shape, layout, model, 4, elements())

    def test_two_blocks_are_not_taken_for_key_and_value(self) -> None:
        first = read_vllm_shape((2, 2, 4, 1, 1), 4, 2, 1)
        self.assertEqual((first.kv_dim, first.blocks), (0, 2))

    def test_latent_attention(self) -> None:
        for itemsize, kernel, blocks in itertools.product((1, 2, 4), (6, 3, 1), (1, 4)):
            shape = read_vllm_shape(
                (blocks, 6, self.DIM), 6, itemsize, self.LAYERS, "MLA", "NHD", kernel
            )
            ratio = 6 // kernel
            for layout in self.layouts(shape):
                self.assertEqual(layout.buffers, 1)

                def elements(
                    itemsize: int = itemsize,
                    ratio: int = ratio,
                    kernel: int = kernel,
                    blocks: int = blocks,
                ) -> Iterator[tuple]:
                    for layer, block, token, dim in itertools.product(
                        range(self.LAYERS), range(blocks), range(6), range(self.DIM)
                    ):
                        index = (block * ratio + token // kernel, token % kernel, dim)
                        yield layer, 0, block, token, dim * itemsize, index

                with self.subTest(itemsize=itemsize, kernel=kernel, layout=layout):
                    model = Model("single", layout, kernel, self.DIM * itemsize)
                    self.check(shape, layout, model, 6, elements())

    def test_packed(self) -> None:
        width = 2 * self.DIM
        for itemsize, kernel, blocks in itertools.product((1, 2, 4), (4, 2), (1, 4)):
            asked = (blocks, self.HEADS, 4, width)
            shape = read_vllm_shape(asked, 4, itemsize, self.LAYERS, "MHA", "NHD", kernel)
            for layout in self.layouts(shape):

                def elements(
                    itemsize: int = itemsize, kernel: int = kernel, blocks: int = blocks
                ) -> Iterator[tuple]:
                    for layer, block, token, head, dim in itertools.product(
                        range(self.LAYERS),
                        range(blocks),
                        range(4),
                        range(self.HEADS),
                        range(width),
                    ):
                        inside = (head * width + dim) * itemsize
                        k = block * (4 // kernel) + token // kernel
                        yield layer, 0, block, token, inside, (k, head, token % kernel, dim)

                with self.subTest(asked=asked, itemsize=itemsize, layout=layout):
                    model = Model("single", layout, kernel, self.HEADS * width * itemsize)
                    self.check(shape, layout, model, 4, elements())

    def test_packed_with_heads_outside(self) -> None:
        shape = read_vllm_shape((3, 2, 4, 6), 4, 2, 1, "MHA", "HND")
        self.assertEqual(shape.inner, (2, 4, 6))
        self.assertEqual(shape.inner_strides, (24, 6, 1))

    def test_tokens(self) -> None:
        for itemsize, page, tokens in itertools.product((1, 2, 8), (1, 4), (4, 8)):
            shape = read_sglang_shape((tokens, self.HEADS, self.DIM), itemsize, self.LAYERS, page)
            for layout in self.layouts(shape):
                self.assertEqual(
                    {view.shape for view in shape.views(layout)},
                    {(2, tokens, self.HEADS, self.DIM)},
                )

                def elements(
                    itemsize: int = itemsize, page: int = page, tokens: int = tokens
                ) -> Iterator[tuple]:
                    for layer, kv, token in itertools.product(
                        range(self.LAYERS), range(2), range(tokens)
                    ):
                        block, within = divmod(token, page)
                        for head, dim, inside in self.heads_and_dims(itemsize):
                            yield layer, kv, block, within, inside, (kv, token, head, dim)

                with self.subTest(itemsize=itemsize, page=page, layout=layout):
                    token_bytes = self.HEADS * self.DIM * itemsize
                    model = Model("split", layout, 1, token_bytes)
                    self.check(shape, layout, model, page, elements())

    def test_tokens_that_end_within_a_block(self) -> None:
        shape = read_sglang_shape((9, 2, 3), 2, 2, page_size=4)
        layout = shape.layout(2 * MIB, contiguous=False)
        self.assertEqual(layout.blocks, 3)
        self.assertEqual({view.shape for view in shape.views(layout)}, {(2, 9, 2, 3)})

    def test_tokens_of_latent_attention(self) -> None:
        shape = read_sglang_shape((8, 1, 5), 2, 3, page_size=4, attention_type="MLA")
        layout = shape.layout(2 * MIB, contiguous=True)
        self.assertEqual(layout.block_bytes, 4 * 5 * 2 * 3)
        self.assertEqual([view.offset for view in shape.views(layout)], [0, 5, 10])
        self.assertEqual({view.strides for view in shape.views(layout)}, {(15, 5, 1)})

    def test_views_of_a_larger_pool_use_its_regions(self) -> None:
        shape = read_vllm_shape((2, 4, 4, 2, 3), 4, 2, 2)
        small = shape.layout(96, contiguous=False)
        large = PoolLayout(2, 2, 48, 40, 96, contiguous=False)
        self.assertEqual(shape.views(small)[1].strides[0], small.region_bytes // 2)
        self.assertEqual(shape.views(large)[1].strides[0], large.region_bytes // 2)
        self.assertEqual(shape.views(large)[1].offset, large.region_bytes)

    def test_pages_cover_all_blocks(self) -> None:
        for unit, page, blocks in itertools.product(range(1, 9), (8, 15, 16, 24), range(1, 20)):
            layout = PoolLayout(3, 2, unit, blocks, page, contiguous=True)
            self.assertGreaterEqual(layout.range_bytes, blocks * layout.block_bytes)
            self.assertLess((layout.pages - 1) * page, blocks * unit)
            apart = PoolLayout(3, 2, unit, blocks, page, contiguous=False)
            self.assertEqual(apart.range_bytes, layout.range_bytes)
            self.assertEqual(apart.handle_bytes * apart.handles_per_page, layout.handle_bytes)


class BlocksAndPages(unittest.TestCase):
    def test_every_page_holds_a_block(self) -> None:
        for unit, page in itertools.product(range(1, 25), range(1, 49)):
            # Pages repeat after as many as there are bytes in a block.
            whole = all((-(-p * page // unit) + 1) * unit <= (p + 1) * page for p in range(unit))
            self.assertEqual(every_page_holds_a_block(unit, page), whole, (unit, page))

    def test_a_block_larger_than_a_page_names_the_size_that_would_do(self) -> None:
        for unit, megabytes in ((2 * MIB + 1, 6), (4 * MIB, 4), (3 * MIB, 6), (5 * MIB, 10)):
            with self.subTest(unit=unit):
                with self.assertRaises(KVCachedConfigError) as raised:
                    check_block(unit, 2 * MIB)
                self.assertIn(f"KVCACHED_PAGE_SIZE_MB={megabytes} ", str(raised.exception))
                check_block(unit, megabytes * MIB)


class WrongShapes(unittest.TestCase):
    def test_vllm(self) -> None:
        good = ((2, 4, 16, 2, 8), 16, 2, 1)
        read_vllm_shape(*good)
        for arguments, text in (
            (((3, 4, 16, 2, 8), 16, 2, 1), "not (3, 4, 16, 2, 8)"),
            (((2, 4, 8, 2, 8), 16, 2, 1), "block_size is 16"),
            (((2, 0, 16, 2, 8), 16, 2, 1), "must be positive"),
            (((2, 4, 16, 2, 8), 16, 3, 1), "1, 2, 4 or 8 bytes"),
            (((2, 4, 16, 2, 8), 16, 2, 0), "num_layers"),
            (((2, 4, 16, 2, 8), 16, 2, 1, "NSA"), "NSA is not supported"),
            (((2, 4, 16, 2, 8), 16, 2, 1, "MHA", "HND"), "packed"),
            (((2, 4, 16, 2, 8), 16, 2, 1, "MHA", "XYZ"), "XYZ is not supported"),
            (((2, 4, 16, 2, 8), 16, 2, 1, "MHA", "NHD", 5), "multiple of kernel_block_size"),
            (((2, 4, 16, 2, 8), 16, 2, 1, "MHA", "NHD", 0), "multiple of kernel_block_size"),
            (((4, 2, 16, 7), 16, 2, 1), "2 * D"),
            (((4, 16), 16, 2, 1, "MLA"), "(N, B, D)"),
            (((4, 16, 2), 16, 2, 1), "a KV cache is"),
        ):
            with self.subTest(arguments=arguments):
                with self.assertRaises(ValueError) as raised:
                    read_vllm_shape(*arguments)  # type: ignore[arg-type]
                self.assertIn(text, str(raised.exception))

    def test_sglang(self) -> None:
        for arguments, text in (
            (((8, 16), 2, 1), "(tokens, H, D)"),
            (((8, 2, 4), 2, 1, 0), "page_size"),
            (((8, 2, 4), 2, 1, 1, "HYBRID_LINEAR"), "not supported"),
            (((8, 2, 4), 2, 1, 1, "MHA", "HND"), "not supported"),
            (((-8, 2, 4), 2, 1), "must be positive"),
        ):
            with self.subTest(arguments=arguments):
                with self.assertRaises(ValueError) as raised:
                    read_sglang_shape(*arguments)  # type: ignore[arg-type]
                self.assertIn(text, str(raised.exception))


if __name__ == "__main__":
    unittest.main()
