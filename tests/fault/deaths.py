"""Ends engines between any two of their system calls, and looks what becomes of their memory.

A survivor replays all the while, on memory too small for two, and checks every block. Victims
are killed (SIGKILL) before their 1st, 2nd, 3rd ... call that matters: hello, opening, each
message, descriptors, mapping and unmapping. More of them die while they ask for descriptors
again, while they resume after a restart of the broker, however the broker comes to know of
processes' ends, and in PID namespaces of their own. Each time their memory is free for others
within a second of their end, and the history of all is checked.
"""

from __future__ import annotations

import argparse
import contextlib
import pathlib
import signal
import subprocess
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "chaos"))
import fleet as chaos  # noqa: E402
import injector  # noqa: E402

# How a broker is told of the end of a process, and what keeps it from a better way.
SOURCES = {
    "SO_PEERPIDFD": "",
    "pidfd_open": "peer_pidfd=ENOPROTOOPT",
    "pidfd of hello": "peer_pidfd=ENOPROTOOPT,pidfd_open=EPERM",
}

# With descriptors missing, so that they are asked for again a second later.
IN_RESEND = [
    "recvmsg=TRUNC#1,send=KILL#2",
    "recvmsg=TRUNC#1,recvmsg=KILL#3",
    "recvmsg=TRUNC#1,mmap=KILL#1",
    "recvmsg=TRUNC/2,mmap=KILL#3",
]


class Deaths:
    def __init__(self, fleet: chaos.Fleet, within_s: float) -> None:
        self._fleet = fleet
        self._within_s = within_s
        library = fleet.program("tests/fault/libfault_injector.so")
        state = fleet.folder / "state"
        self._broker = injector.Injector(library, fleet.folder, "broker", state)
        self._victims = injector.Injector(library, fleet.folder, "victims", state)
        self.freed_after: list[float] = []
        self.slowest: dict[str, float] = {}
        self.start_broker()
        self._survivor = self._start_survivor()

    def start_broker(self) -> None:
        self._fleet.start_broker("--log-level=debug", environment=self._broker.environment())

    def _start_survivor(self) -> chaos.Engine:
        return self._fleet.start_engine("survivor", "--speedup=40", trace="builtin:conv")

    def _keep_one_alive(self) -> None:
        if self._survivor.alive():
            return
        self._survivor.check_ended_well()
        self._fleet.note_exit(self._survivor)
        self._fleet.forget(self._survivor)
        self._survivor = self._start_survivor()

    def at_call(self, number: int) -> str:
        """Kills a new engine before its so many-th call. What that was; empty where it lived on."""
        self._victims.set(f"any=KILL#{number}")
        victim = self._start("victim")
        with contextlib.suppress(subprocess.TimeoutExpired):
            victim.process.wait(5.0)
        return self._buried(victim, need=False)

    def in_resend(self, rules: str) -> None:
        self._victims.set(rules)
        victim = self._start("resender")
        with contextlib.suppress(subprocess.TimeoutExpired):
            victim.process.wait(chaos.PATIENCE_S)
        self._buried(victim, need=True)

    def in_resume(self, number: int) -> None:
        """The broker is killed; as it is back, the engine dies at its so many-th read."""
        self._victims.set("")
        victim = self._start("resumer")
        self._fleet.eventually("the victim has memory", lambda: victim.mapped_bytes() > 0)
        self._fleet.kill_broker()
        self._victims.set(f"rpc_receive=KILL#{number}")
        self.start_broker()
        victim.process.wait(chaos.PATIENCE_S)
        self._buried(victim, need=True)
        self._back()

    def by_source(self, rules: str, own_namespace: bool) -> None:
        self._broker.set(rules)
        self._victims.set("")
        prefix = ["unshare", "--pid", "--fork", "--kill-child"] if own_namespace else []
        victim = self._start("watched", prefix)
        self._fleet.eventually("it is connected", lambda: "watched" in self._fleet.instances())
        pid = self._program(victim) if own_namespace else victim.pid
        self._fleet.eventually(
            f"{pid} holds memory", lambda: bool(self._fleet.instances().get("watched", {}).get("held_bytes"))
        )
        if pid not in self._fleet.instances()["watched"]["pids"]:
            raise chaos.ChaosError(f"pid {pid} is not who is connected: {self._fleet.instances()}")
        subprocess.run(["kill", "-KILL", str(pid)], check=True)
        victim.process.wait(chaos.PATIENCE_S)
        if rules:
            call, error = rules.split(",")[-1].split("=")
            if self._broker.hits()[f"{call} {error}"] == 0:
                raise chaos.ChaosError(f"{rules} never happened")
        self._freed(victim, pid)
        self._broker.set("")

    def finish(self) -> None:
        self._fleet.await_agreement()
        self._survivor.process.send_signal(signal.SIGTERM)
        self._survivor.check_ended_well()
        self._fleet.note_exit(self._survivor)
        self._fleet.forget(self._survivor)
        self._fleet.await_empty()

    def _start(self, name: str, prefix: list[str] | None = None) -> chaos.Engine:
        self._keep_one_alive()
        return self._fleet.start_engine(
            name, "--speedup=40", trace="builtin:code", environment=self._victims.environment(),
            prefix=prefix or [],
        )

    def _back(self) -> None:
        self._fleet.eventually(
            "the survivor is back",
            lambda: not self._survivor.alive() or not self._fleet.gone(self._survivor.pid),
        )

    def _program(self, shell: chaos.Engine) -> int:
        children = pathlib.Path(f"/proc/{shell.pid}/task/{shell.pid}/children").read_text().split()
        return int(children[0])

    def _buried(self, victim: chaos.Engine, need: bool) -> str:
        """It has been killed by the rules; what was the call?"""
        died_of = [hit for hit in self._victims.hits() if hit.endswith(" KILL")]
        if victim.process.poll() != -signal.SIGKILL or len(died_of) != 1:
            if need or victim.process.poll() is not None:
                raise chaos.ChaosError(
                    f"{victim.name} was not killed but {victim.process.poll()}: {self._victims.hits()}; "
                    f"{victim.log.read_text()[-2000:]}"
                )
            victim.process.kill()
            victim.process.wait()
        self._freed(victim, victim.pid)
        return died_of[0].removesuffix(" KILL") if died_of else ""

    def _freed(self, victim: chaos.Engine, pid: int) -> None:
        self._fleet.note_exit(victim)
        freed_after = self._fleet.eventually(
            f"{victim.name} (pid {pid}) is gone from the broker's books",
            lambda: self._fleet.gone(pid), self._within_s,
        )
        self.freed_after.append(freed_after)
        self.slowest[victim.name] = max(freed_after, self.slowest.get(victim.name, 0.0))
        self._fleet.forget(victim)


def may_unshare() -> bool:
    return subprocess.run(["unshare", "--pid", "--fork", "true"], capture_output=True, check=False).returncode == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=400, metavar="N", help="die at each of the first N calls [400]")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="of the calls after the 40th only each N-th [1]")
    parser.add_argument("--resumes", type=int, default=12, metavar="N", help="die at each of the first N reads of resuming [12]")
    parser.add_argument(
        "--within", type=float, default=1.0, metavar="SECONDS",
        help="from a process's exit until its memory is free; more fails [1]",
    )
    arguments, _ = chaos.parse_arguments(parser, capacity="24M")

    died_at: dict[str, int] = {}
    with chaos.reported(), chaos.Fleet(arguments) as fleet:
        deaths = Deaths(fleet, arguments.within)
        progress = chaos.Progress()
        for number in [*range(1, min(arguments.calls, 40) + 1), *range(41, arguments.calls + 1, arguments.every)]:
            call = deaths.at_call(number)
            if not call:
                break
            died_at[call] = died_at.get(call, 0) + 1
            progress.say(f"call {number}: {call}; free after at most {max(deaths.freed_after) * 1000:.0f} ms")
        for rules in IN_RESEND:
            deaths.in_resend(rules)
            progress.say(f"died with {rules}")
        for number in range(1, arguments.resumes + 1):
            deaths.in_resume(number)
            progress.say(f"died at read {number} of resuming")
        namespaces = may_unshare()
        if not namespaces:
            print("SKIPPED: engines in PID namespaces of their own, which takes root (unshare --pid is refused)")
        for source, rules in SOURCES.items():
            for own_namespace in (False, True) if namespaces else (False,):
                deaths.by_source(rules, own_namespace)
                progress.say(f"died, watched by {source}{', in its own PID namespace' * own_namespace}")
        deaths.finish()
        chaos.report({
            "died_before": died_at,
            "deaths": len(deaths.freed_after),
            "free_after_ms_max": {name: round(s * 1000, 1) for name, s in deaths.slowest.items()},
            "history": fleet.check_history(arguments.within),
        }, arguments)


if __name__ == "__main__":
    main()
