"""What the engines' interfaces have in common."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from kvcached.kv_cache_manager import KVCacheManager
from kvcached.log import get_kvcached_logger
from kvcached.runtime import Group, runtime
from kvcached.tensors import KVShape, make_tensors

if TYPE_CHECKING:
    import torch


def init(
    engine: str,
    tp_rank: int,
    tp_size: int,
    is_worker: bool,
    device: object,
    async_sched: bool,
    world_size: int | None,
    pp_rank: int,
) -> None:
    """``world_size`` is another name of ``tp_size``.

    Ranks that are the default say nothing: those of an earlier call stay.
    """
    if world_size is not None:
        if tp_size not in (1, world_size):
            raise ValueError(f"tp_size is {tp_size}, but world_size is {world_size}")
        tp_size = world_size
    runtime.init(
        engine=engine,
        tp_rank=tp_rank or None,
        tp_size=None if tp_size == 1 and tp_rank == 0 else tp_size,
        pp_rank=pp_rank or None,
        is_worker=is_worker,
        device=device,
        async_sched=async_sched,
    )


def itemsize_of(dtype: torch.dtype) -> int:
    """Bytes of an element. Raises ValueError for what is no dtype of torch."""
    import torch

    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"dtype must be one of torch, not {dtype!r}")
    return dtype.itemsize


class Made(NamedTuple):
    group: Group
    flat: torch.Tensor  # the whole range, uint8
    tensors: list[torch.Tensor]


def make(shape: KVShape, dtype: torch.dtype, device: object, group_id: int) -> Made:
    """Opens the group's pool where it is not open yet, and makes the tensors."""
    runtime.use_device(device)
    layout = shape.layout(runtime.page_bytes, runtime.contiguous)
    group = runtime.open_for_tensors(group_id, layout)
    flat = group.flat()
    return Made(group, flat, make_tensors(flat, dtype, shape.views(group.layout)))


def _room(group: Group, block_size: int, cell_size: int) -> int:
    return group.layout.blocks * group.layout.unit_bytes // (block_size * cell_size)


def make_manager(
    integration: str,
    num_blocks: int | None,
    block_size: int,
    cell_size: int,
    num_layers: int,
    num_kv_buffers: int,
    group_id: int,
    pool_name: str | None,
    reserve_null_block: bool,
    clamp: bool = False,
) -> KVCacheManager:
    """``num_blocks`` of None: as many as the group's tensors have.

    With ``clamp``, as many as they have where more were asked for, and a warning.
    """
    group = runtime.find_group(group_id)
    if num_blocks is None:
        if group is None:
            raise ValueError(
                f"num_blocks=None needs tensors of KV group {group_id}, made by alloc_kv_cache()"
            )
        if block_size <= 0 or cell_size <= 0:
            raise ValueError(f"a block of {block_size} cells of {cell_size} bytes has no memory")
        num_blocks = _room(group, block_size, cell_size)
    elif clamp and group is not None and group.has_tensors and block_size > 0 and cell_size > 0:
        room = _room(group, block_size, cell_size)
        if num_blocks > room > 0:
            get_kvcached_logger().warning(
                "num_blocks=%d, but the tensors of KV group %d have %d blocks of %d cells of %d "
                "bytes; taking these",
                *(num_blocks, group_id, room, block_size, cell_size),
            )
            num_blocks = room
    manager = KVCacheManager(
        num_blocks,
        block_size,
        cell_size,
        num_layers,
        runtime.tp_size,
        runtime.pp_rank,
        async_sched=runtime.async_sched,
        reserve_null_block=reserve_null_block,
        num_kv_buffers=num_kv_buffers,
        group_id=group_id,
        pool_name=pool_name,
    )
    manager.integration = integration
    return manager
