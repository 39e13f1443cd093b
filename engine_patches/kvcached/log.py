"""The package's logger."""

from __future__ import annotations

import logging
import os
from typing import IO

from kvcached import config
from kvcached.errors import MalformedVariable

_COLORS = {
    logging.DEBUG: "\033[36m",
    logging.INFO: "\033[32m",
    logging.WARNING: "\033[33m",
    logging.ERROR: "\033[31m",
    logging.CRITICAL: "\033[35m",
}
_RESET = "\033[0m"


def get_log_level() -> int:
    """KVCACHED_LOG_LEVEL as a number; INFO where it is malformed, as logging must work."""
    try:
        return int(getattr(logging, config.get("KVCACHED_LOG_LEVEL")))
    except MalformedVariable:
        return logging.INFO


def use_color(stream: IO[str]) -> bool:
    """Whether lines to ``stream`` are coloured.

    NO_COLOR forbids it. Else KVCACHED_LOG_COLOR decides where it is set, and where it
    is not, whether the stream is a terminal.
    """
    if os.environ.get("NO_COLOR"):
        return False
    try:
        wanted = bool(config.get("KVCACHED_LOG_COLOR"))
    except MalformedVariable:
        return False
    if os.environ.get("KVCACHED_LOG_COLOR", "").strip():
        return wanted
    return stream.isatty()


class _Formatter(logging.Formatter):
    def __init__(self, color: bool) -> None:
        super().__init__(
            "[kvcached][%(levelname)s][%(asctime)s][%(filename)s:%(lineno)d] %(message)s",
            datefmt="%Y-%m-%d %H:%M:%S",
        )
        self._color = color

    def format(self, record: logging.LogRecord) -> str:
        line = super().format(record)
        color: str | None = _COLORS.get(record.levelno) if self._color else None
        if color is None:
            return line
        head, bracket, rest = line.partition("] ")
        return f"{color}{head}{bracket}{_RESET}{rest}"


def get_kvcached_logger(name: str = "kvcached") -> logging.Logger:
    """The logger; made, with a handler to stderr, when it is asked for first."""
    logger = logging.getLogger(name)
    if not logger.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(_Formatter(use_color(handler.stream)))
        logger.addHandler(handler)
        logger.setLevel(get_log_level())
        logger.propagate = False
    return logger
