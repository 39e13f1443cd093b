"""Calls the engines' patches when an engine is imported.

A line in site-packages/kvcached_autopatch.pth calls :func:`install` at the start of
each interpreter where KVCACHED_AUTOPATCH, or without it ENABLE_KVCACHED, is on; with
both off it reads these two variables and imports nothing. vLLM calls
:func:`register_vllm` besides, as a plugin.

The patches of an engine are `kvcached.integration.<engine>.autopatch`, a module with
a function ``apply()``. Where a release has none, the engine runs unpatched, and
that is said once.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import threading
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

# Package that is imported, and its name for people.
ENGINES = {"vllm": "vLLM", "sglang": "SGLang"}

_lock = threading.Lock()
_handled: set[str] = set()


def wanted() -> bool:
    """Whether the environment asks for patches. Raises MalformedVariable."""
    from kvcached import config

    if os.environ.get("KVCACHED_AUTOPATCH", "").strip():
        return bool(config.get("KVCACHED_AUTOPATCH"))
    return bool(config.get("ENABLE_KVCACHED"))


def install() -> None:
    """Has the engines' patches applied when an engine is imported. Idempotent."""
    with _lock:
        if not any(isinstance(finder, _EngineFinder) for finder in sys.meta_path):
            sys.meta_path.insert(0, _EngineFinder())
    for engine in ENGINES:
        if _is_imported(sys.modules.get(engine)):
            apply(engine)


def uninstall() -> None:
    """Engines that are imported later stay as they are. Idempotent."""
    with _lock:
        sys.meta_path[:] = [
            finder for finder in sys.meta_path if not isinstance(finder, _EngineFinder)
        ]


def register_vllm() -> None:
    """vLLM's plugin entry point; vLLM calls it in each of its processes."""
    apply("vllm")


def apply(engine: str) -> None:
    """Applies an engine's patches, once a process, where the environment asks for it.

    What the patches raise passes through, and is raised again by the next call.
    """
    if not wanted():
        return
    with _lock:
        if engine in _handled:
            return
        _handled.add(engine)
    try:
        if carries_patches(engine):
            importlib.import_module(_patches(engine)).apply()
        else:
            _say_unpatched(engine)
    except BaseException:
        with _lock:
            _handled.discard(engine)
        raise


def _patches(engine: str) -> str:
    return f"kvcached.integration.{engine}.autopatch"


def carries_patches(engine: str) -> bool:
    """Whether this release has patches for the engine."""
    package = _patches(engine).rpartition(".")[0]
    return (
        importlib.util.find_spec(package) is not None
        and importlib.util.find_spec(_patches(engine)) is not None
    )


def _say_unpatched(engine: str) -> None:
    from kvcached.log import get_kvcached_logger

    get_kvcached_logger().warning(
        "this release of kvcached carries no patches for %s: %s %s runs unpatched, with KV "
        "memory of its own that kvctl does not see",
        ENGINES[engine],
        engine,
        engine_version(engine) or "of an unknown version",
    )


def engine_version(engine: str) -> str | None:
    """Of the installed distribution; None: it is not installed by pip's records."""
    from importlib import metadata

    try:
        return metadata.version(engine)
    except metadata.PackageNotFoundError:
        return None


def _is_imported(module: ModuleType | None) -> bool:
    """Not while it is being imported: the loader calls then."""
    spec = getattr(module, "__spec__", None)
    return module is not None and not getattr(spec, "_initializing", False)


class _EngineFinder(MetaPathFinder):
    """Finds the engines' packages as the other finders do, and wraps their loader.

    Other finders of its kind may ask it while it asks them: it answers nothing then.
    """

    def __init__(self) -> None:
        self._asking = threading.local()

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None = None,
        target: ModuleType | None = None,
    ) -> ModuleSpec | None:
        if fullname not in ENGINES or getattr(self._asking, "now", False):
            return None
        self._asking.now = True
        try:
            spec = self._ask_others(fullname, path, target)
        finally:
            self._asking.now = False
        # A folder that only has the name is no engine; it has no loader that runs code.
        if spec is None or spec.origin is None or not hasattr(spec.loader, "exec_module"):
            return spec
        spec.loader = _EngineLoader(fullname, spec.loader)
        return spec

    def _ask_others(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None
    ) -> ModuleSpec | None:
        for finder in list(sys.meta_path):
            find_spec = getattr(finder, "find_spec", None)
            if finder is self or find_spec is None:
                continue
            spec: ModuleSpec | None = find_spec(fullname, path, target)
            if spec is not None:
                return spec
        return None


class _EngineLoader(Loader):
    """Another loader, and the patches after it.

    Whoever looks at the module, or asks this one for more than loading, sees the other.
    """

    def __init__(self, engine: str, loader: Any) -> None:
        self._engine = engine
        self._loader = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        create = getattr(self._loader, "create_module", None)
        return create(spec) if create is not None else None

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        module.__loader__ = self._loader
        self._loader.exec_module(module)
        apply(self._engine)
