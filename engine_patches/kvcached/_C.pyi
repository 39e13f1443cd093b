"""The native part: sessions with a broker, and pools of KV blocks.

An extension module of the stable ABI over the C library (client/capi/kvbroker.h,
which says more of each call). It needs no torch. Everything that waits lets other
Python threads run; nothing else gives up the interpreter's lock, and nothing that
the broker asks of this process needs it.

Sizes are bytes unless named blocks or pages; times are milliseconds,
``FOREVER`` is no limit. In a process that was forked after a session was opened
every call of that session raises :class:`Error` with FAILED_PRECONDITION.
"""

from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple, TypedDict

ABI_VERSION: int
VERSION: str
FOREVER: int

ALL_STREAMS: int

# Urgencies of Pool.alloc.
NOW: int  # only what is mapped; a miss leaves nothing behind
WAITING: int  # a miss returns at once and is pursued for a second
RUNNING: int  # a miss may wait for the pool's running_miss_wait_us

# States of a block (Pool.state).
UNBACKED: int
FREE: int
USED: int
CACHED: int
RESERVED: int

# Codes of Error: the numbers of google.rpc.Code.
INVALID_ARGUMENT: int
DEADLINE_EXCEEDED: int
NOT_FOUND: int
PERMISSION_DENIED: int
RESOURCE_EXHAUSTED: int
FAILED_PRECONDITION: int
INTERNAL: int
UNAVAILABLE: int

class Error(RuntimeError):
    """What the library answers; ``code`` is one of the codes above."""

    code: int

class PoolOptions(TypedDict, total=False):
    """Of kvb_pool_options; what is absent has its default there."""

    handle_bytes: int  # required
    handles_per_page: int
    per_layer: bool
    max_pages: int  # required
    block_bytes: int  # required; all layers together
    max_blocks: int  # ids are below; 0: as many as fit
    reserve_null_block: bool
    map_ahead: bool
    min_reserved_pages: int
    max_reserved_pages: int  # -1: no limit
    idle_decay_ms: int
    running_miss_wait_us: int
    claim_deadline_ms: int
    guard: bool
    grow_when_polled: bool  # see Pool.available

class Session:
    """A process's conversation with one broker, and the pools it opened with.

    Opens in the constructor, which waits. ``close`` (or the last reference)
    unmaps and returns everything; tensors that were made from its pools keep
    their addresses, and lose their contents.
    """

    def __init__(
        self,
        instance: str,
        pools: Sequence[PoolOptions],
        *,
        address: Optional[str] = None,
        gpu: Optional[str] = None,
        backend: Optional[str] = None,  # "host", "cuda", "cuda_ipc"
        member: Optional[str] = None,
        min_bytes: Optional[int] = None,
        min_fraction: Optional[float] = None,
        max_bytes: Optional[int] = None,
        max_fraction: Optional[float] = None,
        weight: Optional[float] = None,
        declared_peak: Optional[int] = None,
        labels: Optional[Mapping[str, str]] = None,
        timeout_ms: int = 10_000,
        name_conflict: str = "join",  # or "suffix", "error"
        broker_program: Optional[str] = None,  # started where no broker is found
        shm_directory: Optional[str] = None,  # keeps the 24-byte view there
    ) -> None: ...
    @property
    def instance(self) -> str:
        """The name in force; differs from the wish where that was taken."""
    @property
    def joined_pids(self) -> str:
        """Other processes that had the name already, with commas; "" for none."""
    @property
    def device(self) -> int:
        """The CUDA ordinal in this process of the GPU whose memory it is; -1: host."""
    @property
    def closed(self) -> bool: ...
    def pool(self, index: int) -> Pool: ...
    def health(self) -> Tuple[int, str]:
        """(0, "") while the broker is there, else a code and why it is not."""
    def limits(self) -> Tuple[int, int, int]:
        """min, max, and what the device has to lend, in bytes."""
    def set_max(self, limit: int) -> None:
        """An operator's limit for the whole instance; in force when it returns."""
    def pause(self) -> None:
        """No page comes or goes until resume(); waits for what is under way.

        Around the capture of a CUDA graph, which page work would invalidate. Nests.
        """
    def resume(self) -> None:
        """FAILED_PRECONDITION: it is not paused."""
    def make_room(self, declared_peak: int, timeout_ms: int) -> None: ...
    def close(self) -> None:
        """Idempotent. Waits for calls in other threads, and up to a second for
        work that keeps pages."""

class Pool:
    """One KV pool. Any thread; of a closed session every call raises Error."""

    def alloc(self, count: int, urgency: int = ...) -> Optional[List[int]]:
        """Exactly ``count`` block ids, or None and nothing changed."""
    def alloc_at(self, blocks: Sequence[int], timeout_ms: int) -> bool:
        """Exactly these, which must be free or unbacked; all or none.

        INVALID_ARGUMENT: one of them cannot be taken, and why.
        """
    def free(self, blocks: Sequence[int]) -> None:
        """All or none; INVALID_ARGUMENT names the one that is not in use."""
    def cache(self, blocks: Sequence[int]) -> None:
        """As free, but contents stay until the memory is needed."""
    def set_max_cached(self, blocks: int) -> None:
        """At most so many are cached, least recently used first; below 0: no limit."""
    def touch(self, blocks: Sequence[int], generations: Sequence[int]) -> bool:
        """All in use again, if each still has the content of its generation."""
    def generations(self, blocks: Sequence[int]) -> List[int]: ...
    def drain_removals(self, limit: int = 4096) -> List[Tuple[int, int]]:
        """(block, generation) of cached contents that are gone, oldest first."""
    def available(self) -> int:
        """Blocks that an alloc would get now, promised ones included.

        With ``grow_when_polled``, who asks again and again and takes nothing
        wants more than there is: the pool maps more, up to its limits.
        """
    def capacity(self) -> int:
        """The most blocks there can be as limits stand."""
    def reserve(self, count: int, timeout_ms: int) -> bool:
        """Whether memory for ``count`` blocks is mapped, or set aside for 1 s."""
    def set_blocks(
        self, block_bytes: int, max_blocks: int, reserve_null_block: bool
    ) -> None:
        """Another block size, while no block is in use or cached; pages stay.

        FAILED_PRECONDITION: one is, or a page is about to leave. INVALID_ARGUMENT: no
        such geometry.
        """
    def trim(self) -> int:
        """Has all idle pages returned now, the reserve too; how many."""
    def used_blocks(self) -> List[int]: ...
    def page_used(self, page: int) -> int:
        """Blocks in use on the page; 0 where it is not mapped."""
    def state(self, block: int) -> int: ...
    def step_begin(self) -> None: ...
    def step_end(self, scheduled_step: int) -> None: ...
    def step_done(self, completed_step: int) -> None: ...
    def pages_to_vacate(self) -> int: ...
    def blocks_to_vacate(self, limit: int = 4096) -> List[int]: ...
    def usage(self) -> Tuple[int, int, int, int, int]:
        """Bytes of pages: in use, cached, idle, arriving, wished for."""
    def add_stream(self, stream: int) -> None:
        """A cudaStream_t whose work touches the pool, or ALL_STREAMS.

        No page is unmapped before what was queued on it is done. To be removed before
        it is destroyed; 0 is the default stream. Nothing on host memory.
        """
    def remove_stream(self, stream: int) -> None: ...
    @property
    def regions(self) -> int:
        """Handles of a page; 1 in the contiguous layout."""
    @property
    def region_bytes(self) -> int:
        """Of one region; region h begins at h * region_bytes of the range."""
    @property
    def address(self) -> int:
        """Of the range's first byte."""
    def dlpack(self, offset: int, nbytes: int) -> Any:
        """A DLPack capsule ("dltensor") of uint8, one dimension, in the range.

        The tensor that it becomes keeps the addresses, also past ``close``:
        then host memory reads as zeros, and GPU memory must not be touched.
        Only blocks in use may be touched.
        """

def gpu_uuid(ordinal: int) -> str:
    """Of the CUDA device with this ordinal in this process."""

def list_instances(
    address: Optional[str] = None, gpu: Optional[str] = None, timeout_ms: int = 10_000
) -> str:
    """What `kvctl list --json` prints: a JSON array, one object an instance and GPU."""

def list_brokers(
    address: Optional[str] = None, gpu: Optional[str] = None, timeout_ms: int = 10_000
) -> str:
    """A JSON array, one object a broker: of BrokerStatus in admin.proto."""

def set_limit(
    name: str,
    *,
    min_bytes: Optional[int] = None,
    max_bytes: Optional[int] = None,
    max_percent: Optional[float] = None,
    weight: Optional[float] = None,
    preset: bool = False,
    address: Optional[str] = None,
    gpu: Optional[str] = None,
    timeout_ms: int = 10_000,
) -> None:
    """What `kvctl policy NAME` does."""
