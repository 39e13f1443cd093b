"""What the package raises; see each function for when."""


class KVCachedConfigError(RuntimeError):
    """A set-up that cannot work; the text names what to change."""


class MalformedVariable(KVCachedConfigError, ValueError):
    """An environment variable has a value that is not allowed."""


class KVCachePoolExhausted(ValueError):
    """There is no memory for the blocks just now; may succeed later.

    The text begins ``Cannot get N free blocks``.
    """

    def __init__(self, blocks: int, why: str = "from the pool") -> None:
        super().__init__(f"Cannot get {blocks} free blocks {why}")
        self.blocks = blocks

    def __reduce__(self):  # type: ignore[no-untyped-def]
        return _exhausted, (str(self), self.blocks)


def _exhausted(text: str, blocks: int) -> KVCachePoolExhausted:
    error = KVCachePoolExhausted(blocks)
    error.args = (text,)
    return error


class ForkedError(RuntimeError):
    """The process was forked from one that had a pool open."""

    def __init__(self) -> None:
        super().__init__(
            "kvcached was in use before this process was forked, and cannot be used in it: "
            "start the process with the spawn method, or call init_kvcached() after the fork"
        )
