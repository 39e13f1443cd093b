"""The environment variables: names, defaults and what is allowed.

Nothing is read when this is imported. A variable that is set to nothing counts as
unset. What is malformed raises :class:`~kvcached.errors.MalformedVariable`, which is
a ``ValueError`` and a ``KVCachedConfigError``, naming variable, value and what is
allowed.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Callable, NamedTuple

from kvcached.errors import MalformedVariable

MIB = 1 << 20
# Bytes of memory are handed out in multiples of this.
PAGE_GRANULARITY = 2 * MIB
# The longest name of an instance.
NAME_LENGTH = 128


@dataclass(frozen=True)
class Amount:
    """Memory: bytes, or a fraction of the device. One of them is None."""

    size: int | None = None
    fraction: float | None = None


class Variable(NamedTuple):
    """How one variable is read."""

    parse: Callable[[str], Any]  # raises ValueError
    default: Any
    allowed: str


def parse_bool(text: str) -> bool:
    word = text.lower()
    if word in ("true", "1", "yes", "on"):
        return True
    if word in ("false", "0", "no", "off"):
        return False
    raise ValueError(text)


_SIZE = re.compile(r"(\d+(?:[,_]\d+)*(?:\.\d+)?)\s*(?:B|([KMGT])(?:I?B)?)?", re.IGNORECASE)
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
# No device is larger, and no broker takes a larger limit.
MAX_SIZE = 1 << 52
_MAX_PAGE_BYTES = 1 << 40
# Pages and tokens are counted by less than this.
_COUNT_END = 1 << 31
_TOKENS_END = 1 << 63
_MAX_SECONDS = 10 * 365 * 86_400


def parse_size(text: str) -> int:
    """Bytes: ``512M 512MB 2G 1,000 100_000 1024``; every unit is 1024-based."""
    match = _SIZE.fullmatch(text)
    if not match:
        raise ValueError(text)
    number = match.group(1).replace(",", "").replace("_", "")
    unit = _UNITS[(match.group(2) or "").upper()]
    size = float(number) * unit if "." in number else int(number) * unit
    if size > MAX_SIZE:
        raise ValueError(text)
    return int(size)


def parse_amount(text: str) -> Amount:
    if not text.endswith("%"):
        return Amount(size=parse_size(text))
    percent = float(text[:-1])
    if not 0 < percent <= 100:
        raise ValueError(text)
    return Amount(fraction=percent / 100)


_DURATION = re.compile(r"(?:\d+(?:\.\d+)?(?:ms|us|s|m|h))+")
_MILLISECONDS = {"us": 0.001, "ms": 1, "s": 1000, "m": 60_000, "h": 3_600_000}


def parse_duration_ms(text: str) -> int | None:
    """Milliseconds, None for ``never``."""
    if text.lower() == "never":
        return None
    if text == "0":
        return 0
    if not _DURATION.fullmatch(text):
        raise ValueError(text)
    parts = re.findall(r"(\d+(?:\.\d+)?)(ms|us|s|m|h)", text)
    milliseconds = sum(float(number) * _MILLISECONDS[unit] for number, unit in parts)
    if milliseconds > _MAX_SECONDS * 1000:
        raise ValueError(text)
    return int(milliseconds)


def _parse_page_bytes(text: str) -> int:
    size = int(text) * MIB
    if not 0 < size <= _MAX_PAGE_BYTES or size % PAGE_GRANULARITY:
        raise ValueError(text)
    return size


def _parse_fraction(text: str) -> float:
    fraction = float(text)
    if not 0 < fraction <= 1:
        raise ValueError(text)
    return fraction


def _parse_count(text: str) -> int:
    count = int(text)
    if not 0 <= count < _COUNT_END:
        raise ValueError(text)
    return count


def _parse_max_pages(text: str) -> int | None:
    count = int(text)
    if count >= _COUNT_END:
        raise ValueError(text)
    return None if count < 0 else count


def _parse_tokens(text: str) -> int:
    tokens = int(text)
    if tokens >= _TOKENS_END:
        raise ValueError(text)
    return max(tokens, -1)


def _parse_seconds(text: str) -> float | None:
    seconds = float(text)
    if seconds <= 0 or seconds == float("inf"):
        return None
    if not seconds <= _MAX_SECONDS:  # More, or no number.
        raise ValueError(text)
    return seconds


def _parse_labels(text: str) -> dict[str, str]:
    labels: dict[str, str] = {}
    for item in text.split(","):
        key, equals, value = item.partition("=")
        if not key.strip() or not equals:
            raise ValueError(text)
        labels[key.strip()] = value.strip()
    return labels


def _one_of(*words: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text.lower() not in words:
            raise ValueError(text)
        return text.lower()

    return parse


def _parse_level(text: str) -> str:
    level = text.upper()
    if level not in ("DEBUG", "INFO", "WARNING", "ERROR"):
        raise ValueError(text)
    return level


def sanitise_name(text: str) -> str:
    """A name that an instance can have: others of its characters become ``-``.

    It begins with none of ``-`` and ``.``, which programs take for an option and a hidden
    file; it may be empty.
    """
    return re.sub(r"[^A-Za-z0-9_.-]", "-", text).lstrip("-.")[:NAME_LENGTH]


def _parse_name(text: str) -> str | None:
    return sanitise_name(text) or None


def _parse_shm_compat(text: str) -> str:
    if text.lower() == "auto":
        return "auto"
    return "on" if parse_bool(text) else "off"


_YES_OR_NO = "true, 1, yes, on, false, 0, no or off"
_AN_AMOUNT = "a size such as 512M, 2G or 1024, or a percent of the device such as 25%"
_A_COUNT = "a whole number, 0 or more, below 2**31"

VARIABLES: dict[str, Variable] = {
    "ENABLE_KVCACHED": Variable(parse_bool, False, _YES_OR_NO),
    "KVCACHED_AUTOPATCH": Variable(parse_bool, False, _YES_OR_NO),
    "KVCACHED_IPC_NAME": Variable(_parse_name, None, "any text"),
    "KVCACHED_GPU_UTILIZATION": Variable(_parse_fraction, 0.95, "a number above 0, at most 1"),
    "KVCACHED_PAGE_SIZE_MB": Variable(
        _parse_page_bytes, PAGE_GRANULARITY, "a positive multiple of 2 (MB), at most 1048576"
    ),
    "KVCACHED_LOG_LEVEL": Variable(_parse_level, "INFO", "DEBUG, INFO, WARNING or ERROR"),
    "KVCACHED_PAGE_PREALLOC_ENABLED": Variable(parse_bool, True, _YES_OR_NO),
    "KVCACHED_MIN_RESERVED_PAGES": Variable(_parse_count, 5, _A_COUNT),
    "KVCACHED_MAX_RESERVED_PAGES": Variable(
        _parse_max_pages, None, "a whole number below 2**31; below 0: no limit"
    ),
    "KVCACHED_MAX_CACHED_TOKENS": Variable(
        _parse_tokens, None, "a whole number below 2**63; below 0: no limit"
    ),
    "KVCACHED_CONTIGUOUS_LAYOUT": Variable(parse_bool, True, _YES_OR_NO),
    "KVCACHED_SANITY_CHECK": Variable(parse_bool, False, _YES_OR_NO),
    "KVCACHED_LOG_COLOR": Variable(parse_bool, True, _YES_OR_NO),
    "KVCACHED_IPC_TIMEOUT": Variable(
        _parse_seconds, 60.0, "a number of seconds, at most 10 years; 0 or below: no limit"
    ),
    "KVBROKER_ADDRESS": Variable(str, None, "a socket, or a directory of sockets"),
    "KVBROKER_AUTOSTART": Variable(parse_bool, True, _YES_OR_NO),
    "KVBROKER_LIMIT": Variable(parse_amount, None, _AN_AMOUNT),
    "KVBROKER_MIN": Variable(parse_amount, None, _AN_AMOUNT),
    "KVBROKER_IDLE_DECAY": Variable(
        parse_duration_ms,
        30_000,
        "a duration such as 30s, 500ms or 2m, at most 10 years, 0, or never",
    ),
    "KVBROKER_SHM_COMPAT": Variable(_parse_shm_compat, "auto", f"auto, {_YES_OR_NO}"),
    "KVBROKER_LABELS": Variable(_parse_labels, {}, "key=value,key=value"),
    "KVBROKER_NAME_CONFLICT": Variable(
        _one_of("join", "suffix", "error"), None, "join, suffix or error"
    ),
}


def get(name: str, environ: Mapping[str, str] | None = None) -> Any:
    """The value of one of VARIABLES as the environment has it now.

    Raises MalformedVariable.
    """
    variable = VARIABLES[name]
    text = (os.environ if environ is None else environ).get(name, "").strip()
    if not text:
        return variable.default
    try:
        return variable.parse(text)
    except ValueError:
        raise MalformedVariable(
            f"{name}={text!r} is not allowed; it must be {variable.allowed}"
        ) from None


@dataclass(frozen=True)
class Settings:
    """All variables. Sizes are bytes."""

    enabled: bool
    autopatch: bool
    ipc_name: str | None  # None: default_name()
    gpu_utilization: float
    page_bytes: int
    log_level: str
    page_prealloc: bool
    min_reserved_pages: int
    max_reserved_pages: int | None  # None: no limit
    max_cached_tokens: int | None  # None: pressure decides; below 0: no limit
    contiguous_layout: bool
    sanity_check: bool
    log_color: bool
    ipc_timeout_s: float | None  # None: no limit
    address: str | None
    autostart: bool
    limit: Amount | None
    minimum: Amount | None
    idle_decay_ms: int | None  # None: never
    shm_compat: str  # "auto", "on", "off"
    labels: Mapping[str, str]
    name_conflict: str | None  # None: join where the name is set, else suffix

    @property
    def shm_view(self) -> bool:
        """Whether the 24-byte view is kept in /dev/shm."""
        return self.shm_compat == "on" or (self.shm_compat == "auto" and self.ipc_name is not None)


def read(environ: Mapping[str, str] | None = None) -> Settings:
    """What the environment says now. Raises MalformedVariable for the first bad one."""
    values = {name: get(name, environ) for name in VARIABLES}
    return Settings(
        enabled=values["ENABLE_KVCACHED"],
        autopatch=values["KVCACHED_AUTOPATCH"],
        ipc_name=values["KVCACHED_IPC_NAME"],
        gpu_utilization=values["KVCACHED_GPU_UTILIZATION"],
        page_bytes=values["KVCACHED_PAGE_SIZE_MB"],
        log_level=values["KVCACHED_LOG_LEVEL"],
        page_prealloc=values["KVCACHED_PAGE_PREALLOC_ENABLED"],
        min_reserved_pages=values["KVCACHED_MIN_RESERVED_PAGES"],
        max_reserved_pages=values["KVCACHED_MAX_RESERVED_PAGES"],
        max_cached_tokens=values["KVCACHED_MAX_CACHED_TOKENS"],
        contiguous_layout=values["KVCACHED_CONTIGUOUS_LAYOUT"],
        sanity_check=values["KVCACHED_SANITY_CHECK"],
        log_color=values["KVCACHED_LOG_COLOR"],
        ipc_timeout_s=values["KVCACHED_IPC_TIMEOUT"],
        address=values["KVBROKER_ADDRESS"],
        autostart=values["KVBROKER_AUTOSTART"],
        limit=values["KVBROKER_LIMIT"],
        minimum=values["KVBROKER_MIN"],
        idle_decay_ms=values["KVBROKER_IDLE_DECAY"],
        shm_compat=values["KVBROKER_SHM_COMPAT"],
        labels=dict(values["KVBROKER_LABELS"]),
        name_conflict=values["KVBROKER_NAME_CONFLICT"],
    )


def default_name(engine: str | None = None) -> str:
    """``kvcached_<vLLM|SGLang|proc>_<process group>``; ``engine`` is the middle part.

    Without it, it is the engine that this process has imported.
    """
    if engine is None:
        modules = sys.modules
        engine = "vLLM" if "vllm" in modules else "SGLang" if "sglang" in modules else "proc"
    return sanitise_name(f"kvcached_{engine}_{os.getpgrp()}")
