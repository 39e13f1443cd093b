"""Stand-ins for the programs that the demo runs, for its tests.

`install` writes them to a folder laid out as bazel-bin. They do what FAKE_REPLAY and
FAKE_BROKER in the environment say; see the scripts below.
"""

from __future__ import annotations

import sys
from pathlib import Path

# FAKE_REPLAY: `NAME:fail` exits 1 after a complaint, `NAME:overwritten` finds wrong blocks,
# `NAME:hang` runs until it is asked to end, as an overloaded engine does; `NAME:wait` too, but
# only on the broker.
_REPLAY = """
import json, os, signal, sys
flags = dict(w[2:].split("=", 1) for w in sys.argv[1:] if w.startswith("--") and "=" in w)
if "--print-capacity" in sys.argv:
    print(json.dumps({"requests": 10, "length_s": 60.0, "tokens_in_flight_mean": 500,
                      "tokens_in_flight_p99": 1000, "tokens_in_flight_peak": 1500,
                      "token_bytes": 256, "block_tokens": 16, "block_bytes": 4096,
                      "page_bytes": 262144}))
    sys.exit(0)
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
name, share = flags["name"], flags.get("static-share")
does = dict(w.split(":") for w in os.environ.get("FAKE_REPLAY", "").split()).get(name)
if does == "fail":
    print("kvbroker-replay: cannot go on", file=sys.stderr)
    sys.exit(1)
status = os.fdopen(int(flags["status-fd"]), "w")
for t in (0, 20000, 40000):
    print(json.dumps({"t_ms": t, "load_tokens": 100, "waiting": 2, "running": 3,
                      "in_use_bytes": 65536, "idle_bytes": 4096, "held_bytes": 69632}),
          file=status, flush=True)
if does == "hang" or (does == "wait" and not share):
    signal.sigwait({signal.SIGTERM})
with open(flags["requests"], "w") as file:
    file.write("arrival_ms,wait_ms,first_token_ms,end_ms,preemptions,outcome\\n")
wrong = 7 if does == "overwritten" else 0
print(json.dumps({"name": name, "mode": "static" if share else "elastic", "requests": 10,
                  "rejected": 0, "unfinished": 0, "wait_p99_ms": 2000.0 if share else 10.0,
                  "wait_mean_ms": 100.0, "wait_max_ms": 3000.0, "preemptions": 1,
                  "integrity_errors": wrong, "blocks_written": 99, "late_max_ms": 1.5,
                  "seconds": 0.1}))
sys.exit(1 if wrong else 0)
"""

# FAKE_BROKER: `refuse` does not start, `die` ends as soon as it is ready, `fail` exits 1 when
# it is asked to end.
_BROKER = """
import os, signal, sys
flags = dict(w[2:].split("=", 1) for w in sys.argv[1:])
does = os.environ.get("FAKE_BROKER")
if does == "refuse":
    print("kvbrokerd: no such backend", file=sys.stderr)
    sys.exit(2)
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
for end in (".sock", ".fd.sock"):
    open(os.path.join(flags["socket-dir"], flags["device-uuid"] + end), "w").close()
os.write(int(flags["ready-fd"]), b"ready\\n")
if does == "die":
    sys.exit(3)
signal.sigwait({signal.SIGTERM})
sys.exit(1 if does == "fail" else 0)
"""


def install(folder: Path) -> None:
    for program, script in (
        ("client/replay/kvbroker-replay", _REPLAY),
        ("broker/server/kvbrokerd", _BROKER),
    ):
        path = folder / program
        path.parent.mkdir(parents=True)
        path.write_text(f"#!{sys.executable}\n{script}", encoding="utf-8")
        path.chmod(0o755)
