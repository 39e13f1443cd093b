"""`kvtop`: a screen that shows who uses, keeps and waits for a GPU's KV memory.

What is shown is made by :func:`render` from two lists, without a terminal; the rest
puts it on a curses screen or prints it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

from kvcached import _C, config

# A piece of a line, and its style: "", "bold", "green", "yellow", "red".
Line = list[tuple[str, str]]

_ANSI = {"bold": "\033[1m", "green": "\033[32m", "yellow": "\033[33m", "red": "\033[31m"}
_RESET = "\033[0m"
# A look that a broker does not answer is over after this.
_TIMEOUT_MS = 2000
_NARROWEST_BAR = 8


class Look(NamedTuple):
    """What brokers said at one time; `problem` where none answered."""

    brokers: list[dict[str, Any]]
    instances: list[dict[str, Any]]
    problem: str


def look(address: str | None, gpu: str | None, names: Sequence[str]) -> Look:
    address = address or config.get("KVBROKER_ADDRESS")
    try:
        brokers = json.loads(_C.list_brokers(address, gpu, _TIMEOUT_MS))
        instances = json.loads(_C.list_instances(address, gpu, _TIMEOUT_MS))
    except _C.Error as error:
        return Look([], [], str(error) or "no broker answers")
    if names:
        instances = [instance for instance in instances if instance["ipc"] in names]
    return Look(brokers, instances, "")


def missing(seen: Look, names: Sequence[str]) -> str:
    """What to say where some of the names are no instance's; "" where all are."""
    existing = {instance["ipc"] for instance in seen.instances}
    unknown = [name for name in names if name not in existing]
    if seen.problem or not unknown:
        return ""
    there = f"there are {', '.join(sorted(existing))}" if existing else "there is none"
    return f"no instance {', '.join(unknown)}; {there}"


def format_size(size: int) -> str:
    """`512 B`, `2 MiB`, `1.5 GiB`."""
    value = float(size)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            break
        value /= 1024
    else:
        unit = "TiB"
    return f"{value:.1f}".rstrip("0").rstrip(".") + f" {unit}"


def color_of(used: int, limit: int) -> str:
    """Green below half of the limit, yellow below 80 percent, else red."""
    if used * 2 < limit:
        return "green"
    return "yellow" if used * 10 < limit * 8 else "red"


def bar(width: int, parts: Sequence[tuple[str, int, str]], whole: int) -> Line:
    """`[##==--....]`: parts of a whole, drawn to scale; what exceeds it is cut off."""
    inside = max(1, width - 2)
    line: Line = [("[", "")]
    total = drawn = 0
    for character, size, style in parts:
        total += size
        end = inside if whole <= 0 else min(inside, round(inside * total / whole))
        if size > 0 and end > drawn:
            line.append((character * (end - drawn), style))
            drawn = end
    line.append(("." * (inside - drawn) + "]", ""))
    return line


def _broker_lines(broker: dict[str, Any], width: int) -> list[Line]:
    capacity, lent = int(broker["capacity_bytes"]), int(broker["held_bytes"])
    others = int(broker.get("others_bytes", 0))
    head = f"  lent {format_size(lent)} of {format_size(capacity)}"
    head += f"  free {format_size(max(0, capacity - others - lent))}"
    if others:
        head += f"  others {format_size(others)}"
    lines: list[Line] = [[(broker["device_uuid"], "bold"), (f" ({broker['backend']})" + head, "")]]
    state = broker.get("state") or "serving"
    if state != "serving":
        lines.append([(f"  {state}  {broker.get('device_error', '')}".rstrip(), "red")])
    lines.append(bar(width, [("#", lent, color_of(lent, capacity))], capacity))
    return lines


def _instance_lines(instances: Sequence[dict[str, Any]], capacity: int, width: int) -> list[Line]:
    rows = []
    for instance in instances:
        limit, used = int(instance["limit_bytes"]), int(instance["used_bytes"])
        percent = f"{round(100 * used / limit)} %" if limit else "-"
        pids = ",".join(str(pid) for pid in instance["pids"]) or "-"
        pressure = instance["pressure"] if instance["pressure"] != "none" else ""
        rows.append(
            (
                [format_size(used), format_size(limit), percent]
                + [format_size(int(instance[f"{kind}_bytes"])) for kind in ("cached", "idle")]
                + [format_size(int(instance["waiting_bytes"]))],
                f"  {pids}  {pressure}".rstrip(),
            )
        )
    heads = ["USED", "LIMIT", "%", "CACHED", "IDLE", "WAITING"]
    widths = [max(len(row[0][i]) for row in [(heads, "")] + rows) for i in range(len(heads))]
    name_width = min(24, max(len("NAME"), *(len(instance["ipc"]) for instance in instances)))
    figures_width = sum(widths) + 2 * len(widths)
    bar_width = max(_NARROWEST_BAR, min(60, width - name_width - figures_width - 20))

    def padded(cells: Sequence[str]) -> list[str]:
        return ["  " + cell.rjust(w) for cell, w in zip(cells, widths)]

    top = "NAME".ljust(name_width + 1) + " " * bar_width + "".join(padded(heads)) + "  PIDS"
    lines: list[Line] = [[(top, "bold")]]
    for instance, (cells, rest) in zip(instances, rows):
        limit, used = int(instance["limit_bytes"]), int(instance["used_bytes"])
        style = color_of(used, limit)
        parts = [
            ("#", used, style),
            ("=", int(instance["cached_bytes"]), ""),
            ("-", int(instance["idle_bytes"]), ""),
        ]
        line: Line = [(instance["ipc"][:name_width].ljust(name_width + 1), "")]
        line += bar(bar_width, parts, min(limit, capacity) if capacity else limit)
        line += [(cell, style if head == "%" else "") for head, cell in zip(heads, padded(cells))]
        lines.append([*line, (rest, "")])
    return lines


def render(seen: Look, width: int) -> list[Line]:
    """The lines to show, for a screen of this width; longer ones are to be cut."""
    if seen.problem:
        return [[(line, "red")] for line in seen.problem.splitlines()]
    lines: list[Line] = []
    for broker in seen.brokers:
        if lines:
            lines.append([])
        lines += _broker_lines(broker, width)
        here = [one for one in seen.instances if one["gpu"] == broker["device_uuid"]]
        if here:
            lines += _instance_lines(here, int(broker["capacity_bytes"]), width)
        else:
            lines.append([("  nobody is connected", "")])
    return lines


def _print(lines: Sequence[Line], color: bool) -> None:
    for line in lines:
        print(
            "".join(
                f"{_ANSI[style]}{text}{_RESET}" if color and style else text for text, style in line
            ).rstrip()
        )
    sys.stdout.flush()


def _run_plain(options: argparse.Namespace, color: bool) -> int:
    first = True
    while True:
        seen = look(options.address, options.gpu, options.names)
        if seen.problem:
            for line in seen.problem.splitlines():
                print(f"kvtop: {line}", file=sys.stderr)
            if options.refresh is None or options.once:
                return 1
        else:
            if not first:
                print()
            _print(render(seen, width=100), color)
            first = False
        if options.refresh is None or options.once:
            return 0
        time.sleep(options.refresh)


def _run_screen(options: argparse.Namespace, color: bool) -> None:
    import curses

    def draw(screen: Any, styles: dict[str, int], lines: Sequence[Line], offset: int) -> None:
        height, width = screen.getmaxyx()
        screen.erase()
        for row, line in enumerate(lines[offset : offset + height - 1]):
            column = 0
            for text, style in line:
                if column < width - 1:
                    screen.addnstr(row, column, text, width - 1 - column, styles.get(style, 0))
                column += len(text)
        screen.addnstr(height - 1, 0, "q leaves, arrows scroll", width - 1, styles.get("bold", 0))
        screen.refresh()

    def run(screen: Any) -> None:
        styles = {"bold": curses.A_BOLD}
        try:
            curses.curs_set(0)
            if color and curses.has_colors():
                curses.use_default_colors()
                for number, name in enumerate(("green", "yellow", "red"), start=1):
                    curses.init_pair(number, getattr(curses, f"COLOR_{name.upper()}"), -1)
                    styles[name] = curses.color_pair(number)
        except curses.error:
            pass  # A terminal that can do less.
        interval = options.refresh or 1.0
        offset = 0
        seen = look(options.address, options.gpu, options.names)
        next_look = time.monotonic() + interval
        while True:
            lines = render(seen, screen.getmaxyx()[1] - 1)
            offset = max(0, min(offset, len(lines) - 1))
            try:
                draw(screen, styles, lines, offset)
            except curses.error:
                pass  # The window has become smaller meanwhile; the next round knows.
            screen.timeout(max(0, int(1000 * (next_look - time.monotonic()))))
            key = screen.getch()
            if key in (ord("q"), ord("Q")):
                return
            if key == curses.KEY_DOWN:
                offset += 1
            elif key == curses.KEY_UP:
                offset -= 1
            elif key == curses.KEY_RESIZE:
                curses.update_lines_cols()
            if time.monotonic() >= next_look:
                seen = look(options.address, options.gpu, options.names)
                next_look = time.monotonic() + interval

    curses.wrapper(run)


def _interval(text: str) -> float:
    seconds = float(text)
    if not 0.1 <= seconds <= 86_400:
        raise argparse.ArgumentTypeError("must be at least 0.1, in seconds")
    return seconds


def _can_do_screens() -> bool:
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        return False
    try:
        import curses

        curses.setupterm(fd=sys.stdout.fileno())
        return bool(curses.tigetstr("clear"))
    except Exception:  # No curses here, or a terminal that it does not know.
        return False


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="kvtop", description="Shows who uses, keeps and waits for a GPU's KV memory."
    )
    parser.add_argument("names", metavar="NAME", nargs="*", help="only these instances")
    parser.add_argument("--address", metavar="PATH", help="where brokers listen")
    parser.add_argument("--gpu", metavar="GPU", help="only this device: uuid or index")
    parser.add_argument(
        "-r", "--refresh", metavar="SEC", type=_interval, help="between two looks; 1 by default"
    )
    parser.add_argument("--once", action="store_true", help="one look, as plain lines")
    parser.add_argument("--version", action="version", version=f"kvtop {_C.VERSION}")
    options = parser.parse_args(argv)

    color = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    try:
        if options.names:
            problem = missing(look(options.address, options.gpu, ()), options.names)
            if problem:
                print(f"kvtop: {problem}", file=sys.stderr)
                return 1
        if options.once or not _can_do_screens():
            return _run_plain(options, color)
        _run_screen(options, color)
    except KeyboardInterrupt:
        pass
    except BrokenPipeError:
        # Whoever read it has seen enough; Python is not to complain on exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


if __name__ == "__main__":
    sys.exit(main())
