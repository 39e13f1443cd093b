"""KVCacheManager: block ids for an engine's scheduler, backed by borrowed memory."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from kvcached.errors import KVCachePoolExhausted
from kvcached.log import get_kvcached_logger
from kvcached.runtime import LIMIT_END, Group, runtime, wait_until
from kvcached.tensors import PoolLayout

if TYPE_CHECKING:
    from kvcached import _C
    from kvcached.observability import KVCachePoolSnapshot

# How long an alloc waits for the page of the null block, where that has none yet.
_NULL_BLOCK_WAIT_S = 0.05
_UNITS = {"bytes": 1, "kb": 1 << 10, "mb": 1 << 20, "gb": 1 << 30}
LIMIT_REASONS = {
    "deferred": "inuse_capacity_above_limit",
    "conflict": "revision_reused_with_different_limit",
}


class KVCacheManager:
    """Hands out the blocks of one KV group. Any thread.

    A block is ``block_size`` cells of ``cell_size`` bytes in each of ``num_kv_buffers``
    buffers of each of ``num_layers`` layers; ids are below ``num_blocks``. With
    ``reserve_null_block`` block 0 is always backed and never handed out.

    Where the group has tensors, the manager's blocks lie in them; else the pool is
    opened at the manager's first use. A group has one manager at a time: the blocks of
    one that is gone are free.

    Methods raise RuntimeError after shutdown_kvcached(), and in a process that was
    forked while the pool was open.

    ``defer_physical_release`` is what was asked for, ``physical_release_barrier`` whatever
    its user sets; neither is looked at. ``integration`` is the engine whose interface made
    the manager.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        cell_size: int,
        num_layers: int,
        world_size: int = 1,
        pp_rank: int = 0,
        async_sched: bool = False,
        reserve_null_block: bool = False,
        num_kv_buffers: int = 2,
        group_id: int = 0,
        pool_name: str | None = None,
        defer_physical_release: bool = False,
        own_segment: bool = False,
    ) -> None:
        """``async_sched``, ``defer_physical_release`` and ``own_segment`` need nothing here:
        pages leave when running work is done with them, and limits are the instance's.

        Raises RuntimeError before init_kvcached(), ValueError for figures that are not
        positive or do not fit the group's tensors, KVCachedConfigError for blocks that
        need larger pages, for several ranks, or where the group has a manager,
        KVCachePoolExhausted where the group has tensors and no memory for the null block
        comes within KVCACHED_IPC_TIMEOUT.
        """
        runtime.check_one_rank(world_size, pp_rank)
        for name, value in (("block_size", block_size), ("cell_size", cell_size)):
            if value <= 0:
                raise ValueError(f"{name} must be positive, not {value}")
        self.layout = PoolLayout(
            layers=num_layers,
            buffers=num_kv_buffers,
            unit_bytes=block_size * cell_size,
            blocks=num_blocks,
            page_bytes=runtime.page_bytes,
            contiguous=runtime.contiguous,
        )
        self.layout.check()
        self.num_blocks = num_blocks
        self.block_mem_size = self.layout.unit_bytes
        self._block_tokens = block_size
        self.num_layers = num_layers
        self.num_kv_buffers = num_kv_buffers
        self.reserve_null_block = reserve_null_block
        self.group_id = group_id
        self.pool_name = pool_name
        self.integration: str | None = None
        self.page_size = self.layout.page_bytes
        # Of one layer's K or V.
        self.mem_size = num_blocks * self.block_mem_size
        self.world_size = world_size
        self.pp_rank = pp_rank
        self.defer_physical_release = defer_physical_release
        self.physical_release_barrier: Callable[[], None] | None = None

        self._sanity_check = runtime.settings.sanity_check
        self._reserve_lock = threading.Lock()
        self._reserved: list[int] = []
        # The last limit; and the last one that had a revision. Under runtime.limits_lock.
        self._limit: int | None = None
        self._revised_limit: int | None = None
        self._limit_revision = -1
        self._group: Group | None = None
        self._finalizer: weakref.finalize[Any, Any] | None = None
        self._null_block_backed = not reserve_null_block
        self._ended: RuntimeError | None = None
        self._over = False  # ended, or the interpreter ends
        self._running = 0
        runtime.add_manager(self)

    # ---- the pool ----

    @property
    def attached(self) -> bool:
        """Whether its pool is open."""
        return self._group is not None

    def attach(self, group: Group, finalizer: weakref.finalize[Any, Any]) -> None:
        """For the runtime: the pool is open, and has this manager's blocks.

        ``finalizer`` frees them when the manager is gone.
        """
        from kvcached import _C

        finalizer.atexit = False
        self._finalizer = finalizer
        self._running = _C.RUNNING
        self._group = group
        tokens = runtime.settings.max_cached_tokens
        group.pool.set_max_cached(
            -1 if tokens is None or tokens < 0 else tokens // self._block_tokens
        )
        if self._null_block_backed:
            self._call_pool(group.pool)

    def _call_pool(self, pool: _C.Pool) -> None:
        self._call(pool.alloc, pool.free, pool.available)
        if self._over:  # It ended meanwhile, maybe before that.
            self._end_calls()

    def _back_null_block(self, timeout_s: float) -> bool:
        """Whether the null block has memory within this time."""
        pool = self._open().pool

        def backed() -> bool:
            # The first page that comes is that of the null block.
            blocks = pool.alloc(1)
            if blocks is not None:
                pool.free(blocks)
            return pool.page_used(0) > 0

        if not self._null_block_backed:
            if not wait_until(backed, timeout_s):
                return False
            self._null_block_backed = True
            self._call_pool(pool)
        return True

    def wait_for_null_block(self) -> None:
        """For the runtime: kernels may touch it from now on. Waits; KVCachePoolExhausted."""
        timeout_s = runtime.settings.ipc_timeout_s
        if not self._back_null_block(float("inf") if timeout_s is None else timeout_s):
            raise KVCachePoolExhausted(1, f"for the null block within {timeout_s} seconds")

    def end(self, error: RuntimeError) -> None:
        """For the runtime: every call raises ``error`` from now on."""

        self._ended = error
        self._finish()

    def end_quietly(self) -> None:
        """For the runtime: the interpreter ends. Daemon threads find no blocks any more."""
        self._finish()

    def _finish(self) -> None:
        self._over = True
        # In a forked child, a thread that is not there may have it.
        self._reserve_lock = threading.Lock()
        self._reserved = []
        if self._finalizer is not None:
            self._finalizer.detach()
        self._end_calls()

    def _end_calls(self) -> None:
        error = self._ended
        if error is None:
            self._call(lambda *_: None, lambda *_: None, lambda: 0)
            return

        def refuse(*_: object) -> NoReturn:
            raise error.with_traceback(None)

        self._call(refuse, refuse, refuse)

    def _call(
        self,
        take: Callable[[int, int], list[int] | None],
        give: Callable[[Sequence[int]], None],
        available: Callable[[], int],
    ) -> None:
        """What alloc, free and available_size call from now on.

        They hide the methods of these names, which open the pool. (Were those stored here,
        too, a manager would refer to itself, and live on after its last user.)
        """
        self._take = take  # type: ignore[method-assign]
        self._give = give  # type: ignore[method-assign]
        self._available = available  # type: ignore[method-assign]

    def _check(self) -> None:
        if self._ended is not None:
            raise self._ended.with_traceback(None)

    def _open(self) -> Group:
        self._check()
        if self._group is None:
            runtime.open_for_manager(self)
        assert self._group is not None
        return self._group

    @property
    def group(self) -> Group:
        """Opened where it is not yet; then waits for the null block, if only shortly."""
        first = self._group is None
        group = self._open()
        if first:
            self._back_null_block(_NULL_BLOCK_WAIT_S)
        return group

    @property
    def pool(self) -> _C.Pool:
        """The native pool, opened where it is not yet: more than this class has."""
        return self.group.pool

    def _take(self, count: int, _urgency: int, /) -> list[int] | None:
        if not self._back_null_block(_NULL_BLOCK_WAIT_S):
            return None
        return self._open().pool.alloc(count, self._running)

    def _give(self, blocks: Sequence[int], /) -> None:
        self._open().pool.free(blocks)

    def _available(self) -> int:
        if not self._back_null_block(_NULL_BLOCK_WAIT_S):
            return 0
        return self._open().pool.available()

    # ---- blocks ----

    def alloc(self, need_size: int) -> list[int] | None:
        """Exactly ``need_size`` block ids, or None and nothing changed.

        Blocks of try_to_reserve come first. May wait for some milliseconds where mapped
        pages do not last. The first call opens the pool where tensors have not done so, and
        waits for the broker, up to KVCACHED_IPC_TIMEOUT; None where the null block has no
        memory yet. Raises ValueError for a negative number, and in the first call as
        Runtime.open_group does.
        """
        if not 0 < need_size <= self.num_blocks or self._reserved:
            return self._alloc_slowly(need_size)
        return self._take(need_size, self._running)

    def _alloc_slowly(self, count: int) -> list[int] | None:
        if count < 0:
            raise ValueError(f"cannot allocate {count} blocks")
        self._check()
        if count > self.num_blocks:
            return None
        with self._reserve_lock:
            blocks, self._reserved = self._reserved[:count], self._reserved[count:]
        if len(blocks) == count:
            return blocks
        more = None
        try:
            more = self._take(count - len(blocks), self._running)
        finally:
            if more is None:
                self._keep(blocks)
        return None if more is None else blocks + more

    def _keep(self, blocks: list[int]) -> None:
        """For the next allocs."""
        with self._reserve_lock:
            if not self._over:
                self._reserved = blocks + self._reserved

    def free(self, indices: Sequence[int]) -> None:
        """Gives the blocks back.

        One that is not in use (freed before, never handed out, the null block, twice in
        the list), or that is held by try_to_reserve, is an error of the caller. With
        KVCACHED_SANITY_CHECK it raises ValueError, and nothing is freed; without, it is
        logged and the others are freed.
        """
        from kvcached import _C

        if self._reserved:
            indices = self._without_reserved(indices)
        try:
            self._give(indices)
        except _C.Error as error:
            if error.code != _C.INVALID_ARGUMENT:
                raise
            self._free_slowly(indices, error)
        except OverflowError as error:
            self._free_slowly(indices, error)

    def _without_reserved(self, indices: Sequence[int]) -> list[int]:
        reserved = set(self._reserved)
        wrong = [block for block in indices if block in reserved]
        if wrong:
            self._complain(f"blocks {wrong} are reserved by try_to_reserve, and are not freed")
        return [block for block in indices if block not in reserved]

    def _free_slowly(self, indices: Sequence[int], error: Exception) -> None:
        from kvcached import _C

        self._complain(f"blocks that are not in use cannot be freed: {error}")
        pool = self.pool
        ours = {
            block
            for block in indices
            if 0 <= block < self.num_blocks and pool.state(block) == _C.USED
        }
        self._give(list(ours))

    def _complain(self, problem: str) -> None:
        if self._sanity_check:
            raise ValueError(problem)
        get_kvcached_logger().error("%s", problem)

    def available_size(self) -> int:
        """Blocks that an alloc would get now, promised ones included."""
        if self._reserved:
            return self._available() + len(self._reserved)
        return self._available()

    def try_to_reserve(self, need_size: int) -> bool:
        """Takes blocks that the next allocs get; whether there were as many."""
        if need_size < 0:
            raise ValueError(f"cannot reserve {need_size} blocks")
        self._check()
        if need_size > self.num_blocks:
            return False
        blocks = self._take(need_size, self._running) if need_size else []
        if blocks is None:
            return False
        self._keep(blocks)
        return True

    def free_reserved(self) -> None:
        """Gives back what try_to_reserve took and no alloc has had."""
        with self._reserve_lock:
            blocks, self._reserved = self._reserved, []
        if blocks:
            self._give(blocks)

    @property
    def reserved_blocks(self) -> list[int]:
        """What try_to_reserve holds."""
        return list(self._reserved)

    @property
    def null_block(self) -> list[int] | None:
        return [0] if self.reserve_null_block else None

    def clear(self) -> None:
        """Frees all blocks, those that are handed out too, and returns their memory."""
        group = self.group
        with self._reserve_lock:
            self._reserved = []
        group.empty()
        group.pool.trim()

    def trim(self) -> None:
        """Returns the memory of all pages that hold no block."""
        self.pool.trim()

    def shutdown(self) -> bool:
        """Frees everything; the group may have another manager afterwards. Idempotent."""
        if self._ended is None:
            if self._group is not None:
                self.clear()
            runtime.remove_manager(self)
            self.end(RuntimeError("this manager was shut down"))
        return True

    # ---- pages that leave ----

    def capture_physical_release_marker(self) -> int:
        """A marker for release_retired_pages_through(): always 0."""
        return 0

    def release_retired_pages_through(self, marker: int) -> None:
        """Nothing to do: a page that is freed leaves by itself, when work that was queued
        before on the streams of its pool is done with it."""

    # ---- figures ----

    @property
    def ipc_name(self) -> str:
        """The instance's name: in force once a pool is open, before that the one asked for."""
        self._check()
        return runtime.instance

    def observability_snapshot(self, *, integration: str | None = None) -> KVCachePoolSnapshot:
        """What kvcached.observability shows of this manager; opens its pool.

        ``integration`` is the name to show, that of the engine unless given.
        """
        from kvcached.observability import build_kv_cache_pool_snapshot

        return build_kv_cache_pool_snapshot(self, integration=integration or self.integration)

    def observability_snapshot_dict(self, *, integration: str | None = None) -> dict[str, Any]:
        """The same as a dictionary that JSON can have."""
        return self.observability_snapshot(integration=integration).to_dict()

    def get_page_occupancy(self, page_ids: Iterable[int]) -> dict[int, int]:
        """Blocks in use on each of the pages; 0 for one that is not mapped."""
        pool, pages = self.pool, self.group.layout.pages
        return {page: pool.page_used(page) if 0 <= page < pages else 0 for page in page_ids}

    def get_mapped_memory_size(self, unit: str = "bytes") -> float:
        """Memory of pages with blocks, in ``bytes``, ``kb``, ``mb`` or ``gb`` (1024-based).

        Raises ValueError for another unit.
        """
        if unit not in _UNITS:
            raise ValueError(f"unit must be one of {', '.join(_UNITS)}, not {unit!r}")
        in_use, cached, _, _, _ = self.pool.usage()
        return in_use + cached if unit == "bytes" else (in_use + cached) / _UNITS[unit]

    # ---- limits ----

    def resize(self, new_mem_size: int) -> bool:
        """Limits the group to this many bytes of one layer's K or V.

        It becomes part of the limit of the whole instance, and idle and cached memory
        above it goes. True: what is in use is within it; False: it drains as blocks are
        freed. Raises ValueError for a negative size, and for one of which all layers
        together are 2**63 bytes or more.
        """
        if new_mem_size < 0:
            raise ValueError(f"new_mem_size must not be negative, but is {new_mem_size}")
        limit = new_mem_size * self.num_layers * self.num_kv_buffers
        if limit >= LIMIT_END:
            raise ValueError(f"new_mem_size {new_mem_size} is 2**63 bytes or more in all layers")
        group = self.group
        with runtime.limits_lock:
            runtime.set_group_limit(group, limit)
            self._limit = limit
        return not self.in_shrink

    @property
    def in_shrink(self) -> bool:
        """Whether more is in use than the last limit allows."""
        return self._limit is not None and self.pool.usage()[0] > self._limit

    @property
    def target_num_blocks(self) -> int | None:
        """What a limit below the use drains to."""
        if self._limit is None or not self.in_shrink:
            return None
        return self._limit // self.layout.block_bytes

    def set_memory_limit(self, limit_bytes: int, *, revision: int) -> dict[str, Any]:
        """Limits the group to ``limit_bytes`` of all layers, unless a later word was heard.

        It becomes part of the limit of the whole instance. Answers memory_limit_state(); its
        ``status`` is ``stale``, and nothing changed, for a revision below the last one, and
        ``conflict`` for the same revision with another limit. The same revision and limit
        again change nothing: what an operator has set meanwhile stays. Raises ValueError
        for negative figures, and for 2**63 bytes or more.
        """
        limit_bytes, revision = check_limit(limit_bytes, revision)
        group = self.group
        with runtime.limits_lock:
            refused = self.refusal_of_share(limit_bytes, revision)
            if refused is not None:
                return self._limit_state(refused)
            if revision > self._limit_revision:
                runtime.set_group_limit(group, limit_bytes)
                self._limit = self._revised_limit = limit_bytes
                self._limit_revision = revision
            return self._limit_state()

    def memory_limit_state(self) -> dict[str, Any]:
        """The last limit and what became of it; sizes are bytes of all layers."""
        return self._limit_state()

    def _limit_state(self, status: str | None = None) -> dict[str, Any]:
        group = self.group
        in_use, cached, idle, _, _ = group.pool.usage()
        mapped = in_use + cached + idle
        layout = group.layout
        page = layout.page_total_bytes
        effective = None
        if self._limit is not None:
            effective = min(self._limit // page, layout.pages) * page
        if status is None:
            deferred = effective is not None and in_use > effective
            status = "deferred" if deferred else "applied"
        return {
            "status": status,
            "pool_name": self.pool_name or "",
            "group_id": self.group_id,
            "limit_bytes": self._limit,
            "effective_limit_bytes": effective,
            "current_capacity_bytes": group.pool.capacity() * self.layout.block_bytes,
            "revision": self._limit_revision,
            "mapped_bytes": mapped,
            "remaining_bytes": None if effective is None else max(0, effective - mapped),
            "overage_bytes": 0 if effective is None else max(0, mapped - effective),
            "reason": LIMIT_REASONS.get(status, ""),
        }

    def refusal_of_share(self, limit_bytes: int, revision: int) -> str | None:
        """``stale`` or ``conflict``, what set_memory_limit would answer with."""
        if revision < self._limit_revision:
            return "stale"
        if revision == self._limit_revision and limit_bytes != self._revised_limit:
            return "conflict"
        return None

    def take_share(self, limit_bytes: int, revision: int) -> dict[str, Any]:
        """For kvcached.control, which has set the limit of the instance: this much is ours.

        A share that was heard before changes nothing. Under runtime.limits_lock.
        """
        if revision > self._limit_revision:
            self._limit = self._revised_limit = self.group.limit = limit_bytes
            self._limit_revision = revision
        return self._limit_state()


def check_limit(limit_bytes: Any, revision: Any) -> tuple[int, int]:
    """What int() makes of them. Raises ValueError for negative figures and 2**63 bytes."""
    limit_bytes, revision = int(limit_bytes), int(revision)
    if limit_bytes < 0:
        raise ValueError("limit_bytes must be non-negative")
    if limit_bytes >= LIMIT_END:
        raise ValueError(f"limit_bytes must be below 2**63, not {limit_bytes}")
    if revision < 0:
        raise ValueError("revision must be non-negative")
    return limit_bytes, revision
