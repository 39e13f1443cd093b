"""Managers on a GPU, which a fake driver makes: tensors need a real one."""

from __future__ import annotations

import os
import tempfile
import unittest

from broker import MIB, TIMEOUT_S, environment, running_broker, use_environment
from test_processes import start

from kvcached.runtime import normalize_device, runtime

PROGRAM = """
    from kvcached import control
    from kvcached.runtime import runtime
    vllm.shutdown_kvcached()
    for device, contiguous in (("cuda:0", "1"), ("cuda", "0")):
        os.environ["KVCACHED_CONTIGUOUS_LAYOUT"] = contiguous
        vllm.init_kvcached(device=device)
        mine = vllm.get_kv_cache_manager(1000, 16, 4096, 4)
        assert runtime.device == "cuda:0" and mine.group.session.device == 0
        assert mine.pool.regions == (1 if contiguous == "1" else 8)
        blocks = []
        assert eventually(lambda: blocks.extend(mine.alloc(100) or []) or blocks)
        assert control.state() == "ready"
        # 32 blocks of 64 KiB are on a page of 2 MB of each of 4 layers' K and V.
        assert mine.get_mapped_memory_size("mb") == 4 * 16, mine.get_mapped_memory_size("mb")
        mine.free(blocks)
        vllm.shutdown_kvcached()
    """


class Gpu(unittest.TestCase):
    def test_managers_take_memory_of_the_gpu(self) -> None:
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        driver = os.environ["KVBROKER_FAKE_CUDA"]
        fake = {
            "KVBROKER_CUDA_DRIVER": driver,
            "KVBROKER_NVML": driver,
            "KVBROKER_FAKE_CUDA_DIR": folder.name,
            "KVBROKER_FAKE_CUDA_TOTAL": str(4096 * MIB),
        }
        use_environment(self, {**os.environ, **fake})
        with running_broker("", ["--backend", "cuda", "--gpu", "0"]) as broker:
            process = start(PROGRAM, **environment(broker), **fake)
            out, err = process.communicate(timeout=TIMEOUT_S)
        self.assertEqual((process.returncode, out, err), (0, "", ""))

    def test_a_broker_of_host_memory_is_not_taken_for_one_of_a_gpu(self) -> None:
        driver = os.environ["KVBROKER_FAKE_CUDA"]
        with running_broker("64M") as broker:
            process = start(
                """
                vllm.shutdown_kvcached()
                vllm.init_kvcached(device="cuda:0")
                try:
                    KVCacheManager(1000, 16, 4096, 4).alloc(1)
                except RuntimeError as error:
                    print(error)
                """,
                **environment(broker),
                KVBROKER_CUDA_DRIVER=driver,
            )
            out, err = process.communicate(timeout=TIMEOUT_S)
        self.assertEqual((process.returncode, err), (0, ""))
        self.assertIn("no broker found for this GPU", out)


class Devices(unittest.TestCase):
    def test_names(self) -> None:
        class Device:  # as torch's
            def __str__(self) -> str:
                return "cuda:3"

        for given, name in (
            ("cpu", "cpu"),
            ("cpu:0", "cpu"),
            ("cuda", "cuda"),
            ("cuda:12", "cuda:12"),
            (1, "cuda:1"),
            (Device(), "cuda:3"),
            (None, None),
        ):
            self.assertEqual(normalize_device(given), name)
        for wrong in ("", "cuda:", "cuda:x", "cuda:-1", "hip:0", "cpu:1", "meta", "CUDA", -1):
            with self.subTest(wrong=wrong), self.assertRaises(ValueError):
                normalize_device(wrong)

    def test_one_device_a_process(self) -> None:
        self.addCleanup(runtime.shutdown)
        runtime.init(device="cuda")
        runtime.init(device="cuda:1")
        runtime.init(device="cuda")
        self.assertEqual(runtime.device, "cuda:1")
        for other in ("cuda:0", "cpu"):
            with self.subTest(other=other), self.assertRaises(ValueError):
                runtime.init(device=other)
            with self.subTest(other=other), self.assertRaises(ValueError):
                runtime.use_device(other)
        runtime.shutdown()
        runtime.init(device="cpu")
        self.assertEqual(runtime.use_device(None), "cpu")

    def test_one_page_size_a_process(self) -> None:
        self.addCleanup(runtime.shutdown)
        runtime.init(device="cpu", page_bytes=4 * MIB)
        runtime.init(page_bytes=4 * MIB)
        runtime.init()
        self.assertEqual(runtime.page_bytes, 4 * MIB)
        with self.assertRaises(ValueError):
            runtime.init(page_bytes=2 * MIB)

    def test_a_later_call_may_raise_the_role(self) -> None:
        self.addCleanup(runtime.shutdown)
        runtime.init(device="cpu")
        self.assertFalse(runtime.is_worker)
        runtime.init(is_worker=True, async_sched=True)
        runtime.init()
        self.assertTrue(runtime.is_worker and runtime.async_sched)

    def test_wrong_ranks_and_pages(self) -> None:
        for wrong in (
            {"tp_size": 0},
            {"tp_rank": 2, "tp_size": 2},
            {"tp_rank": -1},
            {"pp_rank": -1},
            {"page_bytes": MIB},
            {"page_bytes": -2 * MIB},
        ):
            with self.subTest(wrong=wrong), self.assertRaises(ValueError):
                runtime.init(**wrong)
            self.assertFalse(runtime.initialized)


if __name__ == "__main__":
    unittest.main()
