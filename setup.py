"""Adds to pyproject.toml what is native, the .pth file and the man pages.

The native part is built with bazel. Where KVBROKER_WHEEL_PARTS names a folder,
its files (`_C.abi3.so`, `bin/`, `licenses/`) are taken instead: that is how
deploy/packaging/build_wheel.sh packs programs that it has stripped.

`pip install -e .` links to bazel-bin: the next `bazel build` of these targets is
what Python loads.
"""

from __future__ import annotations

import base64
import hashlib
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.build_py import build_py
from setuptools.command.editable_wheel import editable_wheel

ROOT = Path(__file__).resolve().parent
PACKAGE = ROOT / "engine_patches" / "kvcached"
HOOK = ROOT / "deploy" / "packaging" / "kvcached_autopatch.pth"

# Place in the package, and the bazel target that makes it.
NATIVE = {
    "_C.abi3.so": "//engine_patches/native:_C.abi3.so",
    "bin/kvbrokerd": "//broker/server:kvbrokerd",
    "bin/kvctl": "//client/cli:kvctl",
}


def version() -> str:
    header = (ROOT / "proto" / "version.h").read_text(encoding="utf-8")
    found = re.search(r'kVersion\[\] = "([^"]+)"', header)
    if not found:
        raise SystemExit("proto/version.h names no kVersion")
    return found.group(1)


def build_native() -> dict[str, Path]:
    """Runs bazel; place in the package -> file under bazel-bin."""
    bazel = shutil.which("bazel")
    if bazel is None:
        raise SystemExit(
            "kvcached: bazel is not on PATH, and the native part is built with it.\n"
            "  On Debian 12: deploy/install_deps.sh (as root) installs what is needed.\n"
            "  Elsewhere: install a wheel; deploy/packaging/build_wheel.sh makes one."
        )
    command = [bazel, "build", "--show_result=0", *NATIVE.values()]
    if subprocess.run(command, cwd=ROOT, stdin=subprocess.DEVNULL, check=False).returncode:
        raise SystemExit(f"kvcached: this failed: {' '.join(command)}")
    made = {}
    for place, target in NATIVE.items():
        made[place] = ROOT / "bazel-bin" / target.lstrip("/").replace(":", "/")
        if not made[place].exists():
            raise SystemExit(f"kvcached: bazel did not make {made[place]}")
    return made


def native_files() -> dict[str, Path]:
    parts = os.environ.get("KVBROKER_WHEEL_PARTS")
    if not parts:
        return build_native()
    return {
        path.relative_to(parts).as_posix(): path
        for path in sorted(Path(parts).rglob("*"))
        if path.is_file()
    }


class BuildPy(build_py):
    def run(self) -> None:
        super().run()
        native = native_files()
        if self.editable_mode:
            for place, file in native.items():
                link = PACKAGE / place
                link.parent.mkdir(exist_ok=True)
                link.unlink(missing_ok=True)
                link.symlink_to(os.path.relpath(file, link.parent))
            return
        library = Path(self.build_lib)
        for place, file in native.items():
            target = library / "kvcached" / place
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)
            target.chmod(0o755 if place.startswith("bin/") else 0o644)
        shutil.copyfile(HOOK, library / HOOK.name)


class EditableWheel(editable_wheel):
    """The .pth file is in site-packages there too."""

    def run(self) -> None:
        super().run()
        for wheel in Path(self.dist_dir).glob("kvcached-*editable*.whl"):
            add_to_wheel(wheel, HOOK)


def add_to_wheel(wheel: Path, file: Path) -> None:
    """Puts `file` at the wheel's root and names it in RECORD."""
    content = file.read_bytes()
    digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
    line = f"{file.name},sha256={digest},{len(content)}\n"
    rewritten = wheel.with_suffix(".new")
    with (
        zipfile.ZipFile(wheel) as old,
        zipfile.ZipFile(rewritten, "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for entry in old.infolist():
            data = old.read(entry)
            if entry.filename.endswith(".dist-info/RECORD"):
                data = line.encode() + data
            new.writestr(entry, data)
        new.writestr(file.name, content)
    rewritten.replace(wheel)


class NativeDistribution(Distribution):
    """Holds machine code, though setuptools compiles none of it."""

    def has_ext_modules(self) -> bool:
        return True


def man_pages() -> list[tuple[str, list[str]]]:
    """(folder to install to, pages), one a section."""
    sys.path.insert(0, str(ROOT / "deploy" / "packaging"))
    import man_page

    sections: dict[str, list[str]] = {}
    folder = ROOT / "build" / "man"
    folder.mkdir(parents=True, exist_ok=True)
    for source in sorted((ROOT / "docs" / "man").glob("*.[1-8].md")):
        page = folder / source.stem
        page.write_text(man_page.to_roff(source.read_text(encoding="utf-8")), encoding="utf-8")
        place = f"share/man/man{page.suffix[1:]}"
        sections.setdefault(place, []).append(str(page.relative_to(ROOT)))
    return sorted(sections.items())


setup(
    version=version(),
    distclass=NativeDistribution,
    cmdclass={"build_py": BuildPy, "editable_wheel": EditableWheel},
    options={"bdist_wheel": {"py_limited_api": "cp39"}},
    # Not an entry point: a control plane starts kvctl for each change of a limit,
    # and an interpreter takes longer to start than kvctl to finish.
    scripts=["deploy/packaging/scripts/kvctl"],
    data_files=man_pages(),
)
