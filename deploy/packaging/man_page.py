"""Turns docs/man/*.md into the pages that `man` shows.

usage: man_page.py PAGE.1.md > PAGE.1

Knows what those files use and no more: sections, paragraphs with `\\` line breaks,
definition lists (`:   `), tables, indented examples, `**`, `*` and backquotes.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

_TOKEN = re.compile(r"`([^`]*)`|\*\*(.+?)\*\*|\*([^*\s][^*]*?)\*|\[([^\]]+)\]\([^)]*\)")


def _escape(text: str) -> str:
    return text.replace("\\", "\\e").replace("-", "\\-")


def _text_line(line: str) -> str:
    """A line that is no request, whatever it begins with."""
    return "\\&" + line if line.startswith((".", "'")) else line


def _inline(text: str) -> str:
    out, end = [], 0
    for token in _TOKEN.finditer(text):
        out.append(_escape(text[end : token.start()]))
        code, bold, italic, link = token.groups()
        if italic is not None:
            out.append(f"\\fI{_escape(italic)}\\fR")
        elif link is not None:
            out.append(_escape(link))
        else:
            out.append(f"\\fB{_escape(code if bold is None else bold)}\\fR")
        end = token.end()
    out.append(_escape(text[end:]))
    return "".join(out)


def _paragraph(lines: list[str]) -> list[str]:
    out: list[str] = []
    for line in lines:
        line = line.strip()
        if line.endswith("\\"):
            out += [_text_line(_inline(line[:-1])), ".br"]
        else:
            out.append(_text_line(_inline(line)))
    return out


def _table(lines: list[str]) -> list[str]:
    rows = [
        [cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line.strip())[1:-1]]
        for line in lines
    ]
    body = [row for row in rows if not all(re.fullmatch(r":?-+:?", cell) for cell in row)]
    columns = len(body[0])
    out = [".TS", "tab(\t);", " ".join(["lb"] + ["l"] * (columns - 1)) + "."]
    for number, row in enumerate(body):
        cells = [f"\\fB{_inline(cell)}\\fR" if number == 0 else _inline(cell) for cell in row]
        cells[-1] = "T{\n" + _text_line(cells[-1]) + "\nT}"
        out.append("\t".join(cells))
    return [*out, ".TE"]


def _blocks(text: str) -> list[list[str]]:
    blocks: list[list[str]] = [[]]
    for line in text.splitlines():
        if line.strip():
            blocks[-1].append(line)
        elif blocks[-1]:
            blocks.append([])
    return [block for block in blocks if block]


def _body(blocks: list[list[str]]) -> list[str]:
    out: list[str] = []
    number = 0
    while number < len(blocks):
        block = blocks[number]
        following = blocks[number + 1] if number + 1 < len(blocks) else [""]
        number += 1
        if block[0].startswith("## "):
            out.append(f'.SH "{block[0][3:]}"')
        elif block[0].startswith("|"):
            out += _table(block)
        elif block[0].startswith("    "):
            out += [
                ".PP",
                ".nf",
                ".RS 4",
                *(_text_line(_escape(line[4:])) for line in block),
                ".RE",
                ".fi",
            ]
        elif len(block) > 1 and block[1].startswith(":   "):
            term, first = block[0], [block[1][4:], *block[2:]]
            number, more = _indented(blocks, number)
            out += _definition(term, [first, *more])
        elif following[0].startswith(":   "):
            number += 1
            first = [following[0][4:], *following[1:]]
            number, more = _indented(blocks, number)
            out += _definition(" ".join(block), [first, *more])
        else:
            out += [".PP", *_paragraph(block)]
    return out


def _indented(blocks: list[list[str]], number: int) -> tuple[int, list[list[str]]]:
    """The blocks from `number` on that belong to the definition before them."""
    found = []
    while number < len(blocks) and all(line.startswith("    ") for line in blocks[number]):
        found.append([line[4:] for line in blocks[number]])
        number += 1
    return number, found


def _definition(term: str, blocks: list[list[str]]) -> list[str]:
    out = [".TP", _text_line(_inline(term)), *_paragraph(blocks[0])]
    if len(blocks) > 1:
        out += [".RS", *_body(blocks[1:]), ".RE"]
    return out


def to_roff(markdown: str) -> str:
    blocks = _blocks(markdown)
    title = re.fullmatch(r"# (\S+)\((\d)\): (.+)", " ".join(blocks[0]))
    if not title:
        raise ValueError("the first line is not `# NAME(SECTION): what it is`")
    name, section, what = title.groups()
    lines = ["'\\\" t", f'.TH "{name.upper()}" "{section}" "" "kvbroker" ""', '.SH "NAME"']
    lines.append(f"{name} \\- {_inline(what)}")
    return "\n".join(lines + _body(blocks[1:])) + "\n"


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    sys.stdout.write(to_roff(Path(sys.argv[1]).read_text(encoding="utf-8")))
