"""Environment variables, names and the logger."""

from __future__ import annotations

import importlib
import io
import logging
import os
import pickle
import subprocess
import sys
import unittest
from unittest import mock

from kvcached import config, errors, log, utils

MIB = 1 << 20


def settings(**variables: str) -> config.Settings:
    return config.read(variables)


class Settings(unittest.TestCase):
    def test_defaults(self) -> None:
        unset = settings()
        self.assertFalse(unset.enabled)
        self.assertEqual(unset.page_bytes, 2 * MIB)
        self.assertEqual(unset.gpu_utilization, 0.95)
        self.assertEqual(unset.min_reserved_pages, 5)
        self.assertIsNone(unset.max_reserved_pages)
        self.assertIsNone(unset.max_cached_tokens)
        self.assertTrue(unset.contiguous_layout)
        self.assertTrue(unset.page_prealloc)
        self.assertEqual(unset.ipc_timeout_s, 60)
        self.assertEqual(unset.idle_decay_ms, 30_000)
        self.assertIsNone(unset.limit)
        self.assertTrue(unset.autostart)

    def test_nothing_counts_as_unset(self) -> None:
        self.assertEqual(settings(**dict.fromkeys(config.VARIABLES, " ")), settings())

    def test_booleans(self) -> None:
        for text in ("true", "1", "yes", "on", "TRUE", " On "):
            self.assertTrue(settings(ENABLE_KVCACHED=text).enabled, text)
        for text in ("false", "0", "no", "off", "No"):
            self.assertFalse(settings(KVCACHED_CONTIGUOUS_LAYOUT=text).contiguous_layout, text)

    def test_amounts(self) -> None:
        for text, size in (
            ("512M", 512 * MIB),
            ("512MB", 512 * MIB),
            ("512MiB", 512 * MIB),
            ("2g", 2048 * MIB),
            ("1.5G", 1536 * MIB),
            ("1,000", 1000),
            ("100_000", 100_000),
            ("1024", 1024),
            ("17B", 17),
            ("0", 0),
        ):
            self.assertEqual(settings(KVBROKER_LIMIT=text).limit, config.Amount(size=size), text)
        self.assertEqual(settings(KVBROKER_MIN="25%").minimum, config.Amount(fraction=0.25))

    def test_durations(self) -> None:
        for text, ms in (
            ("30s", 30_000),
            ("500ms", 500),
            ("1m30s", 90_000),
            ("1.5h", 5_400_000),
            ("0", 0),
            ("never", None),
        ):
            self.assertEqual(settings(KVBROKER_IDLE_DECAY=text).idle_decay_ms, ms, text)

    def test_no_timeout(self) -> None:
        for text in ("0", "-1", "inf"):
            self.assertIsNone(settings(KVCACHED_IPC_TIMEOUT=text).ipc_timeout_s, text)

    def test_labels(self) -> None:
        self.assertEqual(
            settings(KVBROKER_LABELS="model=llama, pod=a=b").labels,
            {"model": "llama", "pod": "a=b"},
        )

    def test_the_view_goes_with_a_name_that_is_set(self) -> None:
        self.assertFalse(settings().shm_view)
        self.assertTrue(settings(KVCACHED_IPC_NAME="a").shm_view)
        self.assertFalse(settings(KVCACHED_IPC_NAME="a", KVBROKER_SHM_COMPAT="0").shm_view)
        self.assertTrue(settings(KVBROKER_SHM_COMPAT="1").shm_view)
        self.assertTrue(settings(KVCACHED_IPC_NAME="a", KVBROKER_SHM_COMPAT="AUTO").shm_view)
        self.assertTrue(settings(KVBROKER_SHM_COMPAT="ON").shm_view)

    def test_the_largest_that_is_allowed(self) -> None:
        large = settings(
            KVCACHED_PAGE_SIZE_MB=str(1 << 20),
            KVCACHED_MIN_RESERVED_PAGES=str((1 << 31) - 1),
            KVCACHED_MAX_RESERVED_PAGES=str((1 << 31) - 1),
            KVCACHED_MAX_CACHED_TOKENS=str((1 << 63) - 1),
            KVCACHED_IPC_TIMEOUT=str(3650 * 86_400),
            KVBROKER_IDLE_DECAY="87600h",
        )
        self.assertEqual(large.page_bytes, 1 << 40)
        self.assertEqual(large.max_reserved_pages, (1 << 31) - 1)
        self.assertEqual(large.ipc_timeout_s, 3650 * 86_400)
        self.assertEqual(large.idle_decay_ms, 3650 * 86_400_000)
        self.assertEqual(settings(KVCACHED_MAX_CACHED_TOKENS="-" + "9" * 30).max_cached_tokens, -1)

    def test_malformed_values_name_variable_value_and_what_is_allowed(self) -> None:
        for name, value in (
            ("ENABLE_KVCACHED", "maybe"),
            ("KVCACHED_GPU_UTILIZATION", "0"),
            ("KVCACHED_GPU_UTILIZATION", "1.5"),
            ("KVCACHED_GPU_UTILIZATION", "nan"),
            ("KVCACHED_PAGE_SIZE_MB", "3"),
            ("KVCACHED_PAGE_SIZE_MB", "0"),
            ("KVCACHED_PAGE_SIZE_MB", "two"),
            ("KVCACHED_LOG_LEVEL", "LOUD"),
            ("KVCACHED_MIN_RESERVED_PAGES", "-1"),
            ("KVCACHED_MAX_RESERVED_PAGES", "ten"),
            ("KVCACHED_MAX_CACHED_TOKENS", "1k"),
            ("KVCACHED_PAGE_SIZE_MB", "1048578"),
            ("KVCACHED_MIN_RESERVED_PAGES", str(1 << 31)),
            ("KVCACHED_MAX_RESERVED_PAGES", str(1 << 31)),
            ("KVCACHED_MAX_CACHED_TOKENS", str(1 << 63)),
            ("KVCACHED_IPC_TIMEOUT", "nan"),
            ("KVCACHED_IPC_TIMEOUT", "1e12"),
            ("KVBROKER_IDLE_DECAY", "87601h"),
            ("KVBROKER_IDLE_DECAY", "9" * 400 + "s"),
            ("KVBROKER_LIMIT", "9" * 400 + ".0"),
            ("KVBROKER_LIMIT", "9" * 400),
            ("KVBROKER_LIMIT", "9" * 400 + "%"),
            ("KVBROKER_LIMIT", "2X"),
            ("KVBROKER_LIMIT", "0%"),
            ("KVBROKER_LIMIT", "101%"),
            ("KVBROKER_LIMIT", "99999999T"),
            ("KVBROKER_MIN", "-1"),
            ("KVBROKER_IDLE_DECAY", "30"),
            ("KVBROKER_IDLE_DECAY", "soon"),
            ("KVBROKER_SHM_COMPAT", "perhaps"),
            ("KVBROKER_LABELS", "model"),
            ("KVBROKER_NAME_CONFLICT", "fight"),
        ):
            with self.subTest(name=name, value=value):
                with self.assertRaises(errors.KVCachedConfigError) as raised:
                    settings(**{name: value})
                self.assertIsInstance(raised.exception, ValueError)
                text = str(raised.exception)
                self.assertIn(name, text)
                self.assertIn(value, text)
                self.assertIn(config.VARIABLES[name].allowed, text)

    def test_names(self) -> None:
        self.assertEqual(settings(KVCACHED_IPC_NAME="a b/c_.-9").ipc_name, "a-b-c_.-9")
        self.assertEqual(settings(KVCACHED_IPC_NAME="a\u00e9" * 200).ipc_name, "a-" * 64)
        self.assertEqual(settings(KVCACHED_IPC_NAME="-.\u00e9.a-.").ipc_name, "a-.")
        for nothing in ("\u00e9" * 200, "..", "--", "./."):
            self.assertIsNone(settings(KVCACHED_IPC_NAME=nothing).ipc_name, nothing)
            self.assertFalse(settings(KVCACHED_IPC_NAME=nothing).shm_view, nothing)
        self.assertEqual(config.default_name("vLLM"), f"kvcached_vLLM_{os.getpgrp()}")
        self.assertRegex(config.default_name(), r"^kvcached_(vLLM|SGLang|proc)_\d+$")


class Constants(unittest.TestCase):
    def test_are_read_when_they_are_asked_for(self) -> None:
        with mock.patch.dict(os.environ, {"KVCACHED_PAGE_SIZE_MB": "4"}):
            self.assertEqual(utils.PAGE_SIZE, 4 * MIB)
        with mock.patch.dict(os.environ, {"KVCACHED_PAGE_SIZE_MB": "6"}):
            self.assertEqual(utils.PAGE_SIZE, 6 * MIB)

    def test_no_limit_is_a_number(self) -> None:
        with mock.patch.dict(os.environ, clear=True):
            self.assertEqual(utils.MAX_RESERVED_PAGES, sys.maxsize)
            self.assertEqual(utils.MAX_CACHED_TOKENS, -1)

    def test_a_malformed_variable_breaks_no_import(self) -> None:
        with mock.patch.dict(os.environ, {"KVCACHED_PAGE_SIZE_MB": "3"}):
            importlib.reload(utils)
            with self.assertRaises(ValueError):
                _ = utils.PAGE_SIZE
            self.assertEqual(utils.SHM_DIR, "/dev/shm")

    def test_unknown_names(self) -> None:
        with self.assertRaises(AttributeError):
            _ = utils.NO_SUCH_CONSTANT


class Import(unittest.TestCase):
    def test_is_silent_and_imports_neither_torch_nor_native_code(self) -> None:
        program = (
            "import kvcached, kvcached.utils, kvcached.control, kvcached.observability, "
            "kvcached.vmm_ops, kvcached.integration.vllm.interfaces, "
            "kvcached.integration.sglang.interfaces, sys\n"
            "assert 'torch' not in sys.modules and 'kvcached._C' not in sys.modules\n"
            "assert kvcached.__version__"
        )
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", program],
            env={**os.environ, "KVCACHED_LOG_LEVEL": "LOUD", "KVCACHED_PAGE_SIZE_MB": "3"},
            capture_output=True,
            text=True,
            check=False,
        )
        self.assertEqual((done.returncode, done.stdout, done.stderr), (0, "", ""))

    def test_versions_agree(self) -> None:
        import kvcached
        from kvcached import _C

        self.assertEqual(kvcached.__version__, _C.VERSION)


class Errors(unittest.TestCase):
    def test_exhausted(self) -> None:
        error = errors.KVCachePoolExhausted(7)
        self.assertTrue(str(error).startswith("Cannot get 7 free blocks"))
        self.assertEqual(str(pickle.loads(pickle.dumps(error))), str(error))
        said = errors.KVCachePoolExhausted("no room")
        self.assertEqual((str(said), said.blocks), ("no room", None))
        self.assertEqual(str(pickle.loads(pickle.dumps(said))), "no room")
        self.assertEqual(pickle.loads(pickle.dumps(error)).blocks, 7)
        self.assertIs(utils.KVCachePoolExhausted, errors.KVCachePoolExhausted)
        self.assertIs(utils.KVCachedConfigError, errors.KVCachedConfigError)


class Stream(io.StringIO):
    def __init__(self, terminal: bool) -> None:
        super().__init__()
        self._terminal = terminal

    def isatty(self) -> bool:
        return self._terminal


class Logging(unittest.TestCase):
    def test_colors(self) -> None:
        for variables, terminal, wanted in (
            ({}, True, True),
            ({}, False, False),
            ({"KVCACHED_LOG_COLOR": "true"}, False, True),
            ({"KVCACHED_LOG_COLOR": "false"}, True, False),
            ({"KVCACHED_LOG_COLOR": "true", "NO_COLOR": "1"}, True, False),
            ({"NO_COLOR": "1"}, True, False),
            ({"NO_COLOR": ""}, True, True),
        ):
            with self.subTest(variables=variables, terminal=terminal):
                with mock.patch.dict(os.environ, variables, clear=True):
                    self.assertEqual(log.use_color(Stream(terminal)), wanted)

    def test_level(self) -> None:
        for text, level in (("DEBUG", logging.DEBUG), ("error", logging.ERROR)):
            with mock.patch.dict(os.environ, {"KVCACHED_LOG_LEVEL": text}):
                self.assertEqual(log.get_log_level(), level)
        with mock.patch.dict(os.environ, {"KVCACHED_LOG_LEVEL": "LOUD"}):
            self.assertEqual(log.get_log_level(), logging.INFO)

    def test_one_handler_and_the_line_begins_with_the_name(self) -> None:
        with mock.patch("sys.stderr", Stream(False)) as stream:
            logger = log.get_kvcached_logger("kvcached.test")
            self.assertIs(log.get_kvcached_logger("kvcached.test"), logger)
            self.assertEqual(len(logger.handlers), 1)
            logger.warning("hello")
        self.assertRegex(stream.getvalue(), r"^\[kvcached\]\[WARNING\].* hello\n$")


if __name__ == "__main__":
    unittest.main()
