"""Pages stay where they are while torch captures a CUDA graph.

CUDA invalidates a capture when another thread waits for the device, as is done before a
page is unmapped, or makes calls that it takes for unsafe. So torch's own beginning and end of
a capture are wrapped, once a process: in between, no page of any pool comes or goes. Who
captures without torch calls ``_C.Session.pause`` and ``resume``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvcached import _C

_PAUSED = "_kvcached_paused"  # on a graph: the sessions that were paused for it


def _resume(graph: Any) -> None:
    from kvcached import _C

    for session in graph.__dict__.pop(_PAUSED, ()):
        try:
            session.resume()
        except _C.Error:
            pass  # closed meanwhile


def _wrap(graph_class: Any, sessions: Callable[[], Sequence[_C.Session]]) -> None:
    begin, end = graph_class.capture_begin, graph_class.capture_end

    @functools.wraps(begin)
    def capture_begin(self: Any, *args: Any, **keywords: Any) -> Any:
        paused: list[_C.Session] = []
        setattr(self, _PAUSED, paused)
        try:
            for session in sessions():
                session.pause()
                paused.append(session)
            return begin(self, *args, **keywords)
        except BaseException:
            _resume(self)
            raise

    @functools.wraps(end)
    def capture_end(self: Any, *args: Any, **keywords: Any) -> Any:
        try:
            return end(self, *args, **keywords)
        finally:
            _resume(self)

    graph_class.capture_begin, graph_class.capture_end = capture_begin, capture_end


_wrapped = False


def watch(sessions: Callable[[], Sequence[_C.Session]]) -> None:
    """Pauses these sessions around each capture from now on. Imports torch."""
    global _wrapped
    if _wrapped:
        return
    import torch

    _wrapped = True
    _wrap(torch.cuda.CUDAGraph, sessions)
