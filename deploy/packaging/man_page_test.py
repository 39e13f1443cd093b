from __future__ import annotations

import shutil
import subprocess
import sys
import unittest
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import man_page  # noqa: E402

PAGES = sorted((HERE.parents[1] / "docs" / "man").glob("*.[1-8].md"))


def body(markdown: str) -> list[str]:
    lines = man_page.to_roff(f"# x(1): y\n\n{markdown}\n").splitlines()
    return lines[lines.index("x \\- y") + 1 :]


class ToRoff(unittest.TestCase):
    def test_head(self) -> None:
        lines = man_page.to_roff("# kvctl(1): shows and sets\n\n## NAME2\n").splitlines()
        self.assertEqual(lines[0], "'\\\" t")  # tbl is wanted
        self.assertTrue(lines[1].startswith('.TH "KVCTL" "1"'), lines[1])
        self.assertIn("kvctl \\- shows and sets", lines)

    def test_no_title_is_an_error(self) -> None:
        with self.assertRaises(ValueError):
            man_page.to_roff("kvctl\n")

    def test_paragraphs_and_letters(self) -> None:
        self.assertEqual(
            body("Say **--all** to *NAME*, `a-b`, or\n[there](x.md).\\\nNext"),
            [
                ".PP",
                "Say \\fB\\-\\-all\\fR to \\fINAME\\fR, \\fBa\\-b\\fR, or",
                "there.",
                ".br",
                "Next",
            ],
        )

    def test_a_line_that_looks_like_a_request_is_text(self) -> None:
        self.assertEqual(body(".so x\n'y"), [".PP", "\\&.so x", "\\&'y"])
        self.assertEqual(body("a\\b"), [".PP", "a\\eb"])

    def test_definitions(self) -> None:
        self.assertEqual(
            body("**a**\n:   first\n    line\n\n    second\n\nafter"),
            [".TP", "\\fBa\\fR", "first", "line", ".RS", ".PP", "second", ".RE", ".PP", "after"],
        )

    def test_tables(self) -> None:
        self.assertEqual(
            body("| a | b |\n|---|---|\n| 1 | 2 \\| 3 |"),
            [
                ".TS",
                "tab(\t);",
                "lb l.",
                "\\fBa\\fR\tT{",
                "\\fBb\\fR",
                "T}",
                "1\tT{",
                "2 | 3",
                "T}",
                ".TE",
            ],
        )

    def test_examples_are_left_as_they_are(self) -> None:
        self.assertEqual(
            body("    $ kvctl  list"), [".PP", ".nf", ".RS 4", "$ kvctl  list", ".RE", ".fi"]
        )


class Pages(unittest.TestCase):
    def test_all_are_made(self) -> None:
        self.assertTrue(PAGES)
        for page in PAGES:
            text = page.read_text(encoding="utf-8")
            roff = man_page.to_roff(text)
            for section in (line[3:] for line in text.splitlines() if line.startswith("## ")):
                self.assertIn(f'.SH "{section}"', roff)
            self.assertNotIn("**", roff)
            self.assertNotIn("`", roff)

    def test_groff_has_nothing_to_say(self) -> None:
        if not shutil.which("groff"):
            self.skipTest("there is no groff here")
        for page in PAGES:
            done = subprocess.run(
                ["groff", "-t", "-man", "-ww", "-Tutf8"],
                input=man_page.to_roff(page.read_text(encoding="utf-8")),
                capture_output=True,
                text=True,
                check=False,
            )
            self.assertEqual((done.returncode, done.stderr), (0, ""), page)


if __name__ == "__main__":
    unittest.main()
