"""Counts test cases for deploy/test.sh; prints "PASSED FAILED" as its last line.

usage: count_tests.py bazel EVENTS.json   a `--build_event_json_file`
       count_tests.py unittest LOG        what `python3 -m unittest` printed
       count_tests.py summary LOG         of a script that ends with "N passed, N failed"
"""

from __future__ import annotations

import json
import re
import sys
import urllib.parse
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any


def count_xml(path: Path) -> tuple[int, list[str]]:
    """How many cases of a test.xml passed, and which failed; skipped are neither."""
    passed, failed = 0, []
    for case in ElementTree.parse(path).iter("testcase"):
        if case.find("failure") is not None or case.find("error") is not None:
            failed.append(f"{case.get('classname', '')}.{case.get('name', '')}".lstrip("."))
        elif (
            case.find("skipped") is None
            and case.get("status", "run") == "run"
            and case.get("result", "completed") == "completed"
        ):
            passed += 1
    return passed, failed


def xml_of(result: dict[str, Any]) -> Path | None:
    for output in result.get("testActionOutput", []):
        if output["name"] == "test.xml":
            return Path(urllib.parse.unquote(urllib.parse.urlparse(output["uri"]).path))
    return None


def count_bazel(events: Path) -> tuple[int, int]:
    # The last attempt of a shard of a run of a target is the one that counts.
    results: dict[tuple[str, int, int], dict[str, Any]] = {}
    for line in events.read_text(encoding="utf-8").splitlines():
        event = json.loads(line)
        key = event["id"].get("testResult")
        if key and "testResult" in event:
            results[key["label"], key.get("run", 1), key.get("shard", 1)] = event["testResult"]

    passed, failed = 0, 0
    for (label, _, _), result in sorted(results.items()):
        target_passed = result["status"] in ("PASSED", "FLAKY")
        xml = xml_of(result)
        try:
            cases_passed, cases_failed = count_xml(xml) if xml else (0, [])
        except (OSError, ElementTree.ParseError):
            cases_passed, cases_failed = 0, []
        if not target_passed and not cases_failed:
            # A crash, a leak found at exit, a timeout.
            cases_failed = [result["status"]]
        for case in cases_failed:
            print(f"FAILED {label} {case}")
        passed += cases_passed
        failed += len(cases_failed)
    return passed, failed


def count_unittest(log: Path) -> tuple[int, int]:
    text = log.read_text(encoding="utf-8", errors="replace")
    ran = re.search(r"^Ran (\d+) tests? in", text, re.MULTILINE)
    if not ran:
        return 0, 1

    def of(word: str) -> int:
        found = re.search(rf"^(?:OK|FAILED) \(.*\b{word}=(\d+)", text, re.MULTILINE)
        return int(found.group(1)) if found else 0

    failed = of("failures") + of("errors") + of("unexpected successes")
    # An error in setUpClass or tearDownClass belongs to no test that ran.
    return max(0, int(ran.group(1)) - failed - of("skipped")), failed


def count_summary(log: Path) -> tuple[int, int]:
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
    summary = re.fullmatch(r"(\d+) passed, (\d+) failed", lines[-2] if len(lines) > 1 else "")
    # One that did not get to its end has failed.
    return (int(summary.group(1)), int(summary.group(2))) if summary else (0, 1)


def main(arguments: list[str]) -> int:
    counters = {"bazel": count_bazel, "unittest": count_unittest, "summary": count_summary}
    if len(arguments) != 2 or arguments[0] not in counters:
        print(__doc__, file=sys.stderr)
        return 2
    passed, failed = counters[arguments[0]](Path(arguments[1]))
    print(passed, failed)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
