from __future__ import annotations

import json
import unittest

from engines import Outcome
from report import (
    Bar,
    Compared,
    engine_bars,
    lateness_remark,
    must_bars,
    neighbour_bar,
    remarks,
    table,
    to_json,
)


def outcome(p99_ms: float, *, unfinished: int = 0, late_ms: float = 0.0) -> Outcome:
    return Outcome(
        requests=1234,
        rejected=0,
        unfinished=unfinished,
        wait_p99_ms=p99_ms,
        wait_mean_ms=p99_ms / 10,
        wait_max_ms=p99_ms,
        preemptions=3,
        integrity_errors=0,
        blocks_written=9,
        late_max_ms=late_ms,
        seconds=1.0,
    )


def compared(static_ms: float, elastic_ms: float) -> Compared:
    return Compared(outcome(static_ms), outcome(elastic_ms))


def verdicts(bars: list[Bar]) -> dict[str, bool]:
    return {bar.name: bar.passed for bar in bars}


class BarsTest(unittest.TestCase):
    def test_who_suffers_must_wait_half_as_long(self) -> None:
        for elastic_ms, passed in ((1000, True), (1001, False)):
            found = verdicts(engine_bars("a", compared(2000, elastic_ms), speedup=1))
            self.assertEqual(found, {"a.p99_halved": passed, "a.p99_not_worse": True})

    def test_half_a_second_does_not_count_as_suffering(self) -> None:
        found = verdicts(engine_bars("a", compared(500, 550), speedup=1))
        self.assertEqual(found, {"a.p99_not_worse": True})

    def test_nobody_may_be_worse_off(self) -> None:
        self.assertFalse(verdicts(engine_bars("a", compared(500, 551), 1))["a.p99_not_worse"])
        # 20 real milliseconds are 800 of the trace.
        self.assertTrue(verdicts(engine_bars("a", compared(0, 800), 40))["a.p99_not_worse"])
        self.assertFalse(verdicts(engine_bars("a", compared(0, 801), 40))["a.p99_not_worse"])

    def test_the_guarantee_must_hold_beside_a_neighbour(self) -> None:
        self.assertTrue(neighbour_bar("a", compared(10, 4010), speedup=40).passed)
        self.assertFalse(neighbour_bar("a", compared(10, 4011), speedup=40).passed)

    def test_integrity_and_leaks(self) -> None:
        self.assertEqual(
            verdicts(must_bars(0, 0)), {"integrity_errors": True, "leaked_bytes": True}
        )
        self.assertEqual(
            verdicts(must_bars(1, 4096)), {"integrity_errors": False, "leaked_bytes": False}
        )

    def test_a_line_begins_with_the_verdict(self) -> None:
        good, bad = must_bars(0, 8)
        self.assertTrue(good.line().startswith("PASS  "))
        self.assertTrue(bad.line().startswith("MISS  8 bytes"))


class TextTest(unittest.TestCase):
    def test_table_has_a_row_an_engine(self) -> None:
        text = table({"conv": compared(2240, 12), "x": compared(0, 0)}, {"conv": False, "x": None})
        lines = text.splitlines()
        self.assertEqual(len(lines), 4)
        self.assertIn("2,240", lines[2])
        self.assertTrue(lines[2].endswith("MISS"))
        self.assertTrue(lines[3].endswith("3"))

    def test_unfinished_requests_are_remarked(self) -> None:
        found = remarks({"a": Compared(outcome(1), outcome(1, unfinished=5))})
        self.assertEqual(len(found), 1)
        self.assertIn("a, broker: 5 requests", found[0])

    def test_only_a_busy_machine_is_remarked(self) -> None:
        self.assertIsNone(lateness_remark([compared(1, 1)], speedup=10))
        late = Compared(outcome(1, late_ms=999), outcome(1, late_ms=200))
        self.assertIn("200 ms late, 2,000 ms", lateness_remark([late], speedup=10) or "")


class JsonTest(unittest.TestCase):
    def contents(self, **changes: object) -> dict[str, object]:
        arguments: dict[str, object] = {
            "engines": {"conv": compared(2000, 10)},
            "neighbour": ("conv", compared(5, 6)),
            "flood": compared(9, 9),
            "bars": must_bars(0, 0),
            "integrity_errors": 0,
            "leaked_bytes": 0,
            "capacity_tokens": 4,
            "seconds": 1.25,
            "settings": {"machine": {}},
        }
        result = to_json(**{**arguments, **changes})  # type: ignore[arg-type]
        loaded: dict[str, object] = json.loads(json.dumps(result))
        return loaded

    def test_has_what_is_promised(self) -> None:
        contents = self.contents()
        for key in ("integrity_errors", "leaked_bytes", "capacity_tokens", "seconds", "bars"):
            self.assertIn(key, contents)
        engines = contents["engines"]
        assert isinstance(engines, dict)
        for way in ("static", "elastic"):
            self.assertLessEqual(
                {"wait_p99_ms", "wait_mean_ms", "preemptions"}, set(engines["conv"][way])
            )
        neighbour = contents["neighbour"]
        assert isinstance(neighbour, dict)
        self.assertEqual(neighbour["static_wait_p99_ms"], 5)
        self.assertEqual(neighbour["elastic_wait_p99_ms"], 6)

    def test_an_act_not_played_leaves_nulls(self) -> None:
        contents = self.contents(neighbour=None, flood=None)
        self.assertEqual(
            contents["neighbour"], {"static_wait_p99_ms": None, "elastic_wait_p99_ms": None}
        )


if __name__ == "__main__":
    unittest.main()
