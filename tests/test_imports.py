"""Who may import whom: torch, triton <- kernels <- psysafe <- scripts <- tests; and which packages at run time."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ("train", "generate", "eval")
RUNTIME = {"torch", "triton", "safetensors", "tokenizers", "numpy", "huggingface_hub"}
OPTIONAL = {"tqdm", "matplotlib", "wandb", "trackio", "pyarrow"}  # tqdm comes with huggingface_hub, others if asked for
ALLOWED = {
    "kernels": {"kernels"},
    "psysafe": {"kernels", "psysafe"},
    "scripts": {"kernels", "psysafe"},
}


def imports(source: str) -> set[str]:
    """Top-level packages that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "absolute imports only"
            found.add(node.module.partition(".")[0])
    return found


def faults(where: str, source: str) -> set[str]:
    """What a file of that part of the project must not import."""
    ours = imports(source) & {"kernels", "psysafe", "tests", "tools", "benchmarks", *SCRIPTS}
    others = imports(source) - ours - set(sys.stdlib_module_names)
    return (ours - ALLOWED[where]) | (others - RUNTIME - OPTIONAL)


def files():
    for part in ("kernels", "psysafe"):
        yield from ((part, path) for path in sorted((ROOT / part).rglob("*.py")))
    yield from (("scripts", ROOT / f"{name}.py") for name in SCRIPTS if (ROOT / f"{name}.py").exists())


@pytest.mark.parametrize(("where", "path"), list(files()), ids=lambda x: getattr(x, "name", x))
def test_import_direction(where, path):
    assert not faults(where, path.read_text())


def implementations(source: str) -> set[str]:
    """Names of one implementation of an op that a file uses: it must call the op, and let the switch choose."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.Name | ast.Attribute):
            names.add(node.id if isinstance(node, ast.Name) else node.attr)
    # Asking the switch itself is allowed.
    return {name for name in names - {"runs_triton"} if name.endswith(("_triton", "_reference", "_kernel"))}


def test_only_the_switch_knows_the_implementations():
    """psysafe and the scripts call ops through the package `kernels`, never one version by name."""
    for where, path in files():
        if where != "kernels":
            assert not implementations(path.read_text()), path


@pytest.mark.parametrize(
    "source",
    [
        "from kernels.ops.qk_norm_rope import qk_norm_rope_triton as rope",
        "import kernels\nkernels.attention.causal_attention_reference(q, k, v, d)",
    ],
)
def test_a_chosen_implementation_is_seen(source):
    assert implementations(source)


@pytest.mark.parametrize(
    ("where", "source"),
    [
        ("kernels", "from psysafe.model.decoder import Qwen3_5"),
        ("psysafe", "def f():\n    import train"),
        ("scripts", "import transformers"),
        ("psysafe", "from bitsandbytes.optim import AdamW8bit"),
    ],
)
def test_a_wrong_import_is_seen(where, source):
    assert faults(where, source)
