"""What a control plane in the engine's process says and asks."""

from __future__ import annotations

import time
from typing import Any

from kvcached.kv_cache_manager import LIMIT_REASONS, check_limit
from kvcached.runtime import runtime

_POLL_S = 0.01


def set_instance_memory_limit(limit_bytes: int, *, revision: int) -> dict[str, Any]:
    """Limits all KV pools of the instance together to ``limit_bytes``.

    As KVCacheManager.set_memory_limit for each of this process's managers, whose answers are
    in ``pools``, with a share by size each. Where one of them answers ``stale`` or
    ``conflict``, nothing changes, and the same words again change nothing either: what an
    operator has set meanwhile stays. ``status`` is ``unavailable`` where there is no manager.
    Raises ValueError for negative figures, and for 2**63 bytes or more.
    """
    limit_bytes, revision = check_limit(limit_bytes, revision)
    managers = runtime.managers()
    answer: dict[str, Any] = {"limit_bytes": limit_bytes, "revision": revision}
    if not managers:
        return {
            "status": "unavailable",
            "reason": "no_registered_kv_cache_pool",
            **answer,
            "effective_limit_bytes": 0,
            "mapped_bytes": 0,
            "remaining_bytes": 0,
            "overage_bytes": 0,
            "pools": [],
        }
    ranges = [m.mem_size * m.num_layers * m.num_kv_buffers for m in managers]
    shares = _split(limit_bytes, ranges)
    for manager in managers:
        manager.pool  # noqa: B018 - opens it, so that there is something to limit
    with runtime.limits_lock:
        refusals = {m.refusal_of_share(share, revision) for m, share in zip(managers, shares)}
        last_revision, last_limit = runtime.instance_word
        if revision < last_revision:
            refusals.add("stale")
        if revision == last_revision and limit_bytes != last_limit:
            refusals.add("conflict")
        refusals -= {None}
        if refusals:
            pools = [m.memory_limit_state() for m in managers]
            status = "conflict" if "conflict" in refusals else "stale"
        else:
            if revision > last_revision:
                runtime.set_instance_limit(limit_bytes)
                runtime.instance_word = (revision, limit_bytes)
            pools = [m.take_share(share, revision) for m, share in zip(managers, shares)]
            deferred = any(state["status"] == "deferred" for state in pools)
            status = "deferred" if deferred else "applied"
    mapped = sum(state["mapped_bytes"] for state in pools)
    effective = sum(state["effective_limit_bytes"] or 0 for state in pools)
    return {
        "status": status,
        "reason": LIMIT_REASONS.get(status, ""),
        **answer,
        "effective_limit_bytes": effective,
        "mapped_bytes": mapped,
        "remaining_bytes": max(0, effective - mapped),
        "overage_bytes": max(0, mapped - effective),
        "pools": pools,
    }


def _split(limit: int, ranges: list[int]) -> list[int]:
    """Shares of ``limit`` by size, none above its range; the last one gets the rest."""
    total = sum(ranges)
    limit = min(limit, total)
    shares = [limit * size // total for size in ranges[:-1]]
    return [*shares, limit - sum(shares)]


def state() -> str:
    """What the process has of its broker.

    ``starting``: no pool is open yet; ``ready``; ``detached``: the broker is away, pools live
    on and do not grow; ``degraded``: some pools are ready and others not, or the GPU does
    not work for this process; ``sleeping``: the engine has given its memory back and will
    ask again.
    """
    groups = runtime.groups()
    if runtime.sleeping:
        return "sleeping"
    if not groups:
        return "starting"
    from kvcached import _C

    codes = {group.session.health()[0] for group in groups}
    if codes == {0}:
        return "ready"
    return "detached" if codes == {_C.UNAVAILABLE} else "degraded"


def wait_ready(timeout: float) -> bool:
    """Whether the state is ``ready`` within ``timeout`` seconds."""
    deadline = time.monotonic() + timeout
    while state() != "ready":
        if time.monotonic() >= deadline:
            return False
        time.sleep(_POLL_S)
    return True


def capabilities() -> dict[str, Any]:
    """What can be relied on; what is missing is not supported.

    ``limits``: how a limit can be set; ``elastic``: memory comes and goes by page;
    ``prefix_cache_reclaim``: cached blocks are given up under pressure; ``state_names``;
    ``tensor_parallel``, ``pipeline_parallel``: whether several ranks can share blocks.
    """
    return {
        "elastic": True,
        "prefix_cache_reclaim": True,
        "limits": ["instance", "group"],
        "revisioned_limits": True,
        "state_names": ["starting", "ready", "degraded", "detached", "sleeping"],
        "tensor_parallel": False,
        "pipeline_parallel": False,
    }
