"""For vLLM: the calls that its patches, and integrations like it, make."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from kvcached import observability
from kvcached.integration import interface
from kvcached.kv_cache_manager import KVCacheManager
from kvcached.runtime import runtime
from kvcached.tensors import ATTENTION_TYPES, KV_LAYOUTS, read_vllm_shape

if TYPE_CHECKING:
    import torch

SUPPORTED_ATTENTION_TYPES = ATTENTION_TYPES
SUPPORTED_KV_LAYOUTS = KV_LAYOUTS


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
    """Prepares the process; talks to nobody. Idempotent.

    A second call may raise the role to worker. ``device``: ``cuda``, ``cuda:N``, ``cpu``
    or a torch.device; None: the current GPU, or the host's memory where torch has none.
    ``world_size`` is another name of ``tp_size``. Raises ValueError for what makes no
    sense, and for a malformed environment variable.
    """
    interface.init("vLLM", tp_rank, tp_size, is_worker, device, async_sched, world_size, pp_rank)


def shutdown_kvcached() -> bool:
    """Gives all memory back; True. Idempotent, and init_kvcached() may follow.

    Tensors stay valid objects whose contents are gone.
    """
    return runtime.shutdown()


def alloc_kv_cache(
    kvcache_shape: Sequence[int],
    block_size: int,
    dtype: torch.dtype,
    device: str,
    num_layers: int,
    attention_type: str = "MHA",
    kv_layout: str = "NHD",
    group_id: int = 0,
    kernel_block_size: int | None = None,
    return_meta: bool = False,
) -> Any:
    """The KV cache's tensors, one a layer; memory comes behind their blocks as they are taken.

    ``kvcache_shape``, for N blocks of ``block_size`` tokens: (2, N, block_size, H, D) or
    (N, 2, block_size, H, D); (N, block_size, D) for MLA; (N, H, block_size, 2 * D) packed,
    whose ``kv_layout`` may be HND. The tensors have this shape; with a
    ``kernel_block_size`` below ``block_size``, as many more blocks of so many tokens.

    HYBRID_LINEAR gives (tensors, info), with info's keys ``buffers`` (int8: the whole range,
    or one a layer), ``num_blocks``, ``page_size_bytes`` (a block in a layer),
    ``block_stride_bytes``, ``num_pools`` and ``is_contiguous``. With ``return_meta`` a
    dictionary is last: ``raw_kv_tensors`` (uint8), ``num_blocks_per_layer``,
    ``gpu_mem_bytes_per_layer_k_or_v``, ``num_layers``, ``dtype``.

    Only blocks in use, and the null block, may be touched. Raises RuntimeError before
    init_kvcached(); ValueError for a shape, dtype, device or group that does not do;
    KVCachedConfigError for blocks larger than a page, for several ranks, and for a group
    that exists and is of another kind; _C.Error where there is no broker.
    """
    runtime.check()
    shape = read_vllm_shape(
        kvcache_shape,
        block_size,
        interface.itemsize_of(dtype),
        num_layers,
        attention_type,
        kv_layout,
        kernel_block_size,
    )
    group, flat, tensors = interface.make(shape, dtype, device, group_id)
    layout = group.layout
    per_layer = layout.region_bytes * layout.buffers
    if layout.contiguous:
        raw = [flat]
    else:
        raw = [flat[layer * per_layer : (layer + 1) * per_layer] for layer in range(num_layers)]

    answer: list[Any] = [tensors]
    if attention_type == "HYBRID_LINEAR":
        import torch

        block = shape.layer_block_bytes
        used = raw if layout.contiguous else [tensor[: shape.blocks * block] for tensor in raw]
        answer.append(
            {
                "buffers": [tensor.view(torch.int8) for tensor in used],
                "num_blocks": shape.blocks,
                "page_size_bytes": block,
                "block_stride_bytes": block * (num_layers if layout.contiguous else 1),
                "num_pools": num_layers,
                "is_contiguous": layout.contiguous,
            }
        )
    if return_meta:
        answer.append(
            {
                "raw_kv_tensors": raw,
                "num_blocks_per_layer": shape.blocks,
                "gpu_mem_bytes_per_layer_k_or_v": layout.pages * layout.page_bytes,
                "num_layers": num_layers,
                "dtype": dtype,
            }
        )
    return answer[0] if len(answer) == 1 else tuple(answer)


def get_kv_cache_manager(
    num_blocks: int | None,
    block_size: int,
    cell_size: int,
    num_layers: int,
    num_kv_buffers: int = 2,
    group_id: int = 0,
    pool_name: str | None = None,
) -> KVCacheManager:
    """The manager of a group's blocks, with block 0 as the null block.

    ``cell_size``: bytes of a token in one layer's K or V. ``num_blocks`` of None: as many as
    the group's tensors have. Raises as KVCacheManager, and RuntimeError before
    init_kvcached().
    """
    runtime.check()
    return interface.make_manager(
        "vllm",
        num_blocks,
        block_size,
        cell_size,
        num_layers,
        num_kv_buffers,
        group_id,
        pool_name,
        reserve_null_block=True,
    )


def should_use_worker_ipc() -> bool:
    """Whether this process is initialised and is no worker."""
    return runtime.initialized and not runtime.is_worker


def get_world_size() -> int:
    """The tensor parallel size. Raises RuntimeError before init_kvcached()."""
    runtime.check()
    return runtime.tp_size


def observability_snapshot() -> observability.RuntimeSnapshot:
    """How the process was initialised."""
    return observability.runtime_snapshot("vllm")


def observability_snapshot_dict() -> dict[str, Any]:
    return observability_snapshot().to_dict()


def kv_cache_pool_snapshots() -> list[observability.KVCachePoolSnapshot]:
    """Of all pools that vLLM has managers for."""
    return observability.get_registered_kv_cache_pool_snapshots(integration="vllm")


def kv_cache_pool_snapshot_dicts() -> list[dict[str, Any]]:
    return observability.get_registered_kv_cache_pool_snapshot_dicts(integration="vllm")
