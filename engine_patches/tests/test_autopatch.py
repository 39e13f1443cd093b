"""The hook that patches engines when they are imported."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
import subprocess
import sys
import tempfile
import unittest
from importlib.abc import MetaPathFinder
from pathlib import Path
from unittest import mock

import kvcached
import kvcached.integration
from kvcached import autopatch, log
from kvcached.errors import MalformedVariable

PTH = "kvcached_autopatch.pth"
ENGINE = "an_engine_of_the_tests"


def pth_line() -> str:
    """Of the installed package, else of this checkout."""
    installed = Path(kvcached.__file__).parent.parent / PTH
    if installed.exists():
        return installed.read_text()
    return (Path(__file__).resolve().parents[2] / "deploy" / "packaging" / PTH).read_text()


class Hook(unittest.TestCase):
    """In this process, with an engine made up for it."""

    def setUp(self) -> None:
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)
        self.write(f"{ENGINE}/__init__.py", "import builtins\nvalue = 17\n")
        self.write(f"{ENGINE}/inner.py", "value = 18\n")
        patched_path = mock.patch.object(sys, "path", [str(self.folder), *sys.path])
        patched_path.start()
        self.addCleanup(patched_path.stop)
        for patch in (
            mock.patch.object(autopatch, "ENGINES", {ENGINE: "An engine"}),
            mock.patch.object(autopatch, "_handled", set()),
            mock.patch.dict(os.environ, {"KVCACHED_AUTOPATCH": "1", "ENABLE_KVCACHED": "1"}),
        ):
            patch.start()
            self.addCleanup(patch.stop)
        old = list(sys.meta_path)
        self.addCleanup(lambda: sys.meta_path.__setitem__(slice(None), old))
        autopatch.uninstall()
        self.addCleanup(self.forget)
        self.forget()

    def write(self, name: str, text: str) -> None:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def forget(self) -> None:
        for name in list(sys.modules):
            if ENGINE in name:
                del sys.modules[name]
        importlib.invalidate_caches()

    def make_patches(self, text: str) -> None:
        self.write(f"patches/{ENGINE}/__init__.py", "")
        self.write(f"patches/{ENGINE}/autopatch.py", text)
        folders = [*kvcached.integration.__path__, str(self.folder / "patches")]
        patch = mock.patch.object(kvcached.integration, "__path__", folders)
        patch.start()
        self.addCleanup(patch.stop)
        importlib.invalidate_caches()

    COUNTING = f"calls = []\ndef apply():\n    import {ENGINE}\n    calls.append({ENGINE}.value)\n"

    def calls(self) -> list[int]:
        module = sys.modules.get(f"kvcached.integration.{ENGINE}.autopatch")
        return module.calls if module else []

    def test_patches_come_after_the_engine(self) -> None:
        self.make_patches(self.COUNTING)
        autopatch.install()
        self.assertEqual(self.calls(), [])
        engine = importlib.import_module(ENGINE)
        self.assertEqual(engine.value, 17)
        self.assertEqual(self.calls(), [17])

    def test_they_come_once(self) -> None:
        self.make_patches(self.COUNTING)
        autopatch.install()
        autopatch.install()
        engine = importlib.import_module(ENGINE)
        importlib.import_module(f"{ENGINE}.inner")
        importlib.reload(engine)
        autopatch.apply(ENGINE)
        self.assertEqual(self.calls(), [17])

    def test_an_engine_that_is_there_already(self) -> None:
        self.make_patches(self.COUNTING)
        importlib.import_module(ENGINE)
        self.assertEqual(self.calls(), [])
        autopatch.install()
        self.assertEqual(self.calls(), [17])

    def test_the_module_is_as_without(self) -> None:
        plain = importlib.import_module(ENGINE)
        loader, names = type(plain.__loader__), set(vars(plain))
        self.forget()
        autopatch.install()
        engine = importlib.import_module(ENGINE)
        self.assertIs(type(engine.__loader__), loader)
        self.assertIs(engine.__spec__.loader, engine.__loader__)
        self.assertEqual(set(vars(engine)), names)
        self.assertEqual(importlib.import_module(f"{ENGINE}.inner").value, 18)

    def test_what_asks_a_spec_gets_the_loader_s_answers(self) -> None:
        autopatch.install()
        spec = importlib.util.find_spec(ENGINE)
        assert spec is not None and spec.loader is not None
        self.assertIn("value = 17", spec.loader.get_source(ENGINE))
        self.assertNotIn(ENGINE, sys.modules)

    def test_no_patches_are_said_once(self) -> None:
        autopatch.install()
        with self.assertLogs(log.get_kvcached_logger(), logging.WARNING) as logged:
            importlib.import_module(ENGINE)
            autopatch.apply(ENGINE)
        self.assertEqual(len(logged.output), 1)
        self.assertIn("no patches for An engine", logged.output[0])
        self.assertIn("unpatched", logged.output[0])

    def test_patches_that_fail_are_an_error_and_are_tried_again(self) -> None:
        self.make_patches(
            "calls = []\ndef apply():\n    calls.append(1)\n"
            "    if len(calls) == 1: raise RuntimeError('no such attribute')\n"
        )
        autopatch.install()
        with self.assertRaisesRegex(RuntimeError, "no such attribute"):
            importlib.import_module(ENGINE)
        self.assertNotIn(ENGINE, sys.modules)
        importlib.import_module(ENGINE)
        self.assertEqual(self.calls(), [1, 1])

    def test_off_is_off(self) -> None:
        self.make_patches(self.COUNTING)
        autopatch.install()
        os.environ["KVCACHED_AUTOPATCH"] = "0"
        importlib.import_module(ENGINE)
        self.assertEqual(self.calls(), [])

    def test_enabled_implies_it(self) -> None:
        del os.environ["KVCACHED_AUTOPATCH"]
        self.assertTrue(autopatch.wanted())
        os.environ["ENABLE_KVCACHED"] = "no"
        self.assertFalse(autopatch.wanted())

    def test_a_malformed_variable_is_said_when_an_engine_comes(self) -> None:
        os.environ["KVCACHED_AUTOPATCH"] = "maybe"
        autopatch.install()
        with self.assertRaisesRegex(MalformedVariable, "KVCACHED_AUTOPATCH='maybe'"):
            importlib.import_module(ENGINE)

    def test_an_engine_that_is_not_installed(self) -> None:
        (self.folder / ENGINE / "__init__.py").unlink()
        (self.folder / ENGINE / "inner.py").unlink()
        (self.folder / ENGINE).rename(self.folder / "gone")
        autopatch.install()
        with self.assertRaises(ModuleNotFoundError):
            importlib.import_module(ENGINE)

    def test_a_folder_that_only_has_the_name(self) -> None:
        (self.folder / ENGINE / "__init__.py").unlink()
        self.make_patches(self.COUNTING)
        autopatch.install()
        importlib.import_module(ENGINE)
        self.assertEqual(self.calls(), [])

    def test_an_engine_that_cannot_be_imported(self) -> None:
        self.write(f"{ENGINE}/__init__.py", "raise OSError('no libcuda')")
        self.make_patches(self.COUNTING)
        autopatch.install()
        with self.assertRaisesRegex(OSError, "no libcuda"):
            importlib.import_module(ENGINE)
        self.assertEqual(self.calls(), [])

    def test_finders_that_ask_each_other(self) -> None:
        self.make_patches(self.COUNTING)
        for first in (False, True):
            with self.subTest(other_first=first):
                self.forget()
                autopatch.uninstall()
                autopatch._handled.clear()
                other = AskingFinder()
                autopatch.install()
                sys.meta_path.insert(0 if first else 1, other)
                importlib.import_module(ENGINE)
                sys.meta_path.remove(other)
                self.assertEqual(self.calls(), [17])
                self.assertGreaterEqual(other.asked, 1)

    def test_uninstalled(self) -> None:
        self.make_patches(self.COUNTING)
        autopatch.install()
        autopatch.uninstall()
        importlib.import_module(ENGINE)
        self.assertEqual(self.calls(), [])


class AskingFinder(MetaPathFinder):
    """Asks all finders, as other hooks of this kind do."""

    def __init__(self) -> None:
        self.asking = False
        self.asked = 0

    def find_spec(self, fullname, path=None, target=None):  # type: ignore[no-untyped-def]
        if fullname != ENGINE or self.asking:
            return None
        self.asking = True
        try:
            self.asked += 1
            return importlib.util.find_spec(fullname)
        finally:
            self.asking = False


class StartOfAnInterpreter(unittest.TestCase):
    def run_python(self, code: str, **variables: str) -> subprocess.CompletedProcess[str]:
        clean = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith("KVCACHED_") and name != "ENABLE_KVCACHED"
        }
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={**clean, **variables},
            capture_output=True,
            text=True,
            check=False,
        )
        self.assertEqual(done.returncode, 0, done.stderr)
        return done

    def loads(self, **variables: str) -> bool:
        code = (
            f"exec({pth_line()!r})\n"
            "import sys\nprint(any(m.startswith('kvcached') for m in sys.modules))"
        )
        return self.run_python(code, **variables).stdout.strip() == "True"

    def test_nothing_is_imported_while_it_is_off(self) -> None:
        self.assertFalse(self.loads())
        for off in ("0", "false", "No", "OFF", ""):
            self.assertFalse(self.loads(ENABLE_KVCACHED=off), off)
            self.assertFalse(self.loads(KVCACHED_AUTOPATCH=off), off)
        self.assertFalse(self.loads(ENABLE_KVCACHED="1", KVCACHED_AUTOPATCH="0"))

    def test_the_hook_is_there_while_it_is_on(self) -> None:
        self.assertTrue(self.loads(ENABLE_KVCACHED="true"))
        self.assertTrue(self.loads(KVCACHED_AUTOPATCH="1"))

    def test_the_hook_needs_little(self) -> None:
        code = (
            f"exec({pth_line()!r})\n"
            "import sys\nprint([m for m in ('torch', 'numpy', 'kvcached._C') if m in sys.modules])"
        )
        self.assertEqual(self.run_python(code, ENABLE_KVCACHED="1").stdout.strip(), "[]")

    def test_an_engine_without_patches_says_so(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            for engine, name in autopatch.ENGINES.items():
                if autopatch.carries_patches(engine):
                    continue
                Path(folder, engine).mkdir()
                Path(folder, engine, "__init__.py").touch()
                code = f"exec({pth_line()!r})\nimport sys\nsys.path.insert(0, {folder!r})\n"
                done = self.run_python(code + f"import {engine}", ENABLE_KVCACHED="1")
                self.assertEqual(done.stderr.count(f"no patches for {name}"), 1, done.stderr)
                done = self.run_python(code + f"import {engine}")
                self.assertEqual(done.stderr, "")


if __name__ == "__main__":
    unittest.main()
