"""Who may import whom, and which packages at run time. CONTRIBUTING.md has the rules; each has a wrong example here."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ("train", "generate", "eval")
RUNTIME = {"torch", "triton", "safetensors", "tokenizers", "numpy", "huggingface_hub"}
OPTIONAL = {"tqdm", "matplotlib", "wandb", "trackio", "pyarrow"}  # tqdm comes with huggingface_hub, others if asked for
OPTIONAL |= {"starlette", "uvicorn", "gguf"}  # requirements-serve.txt, requirements-gguf.txt
OURS = {"kernels", "psysafe", "tests", "tools", "benchmarks", *SCRIPTS}

# A file may import from its own line and the lines above it. A name stands for the module and all below it; the longest
# name counts. Files beside psysafe's folders are services: they know no folder.
LAYERS = [
    ["kernels.documents", "kernels.lora_term", "kernels.namesake"],
    ["kernels.ops", "kernels.paper"],
    ["kernels"],
    ["psysafe.files", "psysafe.helplines", "psysafe.hub", "psysafe.cli", "psysafe.interrupt", "psysafe.journal",
     "psysafe.endpoint", "psysafe.printable", "psysafe.program", "psysafe.runtime", "psysafe.services",
     "psysafe.version", "psysafe.web_page"],
    ["psysafe.model"],
    ["psysafe.checkpoint", "psysafe.data"],
    ["psysafe"],  # load_model and load_tokenizer: the package's front door
    ["psysafe.training", "psysafe.generation", "psysafe.paper"],
    ["psysafe.evaluation"],
    ["psysafe.corpus", "psysafe.serve", "psysafe.publish"],
    list(SCRIPTS),
]  # fmt: skip
# What proves the kernels stands beside the program: it may see the operations, and nothing of psysafe may see it.
PROOF = ("kernels.proof", "kernels.bench", "kernels.check", "kernels.compile_check")


def files() -> dict[str, Path]:
    """Module name -> file, for everything that the project runs."""
    paths = [path for part in ("kernels", "psysafe") for path in sorted((ROOT / part).rglob("*.py"))]
    paths += [ROOT / f"{name}.py" for name in SCRIPTS]
    return {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in paths}


MODULES = files()


def imports(source: str, modules=MODULES) -> set[str]:
    """Modules that a file imports, anywhere in it: ours in full, of others the package."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "absolute imports only"
            whole = [f"{node.module}.{alias.name}" for alias in node.names]
            names |= {name if name in modules else node.module for name in whole}
    return {name if name.partition(".")[0] in OURS else name.partition(".")[0] for name in names}


def layer(module: str) -> int:
    """The number of a module's layer: of the longest name in LAYERS that it begins with."""
    fits = [(len(name), i) for i, names in enumerate(LAYERS) for name in names if f"{module}.".startswith(f"{name}.")]
    assert fits, f"{module} stands in no layer"
    return max(fits)[1]


def is_proof(module: str) -> bool:
    return any(f"{module}.".startswith(f"{name}.") for name in PROOF)


def faults(module: str, source: str) -> set[str]:
    """What this module must not import of what its source imports."""
    wrong = set()
    for name in imports(source):
        if name.partition(".")[0] not in OURS:
            if name not in sys.stdlib_module_names and name not in RUNTIME | OPTIONAL:
                wrong.add(name)
        elif name.partition(".")[0] in {"tests", "tools", "benchmarks"} or (name in SCRIPTS and name != module):
            wrong.add(name)
        elif is_proof(module):
            # The proof may see all of kernels, and nothing else.
            if not name.startswith("kernels"):
                wrong.add(name)
        elif is_proof(name) or layer(name) > layer(module):
            wrong.add(name)
    return wrong


@pytest.mark.parametrize("module", list(MODULES))
def test_import_direction(module):
    assert not faults(module, MODULES[module].read_text())


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("kernels.ops.swiglu", "from psysafe.model.decoder import Qwen3_5"),
        ("kernels.ops.swiglu", "import kernels.proof.closeness"),
        ("kernels.ops.swiglu", "from kernels import swiglu"),
        ("kernels.proof.closeness", "from psysafe.files import write_atomic"),
        ("psysafe.model.decoder", "from psysafe.training.config import TrainConfig"),
        ("psysafe.model.decoder", "def f():\n    from kernels.proof import closeness"),
        ("psysafe.files", "from psysafe.model import decoder"),
        ("psysafe.data.rows", "def f():\n    import train"),
        ("psysafe.generation.engine", "from psysafe.evaluation import result"),
        ("train", "import transformers"),
        ("train", "import generate"),
        ("train", "from tests import oracles"),
        ("psysafe.training.optim", "from bitsandbytes.optim import AdamW8bit"),
    ],
)
def test_a_wrong_import_is_seen(module, source):
    assert faults(module, source)


def circle(edges: dict[str, set[str]]) -> list[str]:
    """Modules that import each other in a circle, or nothing."""
    done: set[str] = set()

    def walk(module: str, path: list[str]) -> list[str]:
        if module in path:
            return path[path.index(module) :]
        if module not in done:
            for name in sorted(edges.get(module, ())):
                if ring := walk(name, [*path, module]):
                    return ring
            done.add(module)
        return []

    return next((ring for module in edges if (ring := walk(module, []))), [])


def test_no_circle():
    """Also not inside a folder, nor through an import that waits inside a function."""
    edges = {module: imports(path.read_text()) & MODULES.keys() for module, path in MODULES.items()}
    assert not circle(edges)
    assert circle(edges | {"psysafe.files": {"train"}})


def test_training_loads_no_proof():
    """What `import train` loads of ours imports neither unittest nor the kernels' proof. (torch itself loads
    unittest.mock, so sys.modules alone cannot tell.)"""
    code = "import sys, train; print(*(m.__name__ for m in list(sys.modules.values()) if getattr(m, '__file__', None)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = {name for name in done.stdout.split() if name in MODULES}
    assert {"train", "psysafe.model.decoder", "kernels.ops.swiglu"} <= loaded
    for module in loaded:
        names = imports(MODULES[module].read_text())
        assert "unittest" not in names and not any(map(is_proof, names)), module


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
    for module, path in MODULES.items():
        if not module.startswith("kernels") and module != "psysafe.model.lora":  # which defines lora_linear_reference
            assert not implementations(path.read_text()), path


@pytest.mark.parametrize(
    "source",
    [
        "from kernels.ops.qk_norm_rope import qk_norm_rope_triton as rope",
        "import kernels\nkernels.ops.causal_attention.causal_attention_reference(q, k, v, d)",
    ],
)
def test_a_chosen_implementation_is_seen(source):
    assert implementations(source)
