from __future__ import annotations

import tempfile
import unittest
from pathlib import Path

from traces import Trace, TraceError, align, flood_beside, measured_trace, parse_trace

_HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens\n"


class TracesTest(unittest.TestCase):
    def setUp(self) -> None:
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)

    def file(self, name: str, *rows: str) -> str:
        path = self.folder / name
        path.write_text(_HEADER + "".join(f"{row},10,20\n" for row in rows), encoding="utf-8")
        return str(path)

    def test_reads_file_and_shift(self) -> None:
        path = self.file("a.csv", "1.5")
        self.assertEqual(parse_trace(f"a={path}"), Trace("a", path))
        self.assertEqual(parse_trace(f"a={path}@600"), Trace("a", path, shift_s=600))
        self.assertEqual(parse_trace(f"a={path}@-2.5").shift_s, -2.5)

    def test_an_at_sign_may_be_part_of_the_file_name(self) -> None:
        path = self.file("a@home.csv", "1")
        self.assertEqual(parse_trace(f"a={path}").source, path)
        self.assertEqual(parse_trace(f"a={path}@3"), Trace("a", path, shift_s=3))

    def test_refuses_what_it_cannot_use(self) -> None:
        path = self.file("a.csv", "1")
        for text in ("a", "a=", f"={path}", f"a/b={path}", f"a={path}@nan", f"a={path}@inf"):
            with self.subTest(text=text), self.assertRaises(TraceError):
                parse_trace(text)

    def test_files_of_dates_share_origin_and_length(self) -> None:
        early = self.file("early", "2023-11-16 18:15:46.6805900", "2023-11-16 18:20:00")
        late = self.file("late", "2023-11-16T18:35:45.98Z", "2023-11-16 18:17:03.9799600")
        aligned = align([Trace("a", late), Trace("b", early)], seed=5, window_s=1200)
        for trace in aligned:
            self.assertEqual(trace.origin, "2023-11-16 18:15:46.6805900")
            self.assertEqual(trace.length_s, 1200)

    def test_files_of_seconds_and_built_in_traces_need_no_origin(self) -> None:
        seconds = Trace("a", self.file("seconds", "3.5", "70"))
        builtin = Trace("b", "builtin:conv")
        a, b = align([seconds, builtin], seed=5, window_s=2000)
        self.assertEqual((a.origin, a.length_s), (None, None))
        self.assertEqual((b.origin, b.length_s, b.seed), (None, 2000, 5))

    def test_flags_say_it_all(self) -> None:
        trace = Trace("a", "x.csv", 1.5, seed=7, rate_scale=3.0, origin="2023-11-16 18:15:46")
        self.assertEqual(
            trace.flags(60),
            [
                "--trace",
                "x.csv",
                "--seed=7",
                "--window=60",
                "--shift=1.5",
                "--rate-scale=3",
                "--origin=2023-11-16 18:15:46",
            ],
        )

    def test_conv_is_measured_or_else_the_first(self) -> None:
        a, conv = Trace("a", "builtin:code"), Trace("conv", "builtin:conv")
        self.assertEqual(measured_trace([a, conv]), conv)
        self.assertEqual(measured_trace([a]), a)

    def test_the_flood_has_other_requests(self) -> None:
        builtin = flood_beside(Trace("conv", "builtin:conv", seed=17))
        self.assertEqual((builtin.name, builtin.rate_scale, builtin.seed), ("flood", 3, 18))
        file = flood_beside(Trace("flood", "x.csv", shift_s=100, length_s=1000))
        self.assertEqual((file.name, file.shift_s), ("flood2", 600))


if __name__ == "__main__":
    unittest.main()
