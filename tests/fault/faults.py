"""Lets the system calls of a broker and of its engines fail, one kind of failure after the other.

Two engines replay; for a second or so each n-th call of one kind fails in the broker, then in
the engines. Then they are told to end. Each time: no engine has failed or found a wrong byte,
the broker's books agree with what the kernel says that is mapped, nothing is lent when all have
left, the broker serves a new engine, and the failure has happened at all.
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
import re
import signal
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "chaos"))
import fleet as chaos  # noqa: E402
import injector  # noqa: E402


@dataclasses.dataclass(frozen=True)
class Fault:
    """A rule, or several that belong together."""

    rules: str
    # Connections may be refused or end, and engines come back; else none may.
    drops: bool = False
    # Limits are set meanwhile, since that is what is saved.
    saves: bool = False


# Of the broker. How often: as often as leaves something to do.
BROKER = [
    Fault("memfd_create=ENOMEM/3"),
    Fault("memfd_create=EMFILE/3"),
    Fault("memfd_create=ENFILE/5"),
    Fault("fallocate=ENOSPC/7"),
    Fault("fallocate=ENOMEM/3"),
    Fault("fallocate=EINTR/2"),
    Fault("seal=EPERM/5"),
    Fault("lease_signal=EINVAL/5"),
    Fault("lease=EAGAIN/2"),
    Fault("lease=ENOMEM/3"),
    Fault("reopen=EMFILE/5"),
    Fault("reopen=ENFILE/3"),
    Fault("reopen=ENOMEM/7"),
    Fault("proc_open=EMFILE/3"),
    Fault("sendmsg=ETOOMANYREFS/5"),
    Fault("sendmsg=ENOBUFS/3"),
    Fault("sendmsg=ENOMEM/3"),
    Fault("sendmsg=EAGAIN/3"),
    Fault("sendmsg=EINTR/3"),
    Fault("recvmsg=EINTR/3"),
    Fault("recvmsg=EAGAIN/3"),
    Fault("recvmsg=ENOMEM/5", drops=True),
    Fault("recvmsg=ENOBUFS/5", drops=True),
    Fault("send=EAGAIN#1", drops=True),
    Fault("accept=EMFILE/2"),
    Fault("accept=ENFILE/2"),
    Fault("accept=ENOMEM/3"),
    Fault("accept=ECONNABORTED/2"),
    Fault("accept=EINTR/2"),
    Fault("duplicate=EMFILE/2", drops=True),
    Fault("epoll_add=ENOMEM/3", drops=True),
    Fault("epoll_add=ENOSPC/2", drops=True),
    # Engines are thrown out, and cannot be watched as they come back.
    Fault("recvmsg=ENOMEM/9,epoll_add=ENOMEM/3", drops=True),
    Fault("epoll_wait=EINTR/2"),
    Fault("peer_pidfd=ENOPROTOOPT"),
    Fault("peer_pidfd=ENOPROTOOPT,pidfd_open=EPERM"),
    Fault("state_open=EMFILE", saves=True),
    Fault("state_write=ENOSPC", saves=True),
    Fault("state_write=EIO/2", saves=True),
    Fault("state_write=EINTR/2", saves=True),
    Fault("state_fsync=EIO", saves=True),
    Fault("state_rename=EROFS", saves=True),
]

# Of the engines.
ENGINES = [
    Fault("mmap=ENOMEM/5"),
    Fault("mmap=EAGAIN/3"),
    Fault("reserve=ENOMEM/2"),
    Fault("munmap=ENOMEM"),
    Fault("recvmsg=TRUNC/3"),
    Fault("recvmsg=EINTR/2"),
    Fault("recvmsg=ENOMEM/7", drops=True),
    Fault("send=EINTR/3"),
    Fault("send=ENOBUFS/3"),
    Fault("send=ENOMEM/5"),
    Fault("sendmsg=EINTR#1"),
    Fault("sendmsg=ETOOMANYREFS#1"),
    Fault("connect=EINTR#1"),
    Fault("recv=EINTR#1"),
    Fault("pidfd_open=EMFILE"),
]

# These begin with the program.
AT_START = ["eventfd=EMFILE#1", "timerfd=EMFILE#1", "epoll_add=ENOSPC#1", "memfd_create=EMFILE#1"]

NAMES = ("conv", "code", "leaver")


class Faults:
    """One broker with engines, and failures that come and go."""

    def __init__(self, fleet: chaos.Fleet, run_s: float) -> None:
        self._fleet = fleet
        self._run_s = run_s
        library = fleet.program("tests/fault/libfault_injector.so")
        state = fleet.folder / "state"
        self._broker = injector.Injector(library, fleet.folder, "broker", state)
        self._engines = injector.Injector(library, fleet.folder, "engines", state)
        self._limit = 0
        self.hits: dict[str, int] = {}
        self.failed: list[str] = []

    def start_broker(self) -> None:
        self._fleet.start_broker("--log-level=debug", environment=self._broker.environment())

    def refuses_to_start(self, rules: str) -> None:
        """A broker that cannot start says why and exits; the next one does start."""
        self._broker.set(rules)
        try:
            self.start_broker()
        except chaos.ChaosError:
            assert self._fleet.broker is not None
            status = self._fleet.broker.wait(chaos.PATIENCE_S)
            log = self._fleet.broker_log().read_text()
            if status <= 0 or not log.strip():
                raise chaos.ChaosError(f"{rules}: the broker ended with {status} and said: {log!r}") from None
        else:
            raise chaos.ChaosError(f"{rules}: the broker started nevertheless")
        finally:
            self._fleet.broker = None
            self._note(f"start {rules}", self._broker, rules)
            self._broker.set("")

    def try_out(self, where: str, fault: Fault) -> None:
        """Raises where anything was not as it must be."""
        fleet = self._fleet
        group = self._broker if where == "broker" else self._engines
        # One is there before and one comes meanwhile.
        engines = [self._start(NAMES[0])]
        fleet.await_connected()
        leaver = self._start(NAMES[2])
        fleet.eventually("the one to leave has memory", lambda: leaver.mapped_bytes() > 0)
        log = fleet.broker_log()
        said = log.stat().st_size
        group.set(fault.rules)
        engines.append(self._start(NAMES[1]))
        self._end(leaver)
        if fault.saves:
            self._set_limit()
        give_up = time.monotonic() + chaos.PATIENCE_S
        while True:
            if not fault.saves:
                # Pages go, and come again. It may be this connection that is refused.
                fleet.kvctl("limit", NAMES[0], "2M", check=False)
            time.sleep(self._run_s / 2)
            if not fault.saves:
                fleet.kvctl("limit", NAMES[0], "48M", check=False)
            time.sleep(self._run_s / 2)
            if not self._missing(group, fault.rules) or time.monotonic() > give_up:
                break
        self._note(f"{where} {fault.rules}", group, fault.rules)
        group.set("")
        if not fault.saves:
            fleet.kvctl("limit", NAMES[0], "48M")
        fleet.await_connected()
        fleet.await_agreement()
        if not fault.drops:
            for line in log.read_text()[said:].splitlines():
                if re.search(r" (session-ended|descriptor-connection-ended|peer-refused) ", line):
                    raise chaos.ChaosError(f"an engine was dropped: {line}")
        if fault.saves:
            self._check_saved()
        for engine in engines:
            self._end(engine)
        fleet.await_empty(NAMES)

    def serves(self) -> None:
        """An engine without failures gets memory."""
        engine = self._start(NAMES[0])
        self._fleet.eventually("a new engine gets memory", lambda: engine.mapped_bytes() > 0)
        self._end(engine)
        self._fleet.await_empty(NAMES)

    def _end(self, engine: chaos.Engine) -> None:
        engine.process.send_signal(signal.SIGTERM)
        engine.check_ended_well()
        self._fleet.note_exit(engine)
        self._fleet.forget(engine)

    def _start(self, name: str) -> chaos.Engine:
        return self._fleet.start_engine(
            name, "--speedup=40", trace="builtin:code" if name == "code" else "builtin:conv", environment=self._engines.environment()
        )

    def _set_limit(self) -> None:
        self._limit += 1 << 20
        # Answered only when it is saved or could not be.
        self._fleet.kvctl("limit", NAMES[0], str((20 << 20) + self._limit), check=False)

    def _check_saved(self) -> None:
        """The limit that was set while nothing could be saved survives a kill of the broker."""
        limit = (20 << 20) + self._limit
        log = self._fleet.broker_log
        if "state-not-saved" in log().read_text():
            self._fleet.eventually(
                "the state is saved again",
                lambda: log().read_text().rfind("state-saved again") > log().read_text().rfind("state-not-saved"),
            )
        self._fleet.kill_broker()
        self.start_broker()
        self._fleet.await_connected()
        self._fleet.await_agreement()
        kept = self._fleet.instances()[NAMES[0]]["limit_bytes"]
        if kept != limit:
            raise chaos.ChaosError(f"the limit is {kept} after a restart, {limit} was set")

    def _missing(self, group: injector.Injector, rules: str) -> list[str]:
        """Those of the rules that have not come true."""
        hits = group.hits()
        return [rule for rule in rules.split(",") if hits[re.sub(r"[/#~].*", "", rule).replace("=", " ")] == 0]

    def _note(self, label: str, group: injector.Injector, rules: str) -> None:
        if missing := self._missing(group, rules):
            raise chaos.ChaosError(f"{label}: {missing} never happened: {dict(group.hits())}")
        self.hits[label] = group.hits().total()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=0.6, help="that each failure is in force [0.6]")
    parser.add_argument("--only", metavar="TEXT", default="", help="those with TEXT in 'broker fallocate=ENOSPC/7' or the like")
    parser.add_argument("--go-on", action="store_true", help="a broken promise does not end it; see all")
    arguments, _ = chaos.parse_arguments(parser)

    failed: list[str] = []
    with chaos.reported(), chaos.Fleet(arguments) as fleet:
        faults = Faults(fleet, arguments.seconds)
        for rules in AT_START:
            if arguments.only in f"start {rules}":
                faults.refuses_to_start(rules)
        faults.start_broker()
        for where, table in (("broker", BROKER), ("engines", ENGINES)):
            for fault in table:
                label = f"{where} {fault.rules}"
                if arguments.only not in label:
                    continue
                start = time.monotonic()
                try:
                    faults.try_out(where, fault)
                    faults.serves()
                except (chaos.ChaosError, OSError, KeyError) as error:
                    if not arguments.go_on:
                        raise chaos.ChaosError(f"{label}: {error}") from error
                    print(f"FAILED {label}: {type(error).__name__} {error}", flush=True)
                    failed.append(label)
                    fleet.start_over()
                    faults = Faults(fleet, arguments.seconds)
                    faults.start_broker()
                    continue
                print(f"{label}: {faults.hits[label]} times, {time.monotonic() - start:.1f} s", flush=True)
        history = fleet.check_history(5.0)
        if failed:
            raise chaos.ChaosError(f"{len(failed)} faults did harm: {failed}")
        chaos.report({"faults": faults.hits, "history": history}, arguments)


if __name__ == "__main__":
    main()
