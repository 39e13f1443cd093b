"""Where a fleet's memory comes from, and what kernel and driver say of it.

    device = devices.open_device(arguments, folder)
    device.mapped_bytes(pid)   # of the broker's memory, in one process
    device.used_bytes()        # of the device, by everybody

A real GPU's mappings are in no file that can be read, and memory on the host has no figure for all
of it: the answer is then None.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
import pathlib
import re
import shutil
import tempfile

BACKENDS = ("host", "fake-cuda", "cuda")
# Of the fake driver's only device.
FAKE_UUID = "GPU-fa6e0000-0000-4000-8000-000000000000"
# Its memory is in sparse files; no fleet's capacity is near it.
FAKE_TOTAL = 64 << 30
# A handle that is not mapped keeps as much of its file mapped, on the fake driver.
FAKE_REFERENCE_BYTES = 4096


class DeviceError(Exception):
    """The device cannot be used; the text says why."""


class Device:
    """Memory of the host: memfds, as the broker names them."""

    name = "host"
    capacity = "48M"
    # What the engines' models are divided by.
    scale = 512
    # How long a process takes from its start to its first pages, roughly: for whom is to die in it.
    first_moments_s = 0.06
    # Whether giver and taker know a page by the same name, so that histories show it passed on.
    pages_have_names = True
    _memory = re.compile("/memfd:kvbroker")

    def __init__(self, folder: pathlib.Path) -> None:
        self.broker_flags = ["--backend=host", f"--device-uuid=CHAOS-{os.getpid()}"]
        # Whether a page can be told from all others by the inode of its descriptor.
        self.engines_recorded = True

    def mapped_bytes(self, pid: int) -> int | None:
        """Of the broker's memory, by the kernel's word."""
        total = 0
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            for line in pathlib.Path(f"/proc/{pid}/maps").read_text().splitlines():
                if self._memory.search(line):
                    first, last = (int(x, 16) for x in line.split(" ", 1)[0].split("-"))
                    total += self._counted(last - first)
        return total

    def used_bytes(self) -> int | None:
        return None

    def share(self) -> None:
        """So that processes of other users may use it, too."""

    def close(self) -> None:
        pass

    def _counted(self, mapping_bytes: int) -> int:
        return mapping_bytes


class FakeGpu(Device):
    """The driver of tests/fake_cuda: allocations are files of a folder of its own."""

    name = "fake-cuda"
    capacity = "256M"
    scale = 64

    def __init__(self, folder: pathlib.Path, driver: pathlib.Path) -> None:
        super().__init__(folder)
        self._folder = folder / "gpu"
        if os.access("/dev/shm", os.W_OK):
            self._folder = pathlib.Path(tempfile.mkdtemp(prefix="kvb_gpu_", dir="/dev/shm"))
        else:
            self._folder.mkdir()
            # On a disk an inode's number is soon used again.
            self.engines_recorded = False
        self._memory = re.compile(re.escape(f" {self._folder}/memory"))
        self.broker_flags = ["--backend=cuda", f"--gpu={FAKE_UUID}"]
        # For this process, which loads the driver too, and for all that it starts.
        os.environ.update(
            KVBROKER_CUDA_DRIVER=str(driver.resolve()), KVBROKER_NVML=str(driver.resolve()),
            KVBROKER_FAKE_CUDA_DIR=str(self._folder), KVBROKER_FAKE_CUDA_TOTAL=str(FAKE_TOTAL),
        )
        self._nvml = Nvml(str(driver.resolve()), FAKE_UUID)

    def used_bytes(self) -> int | None:
        return self._nvml.used_bytes()

    def share(self) -> None:
        self._folder.chmod(0o777)

    def close(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)

    def _counted(self, mapping_bytes: int) -> int:
        return 0 if mapping_bytes == FAKE_REFERENCE_BYTES else mapping_bytes


class Gpu(Device):
    """A real one. Nobody else may use it meanwhile."""

    name = "cuda"
    capacity = "8G"
    scale = 64
    first_moments_s = 3.0  # CUDA makes a context.
    pages_have_names = False

    def __init__(self, folder: pathlib.Path, uuid: str | None) -> None:
        super().__init__(folder)
        self._nvml = Nvml(os.environ.get("KVBROKER_NVML", "libnvidia-ml.so.1"), uuid)
        self.broker_flags = ["--backend=cuda", f"--gpu={self._nvml.uuid}"]

    def mapped_bytes(self, pid: int) -> int | None:
        return None

    def used_bytes(self) -> int | None:
        return self._nvml.used_bytes()


class _MemoryV2(ctypes.Structure):
    _fields_ = [
        ("version", ctypes.c_uint), ("total", ctypes.c_ulonglong), ("reserved", ctypes.c_ulonglong),
        ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong),
    ]


class Nvml:
    """NVML's figures of one GPU: the first, where none is named."""

    def __init__(self, library: str, uuid: str | None) -> None:
        try:
            self._nvml = ctypes.CDLL(library)
        except OSError as error:
            raise DeviceError(f"no NVML: {error}") from error
        self._call("nvmlInit_v2")
        self._device = ctypes.c_void_p()
        if uuid is not None:
            self._call("nvmlDeviceGetHandleByUUID", uuid.encode(), ctypes.byref(self._device))
            self.uuid = uuid
        else:
            self._call("nvmlDeviceGetHandleByIndex_v2", ctypes.c_uint(0), ctypes.byref(self._device))
            text = ctypes.create_string_buffer(96)
            self._call("nvmlDeviceGetUUID", self._device, text, ctypes.c_uint(len(text)))
            self.uuid = text.value.decode()

    def used_bytes(self) -> int:
        """By all processes; what the driver keeps for itself is not in it."""
        memory = _MemoryV2(version=ctypes.sizeof(_MemoryV2) | 2 << 24)
        self._call("nvmlDeviceGetMemoryInfo_v2", self._device, ctypes.byref(memory))
        return int(memory.used)

    def _call(self, function: str, *arguments: object) -> None:
        result = getattr(self._nvml, function)(*arguments)
        if result != 0:
            raise DeviceError(f"{function} answers {result}")


KINDS = {kind.name: kind for kind in (Device, FakeGpu, Gpu)}


def open_device(arguments: argparse.Namespace, folder: pathlib.Path, fake_driver: pathlib.Path) -> Device:
    """What --backend and --gpu say. `folder`: of the fleet."""
    backend = getattr(arguments, "backend", "host")
    if backend == "fake-cuda":
        if not fake_driver.exists():
            raise DeviceError(f"{fake_driver} is not there; run: bazel build //tests/fake_cuda/...")
        return FakeGpu(folder, fake_driver)
    if backend == "cuda":
        return Gpu(folder, arguments.gpu)
    return Device(folder)
