"""Snapshots for monitoring: of this process, and of all instances and GPUs.

Nothing here changes anything. Sizes are bytes.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

from kvcached import config
from kvcached.runtime import runtime
from kvcached.tensors import ATTENTION_TYPES, KV_LAYOUTS

if TYPE_CHECKING:
    from kvcached.kv_cache_manager import KVCacheManager

SCHEMA_VERSION = "kvcached.observability.v1"


@dataclass(frozen=True)
class RuntimeSnapshot:
    """How an engine's process was initialised."""

    schema_version: str
    engine: str
    initialized: bool
    device: str | None
    world_size: int
    pp_rank: int
    async_sched: bool
    contiguous_layout: bool
    is_worker: bool | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class KVCachePoolSnapshot:
    """One manager's pool.

    ``allocated_blocks`` are in use; ``reserved_blocks`` those of them that try_to_reserve
    holds, which count as ``available_blocks`` too. ``inuse_pages`` hold blocks, in use or
    cached; ``reserved_pages`` are mapped and hold none. ``virtual_*`` is address space.
    None: there is no such figure here.
    """

    schema_version: str
    pool_type: str
    integration: str | None
    pool_name: str | None
    group_id: int
    num_layers: int
    num_kv_buffers: int
    page_size_bytes: int
    block_size_bytes: int
    total_blocks: int
    available_blocks: int
    allocated_blocks: int
    reserved_blocks: int
    available_bytes: int
    allocated_bytes: int
    reserved_bytes: int
    null_block_reserved: bool
    virtual_per_layer_bytes: int
    virtual_total_bytes: int
    mapped_bytes: int
    total_pages: int | None
    free_pages: int | None
    inuse_pages: int | None
    reserved_pages: int | None
    available_physical_pages: int | None
    effective_free_pages: int | None
    in_shrink: bool
    shrink_target_blocks: int | None
    resize_target_bytes: int | None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class InstanceSnapshot:
    """One instance on one GPU, as its broker sees it.

    ``resident`` is all it holds: ``referenced`` (pages with blocks in use), ``cached`` and
    ``idle``; the latter two are ``reclaimable``. ``limit`` is what was set, ``effective``
    what is in force; ``waiting`` is what it has asked for and not got.
    """

    name: str
    gpu: str
    pids: tuple[int, ...]
    resident: int
    referenced: int
    idle: int
    cached: int
    reclaimable: int
    limit: int
    effective: int
    waiting: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class GpuSnapshot:
    """One broker's device.

    ``foreign`` is used by others than its instances; ``stock`` is lent to nobody and ready;
    ``reclaimable`` is that and what instances hold idle or cached.
    """

    gpu: str
    total: int
    capacity: int
    held: int
    foreign: int
    stock: int
    reclaimable: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def instance_snapshots(name: str | None = None) -> list[InstanceSnapshot]:
    """All instances of the brokers that can be reached, or those called ``name``.

    Raises _C.Error where there is no broker.
    """
    from kvcached import _C

    listed = json.loads(_C.list_instances(config.get("KVBROKER_ADDRESS")))
    return [
        InstanceSnapshot(
            name=instance["ipc"],
            gpu=instance["gpu"],
            pids=tuple(instance["pids"]),
            resident=instance["held_bytes"],
            referenced=instance["used_bytes"],
            idle=instance["idle_bytes"],
            cached=instance["cached_bytes"],
            reclaimable=instance["idle_bytes"] + instance["cached_bytes"],
            limit=instance["limit_bytes"],
            effective=instance["effective_limit_bytes"],
            waiting=instance["waiting_bytes"],
        )
        for instance in listed
        if name is None or instance["ipc"] == name
    ]


def gpu_snapshots() -> list[GpuSnapshot]:
    """All brokers that can be reached. Raises _C.Error where there is none."""
    from kvcached import _C

    given: dict[str, int] = {}
    for instance in instance_snapshots():
        given[instance.gpu] = given.get(instance.gpu, 0) + instance.reclaimable
    return [
        GpuSnapshot(
            gpu=broker["device_uuid"],
            total=int(broker["total_bytes"]),
            capacity=int(broker["capacity_bytes"]),
            held=int(broker["held_bytes"]),
            foreign=int(broker["foreign_bytes"]),
            stock=int(broker["stock_bytes"]),
            reclaimable=int(broker["stock_bytes"]) + given.get(broker["device_uuid"], 0),
        )
        for broker in json.loads(_C.list_brokers(config.get("KVBROKER_ADDRESS")))
    ]


def get_capabilities() -> dict[str, Any]:
    """What this package offers to those who watch it; a missing key means no."""
    return {
        "schema_version": SCHEMA_VERSION,
        "features": {
            "runtime_snapshot": True,
            "kv_cache_pool_snapshot": True,
            "registered_kv_cache_pool_snapshots": True,
            "read_only": True,
            "policy_control": False,
            "instance_memory_limit": True,
            "operation_counters": False,
            "runtime_reservation_reporting": False,
            "instance_snapshots": True,
            "gpu_snapshots": True,
        },
        "backends": {
            "kv_pooling": True,
            "elastic_capacity": True,
            "resize": True,
            "trim": True,
            "default_page_size_bytes": config.get("KVCACHED_PAGE_SIZE_MB"),
            "contiguous_layout_default": config.get("KVCACHED_CONTIGUOUS_LAYOUT"),
            "non_kv_memory_management": False,
        },
        "integrations": {
            "vllm": {
                "attention_types": list(ATTENTION_TYPES),
                "kv_layouts": list(KV_LAYOUTS),
                "hybrid_linear_state_pooling": True,
                "hybrid_linear_state_pooling_mode": "unified_pool",
                "prefix_caching": True,
                "page_aware_eviction": True,
                "worker_ipc": False,
            },
            "sglang": {
                "attention_types": ["MHA", "GQA", "MLA"],
                "kv_layouts": ["NHD"],
                "hybrid_linear_state_pooling": False,
                "prefix_caching": True,
                "page_aware_eviction": True,
                "worker_ipc": False,
            },
        },
        "pool_snapshot_fields": [field.name for field in fields(KVCachePoolSnapshot)],
        "runtime_snapshot_fields": [field.name for field in fields(RuntimeSnapshot)],
        "operation_counter_names": [],
    }


def build_runtime_snapshot(
    *,
    engine: str,
    initialized: bool,
    device: str | None,
    world_size: int,
    pp_rank: int,
    async_sched: bool,
    contiguous_layout: bool,
    is_worker: bool | None = None,
) -> RuntimeSnapshot:
    return RuntimeSnapshot(
        schema_version=SCHEMA_VERSION,
        engine=engine,
        initialized=initialized,
        device=device,
        world_size=world_size,
        pp_rank=pp_rank,
        async_sched=async_sched,
        contiguous_layout=contiguous_layout,
        is_worker=is_worker,
    )


def runtime_snapshot(engine: str) -> RuntimeSnapshot:
    """This process, seen by one engine's interface."""
    ready = runtime.initialized
    return build_runtime_snapshot(
        engine=engine,
        initialized=ready,
        device=runtime.device_if_known,
        world_size=runtime.tp_size,
        pp_rank=runtime.pp_rank,
        async_sched=runtime.async_sched,
        contiguous_layout=(
            runtime.contiguous if ready else config.get("KVCACHED_CONTIGUOUS_LAYOUT")
        ),
        is_worker=runtime.is_worker,
    )


def build_kv_cache_pool_snapshot(
    manager: KVCacheManager, *, integration: str | None = None
) -> KVCachePoolSnapshot:
    """Opens the manager's pool where it is not open yet."""
    pool, layout = manager.pool, manager.group.layout
    page, block = layout.page_total_bytes, manager.layout.block_bytes
    in_use, cached, idle, arriving, _ = pool.usage()
    used_pages, idle_pages = (in_use + cached) // page, idle // page
    available = manager.available_size()
    allocated = len(pool.used_blocks())
    reserved = len(manager.reserved_blocks)
    per_layer = manager.mem_size * manager.num_kv_buffers
    shrinking = manager.in_shrink
    return KVCachePoolSnapshot(
        schema_version=SCHEMA_VERSION,
        pool_type="kv_cache",
        integration=integration,
        pool_name=manager.pool_name,
        group_id=manager.group_id,
        num_layers=manager.num_layers,
        num_kv_buffers=manager.num_kv_buffers,
        page_size_bytes=manager.page_size,
        block_size_bytes=manager.block_mem_size,
        total_blocks=manager.num_blocks,
        available_blocks=available,
        allocated_blocks=allocated,
        reserved_blocks=reserved,
        available_bytes=available * block,
        allocated_bytes=allocated * block,
        reserved_bytes=reserved * block,
        null_block_reserved=manager.null_block is not None,
        virtual_per_layer_bytes=per_layer,
        virtual_total_bytes=per_layer * manager.num_layers,
        mapped_bytes=in_use + cached,
        total_pages=layout.pages,
        free_pages=layout.pages - used_pages - idle_pages - arriving // page,
        inuse_pages=used_pages,
        reserved_pages=idle_pages,
        available_physical_pages=None,
        effective_free_pages=None,
        in_shrink=shrinking,
        shrink_target_blocks=manager.target_num_blocks if shrinking else None,
        resize_target_bytes=None,
    )


def get_registered_kv_cache_pool_snapshots(
    *, integration: str | None = None
) -> list[KVCachePoolSnapshot]:
    """Of the process's managers, or those that one engine's interface made."""
    snapshots = [
        build_kv_cache_pool_snapshot(manager, integration=manager.integration)
        for manager in runtime.managers()
        if integration is None or manager.integration == integration
    ]
    return sorted(snapshots, key=lambda s: (s.integration or "", s.pool_name or "", s.group_id))


def get_registered_kv_cache_pool_snapshot_dicts(
    *, integration: str | None = None
) -> list[dict[str, Any]]:
    """The same as dictionaries that JSON can have."""
    return [
        snapshot.to_dict()
        for snapshot in get_registered_kv_cache_pool_snapshots(integration=integration)
    ]
