"""Hugging Face's package `kernels`, which this one would hide from transformers where both can be imported.

transformers asks the installed distributions whether there is a `kernels`, then runs `from kernels import get_kernel`
and its like. With a checkout of this repository on the path that finds this package. So what this one does not define
is looked up there: modules by `kernels.__path__`, names by `kernels.__getattr__`.
"""

import importlib.util
import sys
from pathlib import Path

MODULE = "kernels.huggingface"  # under this name its __init__.py is run; it imports its own modules as kernels.NAME


def lookup(name: str, path: list[str]) -> object:
    """The attribute of Hugging Face's package. Raises AttributeError where it, or the name in it, does not exist.

    path: the folders of all packages of this name, this one first.
    """
    # Another checkout of this repository can be on the path, too.
    folder = next((Path(folder) for folder in path[1:] if not Path(folder, "namesake.py").exists()), None)
    if folder is not None and (name == "__version__" or not name.startswith("__")):
        module = sys.modules.get(MODULE) or _load(folder)
        if hasattr(module, name):
            return getattr(module, name)
    raise AttributeError(f"module 'kernels' has no attribute {name!r}")


def _load(folder: Path):
    spec = importlib.util.spec_from_file_location(MODULE, folder / "__init__.py")
    module = sys.modules[MODULE] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[MODULE]
        raise
    return module
