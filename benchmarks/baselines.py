"""Who takes part in the training benchmark: psysafe and the baselines, each with one optimiser step of the recipe.

Every contender gets the same random base weights (drawn from the published tensor names), the same adapters with B
different from zero, and the same documents. It has four methods: `load`, `backward` (returns the loss), `gradients`
(by PEFT's names) and `update`. The baselines run in their best public settings: the kernels of flash-linear-attention
and causal-conv1d where they are installed, cuDNN's attention before any other, one document a row and no padding,
logits of the trained tokens alone, bf16 adapters on a GPU, 8-bit AdamW if bitsandbytes is installed.
"""

import contextlib
import importlib.util
import shutil
import tempfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from psysafe.checkpoint.base import build, random_tensor, randomise
from psysafe.data.documents import Document, MicroBatch, pack
from psysafe.files import read_json
from psysafe.model.config import ModelConfig
from psysafe.model.recompute import STAGES, recompute
from psysafe.training.config import TrainConfig
from psysafe.training.loss import batch_loss
from psysafe.training.memory_plan import Sizes
from psysafe.training.setup import attach_adapters, make_optimizer, plan_within
from psysafe.training.step import add_gradients

MAX_GPU_BYTES = 85_000_000_000  # the memory of an 80 GB GPU; also the limit on a GPU that has more
RECIPE = TrainConfig()
MICRO_BATCH = RECIPE.micro_batch_tokens
LORA = {  # the recipe's adapters, in the words of PEFT's LoraConfig
    "r": RECIPE.lora_rank,
    "lora_alpha": RECIPE.lora_alpha,
    "lora_dropout": 0.0,
    "target_modules": RECIPE.lora_targets,
}
ROOT = Path(__file__).resolve().parents[1]
# In order of preference on Hopper; the first one that supports the shapes runs.
ATTENTION = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
# The model for a CPU. As in the 27B: the kinds of layers and their shares, the ratios of heads, an MLP about 3.4 x as
# wide as the hidden size.
SMALL = {
    **{"vocab_size": 8192, "hidden_size": 256, "intermediate_size": 896, "head_dim": 64, "num_attention_heads": 6},
    **{"num_key_value_heads": 1, "linear_num_key_heads": 2, "linear_num_value_heads": 6, "linear_conv_kernel_dim": 4},
    **{"linear_key_head_dim": 64, "linear_value_head_dim": 64, "tie_word_embeddings": False, "rms_norm_eps": 1e-3},
    "initializer_range": 0.05,
    "rope_parameters": {
        **{"rope_type": "default", "rope_theta": 10_000_000, "partial_rotary_factor": 0.25},
        **{"mrope_section": [4, 2, 2], "mrope_interleaved": True},
    },
}


def architecture(device: torch.device, layers: int) -> dict:
    """The config (as in config.json) of the 27B's first `layers` layers; on a CPU that of the small model."""
    text_config = SMALL if device.type == "cpu" else read_json(ROOT / "configs" / "qwen3.5-27b-architecture.json")
    types = ["linear_attention", "linear_attention", "linear_attention", "full_attention"] * -(-layers // 4)
    return {**text_config, "num_hidden_layers": layers, "layer_types": types[:layers]}


def adapter_tensor(name: str, shape: torch.Size) -> Tensor:
    """Random numbers for a LoRA matrix, drawn from its name. A is as large as at initialisation; B is small but not
    zero, because A gets no gradient from a B of zero."""
    return random_tensor(name, tuple(shape), shape[1] ** -0.5 if name.endswith("lora_A") else 0.01)


class Contender:
    """One implementation of the step.

    text_config: the architecture (config.json); documents: token ids (n,) int64 of each document, all of one length,
    on the CPU; trained: how many tokens of each document are trained, its last ones.
    """

    packages: tuple[str, ...] = ()  # packages that have to be installed
    # What `load` imports. It is imported before the memory is measured: a library's own size is not the step's.
    modules: tuple[str, ...] = ()

    def __init__(
        self, text_config: dict, documents: list[Tensor], trained: int, device: torch.device, checkpointing: bool
    ):
        self.text_config, self.documents, self.trained, self.device = text_config, documents, trained, device
        self.checkpointing = checkpointing
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.trained_tokens = trained * len(documents)

    @classmethod
    def missing(cls, device: str) -> str:
        """Why this contender cannot run here; "" if it can."""
        absent = [name for name in cls.packages if importlib.util.find_spec(name) is None]
        if absent:
            return f"not installed: {', '.join(absent)} (benchmarks/README.md lists versions)"
        return "needs a GPU" if device == "cpu" and cls not in (Ours, HFPeft) else ""

    def recompute_seconds(self) -> float:
        """The time that recomputation adds to a step, as the memory plan computes it."""
        return 0.0

    def step(self) -> Tensor:
        loss = self.backward()
        with torch.profiler.record_function("optimiser"):
            self.update()
        return loss


class Ours(Contender):
    """psysafe. Checkpointed, it recomputes every stage that can be recomputed; else, on a GPU, the memory plan
    chooses the stages."""

    def load(self) -> None:
        self.model = build(ModelConfig.from_dict(self.text_config), self.device, self.dtype)
        randomise(self.model)
        self.adapters = attach_adapters(self.model, RECIPE)
        for name, x in self.adapters.tensors().items():
            x.copy_(adapter_tensor(name, x.shape))
        self.optimizer = make_optimizer(self.adapters, RECIPE)
        trained = [np.arange(len(x)) >= len(x) - self.trained for x in self.documents]
        self.rows = [Document(x.numpy(), mask, "") for x, mask in zip(self.documents, trained, strict=True)]
        self.plan = None
        if self.checkpointing:
            for block in self.model.layers:
                recompute(block, STAGES)
        elif self.device.type == "cuda":
            self.plan = plan_within(MAX_GPU_BYTES, RECIPE, self.model, self.adapters, self.optimizer, ranks=1)

    def backward(self) -> Tensor:
        self.optimizer.zero_grad()
        total = torch.zeros((), device=self.device)
        for batch in pack(self.rows, MICRO_BATCH):  # in every step, as in training: packing is part of the time
            if self.plan is not None:
                self.plan.apply(self.model, sizes(batch))
            loss = batch_loss(self.model, batch, self.device) / self.trained_tokens
            add_gradients(self.model, loss)
            total += loss.detach()
        return total

    def recompute_seconds(self) -> float:
        batches = pack(self.rows, MICRO_BATCH) if self.plan else []
        return sum(self.plan.choose(sizes(batch)).seconds for batch in batches)

    def gradients(self) -> dict[str, Tensor]:
        return self.adapters.tensors(self.adapters.grad)

    def update(self) -> None:
        self.optimizer.step(RECIPE.lr)


def sizes(batch: MicroBatch) -> Sizes:
    return Sizes.of(batch.cu_seqlens.diff().tolist(), len(batch.rows))


class HFPeft(Contender):
    """transformers + PEFT. transformers uses the kernels of flash-linear-attention and causal-conv1d if installed."""

    packages = ("transformers", "peft")
    modules = ("transformers.models.qwen3_5.modeling_qwen3_5", "peft")

    def load(self) -> None:
        from peft import LoraConfig, get_peft_model

        self.model = get_peft_model(self.base(), LoraConfig(**LORA), autocast_adapter_dtype=self.device.type == "cpu")
        self.finish()

    def base(self) -> nn.Module:
        from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig

        config = Qwen3_5TextConfig(**{k: v for k, v in self.text_config.items() if k not in ("model_type", "dtype")})
        config._attn_implementation = "sdpa"
        default_dtype = torch.get_default_dtype()
        torch.set_default_dtype(self.dtype)  # the 27B in fp32 would need 108 GB
        try:
            with self.device:
                model = Qwen3_5ForCausalLM(config)
        finally:
            torch.set_default_dtype(default_dtype)
        with torch.no_grad():
            for name, x in model.named_parameters():
                published = name.removeprefix("model.")
                x.copy_(random_tensor(published, x.shape, self.text_config["initializer_range"], x.device))
        return model

    def finish(self) -> None:
        """What follows after PEFT or Unsloth has attached adapters: checkpointing, the adapters' values, the optimiser,
        and the documents as rows of micro-batches."""
        if self.checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        self.lora = {_short_name(name): p for name, p in self.model.named_parameters() if "lora_" in name}
        with torch.no_grad():
            for name, p in self.lora.items():
                p.copy_(adapter_tensor(name, p.shape))
        self.model.train()
        parameters = list(self.lora.values())
        if self.device.type == "cuda" and importlib.util.find_spec("bitsandbytes"):
            from bitsandbytes.optim import AdamW8bit

            self.optimizer = AdamW8bit(parameters, RECIPE.lr, weight_decay=RECIPE.weight_decay)
        else:
            self.optimizer = torch.optim.AdamW(parameters, RECIPE.lr, weight_decay=RECIPE.weight_decay, fused=True)
        rows = max(1, MICRO_BATCH // len(self.documents[0]))
        self.batches = torch.stack(self.documents).to(self.device).split(rows)

    def backward(self) -> Tensor:
        self.optimizer.zero_grad()
        total = torch.zeros((), device=self.device)
        on_gpu = self.device.type == "cuda"
        # It encloses backward as well, because checkpointing runs the forward pass again there.
        with sdpa_kernel(ATTENTION, set_priority=True) if on_gpu else contextlib.nullcontext():
            for tokens in self.batches:
                loss = self.loss(tokens)
                loss.backward()
                total += loss.detach()
        return total

    def loss(self, tokens: Tensor) -> Tensor:
        """tokens (B, n) of a micro-batch -> its loss. Each row ends with its trained tokens, so that only the logits of
        its last `trained` + 1 positions are computed; the last of them predicts nothing and is dropped."""
        logits = self.model(input_ids=tokens, use_cache=False, logits_to_keep=self.trained + 1).logits[:, :-1]
        labels = tokens[:, -self.trained :]
        return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="sum") / self.trained_tokens

    def gradients(self) -> dict[str, Tensor]:
        return {name: p.grad for name, p in self.lora.items()}

    def update(self) -> None:
        torch.nn.utils.clip_grad_norm_(list(self.lora.values()), RECIPE.max_grad_norm)
        self.optimizer.step()


class TRLLiger(HFPeft):
    """What TRL's SFTTrainer(use_liger_kernel=True) trains: Liger's kernels in the model and its fused linear loss.
    The trainer itself only adds a loop around this step, so it is left out."""

    packages = ("transformers", "peft", "liger_kernel")
    modules = (*HFPeft.modules, "liger_kernel.transformers")

    def base(self) -> nn.Module:
        from liger_kernel.transformers import _apply_liger_kernel_to_instance

        model = super().base()
        _apply_liger_kernel_to_instance(model=model, fused_linear_cross_entropy=True)
        return model

    def loss(self, tokens: Tensor) -> Tensor:
        positions = self.trained + 1  # Liger shifts the labels itself: the first of them is no target
        settings = {"use_cache": False, "num_items_in_batch": self.trained_tokens, "logits_to_keep": positions}
        return self.model(input_ids=tokens, labels=tokens[:, -positions:], **settings).loss


class Unsloth(HFPeft):
    """Unsloth's FastLanguageModel. It loads folders only, so the random base is first written to one."""

    packages = ("unsloth",)
    modules = ("unsloth",)  # it patches transformers, so it has to be imported first

    def loss(self, tokens: Tensor) -> Tensor:
        labels = tokens.clone()
        labels[:, : -self.trained] = -100
        settings = {"use_cache": False, "num_items_in_batch": self.trained_tokens}
        return self.model(input_ids=tokens, labels=labels, **settings).loss

    def load(self) -> None:
        from unsloth import FastLanguageModel

        with tempfile.TemporaryDirectory() as folder:
            self.base().save_pretrained(folder)
            torch.cuda.empty_cache()
            for name in ("tokenizer.json", "tokenizer_config.json"):
                shutil.copy(ROOT / "psysafe" / "assets" / "tiny" / name, folder)
            model, _ = FastLanguageModel.from_pretrained(
                folder, max_seq_length=MICRO_BATCH, dtype=self.dtype, load_in_4bit=False
            )
        self.model = FastLanguageModel.get_peft_model(
            model, **LORA, bias="none", use_gradient_checkpointing="unsloth" if self.checkpointing else False
        )
        self.checkpointing = False  # Unsloth's own is on already; `finish` must not add that of transformers
        self.finish()


def _short_name(name: str) -> str:
    """PEFT's parameter name -> "layers.3.self_attn.q_proj.lora_A"."""
    name = name.removeprefix("base_model.model.model.").removeprefix("language_model.")
    return name.removesuffix(".weight").removesuffix(".default")


CONTENDERS: dict[str, type[Contender]] = {
    "ours": Ours,
    "hf-peft": HFPeft,
    "trl-liger": TRLLiger,
    "unsloth": Unsloth,
}
