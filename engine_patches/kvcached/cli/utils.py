"""The limits and figures of instances, for control planes that read kvcached's own.

They used to read 24 bytes of /dev/shm: three native int64, the limit, what is used,
and what is kept besides. An engine that keeps such a file (KVBROKER_SHM_COMPAT) has it
here too; for every other instance the same 24 bytes come from its broker, and a
limit that is written goes there.

    with RwLockedShm("/dev/shm/chat", "rb") as view:
        limit, used, preallocated = struct.unpack("3q", view)

Where an instance spans several GPUs, the figures are those of the GPU on which it
uses most.
"""

from __future__ import annotations

import errno
import fcntl
import json
import mmap
import os
import struct
import subprocess
from dataclasses import dataclass
from typing import IO, Any, ClassVar

from kvcached import _C, config
from kvcached.utils import SHM_DIR

_INT64_MAX = (1 << 63) - 1


def _address() -> str | None:
    address: str | None = config.get("KVBROKER_ADDRESS")
    return address


def get_ipc_path(ipc_name: str) -> str:
    """Where an instance's view is: `chat`, `/chat` -> `/dev/shm/chat`; a path stays."""
    if "/" in ipc_name.lstrip("/"):
        return ipc_name
    return os.path.join(SHM_DIR, ipc_name.lstrip("/"))


def get_ipc_name(ipc_path: str) -> str:
    """The instance's name, from a path to its view."""
    return os.path.basename(ipc_path)


def _instances() -> list[dict[str, Any]]:
    """Of all brokers that answer; none where there is no broker."""
    try:
        listed: list[dict[str, Any]] = json.loads(_C.list_instances(_address()))
    except _C.Error as error:
        if error.code == _C.NOT_FOUND:
            return []
        raise
    return listed


def get_all_ipc_names() -> list[str]:
    """The names of all instances that brokers of this machine know."""
    return sorted({instance["ipc"] for instance in _instances()})


@dataclass
class MemInfoStruct:
    """The 24 bytes. Sizes in bytes."""

    total_size: int  # the limit
    used_size: int  # of pages in which some request has a block
    prealloc_size: int  # held besides, and not to be had by others

    DTYPE: ClassVar[str] = "int64"
    N_FIELDS: ClassVar[int] = 3
    SHM_SIZE: ClassVar[int] = 24

    @classmethod
    def from_buffer(cls, buf: Any) -> MemInfoStruct:
        return cls(*struct.unpack_from("3q", buf))

    def write_to_buffer(self, buf: Any) -> None:
        struct.pack_into("3q", buf, 0, self.total_size, self.used_size, self.prealloc_size)


def _lives(name: str, listed: list[dict[str, Any]]) -> bool:
    return any(instance["ipc"] == name and instance["pids"] for instance in listed)


def _figures(name: str, listed: list[dict[str, Any]]) -> MemInfoStruct | None:
    """None: no such instance is listed."""
    found = [instance for instance in listed if instance["ipc"] == name]
    if not found:
        return None
    instance = max(found, key=lambda one: int(one["used_bytes"]))
    used = int(instance["used_bytes"])
    yielding = int(instance["idle_bytes"]) + int(instance["cached_bytes"])
    return MemInfoStruct(
        min(int(instance["limit_bytes"]), _INT64_MAX),
        used,
        max(0, int(instance["held_bytes"]) - used - yielding),
    )


class RwLockedShm:
    """The view of one instance, as a context manager that gives a buffer of 24 bytes.

    ``RwLockedShm(path, "rb")`` and ``RwLockedShm(path, 24, RwLockedShm.RLOCK)`` read,
    ``"r+b"`` and ``WLOCK`` write as well. The file is locked with flock meanwhile. Where
    there is none, or one that an engine left which is gone, the buffer holds what the
    broker says on entry, and a limit that was changed in it is set on leaving; one for a
    name that no process has yet is kept for it, which needs a broker that runs. A file
    that is not in SHM_DIR is taken as it is.

    Raises FileNotFoundError where neither file nor instance exists and the view is to
    be read.
    """

    RLOCK = fcntl.LOCK_SH
    WLOCK = fcntl.LOCK_EX

    def __init__(
        self,
        file_path: str,
        mode_or_size: str | int = "rb",
        lock_type: int | None = None,
    ) -> None:
        self.file_path = get_ipc_path(file_path)
        self.size = MemInfoStruct.SHM_SIZE
        if isinstance(mode_or_size, str):
            writes = any(letter in mode_or_size for letter in "wa+")
        else:
            writes = False
            if mode_or_size != self.size:
                raise ValueError(f"a view has {self.size} bytes, not {mode_or_size}")
        if lock_type is None:
            lock_type = self.WLOCK if writes else self.RLOCK
        elif lock_type not in (self.RLOCK, self.WLOCK):
            raise ValueError("lock_type is neither RLOCK nor WLOCK")
        self.lock_type = lock_type
        self.mode = "r+b" if lock_type == self.WLOCK else "rb"
        self.file: IO[bytes] | None = None
        self.mm: mmap.mmap | None = None
        self._before: MemInfoStruct | None = None
        self._lives = True

    def __enter__(self) -> mmap.mmap:
        if not (self._is_kept() and self._map_file()):
            self._ask_broker()
        assert self.mm is not None
        return self.mm

    def __exit__(self, exc_type: Any, exc_value: Any, traceback: Any) -> None:
        assert self.mm is not None
        view = MemInfoStruct.from_buffer(self.mm)
        try:
            self.mm.close()
        except BufferError:
            pass  # An array of the caller's still looks at it.
        if self.file is not None:
            self.file.close()
        elif self._before is not None and exc_type is None:
            if view.total_size != self._before.total_size:
                _C.set_limit(
                    get_ipc_name(self.file_path),
                    max_bytes=view.total_size,
                    preset=not self._lives,
                    address=_address(),
                )

    def _is_kept(self) -> bool:
        """Whether an engine writes and reads the file, if there is one."""
        folder, name = os.path.split(self.file_path)
        if folder != SHM_DIR or not os.path.exists(self.file_path):
            return True
        try:
            listed = json.loads(_C.list_instances(_address()))
        except _C.Error:
            # While its broker is away, an engine's figures are there, and a limit is not heard.
            return self.lock_type == self.RLOCK
        return _lives(name, listed)

    def _map_file(self) -> bool:
        try:
            file = open(self.file_path, self.mode)
        except (FileNotFoundError, PermissionError):
            return False
        if os.fstat(file.fileno()).st_size < self.size:
            file.close()
            return False
        fcntl.flock(file, self.lock_type)
        access = mmap.ACCESS_WRITE if self.lock_type == self.WLOCK else mmap.ACCESS_READ
        self.mm = mmap.mmap(file.fileno(), self.size, access=access)
        self.file = file
        return True

    def _ask_broker(self) -> None:
        name = get_ipc_name(self.file_path)
        listed = _instances()
        figures = _figures(name, listed)
        self._lives = _lives(name, listed)
        if figures is None:
            if self.lock_type == self.RLOCK:
                raise FileNotFoundError(
                    errno.ENOENT, "no such view, and no broker knows the instance", self.file_path
                )
            figures = MemInfoStruct(0, 0, 0)
        self.mm = mmap.mmap(-1, self.size)
        figures.write_to_buffer(self.mm)
        self._before = figures if self.lock_type == self.WLOCK else None


def get_kv_cache_limit(ipc_name: str) -> MemInfoStruct | None:
    """Limit and figures of an instance as its broker has them; None: no such instance."""
    return _figures(get_ipc_name(ipc_name), _instances())


def update_kv_cache_limit(ipc_name: str, kv_cache_limit: int) -> MemInfoStruct | None:
    """Sets the limit, in bytes, of an instance that exists; None: there is none.

    In force for new memory when it returns; what is above drains meanwhile.
    """
    name = get_ipc_name(ipc_name)
    try:
        _C.set_limit(name, max_bytes=kv_cache_limit, address=_address())
    except _C.Error as error:
        if error.code == _C.NOT_FOUND:
            return None
        raise
    return _figures(name, _instances())


def init_kv_cache_limit(ipc_name: str, kv_cache_limit: int) -> MemInfoStruct:
    """Sets the limit, in bytes, also for a name that no instance has yet.

    Needs a broker that runs: raises _C.Error where there is none.
    """
    name = get_ipc_name(ipc_name)
    _C.set_limit(name, max_bytes=kv_cache_limit, preset=True, address=_address())
    return _figures(name, _instances()) or MemInfoStruct(kv_cache_limit, 0, 0)


def delete_kv_cache_segment(ipc_name: str) -> bool:
    """Forgets an instance that has no process left, and a view that it left behind.

    Returns whether there was anything. Raises RuntimeError where the instance lives.
    """
    from kvcached.cli.kvctl import program

    name = get_ipc_name(ipc_name)
    removed = False
    if any(instance["ipc"] == name for instance in _instances()):
        kvctl = program()
        if kvctl is None:
            raise RuntimeError("this installation carries no kvctl, which does this")
        done = subprocess.run(
            [str(kvctl), "delete", name],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            raise RuntimeError(done.stderr.strip() or f"kvctl ended with {done.returncode}")
        removed = True
    try:
        os.unlink(get_ipc_path(name))
        removed = True
    except FileNotFoundError:
        pass
    return removed


def delete_tp_socket_dir(ipc_name: str) -> bool:
    """Kept for those who call it: there is no such folder here. False."""
    return False


def get_total_gpu_memory() -> int:
    """Bytes of the first GPU that has a broker; 0: none has."""
    try:
        brokers = json.loads(_C.list_brokers(_address()))
    except _C.Error:
        return 0
    return int(brokers[0]["total_bytes"]) if brokers else 0
