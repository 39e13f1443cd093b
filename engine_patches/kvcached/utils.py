"""Constants by the names that programs import, and small helpers.

The constants are read from the environment when they are asked for: PAGE_SIZE (bytes),
GPU_UTILIZATION, PAGE_PREALLOC_ENABLED, MIN_RESERVED_PAGES, MAX_RESERVED_PAGES
(``sys.maxsize``: no limit), SANITY_CHECK, MAX_CACHED_TOKENS (-1: no limit),
CONTIGUOUS_LAYOUT, DEFAULT_IPC_NAME, SHM_DIR. A malformed variable raises
MalformedVariable there, and never when a module is imported.
"""

from __future__ import annotations

import sys
from typing import Any, Callable

from kvcached import config
from kvcached.errors import KVCachedConfigError, KVCachePoolExhausted
from kvcached.log import get_kvcached_logger, get_log_level

SHM_DIR = "/dev/shm"


def _or(name: str, unset: int) -> int:
    value = config.get(name)
    return unset if value is None else int(value)


_CONSTANTS: dict[str, Callable[[], Any]] = {
    "PAGE_SIZE": lambda: config.get("KVCACHED_PAGE_SIZE_MB"),
    "GPU_UTILIZATION": lambda: config.get("KVCACHED_GPU_UTILIZATION"),
    "PAGE_PREALLOC_ENABLED": lambda: config.get("KVCACHED_PAGE_PREALLOC_ENABLED"),
    "MIN_RESERVED_PAGES": lambda: config.get("KVCACHED_MIN_RESERVED_PAGES"),
    "MAX_RESERVED_PAGES": lambda: _or("KVCACHED_MAX_RESERVED_PAGES", sys.maxsize),
    "SANITY_CHECK": lambda: config.get("KVCACHED_SANITY_CHECK"),
    "MAX_CACHED_TOKENS": lambda: _or("KVCACHED_MAX_CACHED_TOKENS", -1),
    "CONTIGUOUS_LAYOUT": lambda: config.get("KVCACHED_CONTIGUOUS_LAYOUT"),
    "DEFAULT_IPC_NAME": lambda: config.get("KVCACHED_IPC_NAME") or config.default_name(),
}

__all__ = [  # noqa: F822 - constants are made by __getattr__
    "CONTIGUOUS_LAYOUT",
    "DEFAULT_IPC_NAME",
    "GPU_UTILIZATION",
    "MAX_CACHED_TOKENS",
    "MAX_RESERVED_PAGES",
    "MIN_RESERVED_PAGES",
    "PAGE_PREALLOC_ENABLED",
    "PAGE_SIZE",
    "SANITY_CHECK",
    "SHM_DIR",
    "KVCachePoolExhausted",
    "KVCachedConfigError",
    "align_to",
    "align_up_to_page",
    "get_kvcached_logger",
    "get_log_level",
]


def __getattr__(name: str) -> Any:
    try:
        constant = _CONSTANTS[name]
    except KeyError:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None
    return constant()


def align_to(x: int, a: int) -> int:
    """The smallest multiple of ``a`` that is not below ``x``."""
    return -(-x // a) * a


def align_up_to_page(n_cells: int, cell_size: int) -> int:
    """Cells of ``cell_size`` bytes that fill the pages which ``n_cells`` begin."""
    return align_to(n_cells, config.get("KVCACHED_PAGE_SIZE_MB") // cell_size)
