"""Where the bytes of KV blocks are in a pool's range, and the tensors that view them.

A pool's range consists of regions, a region of pages. In the contiguous layout there
is one region, and block b of all layers is at b * block_bytes: one layer's block after
the other, in a layer K before V. In the per-layer layout a layer's K has a region and
its V the next one, or both together one where K and V are one buffer; block b is at
b * unit_bytes of it.

    contiguous  | b0: K0 V0 K1 V1 | b1: K0 V0 K1 V1 | ...
    per layer   | K0: b0 b1 ... | V0: b0 b1 ... | K1: b0 b1 ... | V1: ...

An engine's kernels may see a block as several kernel blocks (SGLang's see each token
as one). A block then is its kernel blocks one after the other, each laid out as said,
because a tensor has one distance between kernel blocks.

Everything but :func:`make_tensors` is arithmetic on integers, without torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd, prod
from typing import TYPE_CHECKING, Any, NamedTuple

from kvcached.config import MIB, PAGE_GRANULARITY
from kvcached.errors import KVCachedConfigError

if TYPE_CHECKING:
    import torch

ATTENTION_TYPES = ("MHA", "GQA", "MLA", "HYBRID_LINEAR")
KV_LAYOUTS = ("NHD", "HND")


class View(NamedTuple):
    """A tensor over the range; strides and offset count elements."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int


def every_page_holds_a_block(unit_bytes: int, page_bytes: int) -> bool:
    """Whether each page has a block that lies wholly on it."""
    return page_bytes >= 2 * unit_bytes - gcd(unit_bytes, page_bytes)


def check_block(unit_bytes: int, page_bytes: int) -> None:
    """Raises KVCachedConfigError, naming a page size that would do."""
    if every_page_holds_a_block(unit_bytes, page_bytes):
        return
    size = PAGE_GRANULARITY
    while not every_page_holds_a_block(unit_bytes, size):
        size += PAGE_GRANULARITY
    problem = (
        "is larger than a page" if unit_bytes > page_bytes else "leaves pages without a whole block"
    )
    raise KVCachedConfigError(
        f"a KV block of {unit_bytes} bytes of one layer's K or V {problem} of "
        f"{page_bytes // MIB} MB; set KVCACHED_PAGE_SIZE_MB={size // MIB} or use smaller blocks"
    )


@dataclass(frozen=True)
class PoolLayout:
    """How many bytes of what a pool has. Sizes are bytes.

    ``buffers`` is 2 where a layer's K and V are apart, 1 where they are one buffer;
    ``unit_bytes`` is a block's share of one buffer of one layer, ``page_bytes`` a page's.
    """

    layers: int
    buffers: int
    unit_bytes: int
    blocks: int
    page_bytes: int
    contiguous: bool

    def check(self) -> None:
        """Raises ValueError for a figure that is not positive, and as check_block does."""
        for name in ("layers", "buffers", "unit_bytes", "blocks", "page_bytes"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, not {getattr(self, name)}")
        check_block(self.unit_bytes, self.page_bytes)

    @property
    def block_bytes(self) -> int:
        """Of all layers."""
        return self.unit_bytes * self.layers * self.buffers

    @property
    def pages(self) -> int:
        return -(-self.blocks * self.unit_bytes // self.page_bytes)

    @property
    def page_total_bytes(self) -> int:
        """Of all layers."""
        return self.page_bytes * self.layers * self.buffers

    @property
    def handles_per_page(self) -> int:
        return 1 if self.contiguous else self.layers * self.buffers

    @property
    def handle_bytes(self) -> int:
        return self.page_total_bytes // self.handles_per_page

    @property
    def region_bytes(self) -> int:
        return self.pages * self.handle_bytes

    @property
    def range_bytes(self) -> int:
        return self.handles_per_page * self.region_bytes


@dataclass(frozen=True)
class KVShape:
    """What an engine asked for, read.

    A kernel block of one buffer of one layer is the elements of ``inner``, and in it
    the element (i, j, ...) is at the sum of i * inner_strides[0], ... ``kv_dim`` is
    where the tensor's dimension of K and V is: 0, 1, or None where it has none.
    ``count`` is the length of its dimension of kernel blocks.
    """

    itemsize: int
    layers: int
    buffers: int
    blocks: int
    kernel_blocks_per_block: int
    count: int
    inner: tuple[int, ...]
    inner_strides: tuple[int, ...]
    kv_dim: int | None

    @property
    def kernel_elements(self) -> int:
        """Of one kernel block in one layer, K and V."""
        return prod(self.inner) * (1 if self.kv_dim is None else 2)

    @property
    def layer_block_bytes(self) -> int:
        """Of one block in one layer, K and V."""
        return self.kernel_elements * self.kernel_blocks_per_block * self.itemsize

    def layout(self, page_bytes: int, contiguous: bool) -> PoolLayout:
        """The pool for it. Raises as PoolLayout.check."""
        layout = PoolLayout(
            layers=self.layers,
            buffers=self.buffers,
            unit_bytes=self.layer_block_bytes // self.buffers,
            blocks=self.blocks,
            page_bytes=page_bytes,
            contiguous=contiguous,
        )
        layout.check()
        return layout

    def views(self, layout: PoolLayout) -> list[View]:
        """One tensor a layer. ``layout`` may be of a larger pool of the same layers."""
        region = layout.region_bytes // self.itemsize
        if layout.contiguous:
            block_stride = self.kernel_elements * self.layers
            layer_stride = self.kernel_elements
            kv_stride = self.kernel_elements // 2
        else:
            block_stride = self.kernel_elements // self.buffers
            layer_stride = region * self.buffers
            kv_stride = region if self.buffers == 2 else self.kernel_elements // 2
        shape, strides = [self.count], [block_stride]
        if self.kv_dim is not None:
            shape.insert(self.kv_dim, 2)
            strides.insert(self.kv_dim, kv_stride)
        return [
            View((*shape, *self.inner), (*strides, *self.inner_strides), layer * layer_stride)
            for layer in range(self.layers)
        ]


def dense_strides(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(prod(shape[i + 1 :]) for i in range(len(shape)))


def _check_shape(shape: Sequence[int], itemsize: int, layers: int) -> tuple[int, ...]:
    checked = tuple(int(length) for length in shape)
    if any(length <= 0 for length in checked):
        raise ValueError(f"every dimension of a KV cache must be positive, not {checked}")
    if itemsize not in (1, 2, 4, 8):
        raise ValueError(f"elements of a KV cache have 1, 2, 4 or 8 bytes, not {itemsize}")
    if layers <= 0:
        raise ValueError(f"num_layers must be positive, not {layers}")
    return checked


def _check_kind(attention_type: str, kv_layout: str, supported: Sequence[str]) -> None:
    if attention_type not in supported:
        raise ValueError(
            f"Attention type {attention_type} is not supported; there are {', '.join(supported)}"
        )
    if kv_layout not in KV_LAYOUTS:
        raise ValueError(
            f"KV layout {kv_layout} is not supported; there are {', '.join(KV_LAYOUTS)}"
        )


def read_vllm_shape(
    shape: Sequence[int],
    block_size: int,
    itemsize: int,
    layers: int,
    attention_type: str = "MHA",
    kv_layout: str = "NHD",
    kernel_block_size: int | None = None,
) -> KVShape:
    """Reads vLLM's shapes, N blocks of B tokens, H heads of D elements:

    (2, N, B, H, D) and (N, 2, B, H, D); MLA (N, B, D); packed (N, H, B, K and V of a head).

    Raises ValueError for any other, and where ``block_size`` is not B or no multiple of
    ``kernel_block_size``.
    """
    _check_kind(attention_type, kv_layout, ATTENTION_TYPES)
    shape = _check_shape(shape, itemsize, layers)
    mla = attention_type == "MLA"
    packed = not mla and len(shape) == 4
    if kv_layout == "HND" and not packed:
        raise ValueError("KV layout HND is supported for packed shapes (N, H, B, 2 * D) only")
    kernel = block_size if kernel_block_size is None else kernel_block_size
    if block_size <= 0 or kernel <= 0 or block_size % kernel:
        raise ValueError(
            f"block_size ({block_size}) must be a multiple of kernel_block_size ({kernel})"
        )

    kv_dim: int | None = None
    if mla:
        if len(shape) < 3:
            raise ValueError(f"the KV cache of MLA is (N, B, D), not {shape}")
        blocks, tokens, rest = shape[0], shape[1], shape[2:]
    elif packed:
        if shape[3] % 2:
            raise ValueError(f"a packed KV cache is (N, H, B, 2 * D), not {shape}")
        blocks, tokens, rest = shape[0], shape[2], (shape[1], shape[3])
    elif len(shape) == 5 and 2 in shape[:2]:
        kv_dim = 0 if shape[0] == 2 else 1
        blocks, tokens, rest = shape[1 - kv_dim], shape[2], shape[3:]
    else:
        raise ValueError(
            f"a KV cache is (2, N, B, H, D), (N, 2, B, H, D) or (N, H, B, 2 * D), not {shape}"
        )
    if tokens != block_size:
        raise ValueError(f"blocks of {tokens} tokens in {shape}, but block_size is {block_size}")

    if packed:
        heads, width = rest
        inner: tuple[int, ...] = (heads, kernel, width)
        nhd = (width, heads * width, 1)
        inner_strides = nhd if kv_layout == "NHD" else dense_strides(inner)
    else:
        inner = (kernel, *rest)
        inner_strides = dense_strides(inner)
    ratio = block_size // kernel
    return KVShape(
        itemsize=itemsize,
        layers=layers,
        buffers=1 if mla or packed or attention_type == "HYBRID_LINEAR" else 2,
        blocks=blocks,
        kernel_blocks_per_block=ratio,
        count=blocks * ratio,
        inner=inner,
        inner_strides=inner_strides,
        kv_dim=kv_dim,
    )


def read_sglang_shape(
    shape: Sequence[int],
    itemsize: int,
    layers: int,
    page_size: int = 1,
    attention_type: str = "MHA",
    kv_layout: str = "NHD",
) -> KVShape:
    """Reads SGLang's shape (tokens, H, D), which is that of K and of V, or of both in MLA.

    A block is ``page_size`` tokens. The views are (2, tokens, H, D), K before V, or
    (tokens, H, D) in MLA. Raises ValueError for anything else.
    """
    _check_kind(attention_type, kv_layout, ("MHA", "GQA", "MLA"))
    if kv_layout != "NHD" and attention_type != "MLA":
        raise ValueError(f"KV layout {kv_layout} is not supported; there is NHD")
    shape = _check_shape(shape, itemsize, layers)
    if len(shape) < 3:
        raise ValueError(f"a KV cache is (tokens, H, D), not {shape}")
    if page_size <= 0:
        raise ValueError(f"page_size must be positive, not {page_size}")
    mla = attention_type == "MLA"
    return KVShape(
        itemsize=itemsize,
        layers=layers,
        buffers=1 if mla else 2,
        blocks=-(-shape[0] // page_size),
        kernel_blocks_per_block=page_size,
        count=shape[0],
        inner=shape[1:],
        inner_strides=dense_strides(shape[1:]),
        kv_dim=None if mla else 0,
    )


def flat_bytes(pool: Any, nbytes: int, offset: int = 0) -> torch.Tensor:
    """The range as uint8, one dimension; see Pool.dlpack for what may be touched."""
    from torch.utils import dlpack

    return dlpack.from_dlpack(pool.dlpack(offset, nbytes))


def make_tensors(
    flat: torch.Tensor, dtype: torch.dtype, views: Sequence[View]
) -> list[torch.Tensor]:
    """The views over ``flat``, the whole range as uint8."""
    typed = flat.view(dtype)
    base = typed.storage_offset()
    return [typed.as_strided(view.shape, view.strides, base + view.offset) for view in views]
