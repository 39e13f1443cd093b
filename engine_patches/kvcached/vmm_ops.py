"""For hand-made integrations: tensors, and which of their pages have memory.

    vmm_ops.init_kvcached("cuda:0")
    tensors = vmm_ops.create_kv_tensors(size, 2, "cuda:0", num_layers)
    vmm_ops.map_to_kv_tensors([0, page_size])
    vmm_ops.unmap_from_kv_tensors([0])

A page is KVCACHED_PAGE_SIZE_MB of one layer's K or V, in all layers. In the per-layer
layout a page's offset is its distance from the start of a layer's K (or V); in the
contiguous layout it is that from the start of the one tensor, where pages of all layers
lie one after the other: a multiple of page size * num_layers * num_kv_buffers.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

from kvcached.errors import KVCachedConfigError
from kvcached.runtime import Group, runtime
from kvcached.tensors import PoolLayout

if TYPE_CHECKING:
    import torch


def is_available() -> bool:
    """Whether the native part can be loaded."""
    try:
        from kvcached import _C  # noqa: F401
    except ImportError:
        return False
    return True


def init_kvcached(dev_str: str, page_size: int = 0, contiguous_layout: bool = True) -> None:
    """``page_size`` in bytes; 0: as KVCACHED_PAGE_SIZE_MB says. Idempotent; the first call's
    layout holds.

    Raises ValueError for a device or page size that does not do, or another than before.
    """
    runtime.init(device=dev_str, page_bytes=page_size, contiguous=contiguous_layout, is_worker=True)


def shutdown_kvcached() -> None:
    """Gives all memory back; tensors stay valid objects whose contents are gone."""
    runtime.shutdown()


def create_kv_tensors(
    size: int,
    dtype_size: int,
    dev_str: str,
    num_layers: int,
    num_kv_buffers: int = 2,
    group_id: int = 0,
    unified_pool: bool = False,
) -> list[torch.Tensor]:
    """Tensors of one dimension without memory behind them.

    ``size``: bytes of a layer, K and V together, rounded up to pages. Per-layer: a tensor a
    layer, whose second half is V, but for ``unified_pool``, where blocks hold both.
    Contiguous: one tensor for all layers. Elements are integers of ``dtype_size`` 1, 2, 4 or
    8 bytes. Raises RuntimeError before init_kvcached(), ValueError for figures that do not
    do, KVCachedConfigError for a group that is of another kind.
    """
    runtime.check()
    if size <= 0:
        raise ValueError(f"size must be positive, not {size}")
    if dtype_size not in (1, 2, 4, 8):
        raise ValueError(f"dtype_size must be 1, 2, 4 or 8, not {dtype_size}")
    import torch

    runtime.use_device(dev_str)
    page = runtime.page_bytes
    # One unified buffer counts once, unless pages of all layers are one, where it is the
    # caller who says of how many buffers they are.
    buffers = 1 if unified_pool and not runtime.contiguous else num_kv_buffers
    layout = PoolLayout(
        layers=num_layers,
        buffers=buffers,
        unit_bytes=page,
        blocks=-(-size // (page * max(buffers, 1))),
        page_bytes=page,
        contiguous=runtime.contiguous,
    )
    group = runtime.open_for_tensors(group_id, layout)
    dtype = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype_size]
    flat = group.flat().view(dtype)
    if group.layout.contiguous:
        return [flat]
    layer = group.layout.region_bytes * buffers // dtype_size
    return [flat[i * layer : (i + 1) * layer] for i in range(num_layers)]


def kv_tensors_created(group_id: int = 0) -> bool:
    """Whether the group has tensors. Raises RuntimeError before init_kvcached()."""
    group = runtime.find_group(group_id)
    return group is not None and group.has_tensors


def _pages(group: Group, offsets: Sequence[int], group_id: int | Sequence[int]) -> list[int]:
    layout = group.layout
    if isinstance(group_id, int):
        step = layout.page_total_bytes if layout.contiguous else layout.page_bytes
        wrong = [offset for offset in offsets if offset % step]
        if wrong:
            raise ValueError(f"offsets must be multiples of {step}, and {wrong} are not")
        pages = [offset // step for offset in offsets]
    else:
        pages = list(offsets)
    outside = [page for page in pages if not 0 <= page < layout.pages]
    if outside:
        raise ValueError(f"the tensors have {layout.pages} pages, and {outside} are none of them")
    return list(dict.fromkeys(pages))


def _paged_group(group_id: int | Sequence[int]) -> Group:
    runtime.check()
    if not isinstance(group_id, int):
        warnings.warn(
            "two lists mean page ids, and the second one is ignored; give byte offsets",
            DeprecationWarning,
            stacklevel=3,
        )
    group = runtime.group(group_id if isinstance(group_id, int) else 0)
    with group.paging:
        if group.manager() is not None:
            raise KVCachedConfigError(
                f"KV group {group.group_id} has a manager, which maps its pages"
            )
        if not group.paged:
            group.owner = None
            group.set_blocks(group.layout.page_total_bytes, group.layout.pages, False)
            group.paged = True
    return group


def _timeout_ms() -> int:
    from kvcached import _C

    seconds = runtime.settings.ipc_timeout_s
    return _C.FOREVER if seconds is None else int(seconds * 1000)


def map_to_kv_tensors(offsets: Sequence[int], group_id: int | Sequence[int] = 0) -> bool:
    """Has memory behind the pages at ``offsets``: all, or False and nothing changed.

    Those that have it already keep it. ``offsets`` are bytes, see the module; with two
    lists (deprecated) the first one is page ids of group 0. Waits up to
    KVCACHED_IPC_TIMEOUT. Raises RuntimeError before init_kvcached(), ValueError for an
    offset that is none of a page, KVCachedConfigError for a group that is unknown or has a
    manager.
    """
    group = _paged_group(group_id)
    pages = _pages(group, offsets, group_id)
    with group.paging:
        group.paging.wait_for(lambda: group.coming_pages.isdisjoint(pages))
        wanted = [page for page in pages if page not in group.mapped_pages]
        group.coming_pages.update(wanted)
    mapped = not wanted
    try:
        # Others may unmap what this waits for.
        mapped = mapped or group.pool.alloc_at(wanted, _timeout_ms())
    finally:
        with group.paging:
            group.coming_pages.difference_update(wanted)
            if mapped:
                group.mapped_pages.update(wanted)
            group.paging.notify_all()
    return mapped


def unmap_from_kv_tensors(offsets: Sequence[int], group_id: int | Sequence[int] = 0) -> bool:
    """Returns the memory behind the pages at ``offsets``; those that have none have none.

    True. Arguments and errors as map_to_kv_tensors. Waits for a map_to_kv_tensors of
    another thread that is about one of the pages.
    """
    group = _paged_group(group_id)
    pages = _pages(group, offsets, group_id)
    with group.paging:
        group.paging.wait_for(lambda: group.coming_pages.isdisjoint(pages))
        gone = [page for page in pages if page in group.mapped_pages]
        if gone:
            group.mapped_pages.difference_update(gone)
            group.pool.free(gone)
            group.pool.trim()
    return True
