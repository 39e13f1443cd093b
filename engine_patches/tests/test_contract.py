"""Names, parameters, defaults and keys that users rely on, as contract/names.json has them."""

from __future__ import annotations

import builtins
import importlib
import inspect
import json
import typing
import unittest
from pathlib import Path

from broker import MIB, BrokerTest, eventually

from kvcached import config, control, observability
from kvcached.integration.vllm import interfaces as vllm
from kvcached.runtime import runtime

NAMES = json.loads((Path(__file__).parent / "contract" / "names.json").read_text())


def resolve(module: str, path: str) -> object:
    found: object = importlib.import_module(module)
    for name in path.split("."):
        found = getattr(found, name)
    return found


class Names(unittest.TestCase):
    def test_signatures(self) -> None:
        for module, functions in NAMES["signatures"].items():
            for path, wanted in functions.items():
                with self.subTest(module=module, name=path):
                    function = resolve(module, path)
                    have: dict[str, object] = {}
                    for parameter in inspect.signature(function).parameters.values():  # type: ignore[arg-type]
                        if parameter.name == "self":
                            continue
                        if parameter.default is not inspect.Parameter.empty:
                            have[parameter.name] = parameter.default
                        elif parameter.kind is inspect.Parameter.KEYWORD_ONLY:
                            have[parameter.name] = "required by name"
                        else:
                            have[parameter.name] = "required"
                    self.assertEqual(list(have.items()), list(wanted.items()))

    def test_public_functions_have_types_and_words(self) -> None:
        for module, functions in NAMES["signatures"].items():
            for path in functions:
                with self.subTest(module=module, name=path):
                    function = resolve(module, path)
                    self.assertTrue(inspect.getdoc(function))
                    target = function.__init__ if inspect.isclass(function) else function
                    self.assertIn("return", target.__annotations__)  # type: ignore[attr-defined]

    def test_constants(self) -> None:
        for module, constants in NAMES["constants"].items():
            for name in constants:
                with self.subTest(module=module, name=name):
                    self.assertIsNotNone(resolve(module, name))

    def test_exceptions(self) -> None:
        for name, wanted in NAMES["exceptions"].items():
            kinds = {resolve(module, name) for module in wanted["in"]}
            self.assertEqual(len(kinds), 1)
            self.assertTrue(
                issubclass(typing.cast(type, kinds.pop()), getattr(builtins, wanted["is"]))
            )

    def test_variables(self) -> None:
        self.assertEqual({n: v.default for n, v in config.VARIABLES.items()}, NAMES["variables"])

    def test_snapshots(self) -> None:
        for kind, key in (
            (observability.RuntimeSnapshot, "runtime_snapshot_fields"),
            (observability.KVCachePoolSnapshot, "pool_snapshot_fields"),
            (observability.InstanceSnapshot, "instance_snapshot_fields"),
            (observability.GpuSnapshot, "gpu_snapshot_fields"),
        ):
            have = [field.name for field in kind.__dataclass_fields__.values()]
            self.assertTrue(set(NAMES[key]) <= set(have), (kind, have))
        capabilities = observability.get_capabilities()
        self.assertEqual(capabilities["pool_snapshot_fields"], NAMES["pool_snapshot_fields"])
        self.assertEqual(capabilities["runtime_snapshot_fields"], NAMES["runtime_snapshot_fields"])
        self.assertEqual(control.capabilities()["state_names"], NAMES["states"])


class Live(BrokerTest):
    """Snapshots and limits of a process with two groups."""

    CAPACITY = "64M"
    PAGE = 2 * MIB * 2 * 2

    def setUp(self) -> None:
        super().setUp()
        vllm.init_kvcached(device="cpu")

    def test_without_managers_there_is_nothing_to_limit(self) -> None:
        answer = control.set_instance_memory_limit(MIB, revision=1)
        self.assertEqual(sorted(answer), sorted(NAMES["instance_limit_keys"]))
        self.assertEqual(answer["status"], "unavailable")

    def test_one_limit_for_all_groups(self) -> None:
        small = vllm.get_kv_cache_manager(128, 16, 4096, 2, pool_name="small", group_id=1)
        large = vllm.get_kv_cache_manager(384, 16, 4096, 2, pool_name="large")
        limit = 5 * self.PAGE + 3
        answer = control.set_instance_memory_limit(limit, revision=1)
        self.assertEqual(sorted(answer), sorted(NAMES["instance_limit_keys"]))
        self.assertEqual((answer["status"], answer["limit_bytes"]), ("applied", limit))
        sessions = [group.session for group in runtime.groups()]
        self.assertTrue(eventually(lambda: {s.limits()[1] for s in sessions} == {limit}))
        self.assertEqual(len(answer["pools"]), 2)
        for state in answer["pools"]:
            self.assertEqual(list(state), NAMES["limit_state_keys"])
        shares = {state["pool_name"]: state["limit_bytes"] for state in answer["pools"]}
        self.assertEqual(
            sum(shares.values()),
            min(limit, sum(m.mem_size * m.num_layers * m.num_kv_buffers for m in (small, large))),
        )
        self.assertLess(shares["small"], shares["large"])
        stale = control.set_instance_memory_limit(limit, revision=0)
        self.assertEqual(stale["status"], "stale")
        conflict = control.set_instance_memory_limit(0, revision=1)
        self.assertEqual(conflict["status"], "conflict")
        self.assertEqual(large.group.session.limits()[1], limit)
        with self.assertRaises(ValueError):
            control.set_instance_memory_limit(-1, revision=2)

    def test_snapshots(self) -> None:
        mine = vllm.get_kv_cache_manager(300, 16, 4096, 2, pool_name="kv")
        self.assertTrue(eventually(lambda: mine.try_to_reserve(3)))
        (pool,) = vllm.kv_cache_pool_snapshots()
        self.assertEqual((pool.integration, pool.pool_name, pool.total_blocks), ("vllm", "kv", 300))
        self.assertEqual((pool.allocated_blocks, pool.reserved_blocks), (3, 3))
        self.assertEqual(pool.mapped_bytes, self.PAGE)
        self.assertTrue(pool.null_block_reserved)
        self.assertEqual(vllm.kv_cache_pool_snapshot_dicts()[0]["group_id"], 0)
        state = vllm.observability_snapshot()
        self.assertEqual((state.engine, state.device, state.initialized), ("vllm", "cpu", True))

    def test_instances_and_gpus(self) -> None:
        self.assertEqual(observability.instance_snapshots(), [])
        mine = vllm.get_kv_cache_manager(300, 16, 4096, 2)
        self.assertTrue(eventually(lambda: mine.available_size() > 0))
        self.assertEqual(mine.get_page_occupancy([0]), {0: 1})
        mine.set_memory_limit(3 * self.PAGE, revision=1)

        def seen() -> bool:
            found = observability.instance_snapshots("test")
            return len(found) == 1 and found[0].referenced == self.PAGE

        self.assertTrue(eventually(seen))
        (instance,) = observability.instance_snapshots("test")
        self.assertEqual(instance.limit, 3 * self.PAGE)
        self.assertEqual(instance.reclaimable, instance.idle + instance.cached)
        self.assertEqual(observability.instance_snapshots("nobody"), [])
        (gpu,) = observability.gpu_snapshots()
        self.assertEqual(gpu.gpu, instance.gpu)
        self.assertEqual(gpu.capacity, 64 * MIB)

        def fits() -> bool:  # the two are asked one after the other
            (gpu,) = observability.gpu_snapshots()
            (instance,) = observability.instance_snapshots("test")
            return gpu.held >= instance.resident >= self.PAGE

        self.assertTrue(eventually(fits))


if __name__ == "__main__":
    unittest.main()
