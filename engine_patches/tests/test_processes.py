"""Forks, spawned processes, the interpreter's end, and several processes at once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

from broker import DEVICE, TIMEOUT_S, BrokerTest, eventually, take

from kvcached import control
from kvcached.errors import ForkedError
from kvcached.integration.vllm import interfaces as vllm
from kvcached.kv_cache_manager import KVCacheManager
from kvcached.runtime import runtime

CELL = 16 << 10


PRELUDE = """
import os, random, sys, threading, time
sys.path.insert(0, {tests!r})
from broker import DEVICE, eventually
from kvcached.integration.vllm import interfaces as vllm
from kvcached.kv_cache_manager import KVCacheManager
CELL = 16 << 10
vllm.init_kvcached(device=DEVICE)
"""


def start(program: str, **environ: str) -> subprocess.Popen[str]:
    """A Python process that has initialised kvcached."""
    prelude = PRELUDE.format(tests=os.path.dirname(os.path.abspath(__file__)))
    return subprocess.Popen(
        [sys.executable, "-c", prelude + textwrap.dedent(program)],
        env={**os.environ, **environ},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


class Processes(BrokerTest):
    CAPACITY = "64M"

    def finish(self, process: subprocess.Popen[str]) -> str:
        """Its output, once it has ended well and said nothing on stderr."""
        try:
            out, err = process.communicate(timeout=TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            out, err = process.communicate()
            self.fail(f"hangs: {out} {err}")
        self.assertEqual((process.returncode, err), (0, ""))
        return out

    def run_program(self, program: str, **environ: str) -> str:
        return self.finish(start(program, **environ))

    def nobody_holds_anything(self) -> bool:
        return json.loads(self.broker.kvctl("list", "--json")) == []


class End(Processes):
    def test_a_process_that_holds_blocks_ends_well(self) -> None:
        self.run_program(
            """
            mine = KVCacheManager(1000, 16, CELL, 2)
            assert eventually(lambda: mine.alloc(10))
            """
        )
        self.assertTrue(eventually(self.nobody_holds_anything))

    def test_one_with_daemon_threads_in_the_pool_too(self) -> None:
        self.run_program(
            """
            mine = KVCacheManager(1000, 16, CELL, 2)
            def use():
                while True:
                    mine.free(mine.alloc(10) or [])
                    mine.alloc(200)
            for _ in range(4):
                threading.Thread(target=use, daemon=True).start()
            time.sleep(0.2)
            """
        )

    def test_one_that_is_shut_down_and_used_again(self) -> None:
        self.run_program(
            """
            for _ in range(3):
                mine = KVCacheManager(1000, 16, CELL, 2)
                assert eventually(lambda: mine.alloc(10))
                assert vllm.shutdown_kvcached() is True
                assert vllm.shutdown_kvcached() is True
                for call in (lambda: mine.alloc(1), mine.available_size, lambda: mine.free([1]),
                             mine.trim, lambda: mine.pool):
                    try:
                        call()
                    except RuntimeError as error:
                        assert "init_kvcached()" in str(error), error
                    else:
                        raise AssertionError("works after shutdown")
                vllm.init_kvcached(device=DEVICE)
            """
        )

    def test_one_without_a_broker(self) -> None:
        process = start(
            """
            mine = KVCacheManager(1000, 16, CELL, 2)
            assert eventually(lambda: mine.alloc(10))
            print("ready", flush=True)
            sys.stdin.readline()
            """
        )
        assert process.stdout is not None
        self.assertEqual(process.stdout.readline(), "ready\n")
        self.broker.kill()
        self.finish(process)

    def test_one_that_is_killed(self) -> None:
        process = start(
            """
            mine = KVCacheManager(1000, 16, CELL, 2)
            assert eventually(lambda: mine.alloc(60))
            print("ready", flush=True)
            sys.stdin.readline()
            """
        )
        assert process.stdout is not None
        self.assertEqual(process.stdout.readline(), "ready\n")
        process.send_signal(signal.SIGKILL)
        process.communicate()
        vllm.init_kvcached(device=DEVICE)
        take(KVCacheManager(1000, 16, CELL, 2), 60)

    def test_the_name_is_free_for_the_next_process(self) -> None:
        for _ in range(3):
            out = self.run_program(
                """
                mine = KVCacheManager(1000, 16, CELL, 2)
                assert eventually(lambda: mine.alloc(60))
                print(mine.group.session.instance)
                """
            )
            self.assertEqual(out, "test\n")

    def test_a_limit_outlives_its_process(self) -> None:
        program = """
            mine = KVCacheManager(1000, 16, CELL, 2)
            before = mine.group.session.limits()[1]
            {do}
            print(before, mine.group.session.limits()[1])
            """
        page = 2 << 22
        out = self.run_program(program.format(do=f"mine.set_memory_limit(3 * {page}, revision=1)"))
        self.assertEqual(out.split()[1], str(3 * page))
        out = self.run_program(
            program.format(do="assert mine.alloc(25) is None"), KVBROKER_LIMIT="1G"
        )
        self.assertEqual(out.split(), [str(3 * page)] * 2)
        self.broker.kvctl("limit", "test", str(2 * page))
        self.assertEqual(self.run_program(program.format(do="")).split(), [str(2 * page)] * 2)

    def test_default_names_are_told_apart(self) -> None:
        programs = [
            start(
                """
                mine = KVCacheManager(1000, 16, CELL, 2)
                other = KVCacheManager(1000, 16, CELL, 2, group_id=1)
                names = {mine.group.session.instance, other.group.session.instance}
                assert len(names) == 1, names
                print(*names, flush=True)
                sys.stdin.readline()
                """,
                KVCACHED_IPC_NAME="",
            )
            for _ in range(2)
        ]
        names = [process.stdout.readline().strip() for process in programs if process.stdout]
        self.assertEqual(len(set(names)), 2, names)
        for name in names:
            self.assertRegex(name, r"^kvcached_vLLM_\d+")
        for process in programs:
            self.finish(process)


class Forks(Processes):
    def in_child(self, do: object) -> str:
        """What ``do`` returns in a forked process."""
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                text = str(do())  # type: ignore[operator]
            except BaseException as error:
                text = repr(error)
            os.write(write, text.encode())
            os._exit(0)
        os.close(write)
        with os.fdopen(read) as answer:
            text = answer.read()
        self.assertEqual(os.waitpid(child, 0)[1], 0)
        return text

    def test_after_a_pool_was_opened_each_call_says_what_to_do(self) -> None:
        vllm.init_kvcached(device=DEVICE)
        mine = KVCacheManager(1000, 16, CELL, 2)
        blocks = take(mine, 3)

        def calls() -> list[str]:
            texts = []
            for call in (
                lambda: mine.alloc(1),
                lambda: mine.free(blocks),
                mine.available_size,
                mine.memory_limit_state,
                lambda: mine.pool,
                vllm.init_kvcached,
                lambda: vllm.get_kv_cache_manager(10, 16, CELL, 2),
                vllm.get_world_size,
            ):
                try:
                    texts.append(f"works: {call()}")
                except ForkedError as error:
                    texts.append(str(error))
            assert vllm.shutdown_kvcached() is True
            return [text for text in texts if "the first pool is opened, or use spawn" not in text]

        self.assertEqual(self.in_child(calls), "[]")
        # The parent's is untouched.
        mine.free(blocks)
        take(mine, 60)

    def test_reserved_blocks_are_not_the_childs(self) -> None:
        vllm.init_kvcached(device=DEVICE)
        mine = KVCacheManager(1000, 16, CELL, 2)
        take(mine, 1)
        self.assertTrue(eventually(lambda: mine.try_to_reserve(3)))

        def calls() -> list[object]:
            answers: list[object] = [mine.reserved_blocks]
            for call in (
                lambda: mine.alloc(0),
                lambda: mine.alloc(1),
                lambda: mine.free([]),
                lambda: mine.try_to_reserve(0),
                mine.free_reserved,
            ):
                try:
                    answers.append(call())
                except ForkedError:
                    answers.append("forked")
            return answers

        # There is nothing that free_reserved would give back.
        self.assertEqual(self.in_child(calls), str([[], *["forked"] * 4, None]))
        self.assertEqual(len(mine.reserved_blocks), 3)

    def test_a_manager_dropped_in_a_child_is_still_the_parents(self) -> None:
        vllm.init_kvcached(device=DEVICE)
        managers = [KVCacheManager(1000, 16, CELL, 2)]
        blocks = take(managers[0], 3)
        self.assertEqual(self.in_child(managers.clear), "None")
        self.assertEqual(managers[0].pool.used_blocks(), sorted(blocks))

    def test_members_of_processes_with_one_pid_differ(self) -> None:
        mine = runtime._member
        self.assertRegex(mine, "^[0-9a-f]{8}$")
        theirs = self.in_child(lambda: runtime._member)
        self.assertRegex(theirs, "^[0-9a-f]{8}$")
        self.assertNotEqual(theirs, mine)

    def test_a_child_may_end_as_it_likes(self) -> None:
        self.run_program(
            """
            import warnings
            warnings.simplefilter("ignore")  # there are threads, and a fork
            mine = KVCacheManager(1000, 16, CELL, 2)
            assert eventually(lambda: mine.alloc(10))
            child = os.fork()
            if child == 0:
                sys.exit(0)
            assert os.waitpid(child, 0)[1] == 0
            assert eventually(lambda: mine.alloc(10))
            """
        )

    def test_before_a_pool_is_opened_a_fork_is_fine(self) -> None:
        self.run_program(
            """
            mine = KVCacheManager(1000, 16, CELL, 2)
            child = os.fork()
            assert eventually(lambda: mine.alloc(10))
            if child != 0:
                assert os.waitpid(child, 0)[1] == 0
            """
        )

    def test_spawned_processes_have_pools_of_their_own(self) -> None:
        self.run_program(
            """
            import multiprocessing
            mine = KVCacheManager(1000, 16, CELL, 2)
            assert eventually(lambda: mine.alloc(10))
            process = multiprocessing.get_context("spawn").Process(target=print, args=("child",))
            process.start()
            process.join()
            assert process.exitcode == 0
            """
        )


class Together(Processes):
    CAPACITY = "96M"  # 12 pages of 8 blocks

    def test_eight_processes_get_all_or_nothing(self) -> None:
        program = """
            who = int(sys.argv[-1]) if sys.argv[-1].isdigit() else os.getpid()
            rng = random.Random(who)
            mine = KVCacheManager(1000, 16, CELL, 2)
            held, hits, misses = set(), 0, 0
            most = 0
            sys.stdin.readline()
            for _ in range(150):
                if rng.random() < 0.6:
                    wanted = rng.choice((1, 3, 8, 20))
                    got = mine.alloc(wanted)
                    if got is None:
                        misses += 1
                        assert set(mine.pool.used_blocks()) == held
                        continue
                    hits += 1
                    assert len(got) == wanted and len(set(got)) == wanted, got
                    assert not held & set(got), (got, held)
                    held |= set(got)
                    most = max(most, len(held))
                elif held:
                    gone = rng.sample(sorted(held), rng.randrange(len(held)) + 1)
                    held -= set(gone)
                    mine.free(gone)
            assert set(mine.pool.used_blocks()) == held
            mine.free(sorted(held))
            print(hits, misses)
            """
        processes = [start(program, KVCACHED_IPC_NAME=f"racer-{i}") for i in range(8)]
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        counts = [[int(word) for word in self.finish(p).split()] for p in processes]
        self.assertTrue(all(hits for hits, _ in counts), counts)
        self.assertTrue(any(misses for _, misses in counts), counts)
        self.assertTrue(eventually(self.nobody_holds_anything))

    def test_what_one_does_not_use_the_other_gets(self) -> None:
        vllm.init_kvcached(device=DEVICE)
        mine = KVCacheManager(1000, 16, CELL, 2)
        mine.free(take(mine, 90))
        other = start(
            """
            mine = KVCacheManager(1000, 16, CELL, 2)
            assert eventually(lambda: mine.alloc(90))
            """,
            KVCACHED_IPC_NAME="other",
        )
        self.finish(other)
        take(mine, 90)


class Names(Processes):
    def two(self, **environ: str) -> tuple[subprocess.Popen[str], str, str, int]:
        """A process in the instance, and what a second one says and ends with."""
        first = start(
            """
            mine = KVCacheManager(1000, 16, CELL, 2)
            print(mine.group.session.instance, flush=True)
            sys.stdin.readline()
            """
        )
        self.addCleanup(first.communicate)
        assert first.stdout is not None
        self.assertEqual(first.stdout.readline(), "test\n")
        second = start("print(KVCacheManager(1000, 16, CELL, 2).group.session.instance)", **environ)
        out, err = second.communicate(timeout=TIMEOUT_S)
        return first, out, err, second.returncode

    def test_join(self) -> None:
        first, out, err, status = self.two(KVCACHED_LOG_LEVEL="WARNING")
        self.assertEqual((out, status), ("test\n", 0))
        self.assertIn(str(first.pid), err)

    def test_suffix(self) -> None:
        _, out, err, status = self.two(
            KVBROKER_NAME_CONFLICT="suffix", KVCACHED_LOG_LEVEL="WARNING"
        )
        self.assertEqual((out, status), ("test_1\n", 0))
        self.assertIn("test_1", err)

    def test_error(self) -> None:
        first, out, err, status = self.two(KVBROKER_NAME_CONFLICT="error")
        self.assertEqual((out, status), ("", 1))
        self.assertIn(str(first.pid), err)


class Brokers(Processes):
    def test_one_is_started_where_there_is_none(self) -> None:
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        program = """
            from kvcached import _C
            import json
            mine = KVCacheManager(1000, 16, CELL, 2)
            assert eventually(lambda: mine.alloc(10))
            print(json.loads(_C.list_brokers())[0]["pid"])
            """
        here = {"KVBROKER_ADDRESS": "", "XDG_RUNTIME_DIR": folder.name}
        broker = int(self.run_program(program, **here))
        try:
            self.assertNotEqual(os.getpgid(broker), os.getpgrp())
            self.assertNotEqual(os.getsid(broker), os.getsid(0))
            self.assertEqual(int(self.run_program(program, **here)), broker)
        finally:
            os.kill(broker, signal.SIGTERM)
        self.assertTrue(eventually(lambda: not list(Path(folder.name).rglob("*.sock"))))

    def test_a_broker_that_comes_back(self) -> None:
        self.assertEqual(control.state(), "starting")
        vllm.init_kvcached(device=DEVICE)
        mine = KVCacheManager(1000, 16, CELL, 2)
        blocks = take(mine, 10)
        self.assertTrue(control.wait_ready(TIMEOUT_S))
        self.broker.kill()
        self.assertTrue(eventually(lambda: control.state() == "detached"))
        self.assertFalse(control.wait_ready(0))
        mine.free(blocks)
        self.assertEqual(len(mine.alloc(10) or []), 10)
        self.broker.start()
        self.assertTrue(control.wait_ready(TIMEOUT_S))
        take(mine, 30)


if __name__ == "__main__":
    import unittest

    unittest.main()
