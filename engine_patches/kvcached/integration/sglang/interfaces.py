"""For SGLang: the calls that its patches, and integrations like it, make."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from kvcached import observability
from kvcached.integration import interface
from kvcached.kv_cache_manager import KVCacheManager
from kvcached.runtime import runtime
from kvcached.tensors import read_sglang_shape

if TYPE_CHECKING:
    import torch

SUPPORTED_ATTENTION_TYPES = ("MHA", "GQA", "MLA")
SUPPORTED_KV_LAYOUTS = ("NHD",)


def init_kvcached(
    tp_rank: int = 0,
    tp_size: int = 1,
    is_worker: bool = False,
    device: str | None = None,
    async_sched: bool = False,
    *,
    world_size: int | None = None,
    pp_rank: int = 0,
) -> None:
    """As kvcached.integration.vllm.interfaces.init_kvcached."""
    interface.init("SGLang", tp_rank, tp_size, is_worker, device, async_sched, world_size, pp_rank)


def shutdown_kvcached() -> bool:
    """Gives all memory back; True. Idempotent, and init_kvcached() may follow.

    Tensors stay valid objects whose contents are gone.
    """
    return runtime.shutdown()


def alloc_kv_cache(
    kvcache_shape: Sequence[int],
    dtype: torch.dtype,
    device: str,
    num_layers: int,
    page_size: int = 1,
    attention_type: str = "MHA",
    kv_layout: str = "NHD",
    group_id: int = 0,
) -> tuple[list[torch.Tensor], list[torch.Tensor]] | list[torch.Tensor]:
    """(K tensors, V tensors), one of each a layer; for MLA one list.

    ``kvcache_shape`` is (tokens, H, D), and that of each tensor. A block is ``page_size``
    tokens; memory comes behind blocks as they are taken, and only those in use, and the
    null block, may be touched.

    Raises as kvcached.integration.vllm.interfaces.alloc_kv_cache.
    """
    runtime.check()
    shape = read_sglang_shape(
        kvcache_shape,
        interface.itemsize_of(dtype),
        num_layers,
        page_size,
        attention_type,
        kv_layout,
    )
    tensors = interface.make(shape, dtype, device, group_id).tensors
    if attention_type == "MLA":
        return tensors
    return [tensor[0] for tensor in tensors], [tensor[1] for tensor in tensors]


def get_kv_cache_manager(
    num_blocks: int | None,
    block_size: int,
    cell_size: int,
    num_layers: int,
    reserve_null_block: bool = True,
    num_kv_buffers: int = 2,
    group_id: int = 0,
    pool_name: str | None = None,
) -> KVCacheManager:
    """The manager of a group's blocks, of ``block_size`` tokens each.

    ``cell_size``: bytes of a token in one layer's K or V. Where ``num_blocks`` is more than
    the group's tensors have, it is what they have, with a warning: a count of tokens does.
    Raises as KVCacheManager, and
    RuntimeError before init_kvcached().
    """
    runtime.check()
    return interface.make_manager(
        "sglang",
        num_blocks,
        block_size,
        cell_size,
        num_layers,
        num_kv_buffers,
        group_id,
        pool_name,
        reserve_null_block=reserve_null_block,
        clamp=True,
    )


def observability_snapshot() -> observability.RuntimeSnapshot:
    """How the process was initialised."""
    return observability.runtime_snapshot("sglang")


def observability_snapshot_dict() -> dict[str, Any]:
    return observability_snapshot().to_dict()


def kv_cache_pool_snapshots() -> list[observability.KVCachePoolSnapshot]:
    """Of all pools that SGLang has managers for."""
    return observability.get_registered_kv_cache_pool_snapshots(integration="sglang")


def kv_cache_pool_snapshot_dicts() -> list[dict[str, Any]]:
    return observability.get_registered_kv_cache_pool_snapshot_dicts(integration="sglang")
