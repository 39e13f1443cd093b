"""A kernel that writes where nothing is mapped: what its process is told.

    python3 mps_fault.py [--gpu INDEX] [--address HEX]

Prints each call's answer. Exit status 0: the fault came, as it should; 1: it could not be made; 3: the
write was taken.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import sys

PTX = b"""
.version 7.0
.target sm_70
.address_size 64
.visible .entry poke(.param .u64 at)
{
  .reg .b32 %r<2>;
  .reg .b64 %rd<3>;
  ld.param.u64 %rd1, [at];
  cvta.to.global.u64 %rd2, %rd1;
  mov.u32 %r1, 7;
  st.global.u32 [%rd2], %r1;
  ret;
}
\0"""


class Cuda:
    def __init__(self) -> None:
        self._library = ctypes.CDLL(os.environ.get("KVBROKER_CUDA_DRIVER", "libcuda.so.1"))

    def call(self, function: str, *arguments: object) -> int:
        result = int(getattr(self._library, function)(*arguments))
        print(f"{function}: {self.name(result)}", flush=True)
        return result

    def must(self, function: str, *arguments: object) -> None:
        if self.call(function, *arguments) != 0:
            sys.exit(1)

    def name(self, result: int) -> str:
        if result == 0:
            return "OK"
        text = ctypes.c_char_p()
        try:
            self._library.cuGetErrorName(result, ctypes.byref(text))
        except AttributeError:
            pass
        return f"{text.value.decode() if text.value else 'error'} ({result})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", type=int, default=0, metavar="INDEX", help="[0]")
    parser.add_argument(
        "--address", type=lambda text: int(text, 16), default=0x10000, metavar="HEX",
        help="where to write; nothing must be there [10000]",
    )
    arguments = parser.parse_args()
    try:
        cuda = Cuda()
        cuda.must("cuInit", 0)
        device = ctypes.c_int()
        cuda.must("cuDeviceGet", ctypes.byref(device), arguments.gpu)
        context = ctypes.c_void_p()
        cuda.must("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        cuda.must("cuCtxSetCurrent", context)
        module, function = ctypes.c_void_p(), ctypes.c_void_p()
        cuda.must("cuModuleLoadData", ctypes.byref(module), ctypes.c_char_p(PTX))
        cuda.must("cuModuleGetFunction", ctypes.byref(function), module, b"poke")
        at = ctypes.c_uint64(arguments.address)
        parameters = (ctypes.c_void_p * 1)(ctypes.cast(ctypes.byref(at), ctypes.c_void_p))
        one = [ctypes.c_uint(1)] * 6
        cuda.must("cuLaunchKernel", function, *one, ctypes.c_uint(0), None, parameters, None)
    except (OSError, AttributeError) as error:
        print(f"the fault cannot be made: {error}")
        sys.exit(1)
    sys.exit(0 if cuda.call("cuCtxSynchronize") != 0 else 3)


if __name__ == "__main__":
    main()
