from __future__ import annotations

import io
import unittest
from unittest import mock

from engines import Status
from live import LiveView
from units import Units

_STATUS = Status(t_s=30, load_tokens=4321, waiting=7, running=3, in_use=2 << 20, idle=0, held=0)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class LiveViewTest(unittest.TestCase):
    def setUp(self) -> None:
        self.now = 100.0
        patch = mock.patch("live.time.monotonic", side_effect=lambda: self.now)
        patch.start()
        self.addCleanup(patch.stop)

    def view(self, out: io.StringIO) -> LiveView:
        view = LiveView(out, Units(256, 16), capacity_tokens=1000, window_s=60)
        view.begin("title", ["conv", "code"])
        return view

    def test_elsewhere_a_line_an_engine_now_and_then(self) -> None:
        out = io.StringIO()
        view = self.view(out)
        view.tick()
        for _ in range(3):
            view.update("conv", _STATUS)
            view.tick()
        lines = out.getvalue().splitlines()
        self.assertEqual(sum("4,321 tok" in line for line in lines), 1)
        self.now += 60
        view.tick()
        self.assertEqual(out.getvalue().count("4,321 tok"), 2)
        self.assertNotIn("\x1b", out.getvalue())

    def test_a_terminal_is_redrawn_in_place(self) -> None:
        out = Terminal()
        view = self.view(out)
        view.update("conv", _STATUS)
        view.tick()
        self.assertIn("30 of 60 s", out.getvalue())
        self.assertIn("code         starting", out.getvalue())
        self.assertNotIn("A\r", out.getvalue())
        view.update("code", _STATUS)
        view.end()
        self.assertIn("\x1b[4A", out.getvalue())

    def test_the_next_run_begins_below(self) -> None:
        out = Terminal()
        view = self.view(out)
        view.update("conv", _STATUS)
        view.tick()
        view.begin("second", ["a"])
        view.update("a", _STATUS)
        view.tick()
        self.assertNotIn("\x1b[4A", out.getvalue())


if __name__ == "__main__":
    unittest.main()
