"""What the package raises; see each function for when."""

from __future__ import annotations


class KVCachedConfigError(RuntimeError):
    """A set-up that cannot work; the text names what to change."""


class MalformedVariable(KVCachedConfigError, ValueError):
    """An environment variable has a value that is not allowed."""


class KVCachePoolExhausted(ValueError):
    """There is no memory for the blocks just now; may succeed later.

    Made of a number of blocks, its text begins ``Cannot get N free blocks``; made of a
    text, it says that, and ``blocks`` is None.
    """

    def __init__(self, blocks: int | str = "no free blocks", why: str = "from the pool") -> None:
        counted = not isinstance(blocks, str)
        super().__init__(f"Cannot get {blocks} free blocks {why}" if counted else blocks)
        self.blocks = blocks if counted else None

    def __reduce__(self):  # type: ignore[no-untyped-def]
        return _exhausted, (str(self), self.blocks)


def _exhausted(text: str, blocks: int | None) -> KVCachePoolExhausted:
    error = KVCachePoolExhausted(text)
    error.blocks = blocks
    return error


class StateConsistencyError(RuntimeError):
    """For those who catch it; never raised here: mapping is all or nothing."""


class MapQuarantinedError(RuntimeError):
    """For those who catch it; never raised here: no page is left half mapped."""


class QuarantinedResizeError(ValueError):
    """For those who catch it; never raised here: a limit can be set at any time."""


class ForkedError(RuntimeError):
    """The process was forked from one that had a pool open."""

    def __init__(self) -> None:
        super().__init__(
            "kvcached was in use before this process was forked, and cannot be used in it: "
            "fork before the first pool is opened, or use spawn"
        )
