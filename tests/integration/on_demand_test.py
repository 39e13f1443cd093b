"""A broker that engines start when they need one: where it comes from, what it
survives, and when it goes."""

import glob
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import unittest
from typing import Dict, List, Optional

KVBROKERD = os.path.abspath("broker/server/kvbrokerd")
KVCTL = os.path.abspath("client/cli/kvctl")
ENGINE = os.path.abspath("tests/integration/on_demand_engine")
GPU = "GPU-fa6e0000-0000-4000-8000-000000000000"  # the fake driver's
# For giving up only.
PATIENCE = 60.0


class Engine:
    """on_demand_engine in a process group of its own."""

    def __init__(
        self,
        name: str,
        environment: Dict[str, str],
        program: str = KVBROKERD,
        conflict: str = "join",
        gpu: Optional[str] = None,
        **options: object,
    ) -> None:
        self.process = subprocess.Popen(
            [ENGINE, name, program, conflict] + ([gpu] if gpu else []),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            start_new_session=True,
            **options,  # type: ignore[call-overload]
        )
        self.pid = self.process.pid

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def ask(self, words: str) -> str:
        assert self.process.stdin is not None
        self.process.stdin.write(words + "\n")
        self.process.stdin.flush()
        return self.line()

    def leave(self) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        if self.process.poll() is None:
            try:
                self.process.stdin.write("leave\n")
                self.process.stdin.flush()
            except BrokenPipeError:
                pass
        self.process.wait(PATIENCE)
        self.close()

    def kill(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.pid, signal.SIGKILL)
        self.process.wait(PATIENCE)
        self.close()

    def close(self) -> None:
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                try:
                    stream.close()
                except BrokenPipeError:
                    pass


def until(what: str, condition) -> None:  # type: ignore[no-untyped-def]
    deadline = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError("in vain: " + what)
        time.sleep(0.005)


def field(pid: int, number: int) -> int:
    """Of /proc/PID/stat, counted as in proc(5)."""
    with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as stat:
        return int(stat.read().rpartition(")")[2].split()[number - 3])


def descendants(pid: int) -> List[int]:
    found = []
    try:
        for task in os.listdir(f"/proc/{pid}/task"):
            path = f"/proc/{pid}/task/{task}/children"
            with open(path, encoding="ascii") as children:
                for child in children.read().split():
                    found += [int(child)] + descendants(int(child))
    except FileNotFoundError:  # a process or thread that has just ended
        return found + descendants(pid) if os.path.exists(f"/proc/{pid}") else found
    return found


class OnDemandTest(unittest.TestCase):
    def setUp(self) -> None:
        self.folder = tempfile.mkdtemp(prefix="kvb", dir="/tmp")
        self.directory = os.path.join(self.folder, "kvbroker")
        self.environment = {
            "PATH": os.environ["PATH"],
            "XDG_RUNTIME_DIR": self.folder,
            "KVBROKERD_LOCK_DIR": os.path.join(self.folder, "locks"),
            "KVBROKERD_CAPACITY": "64M",
            "KVBROKERD_LOG_LEVEL": "info",
        }
        self.engines: List[Engine] = []

    def tearDown(self) -> None:
        for engine in self.engines:
            engine.kill()
        for pid in self.brokers():
            os.kill(pid, signal.SIGKILL)
        until("the brokers' end", lambda: not self.brokers())
        shutil.rmtree(self.folder, ignore_errors=True)

    def engine(self, name: str = "a", **options: object) -> Engine:
        engine = Engine(name, self.environment, **options)  # type: ignore[arg-type]
        self.engines.append(engine)
        return engine

    def opened(self, name: str = "a", **options: object) -> Engine:
        engine = self.engine(name, **options)
        self.assertTrue((line := engine.line()).startswith("open "), line)
        return engine

    def brokers(self) -> List[int]:
        """Live kvbrokerds of this test, those about to detach included."""
        found = []
        for entry in os.listdir("/proc"):
            try:
                with open(f"/proc/{entry}/cmdline", "rb") as file:
                    words = file.read().split(b"\0")
                if (
                    os.fsencode(self.directory) in words
                    and os.path.basename(words[0]) == b"kvbrokerd"
                ):
                    found.append(int(entry))
            except (OSError, ValueError):
                continue
        return found

    def broker(self) -> int:
        """The one there is, once those that lost have left."""
        until("one broker", lambda: len(self.brokers()) == 1)
        return self.brokers()[0]

    def test_is_started_out_of_reach_of_the_engine(self) -> None:
        secret = os.open(os.path.join(self.folder, "secret"), os.O_CREAT | os.O_RDWR)
        engine = self.opened(pass_fds=(secret,))
        os.close(secret)
        broker = self.broker()
        self.assertNotEqual(field(broker, 5), field(engine.pid, 5), "process group")
        self.assertNotEqual(field(broker, 6), field(engine.pid, 6), "session")
        self.assertEqual(field(broker, 7), 0, "terminal")
        self.assertNotIn(broker, descendants(engine.pid))
        self.assertNotEqual(field(broker, 4), engine.pid)
        self.assertEqual(os.readlink(f"/proc/{broker}/cwd"), "/")
        mine = {os.readlink(f"/proc/{engine.pid}/fd/{fd}") for fd in (0, 1)}
        mine.add(os.path.join(self.folder, "secret"))
        its = {
            fd: os.readlink(f"/proc/{broker}/fd/{fd}")
            for fd in os.listdir(f"/proc/{broker}/fd")
        }
        self.assertFalse(mine & set(its.values()), its)
        self.assertEqual(its["0"], "/dev/null")
        self.assertEqual(its["2"], os.path.join(self.directory, "state/kvbrokerd.log"))
        self.assertEqual(os.stat(self.directory).st_mode & 0o7777, 0o700)
        # Nobody is left to be waited for.
        until("no children", lambda: not descendants(engine.pid))

        os.killpg(engine.pid, signal.SIGKILL)
        engine.process.wait(PATIENCE)
        self.assertEqual(self.opened("b").ask("hold 4"), "held 4")
        self.assertEqual(self.brokers(), [broker])

    def test_one_serves_all_who_start_at_once(self) -> None:
        engines = [self.engine(f"engine{i}") for i in range(6)]
        for i, engine in enumerate(engines):
            self.assertEqual(engine.line(), f"open engine{i} joined=")
        for engine in engines:
            self.assertEqual(engine.ask("hold 2"), "held 2")
        self.broker()

    def test_is_back_when_it_was_killed(self) -> None:
        engines = [self.opened(f"engine{i}") for i in range(3)]
        for engine in engines:
            self.assertEqual(engine.ask("hold 8"), "held 8")
        self.kvctl("limit", "engine0", "4M")
        for round_ in range(3):
            broker = self.broker()
            os.kill(broker, signal.SIGKILL)
            begin = time.monotonic()
            for engine in engines:
                # Memory that only a broker can have given.
                until("growth", lambda engine=engine: engine.ask("grow") == "held 1")
            took = time.monotonic() - begin
            print(f"round {round_}: all grow after {took * 1000:.0f} ms", flush=True)
        # What an operator has set is in force still.
        (instance,) = json.loads(self.kvctl("list", "--json", "engine0"))
        self.assertEqual(instance["limit_bytes"], 4 << 20)

    def test_one_that_ends_at_once_is_said_to(self) -> None:
        # The broker that there is dies, and no other can be had.
        program = os.path.join(self.folder, "kvbrokerd")
        shutil.copy(KVBROKERD, program)
        engine = self.opened(program=program)
        broker = self.broker()
        os.unlink(program)
        with open(program, "w", encoding="ascii") as script:
            script.write(f"#!/bin/sh\nprintf x >>{self.folder}/runs\n")
            script.write("echo 'kvbrokerd: no memory today' >&2\nexit 1\n")
        os.chmod(program, 0o700)
        os.kill(broker, signal.SIGKILL)
        until("words", lambda: "no memory today" in engine.ask("health"))
        self.assertTrue(engine.ask("health").startswith("health 14 "))
        self.assertTrue(os.path.getsize(f"{self.folder}/runs") > 0)

    def test_leaves_when_idle_and_the_next_engine_starts_another(self) -> None:
        self.environment["KVBROKERD_IDLE_EXIT"] = "50ms"
        first = self.opened()
        broker = self.broker()
        first.leave()
        until("its end", lambda: not self.brokers())
        self.assertFalse(
            [name for name in os.listdir(self.directory) if name.endswith(".sock")]
        )
        second = self.opened()
        self.assertNotEqual(self.broker(), broker)
        second.leave()

    def test_engines_that_meet_one_about_to_leave_are_served(self) -> None:
        self.environment["KVBROKERD_IDLE_EXIT"] = "100ms"
        for i in range(15):
            engine = self.opened()
            self.assertEqual(engine.ask("grow"), "held 1")
            engine.leave()
            # The next one comes about when the broker goes.
            time.sleep(0.05 + 0.005 * i)

    def test_is_not_started_where_that_is_forbidden(self) -> None:
        self.environment["KVBROKER_AUTOSTART"] = "0"
        engine = self.engine()
        line = engine.line()
        self.assertTrue(line.startswith("failed 5 no broker found"), line)
        self.assertIn("KVBROKER_AUTOSTART", line)
        self.assertIn(self.directory, line)
        self.environment["KVBROKER_AUTOSTART"] = "perhaps"
        line = self.engine().line()
        self.assertTrue(line.startswith("failed 3 "), line)
        self.assertIn('"perhaps"', line)
        self.assertEqual(self.brokers(), [])

    def test_one_in_another_folder_of_this_user_is_found_by_its_lock(self) -> None:
        first = self.opened("a")
        broker = self.broker()
        other = os.path.join(self.folder, "other")
        os.mkdir(other, 0o700)
        self.environment["XDG_RUNTIME_DIR"] = other
        second = self.opened("b")
        self.assertEqual(second.ask("hold 1"), "held 1")
        self.assertEqual(self.brokers(), [broker])
        self.assertEqual(first.ask("hold 1"), "held 1")

    @unittest.skipIf(os.geteuid() != 0, "needs root to be two users")
    def test_anothers_broker_is_named_with_how_to_be_admitted(self) -> None:
        os.chmod(self.folder, 0o755)
        theirs = os.path.join(self.folder, "theirs")
        os.mkdir(theirs, 0o700)
        os.chown(theirs, 4001, 4001)
        self.opened("a")
        broker = self.broker()
        self.environment["XDG_RUNTIME_DIR"] = theirs
        # Where that user may read them.
        (library,) = set(glob.glob("**/libkvbroker.so", recursive=True)[:1])
        for file in (KVBROKERD, ENGINE, library):
            shutil.copy(file, self.folder)
        self.environment["LD_LIBRARY_PATH"] = self.folder
        begin = time.monotonic()
        line = self.engine(
            "b",
            program=os.path.join(self.folder, "kvbrokerd"),
            executable=os.path.join(self.folder, "on_demand_engine"),
            user=4001,
            group=4001,
            extra_groups=[],
            cwd=self.folder,
        ).line()
        print(f"refused after {time.monotonic() - begin:.1f} s: {line}", flush=True)
        self.assertTrue(line.startswith("failed 9 "), line)
        for part in ("uid 0", f"pid {broker}", self.directory, "allow_uids"):
            self.assertIn(part, line)

    @unittest.skipIf(os.geteuid() != 0, "needs root to be two users")
    def test_who_serves_a_socket_in_anothers_directory_is_no_broker(self) -> None:
        os.chmod(self.folder, 0o755)
        theirs = os.path.join(self.folder, "theirs")
        os.mkdir(theirs)
        os.chmod(theirs, 0o777)
        ready, written = os.pipe()
        child = os.fork()
        if child == 0:
            os.setuid(4001)
            kinds = {"sock": socket.SOCK_STREAM, "fd.sock": socket.SOCK_SEQPACKET}
            listeners = []
            for name, kind in kinds.items():
                listeners.append(socket.socket(socket.AF_UNIX, kind))
                listeners[-1].bind(os.path.join(theirs, f"HOST-x.{name}"))
                listeners[-1].listen()
            os.write(written, b"x")
            signal.pause()
        self.addCleanup(os.waitpid, child, 0)
        self.addCleanup(os.kill, child, signal.SIGKILL)
        os.read(ready, 1)
        self.environment["KVBROKER_ADDRESS"] = theirs
        line = self.engine("a").line()
        self.assertTrue(line.startswith("failed 7 "), line)
        self.assertIn("uid: 4001", line)

    def test_a_gpu_has_one_of_its_own_beside_the_hosts(self) -> None:
        fake = os.path.abspath("tests/fake_cuda/libfake_cuda.so")
        memory = os.path.join(self.folder, "gpu")
        os.mkdir(memory)
        self.environment.update(
            KVBROKER_CUDA_DRIVER=fake,
            KVBROKER_NVML=fake,
            KVBROKER_FAKE_CUDA_DIR=memory,
            KVBROKER_FAKE_CUDA_TOTAL=str(256 << 20),
            KVBROKERD_HEADROOM="16M",
        )
        on_host = self.opened("a")
        host = self.broker()
        on_gpu = self.opened("a", gpu=GPU)
        self.assertEqual(on_gpu.ask("hold 4"), "held 4")
        self.assertEqual(on_host.ask("hold 4"), "held 4")
        self.assertIn(GPU, self.kvctl("list"))
        until("two brokers", lambda: len(self.brokers()) == 2)
        (broker,) = set(self.brokers()) - {host}
        os.kill(broker, signal.SIGKILL)
        begin = time.monotonic()
        until("growth", lambda: on_gpu.ask("grow") == "held 1")
        print(f"on the GPU: grows after {(time.monotonic() - begin) * 1000:.0f} ms")
        self.assertIn(host, self.brokers())

    def test_a_name_in_use(self) -> None:
        first = self.opened("a")
        joined = self.engine("a")
        self.assertEqual(joined.line(), f"open a joined={first.pid}")
        self.assertEqual(self.engine("a", conflict="suffix").line(), "open a_1 joined=")
        line = self.engine("a", conflict="error").line()
        self.assertTrue(line.startswith("failed 9 "), line)
        self.assertIn(str(first.pid), line)
        # A session that comes back keeps its name.
        os.kill(self.broker(), signal.SIGKILL)
        suffixed = self.engines[2]
        until("growth", lambda: suffixed.ask("grow") == "held 1")
        self.assertIn("a_1", self.kvctl("list"))

    def kvctl(self, *words: str) -> str:
        return subprocess.run(
            [KVCTL, "--address", self.directory, *words],
            capture_output=True,
            text=True,
            check=True,
        ).stdout


if __name__ == "__main__":
    unittest.main(argv=[sys.argv[0], "-v"])
