"""The kernels that real steps launch: launches.json, written by the step on paper (tools/write_launches.py)."""

import functools
import importlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path

from kernels.proof.contract import CompileSpec

FILE = Path(__file__).with_name("launches.json")


@functools.cache
def read_launches() -> list[dict]:
    return json.loads(FILE.read_text())


def launched(
    *modules: str, spill_budgets: Mapping[str, tuple[int, str]] | None = None
) -> Callable[[], list[CompileSpec]]:
    """A record's `compile_specs`: all launches of kernels in these modules of kernels.ops.

    spill_budgets: kernel function -> bytes of spills that are accepted, and why.
    """
    return lambda: [
        _spec(launch, spill_budgets or {})
        for launch in read_launches()
        if launch["kernel"].partition(":")[0] in {f"kernels.ops.{module}" for module in modules}
    ]


def _spec(launch: dict, spill_budgets: Mapping[str, tuple[int, str]]) -> CompileSpec:
    module, _, function = launch["kernel"].partition(":")
    types, (budget, why) = launch["types"], spill_budgets.get(function, (0, ""))
    pointers = {name: kind for name, kind in types.items() if kind.startswith("*")}
    return CompileSpec(
        launch["name"],
        getattr(importlib.import_module(module), function),
        {name: kind.removesuffix(":16") if name in pointers else kind for name, kind in types.items()},
        launch["constants"],
        **launch["options"],
        spill_budget=budget,
        why=why,
        unaligned=tuple(name for name, kind in pointers.items() if not kind.endswith(":16")),
    )
