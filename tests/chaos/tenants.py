"""Engines of two users want more memory than there is, so that pages go to and fro between them.

Each writes patterns that name its user into its blocks, and reads each page that it gets before it
uses it: a page is all zero, or has patterns of its own user. One line of another's is an error.
Once for each way in which a broker tells tenants apart; and once with both users in one tenant, where
pages must pass as they are, or the readers would see nothing anyhow. Needs root, for the two users.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import re
import shutil
import signal
import sys
import tempfile
import time

import fleet as chaos

UIDS = (4001, 4002)
TRACES = ("builtin:conv", "builtin:code")
PROGRAMS = (
    "broker/server/kvbrokerd", "client/cli/kvctl", "client/replay/kvbroker-replay",
    "tests/history/history_check", "tests/fake_cuda/libfake_cuda.so",
)
# How a broker may tell tenants apart; with the last, all that use a socket are one.
TENANT_BY = ("uid_pidns", "uid", "socket")
# Load goes on until so many orders were given, and for no longer than that after --seconds.
ENOUGH_ORDERS, LONGER_S = 400, 20.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=20, metavar="S", help="of load, each way [20]")
    arguments, rng = chaos.parse_arguments(parser, gpu=True)
    with chaos.reported():
        if os.geteuid() != 0:
            print("SKIPPED: processes of two users take root")
            return
        if shutil.which("setpriv") is None:
            print("SKIPPED: setpriv, by which a process becomes another user's, is not there")
            return
        with tempfile.TemporaryDirectory(prefix="kvb_bin_", dir="/tmp") as readable:
            arguments.bin = copy_programs(arguments, pathlib.Path(readable))
            seeds = [rng.randrange(1000) for _ in range(len(UIDS) * len(TRACES))]
            counts: dict[str, object] = {
                tenant_by: run(arguments, tenant_by, seeds) for tenant_by in TENANT_BY
            }
        chaos.report(counts, arguments)


def copy_programs(arguments: argparse.Namespace, to: pathlib.Path) -> pathlib.Path:
    """To where every user may run them; a checkout is often its owner's alone."""
    runfiles = os.environ.get("TEST_SRCDIR")
    checkout = pathlib.Path(__file__).resolve().parents[2]
    programs = arguments.bin or (
        pathlib.Path(runfiles) / os.environ["TEST_WORKSPACE"] if runfiles else checkout / "bazel-bin"
    )
    to.chmod(0o755)
    for program in PROGRAMS:
        if (programs / program).exists():
            for folder in reversed((to / program).relative_to(to).parents):
                (to / folder).mkdir(mode=0o755, exist_ok=True)
                (to / folder).chmod(0o755)
            shutil.copy(programs / program, to / program)
            (to / program).chmod(0o755)
    if (programs / "lib").is_dir():  # a bundle's, found by its programs' own places
        shutil.copytree(programs / "lib", to / "lib")
        os.environ["LD_LIBRARY_PATH"] = str(to / "lib")
    return to


def run(arguments: argparse.Namespace, tenant_by: str, seeds: list[int]) -> dict[str, object]:
    separate = tenant_by != "socket"
    with chaos.Fleet(arguments) as fleet:
        # Sockets, histories and a fake GPU's memory are in folders that all of them use.
        fleet.folder.chmod(0o777)
        fleet.share_device()
        fleet.start_broker(
            "--log-level=info", f"--tenant-by={tenant_by}", f"--allow-uids={','.join(map(str, UIDS))}"
        )
        engines = [
            fleet.start_engine(
                f"user{uid}-{trace.removeprefix('builtin:')}", "--speedup=40", "--check-fresh=tenant",
                "--rate-scale=2", trace=trace, seed=seeds[i * len(TRACES) + j],
                prefix=("setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups"),
            )
            for i, uid in enumerate(UIDS)
            for j, trace in enumerate(TRACES)
        ]
        time.sleep(arguments.seconds)
        # A busy machine gets less done in that time, and too little shows nothing.
        patience = time.monotonic() + LONGER_S
        while time.monotonic() < patience:
            if fleet.broker_log().read_text().count(" reclaim ") >= ENOUGH_ORDERS:
                break
            time.sleep(0.2)
        seen = {
            "fresh_pages": 0, "fresh_zero_pages": 0, "fresh_own_tenant_pages": 0,
            "foreign_patterns": 0, "fresh_garbage_lines": 0, "integrity_errors": 0,
        }
        for engine in engines:
            # One that has come to its trace's end does not mind.
            engine.process.send_signal(signal.SIGTERM)
        for engine in engines:
            summary = end(fleet, engine)
            for name in seen:
                seen[name] += int(summary[name])
        fleet.await_empty()
        fleet.await_device_agreement()
        history = fleet.check_history()
        check(fleet, tenant_by, seen, history, separate)
        return {**seen, "passed_on": history["passed_on"], **times_of_grants(fleet), "device": fleet.check_device()}


def end(fleet: chaos.Fleet, engine: chaos.Engine) -> dict[str, object]:
    """Its summary. Where its pages were not as they should be, it says so with its status, too."""
    status = engine.process.wait(chaos.PATIENCE_S)
    fleet.note_exit(engine)
    summary = engine.summary()
    if "fresh_pages" not in summary or status != (1 if summary["fresh_errors"] else 0):
        raise chaos.ChaosError(
            f"engine {engine.name} ended with {status}: {engine.log.read_text(errors='replace')[-2000:]}"
        )
    return summary


def check(
    fleet: chaos.Fleet, tenant_by: str, seen: dict[str, int], history: dict[str, object], separate: bool
) -> None:
    def require(holds: bool, what: str) -> None:
        if not holds:
            raise chaos.ChaosError(f"tenant_by {tenant_by}: {what}: {seen}, history: {history}")

    require(seen["integrity_errors"] == 0 and seen["fresh_garbage_lines"] == 0, "something else wrote into pages")
    # Else nothing has been shown.
    require(seen["fresh_zero_pages"] > 0, "no page came fresh")
    if fleet.device.pages_have_names:
        require(int(str(history["passed_on"])) > 0, "no memory went from one engine to another")
    require(int(str(history["orders"])) > 0, "nobody was asked to give")
    if separate:
        require(seen["foreign_patterns"] == 0, "a page came with another tenant's data")
        require(seen["fresh_own_tenant_pages"] > 0, "no page came with its own tenant's data")
    else:
        require(seen["foreign_patterns"] > 0, "in one tenant no page passed with its data: the readers are blind")


def times_of_grants(fleet: chaos.Fleet) -> dict[str, object]:
    """From claim to grant, by the broker's log."""
    waited = sorted(
        int(match[1])
        for match in re.finditer(r"\bgrant id=.* waited_us=(\d+)", fleet.broker_log().read_text(errors="replace"))
    )
    if not waited:
        raise chaos.ChaosError(f"no grant is in {fleet.broker_log()}")
    return {
        "grants": len(waited),
        "grant_us_p50": waited[len(waited) // 2],
        "grant_us_p90": waited[len(waited) * 9 // 10],
        "grant_us_mean": round(sum(waited) / len(waited)),
    }


if __name__ == "__main__":
    sys.exit(main())
