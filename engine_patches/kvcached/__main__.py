"""`python -m kvcached`: says what works here, what does not, and how to mend it."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import importlib
import importlib.util
import json
import os
import platform
import site
import stat
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Callable, NamedTuple

from kvcached import __version__, autopatch, config, programs
from kvcached.errors import MalformedVariable

OK, NOTE, PROBLEM = "ok", "note", "problem"
PTH = "kvcached_autopatch.pth"
# Read by others than config.
_OTHER_VARIABLES = ("KVBROKER_BIN_DIR", "KVBROKER_CUDA_DRIVER", "KVBROKER_NVML")
_TIMEOUT_MS = 5000
_START_TIMEOUT_MS = 20_000
_MIB = 1 << 20


class Finding(NamedTuple):
    status: str
    topic: str
    text: str
    mend: str = ""


def _native() -> ModuleType | None:
    try:
        return importlib.import_module("kvcached._C")
    except ImportError:
        return None


def _ask(call: Callable[..., str]) -> list[dict[str, Any]]:
    """A listing; nothing where there is no broker. Raises _C.Error for other troubles."""
    from kvcached import _C

    try:
        listed: list[dict[str, Any]] = json.loads(
            call(config.get("KVBROKER_ADDRESS"), timeout_ms=_TIMEOUT_MS)
        )
    except _C.Error as error:
        if error.code == _C.NOT_FOUND:
            return []
        raise
    return listed


def check_package() -> Iterator[Finding]:
    yield Finding(OK, "package", f"kvcached {__version__} in {Path(__file__).parent}")
    try:
        from kvcached import _C
    except ImportError as error:
        yield Finding(
            PROBLEM,
            "native",
            f"kvcached._C cannot be imported: {error}",
            "install the wheel of this platform (Linux with glibc 2.35 or later), or build it: "
            "bazel build //engine_patches/native:_C.abi3.so, then pip install -e .",
        )
        return
    if _C.VERSION != __version__:
        yield Finding(
            PROBLEM,
            "native",
            f"kvcached._C is {_C.VERSION}, and the package is {__version__}",
            "install again: pip install --force-reinstall kvcached, or build the native part anew",
        )
    else:
        yield Finding(OK, "native", f"kvcached._C {_C.VERSION}, ABI {_C.ABI_VERSION}")


def check_python() -> Iterator[Finding]:
    text = f"{platform.python_implementation()} {platform.python_version()}, {sys.executable}"
    yield Finding(OK, "python", text)


def check_torch() -> Iterator[Finding]:
    if importlib.util.find_spec("torch") is None:
        yield Finding(NOTE, "torch", "not installed; only engines and alloc_kv_cache need it")
        return
    try:
        torch = importlib.import_module("torch")
    except Exception as error:  # Whatever its libraries raise.
        yield Finding(
            PROBLEM, "torch", f"cannot be imported: {error}", "install torch again, or another one"
        )
        return
    cuda = getattr(torch.version, "cuda", None)
    works = bool(torch.cuda.is_available())
    text = f"{torch.__version__}, " + (f"CUDA {cuda}" if cuda else "without CUDA")
    if _gpu_devices() and not works:
        yield Finding(
            PROBLEM,
            "torch",
            f"{text}, which sees no GPU, while the machine has one",
            "install a torch with CUDA, and a driver that is new enough for it"
            if not cuda
            else "look at nvidia-smi, CUDA_VISIBLE_DEVICES, and the driver that this CUDA wants",
        )
    else:
        yield Finding(OK, "torch", text + ("" if works or not cuda else ", no GPU"))


def _gpu_devices() -> list[str]:
    return sorted(
        path.name
        for path in Path("/dev").glob("nvidia[0-9]*")
        if path.name[len("nvidia") :].isdigit()
    )


def check_gpus() -> Iterator[Finding]:
    from kvcached import _C

    found = 0
    problem = ""
    while True:
        try:
            uuid = _C.gpu_uuid(found)
        except (_C.Error, ValueError) as error:
            problem = str(error)
            break
        yield Finding(OK, "gpu", f"{found}: {uuid}")
        found += 1
    if found:
        return
    if _gpu_devices():
        yield Finding(
            PROBLEM,
            "gpu",
            f"there is a GPU here that cannot be used: {problem}",
            "look at nvidia-smi; in a container, give it the GPU (--gpus all)",
        )
    else:
        yield Finding(NOTE, "gpu", "none; pools are made of host memory")


def check_programs() -> Iterator[Finding]:
    for name in ("kvbrokerd", "kvctl"):
        program = programs.find(name)
        if program is None:
            yield Finding(
                PROBLEM,
                name,
                "neither in the package, nor in KVBROKER_BIN_DIR, nor on PATH",
                "install the wheel, which carries it, or set KVBROKER_BIN_DIR to bazel's folder",
            )
            continue
        try:
            done = subprocess.run(
                [str(program), "--version"],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=10,
                check=False,
            )
            said = (done.stdout.strip() or done.stderr.strip()).splitlines()
            works = done.returncode == 0
        except (OSError, subprocess.TimeoutExpired) as error:
            said, works = [str(error)], False
        version = said[0].rpartition(" ")[2] if works and said else ""
        if not works:
            yield Finding(
                PROBLEM,
                name,
                f"{program} does not run: {said[0] if said else 'it says nothing'}",
                "install the wheel of this platform again",
            )
        elif version != __version__:
            yield Finding(
                PROBLEM,
                name,
                f"{program} is {version}, and the package is {__version__}",
                "install again, or have KVBROKER_BIN_DIR and PATH name the same release",
            )
        else:
            yield Finding(OK, name, f"{version}, {program}")


def check_broker(start: bool) -> Iterator[Finding]:
    from kvcached import _C

    try:
        brokers = _ask(_C.list_brokers)
    except _C.Error as error:
        yield Finding(
            PROBLEM,
            "broker",
            str(error) or "no broker answers",
            "see who owns the socket directory, and whether that broker still runs (kvctl list)",
        )
        return
    if not brokers and start:
        # Listed while the session is open: it may leave afterwards.
        for finding in _start_broker():
            yield finding
            if finding.status == OK:
                with contextlib.suppress(_C.Error):
                    brokers = _ask(_C.list_brokers)
    elif not brokers:
        yield _no_broker()
    for broker in brokers:
        yield from _describe(broker)


def _describe(broker: dict[str, Any]) -> Iterator[Finding]:
    text = (
        f"{broker['device_uuid']}: kvbrokerd {broker['version']}, pid {broker['pid']}, "
        f"backend {broker['backend']}"
    )
    if broker.get("backend_reason"):
        text += f" ({broker['backend_reason']})"
    if broker.get("device_error"):
        yield Finding(
            PROBLEM, "broker", f"{text}: {broker['device_error']}", "mend the device as it says"
        )
    elif broker["version"] != __version__:
        yield Finding(
            NOTE, "broker", f"{text}; the package is {__version__}", "restart it with this release"
        )
    else:
        yield Finding(OK, "broker", text)


def _no_broker() -> Finding:
    address = os.environ.get("KVBROKER_ADDRESS", "").strip()
    if address:
        return Finding(
            PROBLEM,
            "broker",
            f"nobody answers at KVBROKER_ADDRESS={address}",
            "start a kvbrokerd that listens there, or unset the variable",
        )
    try:
        autostart = config.get("KVBROKER_AUTOSTART")
    except MalformedVariable:
        autostart = True
    if not autostart:
        return Finding(
            PROBLEM,
            "broker",
            "none runs, and KVBROKER_AUTOSTART forbids to start one",
            "start a kvbrokerd, or unset KVBROKER_AUTOSTART",
        )
    program = programs.find("kvbrokerd")
    if program is None:
        return Finding(
            PROBLEM, "broker", "none runs, and there is no kvbrokerd to start", "install the wheel"
        )
    return Finding(
        OK, "broker", f"none runs; an engine starts {program} (python -m kvcached --start tries it)"
    )


def _start_broker() -> Iterator[Finding]:
    """Opens a session as an engine does, which starts a broker where none is.

    Of the first GPU; of host memory where there is none.
    """
    from kvcached import _C

    nobody = _no_broker()
    if nobody.status == PROBLEM:
        yield nobody
        return
    try:
        gpu: str | None = _C.gpu_uuid(0)
    except _C.Error:
        gpu = None
    try:
        session = _C.Session(
            f"kvcached_doctor_{os.getpid()}",
            [{"handle_bytes": 2 * _MIB, "max_pages": 1, "block_bytes": 2 * _MIB}],
            gpu=gpu,
            backend=None if gpu else "host",
            timeout_ms=_START_TIMEOUT_MS,
            broker_program=str(programs.find("kvbrokerd")),
        )
    except _C.Error as error:
        yield Finding(
            PROBLEM,
            "broker",
            f"one was to be started: {error}",
            f"run {programs.find('kvbrokerd')} by hand and see what it says",
        )
        return
    try:
        yield Finding(OK, "broker", "one was started; it leaves when it is idle")
    finally:
        session.close()


def check_variables() -> Iterator[Finding]:
    known = [*config.VARIABLES, *_OTHER_VARIABLES]
    for name in sorted(os.environ):
        value = os.environ[name]
        if name in config.VARIABLES:
            try:
                config.get(name)
            except MalformedVariable as error:
                yield Finding(PROBLEM, "variable", str(error), f"correct or unset {name}")
            else:
                yield Finding(OK, "variable", f"{name}={value}")
        elif name in _OTHER_VARIABLES:
            yield Finding(OK, "variable", f"{name}={value}")
        elif name.startswith(("KVCACHED_", "KVBROKER_")):
            near = difflib.get_close_matches(name, known, n=1)
            mend = f"did you mean {near[0]}?" if near else "docs/api/variables.md lists all"
            yield Finding(NOTE, "variable", f"{name} is not known here, and not read", mend)


def _site_folders() -> list[Path]:
    folders = list(site.getsitepackages()) if hasattr(site, "getsitepackages") else []
    if site.ENABLE_USER_SITE:
        folders.append(site.getusersitepackages())
    return [Path(folder) for folder in folders]


def check_hook() -> Iterator[Finding]:
    try:
        wanted = autopatch.wanted()
    except MalformedVariable:
        wanted = False  # Said among the variables.
    found = [folder / PTH for folder in _site_folders() if (folder / PTH).is_file()]
    state = "on" if wanted else "off: neither ENABLE_KVCACHED nor KVCACHED_AUTOPATCH is"
    if found and not sys.flags.no_site:
        yield Finding(OK, "hook", f"{found[0]}; patching is {state}")
    else:
        yield Finding(
            PROBLEM if wanted else NOTE,
            "hook",
            f"no {PTH} that this interpreter reads; patching is {state}",
            "pip install the package (or pip install -e .), and start Python without -S",
        )
    for engine, name in autopatch.ENGINES.items():
        version = autopatch.engine_version(engine)
        if version is None:
            yield Finding(NOTE, engine, "not installed")
        elif autopatch.carries_patches(engine):
            yield Finding(OK, engine, f"{version}; this release patches {name}")
        elif wanted:
            yield Finding(
                PROBLEM,
                engine,
                f"{version}: this release carries no patches for {name}, which runs unpatched",
                "unset ENABLE_KVCACHED and KVCACHED_AUTOPATCH, or take a release that has them",
            )
        else:
            yield Finding(NOTE, engine, f"{version}; this release carries no patches for {name}")


def check_shm(folder: str = "/dev/shm") -> Iterator[Finding]:
    from kvcached import _C
    from kvcached.cli.utils import MemInfoStruct

    try:
        alive = {instance["ipc"] for instance in _ask(_C.list_instances) if instance["pids"]}
    except _C.Error:
        return  # Whose they are is not known; the broker's finding says why.
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError:
        return
    for entry in entries:
        with contextlib.suppress(OSError):
            status = entry.stat(follow_symlinks=False)
            if (
                stat.S_ISREG(status.st_mode)
                and status.st_size == MemInfoStruct.SHM_SIZE
                and entry.name not in alive
            ):
                yield Finding(
                    NOTE,
                    "shm",
                    f"{entry.path} belongs to no engine that lives; nothing reads it",
                    f"rm {entry.path}",
                )


def examine(start: bool = False) -> list[Finding]:
    """All that there is to say, in the order in which things build on each other."""
    checks: list[Callable[[], Iterator[Finding]]] = [check_package, check_python, check_torch]
    if _native() is not None:
        checks.append(check_gpus)
    checks.append(check_programs)
    if _native() is not None:
        checks += [lambda: check_broker(start), check_shm]
    checks += [check_variables, check_hook]
    return [finding for check in checks for finding in check()]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m kvcached",
        description="Says what of kvcached works here, what does not, and how to mend it. "
        "Ends with 0 where nothing is wrong, 1 where something is.",
    )
    parser.add_argument("--json", action="store_true", help="for programs")
    parser.add_argument(
        "--start", action="store_true", help="try to start a broker where none runs"
    )
    parser.add_argument("--version", action="version", version=f"kvcached {__version__}")
    options = parser.parse_args(argv)

    findings = examine(options.start)
    problems = sum(finding.status == PROBLEM for finding in findings)
    if options.json:
        said = {
            "version": __version__,
            "problems": problems,
            "findings": [finding._asdict() for finding in findings],
        }
        print(json.dumps(said, indent=2))
    else:
        for finding in findings:
            print(f"{finding.status:<8} {finding.topic:<9} {finding.text}")
            if finding.mend:
                print(f"{'':<18} -> {finding.mend}")
        print("\nno problems" if problems == 0 else f"\nproblems: {problems}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
