"""What is told to sessions around the capture of a graph, of a class that is like torch's."""

from __future__ import annotations

import unittest

from broker import BrokerTest

from kvcached import _C, graphs
from kvcached.kv_cache_manager import KVCacheManager
from kvcached.runtime import runtime


class Session:
    def __init__(self, fails: bool = False) -> None:
        self.pauses = 0
        self.fails = fails

    def pause(self) -> None:
        if self.fails:
            raise _C.Error("closed")
        self.pauses += 1

    def resume(self) -> None:
        self.pauses -= 1


class GraphsTest(unittest.TestCase):
    def setUp(self) -> None:
        self.sessions = [Session(), Session()]
        self.seen: list[tuple[str, list[int]]] = []
        test = self

        class Graph:
            def capture_begin(self, pool: object = None) -> str:
                test.seen.append(("begin", [s.pauses for s in test.sessions]))
                if pool == "bad":
                    raise RuntimeError("no capture")
                return "begun"

            def capture_end(self) -> None:
                test.seen.append(("end", [s.pauses for s in test.sessions]))
                if len(test.seen) > 2:
                    raise RuntimeError("invalidated")

        graphs._wrap(Graph, lambda: self.sessions)  # type: ignore[arg-type, return-value]
        self.graph = Graph()

    def pauses(self) -> list[int]:
        return [session.pauses for session in self.sessions]

    def test_pages_stay_from_the_beginning_to_the_end(self) -> None:
        self.assertEqual(self.graph.capture_begin(pool=3), "begun")
        self.graph.capture_end()
        self.assertEqual(self.seen, [("begin", [1, 1]), ("end", [1, 1])])
        self.assertEqual(self.pauses(), [0, 0])

    def test_a_capture_that_fails_ends_the_pause(self) -> None:
        with self.assertRaisesRegex(RuntimeError, "no capture"):
            self.graph.capture_begin("bad")
        self.assertEqual(self.pauses(), [0, 0])
        self.graph.capture_begin()
        with self.assertRaisesRegex(RuntimeError, "invalidated"):
            self.graph.capture_end()
        self.assertEqual(self.pauses(), [0, 0])

    def test_a_pool_that_opens_in_the_midst_is_not_resumed(self) -> None:
        self.graph.capture_begin()
        self.sessions.append(Session())
        self.graph.capture_end()
        self.assertEqual(self.pauses(), [0, 0, 0])

    def test_what_cannot_be_paused_ends_the_pause_of_the_others(self) -> None:
        self.sessions.append(Session(fails=True))
        with self.assertRaises(_C.Error):
            self.graph.capture_begin()
        self.assertEqual(self.pauses(), [0, 0, 0])
        self.assertEqual(self.seen, [])


class PauseTest(BrokerTest):
    def test_nothing_comes_while_a_session_is_paused(self) -> None:
        runtime.init(device="cpu")
        manager = KVCacheManager(1000, 16, 16 << 10, 2)
        self.assertIsNotNone(manager.alloc(8))
        session, pool = manager.group.session, manager.pool
        pool.trim()
        session.pause()
        session.pause()
        before = pool.usage()[:3]
        self.assertIsNone(pool.alloc(40, _C.RUNNING))
        self.assertEqual(pool.usage()[:3], before)
        session.resume()
        self.assertIsNone(pool.alloc(40, _C.RUNNING))
        self.assertEqual(pool.usage()[:3], before)
        session.resume()
        self.assertIsNotNone(pool.alloc(40, _C.RUNNING))
        with self.assertRaises(_C.Error) as raised:
            session.resume()
        self.assertEqual(raised.exception.code, _C.FAILED_PRECONDITION)

    def test_a_paused_session_can_be_closed(self) -> None:
        runtime.init(device="cpu")
        manager = KVCacheManager(1000, 16, 16 << 10, 2)
        self.assertIsNotNone(manager.alloc(8))
        manager.group.session.pause()
        runtime.shutdown()


if __name__ == "__main__":
    unittest.main()
