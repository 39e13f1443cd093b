"""kvctl, kvtop and the 24-byte view from Python."""

from __future__ import annotations

import contextlib
import fcntl
import io
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import tempfile
import time
import unittest
from pathlib import Path
from typing import Any
from unittest import mock

from broker import MIB, TIMEOUT_S, BrokerTest, eventually

from kvcached import _C
from kvcached.cli import kvctl, kvtop, utils


def run_module(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *arguments],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
        **options,
    )


def open_session(name: str) -> _C.Session:
    pool: _C.PoolOptions = {"handle_bytes": MIB, "max_pages": 32, "block_bytes": MIB}
    return _C.Session(name, [pool], address=os.environ["KVBROKER_ADDRESS"])


class Kvctl(BrokerTest):
    def test_it_is_the_program(self) -> None:
        done = run_module("kvcached.cli.kvctl", "list", "--json")
        self.assertEqual((done.returncode, done.stdout.strip(), done.stderr), (0, "[]", ""))

    def test_its_exit_status_is_kept(self) -> None:
        self.assertEqual(run_module("kvcached.cli.kvctl", "limit", "nobody", "1G").returncode, 1)
        self.assertEqual(run_module("kvcached.cli.kvctl", "no-such-verb").returncode, 2)

    def test_a_script_of_the_name_is_not_the_program(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            script = Path(folder, "kvctl")
            script.write_text("#!/bin/sh\nexec python3 -m kvcached.cli.kvctl\n")
            script.chmod(0o755)
            with mock.patch("kvcached.programs.find", return_value=script):
                self.assertIsNone(kvctl.program())
                with contextlib.redirect_stderr(io.StringIO()) as said:
                    self.assertEqual(kvctl.main(["list"]), 1)
        self.assertIn("KVBROKER_BIN_DIR", said.getvalue())

    def test_its_verb_kvtop(self) -> None:
        done = run_module("kvcached.cli.kvctl", "kvtop", "--once")
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertIn("nobody is connected", done.stdout)


class Controller(unittest.TestCase):
    def test_it_says_that_it_is_not_here_yet(self) -> None:
        with mock.patch.dict(os.environ, {"PATH": "/nonexistent"}):
            done = run_module("kvcached.controller", "--config", "x.yaml")
        self.assertEqual(done.returncode, 1)
        self.assertEqual(len(done.stderr.splitlines()), 1)
        self.assertIn("no controller yet", done.stderr)


class ViewOfAFile(unittest.TestCase):
    def setUp(self) -> None:
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.path = Path(folder.name, "chat")
        self.path.write_bytes(struct.pack("3q", 7, 8, 9))

    def test_reading(self) -> None:
        forms: list[tuple[Any, ...]] = [(), ("rb",), ("r",), (24, utils.RwLockedShm.RLOCK)]
        for form in forms:
            with utils.RwLockedShm(str(self.path), *form) as view:
                self.assertEqual(struct.unpack("3q", view), (7, 8, 9))
                self.assertEqual(utils.MemInfoStruct.from_buffer(view).used_size, 8)
                with self.assertRaises(TypeError):
                    view[0] = 1

    def test_writing(self) -> None:
        for limit, form in enumerate([("r+b",), (24, utils.RwLockedShm.WLOCK)]):
            with utils.RwLockedShm(str(self.path), *form) as view:
                info = utils.MemInfoStruct.from_buffer(view)
                info.total_size = limit
                info.write_to_buffer(view)
            self.assertEqual(self.path.read_bytes(), struct.pack("3q", limit, 8, 9))

    def test_it_is_locked_meanwhile(self) -> None:
        for form, others in (("rb", fcntl.LOCK_EX), ("r+b", fcntl.LOCK_SH)):
            with self.path.open("rb") as other:
                with utils.RwLockedShm(str(self.path), form):
                    with self.assertRaises(BlockingIOError):
                        fcntl.flock(other, others | fcntl.LOCK_NB)
                fcntl.flock(other, others | fcntl.LOCK_NB)

    def test_an_array_may_outlive_it(self) -> None:
        with utils.RwLockedShm(str(self.path), "rb") as view:
            array = memoryview(view).cast("q")
        self.assertEqual(array.tolist(), [7, 8, 9])

    def test_wrong_sizes_and_locks(self) -> None:
        for form in ((16, utils.RwLockedShm.RLOCK), (24, 99)):
            with self.assertRaises(ValueError):
                utils.RwLockedShm(str(self.path), *form)

    def test_names_and_paths(self) -> None:
        for name in ("chat", "/chat", "/dev/shm/chat"):
            self.assertEqual(utils.get_ipc_path(name), "/dev/shm/chat")
            self.assertEqual(utils.get_ipc_name(name), "chat")
        self.assertEqual(utils.get_ipc_path("/tmp/x/chat"), "/tmp/x/chat")


class ViewOfABroker(BrokerTest):
    def setUp(self) -> None:
        super().setUp()
        # No file of this name is anywhere.
        self.name = f"view-{os.getpid()}"

    def test_names(self) -> None:
        self.assertEqual(utils.get_all_ipc_names(), [])
        sessions = [open_session(name) for name in ("b", "a", "b")]
        self.assertEqual(utils.get_all_ipc_names(), ["a", "b"])
        for session in sessions:
            session.close()

    def test_nobody_has_no_names(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            os.environ["KVBROKER_ADDRESS"] = folder
            self.assertEqual(utils.get_all_ipc_names(), [])
            self.assertIsNone(utils.get_kv_cache_limit("chat"))
            self.assertEqual(utils.get_total_gpu_memory(), 0)

    def test_the_same_24_bytes(self) -> None:
        session = open_session(self.name)
        pool = session.pool(0)
        self.assertTrue(pool.reserve(3, 10_000))
        self.assertEqual(len(pool.alloc(3, _C.RUNNING) or []), 3)
        limit = session.limits()[1]

        def seen() -> tuple[int, ...]:
            with utils.RwLockedShm(f"/dev/shm/{self.name}", "rb") as view:
                return struct.unpack("3q", view)

        # What is mapped ahead counts as preallocated until it has come.
        self.assertTrue(eventually(lambda: seen() == (limit, 3 * MIB, 0)), seen())

    def test_a_limit_that_is_written_is_set(self) -> None:
        session = open_session(self.name)
        with utils.RwLockedShm(self.name, "r+b") as view:
            struct.pack_into("q", view, 0, 5 * MIB + 1)
        self.assertEqual(session.limits()[1], 5 * MIB + 1)
        with utils.RwLockedShm(self.name, "r+b"):
            session.set_max(6 * MIB)
        self.assertEqual(session.limits()[1], 6 * MIB, "what was not changed was set")

    def test_a_write_that_fails_sets_nothing(self) -> None:
        session = open_session(self.name)
        before = session.limits()[1]
        with self.assertRaises(KeyError), utils.RwLockedShm(self.name, "r+b") as view:
            struct.pack_into("q", view, 0, MIB)
            raise KeyError
        self.assertEqual(session.limits()[1], before)

    def test_no_such_instance(self) -> None:
        with self.assertRaises(FileNotFoundError):
            utils.RwLockedShm(self.name, "rb").__enter__()
        self.assertIsNone(utils.get_kv_cache_limit(self.name))
        self.assertIsNone(utils.update_kv_cache_limit(self.name, MIB))
        self.assertFalse(utils.delete_kv_cache_segment(self.name))

    def test_update(self) -> None:
        session = open_session(self.name)
        info = utils.update_kv_cache_limit(self.name, 9 * MIB)
        self.assertEqual(info, utils.MemInfoStruct(9 * MIB, 0, 0))
        self.assertEqual(session.limits()[1], 9 * MIB)

    def test_a_live_instance_is_not_deleted_a_dead_one_is(self) -> None:
        session = open_session(self.name)
        with self.assertRaisesRegex(RuntimeError, f"live processes.*{os.getpid()}"):
            utils.delete_kv_cache_segment(self.name)
        utils.update_kv_cache_limit(self.name, MIB)  # which is remembered
        session.close()
        self.assertTrue(
            eventually(lambda: not self.listed() or not self.listed()[0]["pids"]), self.listed()
        )
        self.assertTrue(utils.delete_kv_cache_segment(self.name))
        self.assertEqual(utils.get_all_ipc_names(), [])

    def listed(self) -> Any:
        return [one for one in utils._instances() if one["ipc"] == self.name]

    def test_a_stale_file_is_not_taken_for_an_instance(self) -> None:
        path = Path(utils.get_ipc_path(self.name))
        path.write_bytes(struct.pack("3q", 1, 2, 3))
        self.addCleanup(path.unlink, missing_ok=True)
        with self.assertRaises(FileNotFoundError):
            utils.RwLockedShm(self.name, "rb").__enter__()
        with utils.RwLockedShm(self.name, "r+b") as view:
            struct.pack_into("q", view, 0, 5 * MIB)
        self.assertEqual(path.read_bytes(), struct.pack("3q", 1, 2, 3))
        session = open_session(self.name)
        self.assertEqual(session.limits()[1], 5 * MIB, "what was written was not kept for it")
        with utils.RwLockedShm(self.name, "rb") as view:  # It has processes now.
            self.assertEqual(struct.unpack("3q", view), (1, 2, 3))
        self.broker.stop()
        with utils.RwLockedShm(self.name, "rb") as view:
            self.assertEqual(struct.unpack("3q", view), (1, 2, 3))
        with self.assertRaises(_C.Error), utils.RwLockedShm(self.name, "r+b") as view:
            struct.pack_into("q", view, 0, 6 * MIB)
        session.close()

    def test_a_stale_file_goes(self) -> None:
        path = Path(utils.get_ipc_path(self.name))
        path.write_bytes(bytes(24))
        self.addCleanup(path.unlink, missing_ok=True)
        self.assertTrue(utils.delete_kv_cache_segment(self.name))
        self.assertFalse(path.exists())


def a_look(**figures: Any) -> kvtop.Look:
    broker = {
        "device_uuid": "GPU-1",
        "backend": "cuda",
        "capacity_bytes": 1000 * MIB,
        "held_bytes": 500 * MIB,
        "others_bytes": 100 * MIB,
        "state": "serving",
        "device_error": "",
    }
    instance = {
        "ipc": "chat",
        "gpu": "GPU-1",
        "limit_bytes": 800 * MIB,
        "used_bytes": 200 * MIB,
        "cached_bytes": 200 * MIB,
        "idle_bytes": 100 * MIB,
        "waiting_bytes": 0,
        "pids": [11, 12],
        "pressure": "none",
        **figures,
    }
    return kvtop.Look([broker], [instance], "")


def text_of(lines: Any) -> list[str]:
    return ["".join(text for text, _ in line) for line in lines]


class Screen(unittest.TestCase):
    def test_what_it_shows(self) -> None:
        head, bar, _, chat = text_of(kvtop.render(a_look(), 120))
        self.assertIn("lent 500 MiB of 1000 MiB  free 400 MiB  others 100 MiB", head)
        self.assertEqual(round(100 * bar.count("#") / (len(bar) - 2)), 50)
        for figure in ("200 MiB", "800 MiB", "25 %", "100 MiB", "11,12"):
            self.assertIn(figure, chat)

    def test_bars_are_to_scale(self) -> None:
        chat = text_of(kvtop.render(a_look(), 120))[-1]
        bar = chat[chat.index("[") + 1 : chat.index("]")]
        self.assertEqual(bar.strip("#=-."), "")
        for character, share in (("#", 200), ("=", 200), ("-", 100), (".", 300)):
            self.assertAlmostEqual(bar.count(character), len(bar) * share / 800, delta=1)

    def test_colors_follow_the_share_of_the_limit(self) -> None:
        for used, color in ((0, "green"), (399, "green"), (400, "yellow"), (639, "yellow")):
            self.assertEqual(kvtop.color_of(used, 800), color)
        for used, limit in ((640, 800), (900, 800), (1, 0), (0, 0)):
            self.assertEqual(kvtop.color_of(used, limit), "red")

    def test_limits_of_nothing_and_of_more_than_there_is(self) -> None:
        for limit in (0, (1 << 63) - 1):
            lines = text_of(kvtop.render(a_look(limit_bytes=limit, used_bytes=0), 80))
            self.assertEqual(len(lines), 4)

    def test_every_width(self) -> None:
        for width in range(1, 300, 7):
            for line in text_of(kvtop.render(a_look(ipc="n" * 128, pressure="waiting"), width))[:2]:
                self.assertTrue(line)

    def test_sizes(self) -> None:
        for size, text in ((0, "0 B"), (1023, "1023 B"), (3 << 29, "1.5 GiB"), (5 << 40, "5 TiB")):
            self.assertEqual(kvtop.format_size(size), text)

    def test_troubles_are_shown(self) -> None:
        self.assertEqual(text_of(kvtop.render(kvtop.Look([], [], "no broker"), 80)), ["no broker"])
        look = a_look()
        look.brokers[0].update(state="lost", device_error="reset it")
        self.assertIn("lost  reset it", text_of(kvtop.render(look, 80))[1])


class Kvtop(BrokerTest):
    def test_plain_where_there_is_no_terminal(self) -> None:
        session = open_session("chat")
        done = run_module("kvcached.cli.kvtop")
        self.assertEqual((done.returncode, done.stderr), (0, ""))
        self.assertRegex(done.stdout, rf"(?m)^chat +\[.*\].* {os.getpid()}$")
        self.assertNotIn("\033", done.stdout)
        self.assertIn("chat", run_module("kvcached.cli.kvtop", "chat").stdout)
        for names in (["nosuch"], ["chat", "nosuch"]):
            done = run_module("kvcached.cli.kvtop", *names)
            self.assertEqual((done.returncode, done.stdout), (1, ""))
            self.assertEqual(done.stderr, "kvtop: no instance nosuch; there are chat\n")
        session.close()

    def test_no_broker(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            done = run_module("kvcached.cli.kvtop", "--address", folder)
        self.assertEqual((done.returncode, done.stdout), (1, ""))
        self.assertRegex(done.stderr, r"\Akvtop: ")

    def test_usage(self) -> None:
        self.assertEqual(run_module("kvcached.cli.kvtop", "--refresh", "0").returncode, 2)

    def on_a_terminal(self) -> tuple[subprocess.Popen[bytes], int]:
        mine, its = pty.openpty()
        self.addCleanup(os.close, mine)
        process = subprocess.Popen(
            [sys.executable, "-m", "kvcached.cli.kvtop", "--refresh", "0.1"],
            stdin=its,
            stdout=its,
            stderr=subprocess.PIPE,
            env={**os.environ, "TERM": "xterm", "LINES": "20", "COLUMNS": "100"},
            start_new_session=True,
            # Which may be ignored here, as in what a shell runs in the background.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        os.close(its)
        self.addCleanup(lambda: process.poll() is None and process.kill())
        assert process.stderr is not None
        self.addCleanup(process.stderr.close)
        return process, mine

    def read_until(self, terminal: int, pattern: bytes) -> None:
        seen = b""
        deadline = time.monotonic() + TIMEOUT_S
        while not re.search(pattern, seen):
            ready, _, _ = select.select([terminal], [], [], max(0, deadline - time.monotonic()))
            self.assertTrue(ready, seen)
            seen += os.read(terminal, 65536)

    def finish(self, process: subprocess.Popen[bytes], terminal: int) -> None:
        def ended() -> bool:
            with contextlib.suppress(OSError):  # What it still writes has to go somewhere.
                while select.select([terminal], [], [], 0)[0]:
                    os.read(terminal, 65536)
            return process.poll() is not None

        self.assertTrue(eventually(ended))
        assert process.stderr is not None
        self.assertEqual((process.returncode, process.stderr.read()), (0, b""))

    def test_q_leaves(self) -> None:
        process, terminal = self.on_a_terminal()
        self.read_until(terminal, rb"nobody is connected")
        os.write(terminal, b"q")
        self.finish(process, terminal)

    def test_an_interrupt_leaves(self) -> None:
        process, terminal = self.on_a_terminal()
        self.read_until(terminal, rb"nobody is connected")
        process.send_signal(signal.SIGINT)
        self.finish(process, terminal)

    def test_it_lives_through_other_sizes_and_without_a_broker(self) -> None:
        import termios

        process, terminal = self.on_a_terminal()
        self.read_until(terminal, rb"nobody is connected")
        for rows, columns in ((1, 1), (3, 7), (60, 300), (2, 40), (20, 100)):
            fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("4H", rows, columns, 0, 0))
            process.send_signal(signal.SIGWINCH)
            time.sleep(0.02)  # For it to draw in between; nothing depends on it.
        self.broker.kill()
        self.read_until(terminal, rb"(?i)broker")
        self.broker.start()
        self.read_until(terminal, rb"nobody")
        os.write(terminal, b"q")
        self.finish(process, terminal)


if __name__ == "__main__":
    unittest.main()
