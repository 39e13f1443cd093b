"""The shared-memory view of real sessions, used as other programs use it.

    shm_view_test.py PROGRAM KVCTL ADDRESS DIRECTORY

PROGRAM is view_program, ADDRESS a running broker's. Only the standard library,
as in the programs that read and write such files: flock, read, write, mmap.
"""

import fcntl
import json
import mmap
import os
import random
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable

FORM = struct.Struct("=qqq")
PAGE = 64 * 1024
BLOCKS_PER_PAGE = 16
PATIENCE = 30.0  # for giving up only

PROGRAM, KVCTL, ADDRESS, DIRECTORY = sys.argv[1:5]


def fail(text: str) -> None:
    raise AssertionError(text)


def eventually(what: str, holds: Callable[[], bool]) -> float:
    """Until it holds; says how long it took, in milliseconds."""
    start = time.monotonic()
    while not holds():
        if time.monotonic() - start > PATIENCE:
            fail(f"never: {what}")
        time.sleep(0.001)
    return (time.monotonic() - start) * 1000


class Engine:
    def __init__(self, name: str) -> None:
        self.name = name
        self.process = subprocess.Popen(
            [PROGRAM, ADDRESS, DIRECTORY, name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        # The file is there before the session is.
        line = self.answer()
        if line != "ready":
            fail(line)
        if not os.path.exists(path(name)):
            fail("a session is open and has no view")

    def answer(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def tell(self, line: str) -> str:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        return self.answer()

    def end(self) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        if self.process.wait(PATIENCE) != 0:
            fail("the engine fails")
        self.process.stdout.close()

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(PATIENCE)


def path(name: str) -> str:
    return os.path.join(DIRECTORY, name)


def read(name: str) -> tuple[int, int, int]:
    with open(path(name), "rb") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        data = file.read()
    if len(data) != FORM.size:
        fail(f"{len(data)} bytes")
    return FORM.unpack(data)


def write_limit(name: str, limit: int) -> None:
    """As such programs do: all three figures, with the two that were read."""
    with open(path(name), "r+b", buffering=0) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        _, used, preallocated = FORM.unpack(file.read(FORM.size))
        file.seek(0)
        file.write(FORM.pack(limit, used, preallocated))


def kvctl(*arguments: str) -> str:
    return subprocess.run(
        [KVCTL, "--address", ADDRESS, *arguments],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    ).stdout


def listed(name: str, field: str) -> int:
    for instance in json.loads(kvctl("list", "--json")):
        if instance["ipc"] == name:
            return int(instance[field])
    return -1


def one_engine() -> None:
    engine = Engine("llama")
    if read("llama") != (4000000, 0, 0):
        fail(f"at the start: {read('llama')}")
    if engine.tell(f"alloc {3 * BLOCKS_PER_PAGE}") != "done":
        fail("alloc")
    eventually("used", lambda: read("llama") == (4000000, 3 * PAGE, 0))

    # A foreign write is a limit, to the byte.
    write_limit("llama", 1234567)
    took = eventually("in force", lambda: listed("llama", "limit_bytes") == 1234567)
    print(f"written under flock to in force, as kvctl sees it: {took:.1f} ms")
    eventually("kept", lambda: read("llama") == (1234567, 3 * PAGE, 0))
    eventually("told", lambda: engine.tell("limit") == "1234567")

    # Through a mapping, which nobody is told of.
    with (
        open(path("llama"), "r+b") as file,
        mmap.mmap(file.fileno(), FORM.size) as view,
    ):
        view[:8] = struct.pack("=q", 2345678)
        took = eventually("mapped", lambda: listed("llama", "limit_bytes") == 2345678)
        print(f"written through a mapping to in force: {took:.1f} ms")

    # The other way: kvctl, and the session itself.
    kvctl("limit", "llama", "3000000")
    took = eventually("shown", lambda: read("llama")[0] == 3000000)
    print(f"kvctl's limit to the view: {took:.1f} ms")
    if engine.tell("max 3500001") != "0 3500001":
        fail("set_max is not in force when it returns")
    if listed("llama", "limit_bytes") != 3500001:
        fail("set_max: kvctl sees another")
    eventually("own", lambda: read("llama")[0] == 3500001)

    # Nonsense is written back, and changes nothing.
    write_limit("llama", -7)
    eventually("nonsense", lambda: read("llama")[0] == 3500001)
    if listed("llama", "limit_bytes") != 3500001:
        fail("nonsense was set")
    # 0 is a limit.
    write_limit("llama", 0)
    eventually("zero", lambda: listed("llama", "limit_bytes") == 0)
    write_limit("llama", 4000000)
    eventually("not zero", lambda: listed("llama", "limit_bytes") == 4000000)

    spent = int(engine.tell("spin 2000"))
    print(f"an idle engine with a view: {spent / 2:.0f} us of CPU a second")
    engine.end()
    if os.listdir(DIRECTORY):
        fail(f"left behind: {os.listdir(DIRECTORY)}")
    kvctl("delete", "llama")


def two_processes() -> None:
    first, second = Engine("shared"), Engine("shared")
    first.tell(f"alloc {2 * BLOCKS_PER_PAGE}")
    second.tell(f"alloc {5 * BLOCKS_PER_PAGE}")
    eventually("sum", lambda: read("shared") == (4000000, 7 * PAGE, 0))
    write_limit("shared", 3000000)
    eventually("one limit", lambda: listed("shared", "limit_bytes") == 3000000)
    eventually("both told", lambda: second.tell("limit") == "3000000")
    eventually("shown", lambda: read("shared") == (3000000, 7 * PAGE, 0))

    # What a killed one had is gone; the other's is not.
    first.kill()
    eventually("without it", lambda: read("shared") == (3000000, 5 * PAGE, 0))

    # And with the last one killed, the next owner takes over what is left.
    second.kill()
    if read("shared") != (3000000, 5 * PAGE, 0):
        fail("nobody is there to change it")
    write_limit("shared", 1)  # nobody's wish any more
    eventually("gone", lambda: listed("shared", "held_bytes") == 0)
    third = Engine("shared")
    # An operator's limit stays for the next process.
    if read("shared") != (3000000, 0, 0):
        fail(f"taken over with {read('shared')}")
    third.tell(f"alloc {BLOCKS_PER_PAGE}")
    eventually("own", lambda: read("shared") == (3000000, PAGE, 0))
    if listed("shared", "limit_bytes") != 3000000:
        fail("a stale limit was set")
    third.end()
    if os.listdir(DIRECTORY):
        fail(f"left behind: {os.listdir(DIRECTORY)}")
    kvctl("delete", "shared")


def hazards() -> None:
    """Whatever is done to the file, engine and victims are none the worse."""
    victim = os.path.join(DIRECTORY, "victim")
    with open(victim, "wb") as file:
        file.write(b"x" * FORM.size)
    engine = Engine("llama")
    engine.tell(f"alloc {BLOCKS_PER_PAGE}")
    good = (4000000, PAGE, 0)
    eventually("good", lambda: read("llama") == good)

    def shown() -> bool:
        try:
            return not os.path.islink(path("llama")) and read("llama") == good
        except (OSError, AssertionError):
            return False

    def replace(make: Callable[[], None]) -> None:
        os.unlink(path("llama"))
        try:
            make()
        except FileExistsError:
            return  # it was quicker
        eventually(f"again, after {make}", shown)

    replace(lambda: None)
    replace(lambda: os.symlink(victim, path("llama")))
    replace(lambda: os.link(victim, path("llama")))
    for size in (0, 7, 4096):
        os.truncate(path("llama"), size)
        eventually(f"again, after {size} bytes", shown)
    with open(victim, "rb") as file:
        if file.read() != b"x" * FORM.size:
            fail("another file was written to")
    if engine.tell("limit") != "4000000":
        fail("the engine's limit has changed")
    engine.end()
    os.unlink(victim)
    if os.listdir(DIRECTORY):
        fail(f"left behind: {os.listdir(DIRECTORY)}")


def stress() -> None:
    """Readers and writers under flock, through mappings, and kvctl, at once."""
    engines = [Engine("busy"), Engine("busy")]
    stop = threading.Event()
    torn: list[str] = []

    def reader() -> None:
        while not stop.is_set():
            limit, used, preallocated = read("busy")
            if used % PAGE or not 0 <= used <= 4000000 or preallocated:
                torn.append(f"{limit} {used} {preallocated}")

    def writer(seed: int) -> None:
        chance = random.Random(seed)
        while not stop.is_set():
            write_limit("busy", chance.randrange(2000000, 4000000))
            time.sleep(chance.random() / 100)

    threads = [threading.Thread(target=reader) for _ in range(2)]
    threads += [threading.Thread(target=writer, args=(seed,)) for seed in (1, 2)]
    for thread in threads:
        thread.start()
    try:
        chance = random.Random(3)
        for _ in range(40):
            for engine in engines:
                engine.tell(f"alloc {chance.randrange(1, 4)}")
            if chance.random() < 0.2:
                kvctl("limit", "busy", str(chance.randrange(2000000, 4000000)))
            if chance.random() < 0.1:
                engines.pop(0).kill()
                engines.append(Engine("busy"))
            time.sleep(0.02)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    if torn:
        fail(f"torn figures: {torn[:5]}")

    # In the end all agree, and a last word is heard.
    write_limit("busy", 3999999)
    eventually("the last word", lambda: listed("busy", "limit_bytes") == 3999999)
    eventually("shown", lambda: read("busy")[0] == 3999999)
    eventually("the sum", lambda: read("busy")[1] == listed("busy", "used_bytes"))
    time.sleep(0.3)  # and it stays so
    if read("busy")[0] != 3999999 or listed("busy", "limit_bytes") != 3999999:
        fail("the last word does not last")
    for engine in engines:
        engine.end()
    if os.listdir(DIRECTORY):
        fail(f"left behind: {os.listdir(DIRECTORY)}")


for test in (one_engine, two_processes, hazards, stress):
    print(f"---- {test.__name__}", flush=True)
    test()
print("PASSED")
