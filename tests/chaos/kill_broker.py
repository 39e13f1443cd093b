"""Kills the broker with SIGKILL under three replaying engines, again and again.

After each start of a new one all engines resume; then the broker's books agree with what the
kernel says that each engine maps. No engine may fail, and none may find a block that is not
as it wrote it. With --upgrade-from the starts alternate with another build of the broker. On a GPU
all engines leave now and then, and the driver counts no more memory than the broker does.
"""

from __future__ import annotations

import argparse
import pathlib
import signal
import time

import fleet as chaos

# On a GPU, after so many kills all engines leave and new ones come.
KILLS_BETWEEN_QUIET = 10

ENGINES = {"conv": "builtin:conv", "code": "builtin:code", "code2": "builtin:code"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100, metavar="N", help="[100]")
    parser.add_argument(
        "--terminate", type=float, default=0.1, metavar="SHARE",
        help="so many of the kills are SIGTERM, as for an upgrade [0.1]",
    )
    parser.add_argument(
        "--upgrade-from", type=pathlib.Path, metavar="KVBROKERD",
        help="every other broker is this program",
    )
    arguments, rng = chaos.parse_arguments(parser, gpu=True)

    resumed_after: list[float] = []
    done = 0
    limit_changes = 0
    with chaos.reported(), chaos.Fleet(arguments) as fleet:
        def program() -> pathlib.Path | None:
            return arguments.upgrade_from if fleet.broker_starts % 2 == 0 else None

        fleet.start_broker(program=program())
        progress = chaos.Progress()

        def start(name: str) -> chaos.Engine:
            flags = ["--speedup=40"]
            if name == "code2":
                flags.append("--shift=600")
            return fleet.start_engine(name, *flags, trace=ENGINES[name], seed=rng.randrange(1000))

        engines = {name: start(name) for name in ENGINES}

        def all_resumed() -> bool:
            listed = fleet.instances()
            return all(
                not engine.alive() or engine.pid in listed.get(engine.name, {}).get("pids", [])
                for engine in engines.values()
            )

        def leave() -> None:
            nonlocal done
            for engine in engines.values():
                engine.process.send_signal(signal.SIGTERM)
            for engine in engines.values():
                engine.check_ended_well()
                done += 1
                fleet.forget(engine)
            fleet.await_empty(("conv",))
            fleet.await_device_agreement()

        fleet.eventually("all engines are connected", all_resumed)
        limit = None
        for kill in range(arguments.kills):
            time.sleep(rng.uniform(0, 1.0))
            if rng.random() < 0.2:
                # An operator's limit must be in force again after the restart.
                limit = rng.choice([12, 24, 48]) * fleet.limit_unit
                fleet.kvctl("limit", "conv", str(limit))
                limit_changes += 1
            fleet.kill_broker(signal.SIGTERM if rng.random() < arguments.terminate else signal.SIGKILL)
            if rng.random() < 0.3:
                time.sleep(rng.uniform(0, 0.5))
            fleet.start_broker(program=program())
            resumed_after.append(fleet.eventually("all engines have resumed", all_resumed))
            fleet.await_agreement()
            if limit is not None:
                listed = fleet.instances().get("conv")
                if listed is not None and listed["limit_bytes"] != limit:
                    raise chaos.ChaosError(f"conv's limit is {listed['limit_bytes']}, not {limit}, after a restart")
            for name, engine in engines.items():
                if not engine.alive():
                    engine.check_ended_well()
                    done += 1
                    fleet.forget(engine)
                    engines[name] = start(name)
            if fleet.is_gpu and (kill + 1) % KILLS_BETWEEN_QUIET == 0:
                leave()
                engines.update({name: start(name) for name in ENGINES})
            fleet.eventually("all engines are connected", all_resumed)
            progress.say(
                f"{kill + 1} of {arguments.kills} kills; engines back after at most "
                f"{max(resumed_after) * 1000:.0f} ms; {done} engines done"
            )
        leave()
        counts = {
            "broker_kills": arguments.kills,
            "engines_back_ms_p50": round(sorted(resumed_after)[len(resumed_after) // 2] * 1000, 1),
            "engines_back_ms_max": round(max(resumed_after) * 1000, 1),
            "engines_whole": done,
            "limit_changes": limit_changes,
            "history": fleet.check_history(),
            "device": fleet.check_device(),
        }
        chaos.report(counts, arguments)


if __name__ == "__main__":
    main()
