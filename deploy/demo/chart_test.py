from __future__ import annotations

import unittest
import xml.etree.ElementTree as ElementTree

from chart import Panel, render
from engines import Status
from units import Units

_SVG = "{http://www.w3.org/2000/svg}"
_UNITS = Units(token_bytes=256, block_tokens=16)


def samples(count: int) -> list[Status]:
    return [
        Status(t_s=4.0 * i, load_tokens=1, waiting=i % 3, running=1, in_use=1 << 20, idle=0,
               held=2 << 20)
        for i in range(count)
    ]  # fmt: skip


class ChartTest(unittest.TestCase):
    def draw(self, *panels: Panel, title: str = "title") -> ElementTree.Element:
        return ElementTree.fromstring(render(title, "subtitle", panels, _UNITS))

    def texts(self, svg: ElementTree.Element) -> list[str]:
        return [text.text or "" for text in svg.iter(f"{_SVG}text")]

    def test_both_ways_are_well_formed_and_labelled(self) -> None:
        engines = {"conv": samples(300), "code": samples(250)}
        shares = {"conv": 4 << 20, "code": 4 << 20}
        svg = self.draw(
            Panel("static", engines, 8 << 20, shares), Panel("broker", engines, 8 << 20, None)
        )
        texts = self.texts(svg)
        for expected in ("static", "broker", "conv's own", "shared by all", "4.0 GiB", "2.0 GiB"):
            self.assertIn(expected, texts)
        self.assertIn("trace time, seconds", texts)
        self.assertIn("GiB of KV cache", texts)

    def test_all_is_inside_the_picture(self) -> None:
        svg = self.draw(Panel("static", {"a": samples(30)}, 1 << 20, {"a": 1 << 20}))
        width, height = float(svg.get("width", "0")), float(svg.get("height", "0"))
        for polygon in svg.iter(f"{_SVG}polygon"):
            for point in polygon.get("points", "").split():
                x, y = map(float, point.split(","))
                self.assertTrue(0 <= x <= width and 0 <= y <= height, point)

    def test_names_and_titles_are_escaped(self) -> None:
        svg = self.draw(Panel("a < b & c", {"a": samples(3)}, 1 << 20, None), title="<x>")
        self.assertIn("a < b & c", self.texts(svg))

    def test_an_engine_that_said_nothing_is_drawn_empty(self) -> None:
        self.draw(Panel("static", {"a": [], "b": samples(1)}, 1 << 20, {"a": 1, "b": 1}))


if __name__ == "__main__":
    unittest.main()
