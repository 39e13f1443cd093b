"""Everything at once, for as long as you like: engines come and go, are killed, stopped and
fenced off from the broker, operators move limits, the broker is killed and restarted.

It goes in rounds. In each, engines replay traces under random limits while random things
happen to them. At its end all of them leave; then nothing may be lent any more, no engine may
have failed or found a wrong byte, and the broker's descriptors must be what they were; on a GPU the
driver must count no more memory than the broker does. Several
rounds make a phase, with one broker at first and restarts in the last third of it; at the end
of each the recorded history of all processes must keep every rule (tests/history). Memory and
descriptors of the longest-lived broker are printed, round by round.
"""

from __future__ import annotations

import argparse
import random
import signal
import time

import fleet as chaos

MIB = 1 << 20
# A few names, so that limits are found again and instances shared.
NAMES = 6
# And what a GPU's granularity of 2 MiB lets their bytes be divided by.
MODELS = {"llama-3.1-8b": 64, "qwen3-4b": 36, "qwen2.5-7b": 56}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("minutes", type=float, help="how long; the round under way is ended")
    parser.add_argument("--round", type=float, default=20, metavar="SECONDS", help="of one round [20]")
    parser.add_argument("--phase", type=int, default=24, metavar="ROUNDS", help="of one phase [24]")
    arguments, rng = chaos.parse_arguments(parser, gpu=True)
    with chaos.reported(), chaos.Fleet(arguments) as fleet:
        chaos.report({**Soak(fleet, rng, arguments).run(), "device": fleet.check_device()}, arguments)


class Soak:
    """The rounds, and what they have survived."""

    def __init__(self, fleet: chaos.Fleet, rng: random.Random, arguments: argparse.Namespace) -> None:
        self._fleet = fleet
        self._rng = rng
        self._arguments = arguments
        self._counts = dict.fromkeys(
            (
                "phases", "rounds", "engines", "engines_killed", "engines_stopped", "engines_left",
                "limits_moved", "policies_moved", "broker_kills", "broker_terms", "events_checked",
                "mappings_checked", "deaths_checked",
            ),
            0,
        )
        # The broker's memory and descriptors at each round's end, with nobody connected.
        self._flatness: list[tuple[int, int]] = []
        self._longest: list[tuple[int, int]] = []

    def run(self) -> dict[str, object]:
        end = time.monotonic() + self._arguments.minutes * 60
        progress = chaos.Progress(60)
        self._start_broker()
        while time.monotonic() < end:
            place = self._counts["rounds"] % self._arguments.phase
            self._round(restarts=place >= self._arguments.phase * 2 // 3)
            self._counts["rounds"] += 1
            last = self._flatness[-1]
            if place + 1 == self._arguments.phase:
                self._end_phase()
                self._start_broker()
            progress.say(
                f"{self._counts['rounds']} rounds, {self._counts['engines']} engines, "
                f"{self._counts['engines_killed']} killed, {self._counts['broker_kills']} broker kills; "
                f"broker: {last[0] / MIB:.1f} MiB, {last[1]} descriptors"
            )
        if self._counts["rounds"] % self._arguments.phase != 0:
            self._end_phase()
        lived = max((self._longest, self._flatness), key=len)
        return {
            **self._counts,
            "longest_broker_rounds": len(lived),
            "its_memory_mib_by_round": [round(memory / MIB, 1) for memory, _ in lived],
            "its_descriptors_by_round": [descriptors for _, descriptors in lived],
        }

    # ---- the broker ----

    def _start_broker(self) -> None:
        self._fleet.start_broker()
        self._longest = max((self._longest, self._flatness), key=len)
        self._flatness = []

    def _restart_broker(self) -> None:
        kill = self._rng.random() < 0.8
        self._counts["broker_kills" if kill else "broker_terms"] += 1
        self._fleet.kill_broker(signal.SIGKILL if kill else signal.SIGTERM)
        if self._rng.random() < 0.3:
            time.sleep(self._rng.uniform(0, 0.5))
        self._start_broker()

    # ---- a round ----

    def _round(self, restarts: bool) -> None:
        end = time.monotonic() + self._arguments.round
        doomed: list[chaos.Engine] = []  # stopped, to be killed
        next_restart = time.monotonic() + self._rng.uniform(0.5, 3)
        while time.monotonic() < end:
            time.sleep(self._rng.uniform(0, 0.15))
            if restarts and time.monotonic() > next_restart:
                next_restart = time.monotonic() + self._rng.uniform(1, 4)
                self._restart_broker()
            alive = [engine for engine in self._fleet.engines if engine not in doomed]
            for engine in alive:
                if not engine.alive():
                    self._left(engine)
            alive = [engine for engine in alive if engine.alive()]
            chance = self._rng.random()
            if len(alive) < 2 or (chance < 0.15 and len(alive) < 6):
                self._start_engine()
            elif chance < 0.22:
                self._kill(self._rng.choice(alive))
            elif chance < 0.25:
                victim = self._rng.choice(alive)
                victim.process.send_signal(signal.SIGSTOP)
                doomed.append(victim)
                self._counts["engines_stopped"] += 1
            elif chance < 0.29 and doomed:
                self._kill_or_wake(doomed)
            elif chance < 0.33:
                self._rng.choice(alive).process.send_signal(signal.SIGTERM)
            elif chance < 0.45:
                self._counts["limits_moved"] += 1
                limit = self._rng.randrange(2, 50) * self._fleet.limit_unit
                self._set("limit", self._rng.choice(alive).name, str(limit))
            elif chance < 0.50:
                self._counts["policies_moved"] += 1
                guarantee = self._rng.randrange(0, 8) * self._fleet.limit_unit
                self._set(
                    "policy", self._rng.choice(alive).name,
                    "--min", str(guarantee), "--weight", str(self._rng.choice((0.5, 1, 3))),
                )
        while doomed:
            self._kill_or_wake(doomed)
        for engine in list(self._fleet.engines):
            engine.process.send_signal(signal.SIGTERM)
        for engine in list(self._fleet.engines):
            self._left(engine)
        self._check()

    def _start_engine(self) -> None:
        self._counts["engines"] += 1
        model = self._rng.choice(tuple(MODELS))
        scale = (f"--scale={MODELS[model]}",) if self._fleet.is_gpu else ()
        self._fleet.start_engine(
            f"engine{self._rng.randrange(NAMES)}", "--speedup=40", f"--shift={self._rng.randrange(1200)}",
            f"--rate-scale={self._rng.choice((0.5, 1, 2))}",
            f"--model={model}", *scale,
            trace=self._rng.choice(("builtin:conv", "builtin:code")), seed=self._rng.randrange(1000),
        )

    def _kill(self, engine: chaos.Engine) -> None:
        self._counts["engines_killed"] += 1
        engine.process.send_signal(signal.SIGKILL)
        engine.process.wait()
        self._fleet.note_exit(engine)
        self._fleet.forget(engine)

    def _kill_or_wake(self, doomed: list[chaos.Engine]) -> None:
        engine = doomed.pop()
        if self._rng.random() < 0.5:
            engine.process.send_signal(signal.SIGCONT)
        else:
            self._kill(engine)

    def _left(self, engine: chaos.Engine) -> None:
        engine.check_ended_well()
        self._fleet.note_exit(engine)
        self._counts["engines_left"] += 1
        self._fleet.forget(engine)

    def _set(self, *words: str) -> None:
        # An instance may have gone meanwhile, and guarantees may be more than there is.
        self._fleet.kvctl(*words, check=False)

    # ---- at a round's end ----

    def _check(self) -> None:
        names = tuple(f"engine{i}" for i in range(NAMES))
        self._fleet.await_empty(names)
        self._fleet.await_device_agreement()
        for name in self._fleet.instances():
            self._set("delete", name)
        self._flatness.append((self._fleet.broker_memory_bytes(), self._fleet.broker_descriptors()))
        if self._flatness[-1][1] > self._flatness[0][1] + 8:
            raise chaos.ChaosError(f"the broker's descriptors grow: {[d for _, d in self._flatness]}")

    def _end_phase(self) -> None:
        # A death is judged once the broker has done something a second later.
        time.sleep(1.1)
        self._set("limit", "nobody", "1M", "--preset")
        seen = self._fleet.check_history()
        self._fleet.forget_history()
        for kind in ("events", "mappings", "deaths"):
            self._counts[f"{kind}_checked"] += seen[kind]
        self._counts["phases"] += 1


if __name__ == "__main__":
    main()
