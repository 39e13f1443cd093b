#!/bin/bash
# Fetches kvcached's source distribution, to measure it where the GPU is, into
# build/. It is never part of this repository.
#
#   tests/bench/gpu/fetch_kvcached.sh [VERSION]
set -euo pipefail
cd "$(dirname "$0")/../../.."

version=${1:-0.1.6}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# pip runs a source distribution's setup.py to learn its name, and this one
# wants torch there: a stand-in does, as nothing is built.
mkdir -p "$work/stand_in/torch/utils"
cat > "$work/stand_in/torch/__init__.py" <<'END'
import types

__version__ = "2.11.0"
version = types.SimpleNamespace(cuda="13.0", hip=None)
_C = types.SimpleNamespace(_GLIBCXX_USE_CXX11_ABI=True)
END
touch "$work/stand_in/torch/utils/__init__.py"
cat > "$work/stand_in/torch/utils/cpp_extension.py" <<'END'
from setuptools import Extension
from setuptools.command.build_ext import build_ext as BuildExtension


def CUDAExtension(*_args, **_settings):
    return Extension("none", [])


CppExtension = CUDAExtension


def include_paths(**_settings):
    return []


library_paths = include_paths
END
python3 -m pip install -q --target "$work/tools" 'setuptools>=77' wheel
PYTHONPATH=$work/stand_in:$work/tools python3 -m pip download -q --no-deps \
  --no-binary :all: --no-build-isolation -d "$work/out" "kvcached==$version"
mkdir -p build
cp "$work"/out/kvcached-*.tar.gz build/
ls build/kvcached-*.tar.gz
