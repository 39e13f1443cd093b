"""Options: the demo's command line, checked."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from traces import Trace, TraceError, align, check_names, default_traces, parse_trace

# The made-up traces' default, the same as kvbroker-replay's.
DEFAULT_SEED = 17
DEFAULT_SPEEDUP = 40.0

# What deploy/demo.sh adds to what was typed.
ADDED_FLAGS = ("--bin", "--started")

_MAX_SECONDS = 7 * 24 * 3600.0
_MAX_RATE = 1e9
_MAX_SPEEDUP = 1e6
_MAX_CAPACITY = 1 << 40

_DESCRIPTION = """\
Runs LLM engines without their GPU beside each other, once on an even static split of
memory and once on kvbroker, and compares how long requests wait for memory.

act 1   the engines of --trace (conv, code, code2), first static, then on the broker
act 2   conv with half of the memory guaranteed, beside a neighbour with three times
        its requests, first on static halves, then on the broker
"""

_EPILOG = """\
Traces are CSV files with the header TIMESTAMP,ContextTokens,GeneratedTokens; docs/demo.md
says where real ones are published. Times in the results are trace milliseconds.

Exit status: 0 all processes ended well, no block was overwritten and no memory leaked
(whether waits met their bars is told, but does not count); 1 otherwise; 2 wrong usage;
130 interrupted.
"""


@dataclass(frozen=True)
class Options:
    traces: list[Trace]  # aligned; at least one
    capacity_tokens: int | None  # None: auto
    prefill: float
    decode: float
    window_s: float
    speedup: float
    seed: int
    acts: frozenset[int]
    json: Path | None
    requests: Path | None
    logs: Path | None
    bin: Path | None  # where the programs are; None: check the arguments only
    started: float | None  # when the command began, seconds since 1970

    @property
    def chart(self) -> Path:
        if self.json is None:
            return Path("kvbroker-demo.svg")
        if self.json.suffix == ".json":
            return self.json.with_suffix(".svg")
        return self.json.with_name(self.json.name + ".svg")


def _above_zero(most: float) -> Callable[[str], float]:
    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not 0 < value <= most:
            raise argparse.ArgumentTypeError(f"must be above 0 and at most {most:g}: {text}")
        return value

    return read


def _capacity(text: str) -> int | None:
    if text == "auto":
        return None
    try:
        tokens = int(text.replace(",", ""))
    except ValueError:
        tokens = 0
    if not 0 < tokens <= _MAX_CAPACITY:
        raise argparse.ArgumentTypeError(f"must be `auto` or a number of tokens above 0: {text}")
    return tokens


def _seed(text: str) -> int:
    try:
        seed = int(text)
    except ValueError:
        seed = -1
    if not 0 <= seed < 1 << 64:
        raise argparse.ArgumentTypeError(f"must be a whole number from 0 to 2^64 - 1: {text}")
    return seed


def _trace(text: str) -> Trace:
    try:
        return parse_trace(text)
    except TraceError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _file(text: str) -> Path:
    path = Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"is a directory: {text}")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"there is no directory for it: {text}")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"may not be written: {text}")
    return path


def _folder(text: str) -> Path:
    path = Path(text)
    if path.exists() and not path.is_dir():
        raise argparse.ArgumentTypeError(f"is not a directory: {text}")
    return path


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="deploy/demo.sh",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "--trace",
        type=_trace,
        action="append",
        dest="traces",
        metavar="NAME=FILE[@SHIFT_SECONDS]",
        help="an engine and the requests it replays, that much later and wrapping around; again "
        "for each engine. FILE may be builtin:conv or builtin:code "
        "[conv=builtin:conv code=builtin:code code2=builtin:code@600]",
    )
    add(
        "--capacity",
        type=_capacity,
        metavar="TOKENS|auto",
        help="memory for all engines; auto: 2.4 x the 99th percentile of the tokens that conv "
        "(or the first engine) has in flight [auto]",
    )
    add(
        "--prefill",
        type=_above_zero(_MAX_RATE),
        default=20_000.0,
        metavar="N",
        help="prompt tokens a second [20000]",
    )
    add(
        "--decode",
        type=_above_zero(_MAX_RATE),
        default=30.0,
        metavar="N",
        help="tokens a second and request [30]",
    )
    add(
        "--window",
        type=_above_zero(_MAX_SECONDS),
        default=1200.0,
        dest="window_s",
        metavar="SECONDS",
        help="replay the traces' first so many seconds [1200]",
    )
    add(
        "--speedup",
        type=_above_zero(_MAX_SPEEDUP),
        default=DEFAULT_SPEEDUP,
        metavar="X",
        help=f"trace seconds a real second [{DEFAULT_SPEEDUP:g}]",
    )
    add(
        "--seed",
        type=_seed,
        default=DEFAULT_SEED,
        metavar="N",
        help=f"of the built-in traces [{DEFAULT_SEED}]",
    )
    add(
        "--only",
        choices=("1", "2"),
        metavar="ACT",
        help="act 1 or act 2 instead of both",
    )
    add(
        "--json",
        type=_file,
        metavar="FILE",
        help="write the results there and the chart beside it [chart: ./kvbroker-demo.svg]",
    )
    add(
        "--requests",
        type=_folder,
        metavar="DIR",
        help="write a CSV file an engine and run there, a line a request",
    )
    add("--logs", type=_folder, metavar="DIR", help="keep the processes' logs there")
    add(
        "--no-install",
        action="store_true",
        help="do not install missing packages",
    )
    for flag, kind in zip(ADDED_FLAGS, (Path, float), strict=True):
        add(flag, type=kind, help=argparse.SUPPRESS)
    return parser


def parse_options(arguments: Sequence[str]) -> Options:
    """Exits with status 2 and a message on wrong usage, and with 0 after --help."""
    parser = _parser()
    parsed = parser.parse_args(arguments)
    try:
        traces = parsed.traces or default_traces()
        check_names(traces)
        traces = align(traces, parsed.seed, parsed.window_s)
    except TraceError as error:
        parser.error(f"argument --trace: {error}")
    return Options(
        traces=traces,
        capacity_tokens=parsed.capacity,
        prefill=parsed.prefill,
        decode=parsed.decode,
        window_s=parsed.window_s,
        speedup=parsed.speedup,
        seed=parsed.seed,
        acts=frozenset({1, 2} if parsed.only is None else {int(parsed.only)}),
        json=parsed.json,
        requests=parsed.requests,
        logs=parsed.logs,
        bin=parsed.bin,
        started=parsed.started,
    )
