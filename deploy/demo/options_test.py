from __future__ import annotations

import contextlib
import io
import tempfile
import unittest
from pathlib import Path

from options import Options, parse_options


class ParseOptionsTest(unittest.TestCase):
    def complaint(self, *arguments: str) -> str:
        err = io.StringIO()
        with contextlib.redirect_stderr(err), self.assertRaises(SystemExit) as exited:
            parse_options(arguments)
        self.assertEqual(exited.exception.code, 2)
        return err.getvalue()

    def test_defaults(self) -> None:
        options: Options = parse_options([])
        self.assertEqual([trace.name for trace in options.traces], ["conv", "code", "code2"])
        self.assertEqual(options.traces[2].shift_s, 600)
        self.assertIsNone(options.capacity_tokens)
        self.assertEqual((options.prefill, options.decode), (20_000, 30))
        self.assertEqual(options.window_s, 1200)
        self.assertEqual(options.acts, {1, 2})
        self.assertEqual(options.chart, Path("kvbroker-demo.svg"))

    def test_values(self) -> None:
        options = parse_options(
            ["--capacity=200,000", "--window", "60.5", "--seed=3", "--only=1", "--no-install"]
        )
        self.assertEqual(options.capacity_tokens, 200_000)
        self.assertEqual(options.window_s, 60.5)
        self.assertEqual(options.seed, 3)
        self.assertEqual(options.traces[0].seed, 3)
        self.assertEqual(options.acts, {1})

    def test_the_chart_lies_beside_the_json(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            self.assertEqual(
                parse_options([f"--json={folder}/a.json"]).chart, Path(folder, "a.svg")
            )
            self.assertEqual(parse_options([f"--json={folder}/a"]).chart, Path(folder, "a.svg"))

    def test_bad_numbers_are_named(self) -> None:
        for flag in ("--prefill", "--decode", "--window", "--speedup"):
            for value in ("0", "-1", "nan", "inf", "many"):
                with self.subTest(flag=flag, value=value):
                    complaint = self.complaint(f"{flag}={value}")
                    self.assertIn(flag, complaint)
                    self.assertIn(value, complaint)
        for value in ("0", "-5", "1.5", "much"):
            self.assertIn(value, self.complaint(f"--capacity={value}"))
        self.assertIn("--seed", self.complaint("--seed=-1"))

    def test_wrong_usage_is_refused(self) -> None:
        self.assertIn("--sped", self.complaint("--sped=3"))
        self.assertIn("--only", self.complaint("--only=3"))
        self.assertIn("extra", self.complaint("extra"))
        self.assertIn("/nowhere", self.complaint("--json=/nowhere/a.json"))
        self.assertIn("is a directory", self.complaint("--json=/"))
        self.assertIn("is not a directory", self.complaint(f"--requests={__file__}"))

    def test_bad_traces_are_refused(self) -> None:
        self.assertIn("no such trace file: /nowhere.csv", self.complaint("--trace=a=/nowhere.csv"))
        self.assertIn("builtin:conv, builtin:code", self.complaint("--trace=a=builtin:chat"))
        self.assertIn("NAME=FILE", self.complaint("--trace=conv"))
        self.assertIn("two traces", self.complaint(*["--trace=a=builtin:conv"] * 2))


if __name__ == "__main__":
    unittest.main()
