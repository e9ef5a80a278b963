"""Hugging Face's package `kernels` beside this one: transformers and PEFT find theirs, and the operations are ours."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import kernels

ROOT = Path(__file__).resolve().parents[1]
NAMES = (
    *("CUDAProperties", "Device", "KernelizeFallback", "LayerRepository", "LocalLayerRepository", "Mode"),
    *("ROCMProperties", "register_kernel_mapping", "replace_kernel_forward_from_hub", "use_kernel_mapping"),
    *("get_kernel", "kernelize", "use_kernel_forward_from_hub", "use_kernelized_func"),
)
# As the real one: it imports its modules by the package's own name, and one of them asks the package for its version.
INIT = f"__version__ = '0.18.5'\nfrom kernels.layer import {', '.join(NAMES)}\n"
LAYER = """
from . import __version__ as version
from unittest.mock import MagicMock

class Anything(MagicMock):
    def __call__(self, *args, **kwargs):
        return lambda x: x  # every decorator leaves what it decorates alone

"""


def write_namesake(folder: Path) -> Path:
    """An installed distribution `kernels` with the names that transformers imports."""
    (folder / "kernels").mkdir()
    (folder / "kernels" / "__init__.py").write_text(INIT)
    (folder / "kernels" / "layer.py").write_text(LAYER + "".join(f"{name} = Anything()\n" for name in NAMES))
    (folder / "kernels-0.18.5.dist-info").mkdir()
    metadata = "Metadata-Version: 2.1\nName: kernels\nVersion: 0.18.5\n"
    (folder / "kernels-0.18.5.dist-info" / "METADATA").write_text(metadata)
    return folder


def run(code: str, folder: Path) -> None:
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{folder}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_names_and_modules_that_are_not_here_come_from_the_installed_package(tmp_path):
    code = """
import kernels, kernels.ops.swiglu
from kernels import get_kernel, Mode
import kernels.layer
assert kernels.layer.Mode is Mode and kernels.layer.version == kernels.__version__ == '0.18.5'
assert kernels.swiglu.reference is kernels.ops.swiglu.swiglu_reference
assert not hasattr(kernels, 'nothing') and not hasattr(kernels, '__wrapped__')
"""
    run(code, write_namesake(tmp_path))


def test_without_an_installed_package_a_name_that_is_not_here_is_none():
    if len(kernels.__path__) == 1:
        assert not hasattr(kernels, "get_kernel") and not hasattr(kernels, "__version__")


@pytest.mark.slow
def test_transformers_peft_and_a_run_of_ours_in_one_process(tmp_path):
    """transformers believes that its kernels are there, imports them, and PEFT builds on a model of its own."""
    code = f"""
from transformers.utils import is_kernels_available
assert is_kernels_available()
import torch, train
from peft import LoraConfig, get_peft_model
from tests.oracles import reference_model
import transformers.integrations.hub_kernels as hub
assert hub.LayerRepository.__module__ == 'kernels.layer' or hub.Mode is not None
model = get_peft_model(reference_model(), LoraConfig(r=1, target_modules=['q_proj']))
assert model(torch.arange(5)[None]).logits.isfinite().all()
assert train.main(['--max-steps', '1', '--warmup-steps', '0', '--out', {str(tmp_path / "run")!r}]) == 0
"""
    run(code, write_namesake(tmp_path))
