"""The card's section on loading: PEFT, transformers, vLLM, llama.cpp, psysafe, and whether the adapter is on."""

from dataclasses import dataclass

from psysafe.publish.contents import BESIDE
from psysafe.publish.run import Base

BUNDLED = "psysafe/assets/tiny"  # in a clone of the project
TEXT, IMAGE_TEXT = "AutoModelForCausalLM", "AutoModelForImageTextToText"  # the classes of a multimodal base
QUESTION = '"I feel like giving up."'


@dataclass(frozen=True)
class Names:
    """What the model is called, and which files the repository holds beside the adapter. gguf: the file's name, and
    whether the whole model is in it, or the adapter alone."""

    repository: str
    base: Base
    merged: bool
    gguf: str
    gguf_is_model: bool
    layout: str  # of the adapter's tensors

    @property
    def title(self) -> str:
        return self.repository.partition("/")[2]

    @property
    def base_name(self) -> str:
        """What to load as the base: a hub id, or the bundled miniature's folder in a clone of the project."""
        return self.base.hub_id or BUNDLED

    @property
    def adapter(self) -> str:
        """What programs that know no subfolders take."""
        return "ADAPTER" if self.subfolder else self.repository

    @property
    def subfolder(self) -> str:
        return BESIDE.rstrip("/") if self.merged or self.gguf_is_model else ""


def section(names: Names) -> list[str]:
    parts = [_peft(names), _transformers(names), _vllm(names), _llama_cpp(names), _psysafe(names)]
    return [line for part in parts for line in part]


def _block(language: str, *lines: str) -> list[str]:
    return [f"```{language}", *lines, "```", ""]


def _peft(names: Names) -> list[str]:
    where = f', subfolder="{names.subfolder}"' if names.subfolder else ""
    revision = f', revision="{names.base.revision}"' if names.base.revision else ""
    loader = IMAGE_TEXT if names.layout == "multimodal" else TEXT
    is_here = names.base_name == BUNDLED
    bundled = [f"`{BUNDLED}` is the miniature's folder in a clone of the project.", ""] if is_here else []
    return [
        "### PEFT",
        "",
        *_block(
            "python",
            "import torch",
            "from peft import PeftModel",
            f"from transformers import {loader}",
            "",
            f'base = {loader}.from_pretrained("{names.base_name}"{revision}, dtype="auto")',
            f'model = PeftModel.from_pretrained(base, "{names.repository}"{where})',
        ),
        *bundled,
        f"{_classes(names.layout)} A loader that finds none of the names it looks for leaves **the bare base**, with a "
        "warning at most. So check that the adapter is on, by the same prompt without it:",
        "",
        *_block(
            "python",
            "tokens = torch.arange(9)[None]                                    # any prompt",
            "with torch.no_grad():",
            "    tuned = model(tokens).logits",
            "    with model.disable_adapter():",
            "        print((tuned - model(tokens).logits).abs().max())         # has to be above 0",
        ),
    ]


def _adapter_folder(names: Names) -> list[str]:
    """What ADAPTER in a command means."""
    return [f"ADAPTER is the folder `{BESIDE}` of this repository, downloaded.", ""] if names.subfolder else []


def _classes(layout: str) -> str:
    if layout == "both":
        return (
            "The base is multimodal, and the adapter's file holds every tensor under the names of both classes that "
            f"load it: `{TEXT}`, as above, or `{IMAGE_TEXT}` in its place."
        )
    used, other = (TEXT, IMAGE_TEXT) if layout == "text" else (IMAGE_TEXT, TEXT)
    return f"The adapter's tensors have the names of `{used}`; `{other}` would find none of them."


def _transformers(names: Names) -> list[str]:
    lines = ["### transformers, merged weights", ""]
    if not names.merged:
        model = f"--model {BUNDLED} " if names.base_name == BUNDLED else ""  # else the adapter names it
        command = f"python -m psysafe.checkpoint merge {model}--adapter {names.adapter} --out merged"
        where = f"Not in this repository. In a clone of psysafe `{command}` makes them."
        return [*lines, where, "", *_adapter_folder(names)]
    return [
        *lines,
        *_block(
            "python",
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            f'model = AutoModelForCausalLM.from_pretrained("{names.repository}", dtype="auto")',
            f'tokenizer = AutoTokenizer.from_pretrained("{names.repository}")',
        ),
        "The adapter is in the weights: nothing has to be switched on. The same prompt has other logits than with the "
        "base.",
        "",
    ]


def _vllm(names: Names) -> list[str]:
    if names.merged:
        return ["### vLLM", "", *_block("sh", f"vllm serve {names.repository}")]
    return [
        "### vLLM",
        "",
        *_block("sh", f"vllm serve {names.base_name} --enable-lora --lora-modules tuned={names.adapter}"),
        *_adapter_folder(names),
        "Not tried by us. At the time of writing there are open reports that LoRA has no effect in vLLM on this "
        "architecture ([#49354](https://github.com/vllm-project/vllm/issues/49354), "
        "[#48019](https://github.com/vllm-project/vllm/issues/48019)). Ask `tuned` and the base the same question at "
        "temperature 0: if the answers are the same, word by word, on several prompts, the adapter is off. Merged "
        "weights need no support for adapters.",
        "",
    ]


def _llama_cpp(names: Names) -> list[str]:
    if not names.gguf:
        return ["### llama.cpp", "", "There is no GGUF file in this repository.", ""]
    if not names.gguf_is_model:
        said = f"`{names.gguf}` is the adapter; BASE.gguf any file of the base, quantised or not, downloaded before:"
        return ["### llama.cpp", "", said, "", *_block("sh", f"llama-server -m BASE.gguf --lora {names.gguf}")]
    command = f"llama-server --hf-repo {names.repository} --hf-file {names.gguf}"
    return ["### llama.cpp", "", *_block("sh", command), "The adapter is in the weights of that file.", ""]


def _psysafe(names: Names) -> list[str]:
    if names.merged:
        serve = f"python -m psysafe.serve --model {names.repository}"
        ask = f"python generate.py --model {names.repository} {QUESTION}"
        return ["### psysafe", "", *_block("sh", ask, serve)]
    return [
        "### psysafe",
        "",
        "In a clone of the project; the second command serves base and adapter side by side to any client of OpenAI's "
        "API:",
        "",
        *_block(
            "sh",
            f"python generate.py --model {names.base_name} --compare base,{names.adapter} {QUESTION}",
            f"python -m psysafe.serve --model {names.base_name} --adapter tuned={names.adapter}",
        ),
        *_adapter_folder(names),
        "The first answers with and without the adapter: two answers alike, word by word, mean that it is off.",
        "",
    ]
