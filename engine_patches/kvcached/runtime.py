"""What this process has of kvcached: one state, and a pool for each KV group.

    init() --> [initialised] --alloc_kv_cache or a manager's first use--> pools
       ^            |                                                      |
       +------------+-------------------- shutdown() <---------------------+

Each group's pool has a session of its own, all of them members of one instance, so
that one limit is over their sum. A pool is opened when its tensors are made, or by a
manager that is used before there are any.

**Several ranks.** Ranks would have to take the same blocks at the same time, which is
not built yet, and every call that needs a pool says so (KVCachedConfigError). That
holds for SGLang too, though each of its ranks has a scheduler and a pool of its own,
and ids of one rank mean nothing to another: its ranks decide alike only as long as
``available_size()`` and ``alloc()`` answer alike on all of them. Pools on different
GPUs do not, because each has other neighbours. A rank that admits a request alone
leaves the others waiting in a collective operation for ever.

**Forks.** A process that is forked after a pool was opened cannot use kvcached; every
call there raises ForkedError. One that was forked before can.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import secrets
import sys
import threading
import time
import weakref
from typing import TYPE_CHECKING, Any, Callable

from kvcached import config, graphs, programs
from kvcached.errors import ForkedError, KVCachedConfigError
from kvcached.log import get_kvcached_logger
from kvcached.tensors import PoolLayout, flat_bytes

if TYPE_CHECKING:
    import torch

    from kvcached import _C
    from kvcached.kv_cache_manager import KVCacheManager

NOT_INITIALIZED = "kvcached is not initialized. Please call init_kvcached() first."
# A running request would rather wait this long than be preempted and computed again.
_RUNNING_MISS_WAIT_US = 20_000
# How long pages of blocks that nobody owns any more may take to go.
_EMPTY_TIMEOUT_S = 5.0
_POLL_S = 0.002
# How long the blocks of a manager that nobody has any more wait for who opens a pool.
_DROP_TIMEOUT_S = 1.0
# Limits are below this, in bytes.
LIMIT_END = 1 << 63


def normalize_device(device: object) -> str | None:
    """``cpu``, ``cuda`` or ``cuda:N`` of a string, a torch.device or an ordinal.

    None stays None. Raises ValueError for anything else.
    """
    if device is None:
        return None
    text = f"cuda:{device}" if isinstance(device, int) else str(device)
    kind, _, index = text.partition(":")
    if kind == "cpu" and index in ("", "0"):
        return "cpu"
    if kind == "cuda" and (index.isdigit() or text == "cuda"):
        return text
    raise ValueError(f"device must be cpu, cuda or cuda:N, not {text!r}")


def _has_cuda() -> bool:
    try:
        import torch
    except ImportError:
        return False
    return bool(torch.cuda.is_available())


def _current_cuda() -> str:
    try:
        import torch
    except ImportError:
        return "cuda:0"
    return f"cuda:{torch.cuda.current_device()}"


class Group:
    """One KV group's pool, and who uses it. Made by Runtime.open_group."""

    def __init__(
        self, runtime: Runtime, group_id: int, layout: PoolLayout, session: _C.Session
    ) -> None:
        self.group_id = group_id
        self.layout = layout
        self.session = session
        self.pool: _C.Pool = session.pool(0)
        self.limit: int | None = None  # bytes, None: what the range has room for
        self.has_tensors = False
        # Whether its blocks are pages, which vmm_ops hands out by name.
        self.paged = False
        self.mapped_pages: set[int] = set()
        # Pages that some thread is having mapped; under `paging`, as mapped_pages.
        self.coming_pages: set[int] = set()
        self.paging = threading.Condition()
        # Whose blocks these are: what the last manager gave, None for vmm_ops.
        self.owner: object = None
        self._runtime = runtime
        # What set_blocks was last told.
        self._blocks = (layout.block_bytes, layout.blocks, False)

    def manager(self) -> KVCacheManager | None:
        return self._runtime.manager(self.group_id)

    def set_blocks(self, block_bytes: int, max_blocks: int, reserve_null_block: bool) -> None:
        """The pool's blocks are these from now on; what it had is given back.

        Nobody may own any: the caller has seen that no manager is alive.
        """
        self.empty()
        wanted = (block_bytes, max_blocks, reserve_null_block)
        if wanted == self._blocks:
            return
        from kvcached import _C

        def done() -> bool:
            try:
                self.pool.set_blocks(*wanted)
            except _C.Error as error:
                if error.code != _C.FAILED_PRECONDITION:
                    raise
                self.pool.trim()
                return False
            return True

        if not wait_until(done, _EMPTY_TIMEOUT_S):
            raise KVCachedConfigError(
                f"group {self.group_id} still holds pages of blocks of another size"
            )
        self._blocks = wanted

    def empty(self) -> None:
        """Frees all blocks, cached ones too."""
        from kvcached import _C

        pool = self.pool
        used = [block for block in pool.used_blocks() if pool.state(block) == _C.USED]
        pool.free(used)
        if used or pool.usage()[1]:
            _drop_cached(pool, self._blocks[1])
        self.mapped_pages.clear()

    def flat(self) -> torch.Tensor:
        """The whole range as uint8, one dimension."""
        return flat_bytes(self.pool, self.layout.range_bytes)


def _drop_cached(pool: _C.Pool, blocks: int) -> None:
    from kvcached import _C

    # Some may be taken away meanwhile; touch is for all or none, so one by one.
    for block in [block for block in range(blocks) if pool.state(block) == _C.CACHED]:
        if pool.touch([block], pool.generations([block])):
            pool.free([block])


def wait_until(done: Callable[[], bool], timeout_s: float) -> bool:
    deadline = time.monotonic() + timeout_s
    while not done():
        if time.monotonic() >= deadline:
            return False
        time.sleep(_POLL_S)
    return True


class Runtime:
    """The process's state. Thread-safe; there is one, :data:`runtime`."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        # Around what is heard of limits, said to the broker and remembered. Comes before _lock.
        self.limits_lock = threading.RLock()
        self._member = secrets.token_hex(4)  # pids come again, and differ by namespace
        self._ending = False
        self._opened_here = False  # a session, in this process
        self._forked = False
        # Of the parent, in a forked child: never ended here, as they are not ours.
        self._inherited: list[Group] = []
        self._managers: dict[int, weakref.ref[KVCacheManager]] = {}
        self._clear()

    def _clear(self) -> None:
        self.initialized = False
        self.engine: str | None = None
        self.tp_rank = 0
        self.tp_size = 1
        self.pp_rank = 0
        self.is_worker = False
        self.async_sched = False
        self.sleeping = False
        self._settings: config.Settings | None = None
        self._device: str | None = None
        self._page_bytes = 0
        self._contiguous = True
        self._instance: str | None = None  # the name in force, once a session is open
        self._groups: dict[int, Group] = {}
        # Revision and limit that kvcached.control set last; under limits_lock.
        self.instance_word = (-1, 0)

    # ---- begin and end ----

    def init(
        self,
        *,
        engine: str | None = None,
        tp_rank: int | None = None,
        tp_size: int | None = None,
        pp_rank: int | None = None,
        is_worker: bool = False,
        device: object = None,
        async_sched: bool = False,
        page_bytes: int = 0,
        contiguous: bool | None = None,
    ) -> None:
        """Idempotent; a later call may raise the role, and name a device that none has named.

        Talks to nobody. Ranks of None stay what an earlier call said. ``page_bytes`` of 0 and
        ``contiguous`` of None: as the environment says. Raises ValueError for arguments that
        make no sense, MalformedVariable.
        """
        self._check_fork()
        tp_rank = self.tp_rank if tp_rank is None else tp_rank
        tp_size = self.tp_size if tp_size is None else tp_size
        pp_rank = self.pp_rank if pp_rank is None else pp_rank
        if tp_size < 1 or not 0 <= tp_rank < tp_size:
            raise ValueError(f"tp_rank {tp_rank} is not one of tp_size {tp_size}")
        if pp_rank < 0:
            raise ValueError(f"pp_rank must not be negative, but is {pp_rank}")
        if page_bytes < 0 or page_bytes % config.PAGE_GRANULARITY:
            raise ValueError(
                f"page_size must be a multiple of {config.PAGE_GRANULARITY}, not {page_bytes}"
            )
        wanted = normalize_device(device)
        with self._lock:
            if not self.initialized:
                settings = config.read()
                self._settings = settings
                self._page_bytes = page_bytes or settings.page_bytes
                self._contiguous = settings.contiguous_layout if contiguous is None else contiguous
                self.engine = engine
                self.initialized = True
            elif page_bytes not in (0, self._page_bytes):
                raise ValueError(
                    f"page_size {page_bytes}: kvcached uses {self._page_bytes} in this process"
                )
            if wanted is not None:
                self._name_device(wanted)
            self.tp_rank, self.tp_size, self.pp_rank = tp_rank, tp_size, pp_rank
            self.is_worker = self.is_worker or is_worker
            self.async_sched = self.async_sched or async_sched

    def shutdown(self) -> bool:
        """Gives all memory back. Idempotent; init may follow.

        Tensors stay objects, and keep their addresses, but not their contents: those of a
        GPU must not be touched. Managers are dead.
        """
        if self._forked:
            return True
        with self._lock:
            groups = list(self._groups.values())
            managers = [self.manager(group) for group in list(self._managers)]
            self._managers.clear()
            self._clear()
        for manager in managers:
            if manager is not None:
                manager.end(RuntimeError(f"this manager was shut down. {NOT_INITIALIZED}"))
        for group in groups:
            group.session.close()
        return True

    def exit(self) -> None:
        """As shutdown, at the interpreter's end."""
        self._ending = True
        for manager in self.managers():
            manager.end_quietly()
        for group in self.groups():
            group.session.close()

    def _check_fork(self) -> None:
        if self._forked:
            raise ForkedError()

    def check(self) -> None:
        """Raises RuntimeError before init and after shutdown, ForkedError."""
        self._check_fork()
        if not self.initialized:
            raise RuntimeError(NOT_INITIALIZED)

    def after_fork_in_child(self) -> None:
        self._lock = threading.RLock()
        self.limits_lock = threading.RLock()
        self._member = secrets.token_hex(4)
        if not self._opened_here:
            return
        self._forked = True
        self._inherited.extend(self._groups.values())
        self._groups = {}
        for manager in [self.manager(group) for group in list(self._managers)]:
            if manager is not None:
                manager.end(ForkedError())

    # ---- what was chosen ----

    @property
    def settings(self) -> config.Settings:
        self.check()
        assert self._settings is not None
        return self._settings

    @property
    def page_bytes(self) -> int:
        """Of one layer's K or V."""
        self.check()
        return self._page_bytes

    @property
    def contiguous(self) -> bool:
        self.check()
        return self._contiguous

    @property
    def device(self) -> str:
        """``cpu`` or ``cuda:N``; chosen when it is asked for, unless it was named."""
        self.check()
        with self._lock:
            if self._device is None:
                self._device = _current_cuda() if _has_cuda() else "cpu"
            elif self._device == "cuda":
                self._device = _current_cuda()
            return self._device

    @property
    def device_if_known(self) -> str | None:
        return self._device

    def use_device(self, device: object) -> str:
        """That of tensors to be made. Raises ValueError where another one is in use."""
        self.check()
        wanted = normalize_device(device)
        with self._lock:
            if wanted is not None:
                self._name_device(wanted)
        return self.device

    def _name_device(self, wanted: str) -> None:
        named = self._device
        if named is None or (named == "cuda" and wanted.startswith("cuda:")):
            self._device = wanted
        elif wanted != named and not (wanted == "cuda" and named.startswith("cuda:")):
            raise ValueError(
                f"device {wanted}: kvcached uses {named} in this process; "
                "shutdown_kvcached() comes before another one"
            )

    @property
    def instance(self) -> str:
        """The name in force, or the one that will be asked for."""
        self.check()
        return self._instance or self._wished_name()

    def _wished_name(self) -> str:
        return self.settings.ipc_name or config.default_name(self.engine)

    # ---- pools ----

    def groups(self) -> list[Group]:
        """Those that are open. Does not wait for one that is being opened."""
        return [group for _, group in sorted(self._groups.items())]

    def find_group(self, group_id: int) -> Group | None:
        self.check()
        return self._groups.get(group_id)

    def group(self, group_id: int) -> Group:
        """Raises KVCachedConfigError where it has no pool."""
        group = self.find_group(group_id)
        if group is None:
            raise KVCachedConfigError(f"KV group {group_id} has no tensors and no manager in use")
        return group

    def check_one_rank(self, tp_size: int = 1, pp_rank: int = 0) -> None:
        """Raises KVCachedConfigError where ranks would have to agree; see the module."""
        self.check()
        tp_size, pp_rank = max(tp_size, self.tp_size), max(pp_rank, self.pp_rank)
        if tp_size > 1 or pp_rank > 0:
            raise KVCachedConfigError(
                f"tensor parallel size {tp_size}, pipeline rank {pp_rank}: kvcached "
                "does not keep the KV caches of several ranks alike yet; run the engine on one "
                "GPU, or without kvcached"
            )

    def open_group(self, group_id: int, layout: PoolLayout) -> Group:
        """The group's pool, opened where there is none yet. Waits for the broker.

        One that is open has to have the same layers, and room for the blocks. Raises
        KVCachedConfigError where it has not, _C.Error where there is no broker.
        """
        if group_id < 0:
            raise ValueError(f"group_id must not be negative, but is {group_id}")
        self.check_one_rank()
        layout.check()
        with self._lock:
            group = self._groups.get(group_id)
            if group is None:
                group = Group(self, group_id, layout, self._open_session(group_id, layout))
                self._groups[group_id] = group
            else:
                _check_room(group, layout)
            return group

    def open_for_tensors(self, group_id: int, layout: PoolLayout) -> Group:
        """As open_group, for one who makes tensors.

        Raises ValueError where the group has a manager whose blocks do not lie in them,
        KVCachePoolExhausted where no memory for its null block comes in time.
        """
        self.check()
        with self._lock:
            manager = self.manager(group_id)
            if manager is not None:
                check_manager_fits(group_id, layout, manager)
            group = self.open_group(group_id, layout)
            group.has_tensors = True
            if group.session.device >= 0:
                graphs.watch(self._gpu_sessions)
            if manager is not None and not manager.attached:
                self._attach(manager, group)
        if manager is not None:
            manager.wait_for_null_block()
        return group

    def open_for_manager(self, manager: KVCacheManager) -> None:
        """The manager is used and there are no tensors: its own blocks say how large it is.

        Does not wait for its null block.
        """
        self.check()
        with self._lock:
            if not manager.attached:
                self._attach(manager, self.open_group(manager.group_id, manager.layout))

    def _attach(self, manager: KVCacheManager, group: Group) -> None:
        check_manager_fits(group.group_id, group.layout, manager)
        group.paged = False
        owner = group.owner = object()
        group.set_blocks(manager.layout.block_bytes, manager.num_blocks, manager.reserve_null_block)
        manager.attach(group, weakref.finalize(manager, self._drop, group, owner))

    def _drop(self, group: Group, owner: object) -> None:
        """A manager is gone that nobody has shut down: frees what it had."""
        if self._ending or not self._lock.acquire(timeout=_DROP_TIMEOUT_S):
            return  # The group's next manager frees it.
        try:
            # After a shutdown and in a forked child the group is none of these.
            if group.owner is owner and self._groups.get(group.group_id) is group:
                with contextlib.suppress(RuntimeError):  # Its session has ended.
                    group.empty()
        finally:
            self._lock.release()

    def _open_session(self, group_id: int, layout: PoolLayout) -> _C.Session:
        from kvcached import _C

        settings = self.settings
        device = self.device
        pool: _C.PoolOptions = {
            "handle_bytes": layout.handle_bytes,
            "handles_per_page": layout.handles_per_page,
            "per_layer": not layout.contiguous,
            "max_pages": layout.pages,
            "block_bytes": layout.block_bytes,
            "max_blocks": layout.blocks,
            "reserve_null_block": False,
            "map_ahead": settings.page_prealloc,
            "min_reserved_pages": settings.min_reserved_pages,
            "max_reserved_pages": (
                -1 if settings.max_reserved_pages is None else settings.max_reserved_pages
            ),
            "idle_decay_ms": (
                _C.FOREVER if settings.idle_decay_ms is None else settings.idle_decay_ms
            ),
            "running_miss_wait_us": _RUNNING_MISS_WAIT_US,
            "grow_when_polled": True,
        }
        options: dict[str, Any] = {}
        _put_amount(options, "min", settings.minimum)
        _put_amount(
            options, "max", settings.limit or config.Amount(fraction=settings.gpu_utilization)
        )
        conflict = settings.name_conflict or ("join" if settings.ipc_name else "suffix")
        if self._instance is not None:
            conflict = "join"  # this process is in it already
        program = None
        if settings.address is None and settings.autostart:
            program = programs.find("kvbrokerd")
        timeout = settings.ipc_timeout_s
        self._opened_here = True
        session = _C.Session(
            self.instance,
            [pool],
            address=settings.address,
            gpu=None if device == "cpu" else _C.gpu_uuid(int(device.partition(":")[2])),
            backend="host" if device == "cpu" else None,
            member=f"{os.getpid()}-{self._member}-{group_id}",
            labels=dict(settings.labels),
            timeout_ms=_C.FOREVER if timeout is None else max(1, int(timeout * 1000)),
            name_conflict=conflict,
            broker_program=None if program is None else str(program),
            shm_directory="/dev/shm" if settings.shm_view else None,
            **options,
        )
        if (session.device < 0) != (device == "cpu"):
            session.close()
            raise KVCachedConfigError(
                f"device {device} was asked for, but the broker lends memory of "
                + ("the host" if device != "cpu" else "a GPU")
            )
        if session.instance != self.instance:
            get_kvcached_logger().warning(
                "the name %s is taken; this instance is called %s", self.instance, session.instance
            )
        if session.joined_pids and self._instance is None:
            get_kvcached_logger().warning(
                "instance %s is shared with process %s: one limit holds for all of them",
                session.instance,
                session.joined_pids,
            )
        self._instance = session.instance
        if session.device >= 0:
            # Whoever knows which streams touch the pool names them instead.
            session.pool(0).add_stream(_C.ALL_STREAMS)
            if "torch" in sys.modules:
                graphs.watch(self._gpu_sessions)
        return session

    def _gpu_sessions(self) -> list[_C.Session]:
        return [group.session for group in self.groups() if group.session.device >= 0]

    # ---- managers ----

    def manager(self, group_id: int) -> KVCacheManager | None:
        """The group's, while it lives."""
        reference = self._managers.get(group_id)
        return None if reference is None else reference()

    def managers(self) -> list[KVCacheManager]:
        """Those that live, by group."""
        found = [self.manager(group_id) for group_id in sorted(self._managers)]
        return [manager for manager in found if manager is not None]

    def add_manager(self, manager: KVCacheManager) -> None:
        """Raises KVCachedConfigError where the group has a live one, or is too small.

        Where the group is open, kernels may touch the null block before any block is taken:
        waits for it, and raises KVCachePoolExhausted where it does not come in time.
        """
        self.check()
        with self._lock:
            if self.manager(manager.group_id) is not None:
                raise KVCachedConfigError(f"KV group {manager.group_id} has a manager already")
            group = self._groups.get(manager.group_id)
            if group is not None:
                self._attach(manager, group)
            self._managers[manager.group_id] = weakref.ref(manager)
        if group is None:
            return
        try:
            manager.wait_for_null_block()
        except BaseException:
            manager.shutdown()
            raise

    def remove_manager(self, manager: KVCacheManager) -> None:
        with self._lock:
            if self.manager(manager.group_id) is manager:
                del self._managers[manager.group_id]

    # ---- limits ----

    def set_group_limit(self, group: Group, limit: int) -> None:
        """Limits the instance to this and what its other groups may have. Bytes."""
        with self.limits_lock:
            total = limit + sum(
                other.layout.pages * other.layout.page_total_bytes
                if other.limit is None
                else other.limit
                for other in self.groups()
                if other is not group
            )
            group.session.set_max(min(total, config.MAX_SIZE))
            group.limit = limit

    def set_instance_limit(self, limit: int) -> None:
        """Of all groups together, in bytes, exactly, where a device could have as much.

        Raises KVCachedConfigError without a pool.
        """
        groups = self.groups()
        if not groups:
            raise KVCachedConfigError("there is no pool to limit yet")
        groups[0].session.set_max(min(limit, config.MAX_SIZE))


def _put_amount(options: dict[str, Any], name: str, amount: config.Amount | None) -> None:
    if amount is not None and amount.size is not None:
        options[f"{name}_bytes"] = amount.size
    elif amount is not None:
        options[f"{name}_fraction"] = amount.fraction


def _check_room(group: Group, layout: PoolLayout) -> None:
    have = group.layout
    for name in ("layers", "buffers", "contiguous", "page_bytes"):
        if getattr(have, name) != getattr(layout, name):
            raise KVCachedConfigError(
                f"KV group {group.group_id} has {name} {getattr(have, name)}, "
                f"not {getattr(layout, name)}"
            )
    if layout.pages > have.pages:
        raise KVCachedConfigError(
            f"KV group {group.group_id} has addresses for {have.pages} pages, and "
            f"{layout.blocks} blocks need {layout.pages}: the first to use the group sets its size"
        )


def check_manager_fits(group_id: int, layout: PoolLayout, manager: KVCacheManager) -> None:
    """Raises ValueError where the manager's blocks are not those of the layout."""
    for name, have, wanted in (
        ("num_layers", layout.layers, manager.num_layers),
        ("num_kv_buffers", layout.buffers, manager.num_kv_buffers),
    ):
        if have != wanted:
            raise ValueError(
                f"{name}={wanted}, but the KV cache tensors of group {group_id} have {have}; "
                "num_kv_buffers is 1 for MLA, packed and HYBRID_LINEAR, else 2"
            )
    room = layout.blocks * layout.unit_bytes // manager.block_mem_size
    if manager.num_blocks > room:
        raise ValueError(
            f"num_blocks={manager.num_blocks}, but the KV cache tensors of group {group_id} have "
            f"{room} blocks of {manager.block_mem_size} bytes; num_blocks=None takes all of them"
        )


runtime = Runtime()
os.register_at_fork(after_in_child=runtime.after_fork_in_child)
atexit.register(runtime.exit)
