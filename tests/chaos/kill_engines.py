"""Kills engines with SIGKILL at random moments, and looks what becomes of their memory.

Survivors replay all the while and check every block; victims are killed at any moment from
their first instruction on, several at once now and then, some stopped (SIGSTOP) before. After
each kill: the victim's memory is free for others, by the broker's books; and from time to time:
the books agree with what the kernel says that the survivors map.
"""

from __future__ import annotations

import argparse
import signal
import time

import fleet as chaos


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=500, metavar="N", help="[500]")
    parser.add_argument(
        "--within", type=float, default=1.0, metavar="SECONDS",
        help="from a process's exit until its memory is free; more fails [1]",
    )
    arguments, rng = chaos.parse_arguments(parser)

    freed_after: list[float] = []
    survivors_done = agreements = 0
    with chaos.reported(), chaos.Fleet(arguments) as fleet:
        fleet.start_broker("--log-level=info")
        descriptors = fleet.broker_descriptors()
        progress = chaos.Progress()
        traces = {"steady-conv": "builtin:conv", "steady-code": "builtin:code"}

        def start_survivor(name: str) -> chaos.Engine:
            return fleet.start_engine(
                name, "--speedup=40", "--window=1000", trace=traces[name], seed=rng.randrange(1000)
            )

        survivors = {name: start_survivor(name) for name in traces}
        while len(freed_after) < arguments.kills:
            victims = [
                fleet.start_engine(
                    f"victim{i}", "--speedup=40", f"--shift={rng.randrange(1200)}", seed=rng.randrange(1000)
                )
                for i in range(rng.choice((1, 1, 2, 3)))
            ]
            # Half of them in the first moments: hello, open, the first grants.
            time.sleep(rng.uniform(0, 0.06) if rng.random() < 0.5 else rng.uniform(0, 0.8))
            if rng.random() < 0.1:
                victims[0].process.send_signal(signal.SIGSTOP)
                time.sleep(rng.uniform(0, 0.05))
            for victim in victims:
                victim.process.send_signal(signal.SIGKILL)
            for victim in victims:
                victim.process.wait()
                fleet.note_exit(victim)
                freed_after.append(
                    fleet.eventually(
                        f"{victim.name} (pid {victim.pid}) is gone from the broker's books",
                        lambda pid=victim.pid: fleet.gone(pid),
                        arguments.within,
                    )
                )
                fleet.forget(victim)
            for name, survivor in survivors.items():
                if not survivor.alive():
                    survivor.check_ended_well()
                    survivors_done += 1
                    fleet.forget(survivor)
                    survivors[name] = start_survivor(name)
            if len(freed_after) % 10 < len(victims):
                fleet.await_agreement()
                agreements += 1
            progress.say(
                f"{len(freed_after)} of {arguments.kills} killed; memory free after at most "
                f"{max(freed_after) * 1000:.0f} ms; {survivors_done} survivors done"
            )
        for survivor in survivors.values():
            survivor.process.send_signal(signal.SIGTERM)
        for survivor in survivors.values():
            survivor.check_ended_well()
            survivors_done += 1
        fleet.await_empty()
        fleet.eventually("the broker's descriptors are back", lambda: fleet.broker_descriptors() <= descriptors + 2)

        counts = {
            "kills": len(freed_after),
            "free_after_ms_p50": round(sorted(freed_after)[len(freed_after) // 2] * 1000, 1),
            "free_after_ms_max": round(max(freed_after) * 1000, 1),
            "survivors_whole": survivors_done,
            "times_books_agreed_with_the_kernel": agreements,
            "descriptors_at_start": descriptors,
            "descriptors_at_end": fleet.broker_descriptors(),
            "history": fleet.check_history(arguments.within),
        }
        chaos.report(counts, arguments)


if __name__ == "__main__":
    main()
