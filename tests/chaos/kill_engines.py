"""Kills engines with SIGKILL at random moments, and looks what becomes of their memory.

Survivors replay all the while and check every block; victims are killed at any moment from
their first instruction on, several at once now and then, some stopped (SIGSTOP) before; with
--parallel, so many are alive at a time and each is killed at a moment of its own. After each
kill: the victim's memory is free for others, by the broker's books; and from time to time:
the books agree with what the kernel says that the survivors map, and on a GPU, with no engine
alive, with what the driver says is in use.
"""

from __future__ import annotations

import argparse
import dataclasses
import random
import signal
import time

import fleet as chaos

KILLS_BETWEEN_AGREEMENTS = 10
# On a GPU, after so many all engines leave.
KILLS_BETWEEN_QUIET = 50
SURVIVORS = {"steady-conv": "builtin:conv", "steady-code": "builtin:code"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=500, metavar="N", help="[500]")
    parser.add_argument(
        "--parallel", type=int, metavar="N",
        help="victims alive at a time [one to three, which come and go together]",
    )
    parser.add_argument(
        "--within", type=float, default=1.0, metavar="SECONDS",
        help="from a process's exit until its memory is free; more fails [1]",
    )
    arguments, rng = chaos.parse_arguments(parser, gpu=True)
    with chaos.reported(), chaos.Fleet(arguments) as fleet:
        chaos.report(Killings(fleet, rng, arguments).run(), arguments)


@dataclasses.dataclass
class Victim:
    engine: chaos.Engine
    started: float
    grows: bool
    # When it is to die; None: some time after it has got memory.
    due: float | None


class Killings:
    """The victims, the survivors, and what was seen of both."""

    def __init__(self, fleet: chaos.Fleet, rng: random.Random, arguments: argparse.Namespace) -> None:
        self._fleet = fleet
        self._rng = rng
        self._arguments = arguments
        self._survivors: dict[str, chaos.Engine] = {}
        self._victims: list[Victim] = []
        self._victims_started = 0
        self._freed_after: list[float] = []
        self._holders_killed = 0
        self._survivors_done = 0
        self._agreements = 0

    def run(self) -> dict[str, object]:
        fleet = self._fleet
        fleet.start_broker("--log-level=info")
        descriptors = fleet.broker_descriptors()
        progress = chaos.Progress()
        self._start_survivors()
        while len(self._freed_after) < self._arguments.kills:
            before = len(self._freed_after)
            if self._arguments.parallel is None:
                self._kill_some_together()
            else:
                self._kill_one_of_many()
            self._replace_survivors()
            if self._passed(KILLS_BETWEEN_AGREEMENTS, before):
                fleet.await_agreement(self._survivors.values())
                self._agreements += 1
            if fleet.is_gpu and self._passed(KILLS_BETWEEN_QUIET, before):
                self._leave()
                self._start_survivors()
            progress.say(
                f"{len(self._freed_after)} of {self._arguments.kills} killed, {self._holders_killed} or more of them "
                f"with memory; free after at most {max(self._freed_after, default=0) * 1000:.0f} ms; "
                f"{self._survivors_done} survivors done"
            )
        self._leave()
        fleet.eventually("the broker's descriptors are back", lambda: fleet.broker_descriptors() <= descriptors + 2)
        return {
            "kills": len(self._freed_after),
            "killed_with_memory_at_least": self._holders_killed,
            "free_after_ms_p50": round(sorted(self._freed_after)[len(self._freed_after) // 2] * 1000, 1),
            "free_after_ms_max": round(max(self._freed_after) * 1000, 1),
            "survivors_whole": self._survivors_done,
            "times_books_agreed_with_the_kernel": self._agreements,
            "descriptors_at_start": descriptors,
            "descriptors_at_end": fleet.broker_descriptors(),
            "history": fleet.check_history(self._arguments.within),
            "device": fleet.check_device(),
        }

    def _passed(self, every: int, before: int) -> bool:
        """Whether the count of kills has passed a multiple of `every` since it was `before`."""
        return len(self._freed_after) // every > before // every

    # ---- victims ----

    def _start_victim(self, name: str) -> chaos.Engine:
        return self._fleet.start_engine(
            name, "--speedup=40", f"--shift={self._rng.randrange(1200)}", seed=self._rng.randrange(1000)
        )

    def _first_moments(self) -> float:
        """Hello, open, the first grants."""
        return self._rng.uniform(0, self._fleet.device.first_moments_s)

    def _kill_some_together(self) -> None:
        victims = [self._start_victim(f"victim{i}") for i in range(self._rng.choice((1, 1, 2, 3)))]
        early = self._rng.random() < 0.5
        time.sleep(self._first_moments() if early else self._rng.uniform(0, 0.8))
        self._kill(victims, look=not early)

    def _kill_one_of_many(self) -> None:
        left = self._arguments.kills - len(self._freed_after)
        while len(self._victims) < min(self._arguments.parallel, left):
            self._victims_started += 1
            now = time.monotonic()
            grows = self._rng.random() < 0.5
            self._victims.append(
                Victim(
                    self._start_victim(f"victim{self._victims_started}"), now, grows,
                    None if grows else now + self._first_moments(),
                )
            )
        victim = self._await_due()
        self._victims.remove(victim)
        if victim.engine.alive():
            self._kill([victim.engine], look=victim.grows)
        else:
            # It has come to its trace's end.
            victim.engine.check_ended_well()
            self._fleet.forget(victim.engine)

    def _await_due(self) -> Victim:
        while True:
            now = time.monotonic()
            if any(victim.due is None for victim in self._victims):
                listed = self._fleet.instances()
                for victim in self._victims:
                    if victim.due is None and listed.get(victim.engine.name, {}).get("held_bytes"):
                        victim.due = now + self._rng.uniform(0, 0.8)
            for victim in self._victims:
                # Who gets nothing for so long is killed as it is.
                due = victim.started + chaos.PATIENCE_S if victim.due is None else victim.due
                if due <= now or not victim.engine.alive():
                    return victim
            time.sleep(0.005)

    def _kill(self, victims: list[chaos.Engine], look: bool) -> None:
        """`look`: whether they hold memory. That takes time, which the first moments do not have."""
        if self._rng.random() < 0.1:
            victims[0].process.send_signal(signal.SIGSTOP)
            time.sleep(self._rng.uniform(0, 0.05))
        listed = self._fleet.instances() if look else {}
        self._holders_killed += sum(bool(listed.get(victim.name, {}).get("held_bytes")) for victim in victims)
        for victim in victims:
            victim.process.send_signal(signal.SIGKILL)
        for victim in victims:
            victim.process.wait()
            self._fleet.note_exit(victim)
            self._freed_after.append(
                self._fleet.eventually(
                    f"{victim.name} (pid {victim.pid}) is gone from the broker's books",
                    lambda pid=victim.pid: self._fleet.gone(pid),
                    self._arguments.within,
                )
            )
            self._fleet.forget(victim)

    # ---- survivors ----

    def _start_survivors(self) -> None:
        self._survivors = {name: self._start_survivor(name) for name in SURVIVORS}

    def _start_survivor(self, name: str) -> chaos.Engine:
        return self._fleet.start_engine(
            name, "--speedup=40", "--window=1000", trace=SURVIVORS[name], seed=self._rng.randrange(1000)
        )

    def _replace_survivors(self) -> None:
        for name, survivor in self._survivors.items():
            if not survivor.alive():
                self._end_survivor(survivor)
                self._survivors[name] = self._start_survivor(name)

    def _end_survivor(self, survivor: chaos.Engine) -> None:
        survivor.check_ended_well()
        self._survivors_done += 1
        self._fleet.forget(survivor)

    # ---- both ----

    def _leave(self) -> None:
        """Until no engine is there, and nothing of their memory."""
        for victim in self._victims:
            self._kill([victim.engine], look=True)
        self._victims.clear()
        for survivor in self._survivors.values():
            survivor.process.send_signal(signal.SIGTERM)
        for survivor in self._survivors.values():
            self._end_survivor(survivor)
        self._survivors.clear()
        self._fleet.await_empty()
        self._fleet.await_device_agreement()


if __name__ == "__main__":
    main()
