"""The extension by itself: what careless and hostile callers do to it."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import time
import unittest

from broker import BrokerTest

from kvcached import _C

PAGE = 2 << 20


class Native(BrokerTest):
    CAPACITY = "64M"

    def open(self, **pool: object) -> _C.Session:
        options = {"handle_bytes": PAGE, "max_pages": 16, "block_bytes": PAGE // 4, **pool}
        session = _C.Session("test", [options], address=self.broker.address)  # type: ignore[list-item]
        self.addCleanup(session.close)
        return session

    def test_a_session_that_closes_while_arguments_are_read(self) -> None:
        class Closes:
            def __init__(self, session: _C.Session) -> None:
                self.session = session

            def __index__(self) -> int:
                self.session.close()
                return 1

        for use in (
            lambda pool, evil: pool.free([evil]),
            lambda pool, evil: pool.cache([evil]),
            lambda pool, evil: pool.touch([evil], [1]),
            lambda pool, evil: pool.generations([evil]),
            lambda pool, evil: pool.alloc_at([evil], 10),
        ):
            session = self.open()
            pool = session.pool(0)
            with self.assertRaises(_C.Error) as raised:
                use(pool, Closes(session))
            self.assertEqual(raised.exception.code, _C.FAILED_PRECONDITION)
            self.assertIn("closed", str(raised.exception))

    def test_closing_ends_what_waits(self) -> None:
        session = self.open()
        pool = session.pool(0)
        ended: list[object] = []
        waits = [
            lambda: pool.reserve(40, 60_000),
            lambda: pool.alloc_at(list(range(60)), 60_000),
            lambda: session.make_room(1 << 40, 60_000),
        ]

        def run(wait: object) -> None:
            try:
                ended.append(wait())  # type: ignore[operator]
            except _C.Error as error:
                ended.append(error)

        # All there is, so that they have to wait.
        other = self.open()
        taken = other.pool(0)
        while taken.alloc(4, _C.RUNNING) is not None:
            pass
        threads = [threading.Thread(target=run, args=(wait,)) for wait in waits]
        for thread in threads:
            thread.start()
        time.sleep(0.2)
        session.close()
        for thread in threads:
            thread.join(20)
            self.assertFalse(thread.is_alive())
        self.assertEqual(len(ended), 3)

    def test_a_session_is_opened_once(self) -> None:
        session = self.open()
        pool = session.pool(0)
        arguments = ("test", [{"handle_bytes": PAGE, "max_pages": 1, "block_bytes": PAGE}])
        with self.assertRaises(RuntimeError):
            session.__init__(*arguments, address=self.broker.address)  # type: ignore[misc]
        session.close()
        with self.assertRaises(RuntimeError):
            session.__init__(*arguments, address=self.broker.address)  # type: ignore[misc]
        with self.assertRaises(_C.Error):
            pool.available()

    def test_pools_come_from_sessions(self) -> None:
        with self.assertRaises(TypeError):
            _C.Pool()

    def test_absurd_numbers_cost_nothing(self) -> None:
        pool = self.open().pool(0)
        self.assertIsNone(pool.alloc(2**31 - 1, _C.NOW))
        self.assertIsNone(pool.alloc(65))
        self.assertEqual(pool.blocks_to_vacate(2**31 - 1), [])
        for wrong in (-1, 2**40):
            with self.assertRaises(ValueError):
                pool.alloc(wrong)
        with self.assertRaises(OverflowError):
            pool.free([2**40])
        with self.assertRaises(ValueError):
            pool.dlpack(0, 2**62)

    def test_a_pool_keeps_its_session(self) -> None:
        pool = self.open().pool(0)
        self._cleanups.pop()  # what open() would have closed
        gc.collect()
        self.assertEqual(pool.usage()[0], 0)

    def test_wrong_options_are_named(self) -> None:
        for pools, part in (
            ([{"handle_bytes": PAGE, "max_pages": 1, "block_bytes": PAGE, "typo": 1}], "typo"),
            ([{"handle_bytes": -1}], "handle_bytes"),
            ([{"handle_bytes": PAGE, "max_pages": 1 << 40}], "max_pages"),
        ):
            with self.assertRaisesRegex(ValueError, part):
                _C.Session("test", pools, address=self.broker.address)  # type: ignore[arg-type]
        with self.assertRaises(ValueError):
            _C.Session("test", [], name_conflict="maybe")

    def test_it_is_loaded_into_several_interpreters_processes(self) -> None:
        for _ in range(2):
            done = subprocess.run([sys.executable, "-c", "from kvcached import _C"], check=False)
            self.assertEqual(done.returncode, 0)


if __name__ == "__main__":
    unittest.main()
