"""The arms of the race: one optimiser step of the recipe as ours and as the field's own parts do it.

Every arm gets the same random base (numbers that follow from the published tensor names), the same adapters with B
different from zero, and the same documents; it offers `load`, `backward` (-> loss), `gradients` (by PEFT's names) and
`update`. The peers run in their best public settings: fla's kernels where installed, one row a document instead of
padding, the loss over trained tokens only where they offer that, bf16 adapters on a GPU, 8-bit AdamW if bitsandbytes is
there.
"""

import importlib.util
import json
import tempfile
from pathlib import Path

import numpy as np
import torch

import kernels
from psysafe.checkpoint import build, random_tensor, randomise
from psysafe.config import TrainConfig
from psysafe.data import Document, pack
from psysafe.facts import make_optimizer, nbytes
from psysafe.lora import TARGETS, attach
from psysafe.memory import RESERVE, Plan, Sizes
from psysafe.model_config import ModelConfig

CAP = 85_000_000_000  # bytes of an 80 GB GPU, also where the GPU at hand has more
MICRO_BATCH = 4096
LR = 1e-4


def adapter_tensor(name: str, shape: torch.Size) -> torch.Tensor:
    """Numbers for a LoRA matrix, from its name: A as at initialisation, B small but not zero."""
    return random_tensor(name, tuple(shape), shape[1] ** -0.5 if name.endswith("lora_A") else 0.01)


class Arm:
    def __init__(self, text: dict, tokens: list[torch.Tensor], trained: int, device: torch.device, checkpointing: bool):
        self.text, self.tokens, self.trained, self.device = text, tokens, trained, device
        self.checkpointing = checkpointing
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.targets = trained * len(tokens)

    def step(self) -> torch.Tensor:
        loss = self.backward()
        with torch.profiler.record_function("optimiser"):
            self.update()
        return loss


class Ours(Arm):
    def load(self) -> None:
        self.model = build(ModelConfig.from_dict(self.text), self.device, self.dtype)
        randomise(self.model)
        self.adapters = attach(self.model, 1, 32)
        for name, x in self.adapters.tensors().items():
            x.copy_(adapter_tensor(name, x.shape))
        self.optimizer = make_optimizer(self.adapters, TrainConfig(min_8bit_size=4096))
        trained = [np.arange(len(x)) >= len(x) - self.trained for x in self.tokens]
        self.documents = [Document(x.numpy(), t, "") for x, t in zip(self.tokens, trained, strict=True)]
        self.plan = None
        if self.device.type == "cuda":
            fixed = nbytes(*self.model.parameters(), self.adapters.grad, *self.optimizer.state_tensors().values())
            self.plan = Plan(self.model.config, self.adapters.targets, 1, CAP - RESERVE, fixed)

    def backward(self) -> torch.Tensor:
        self.optimizer.zero_grad()
        total = torch.zeros((), device=self.device)
        for batch in pack(self.documents, MICRO_BATCH):
            if self.plan is not None:
                self.plan.apply(self.model, Sizes.of(batch.cu_seqlens.diff().tolist(), len(batch.rows)))
            tokens, rows, labels = (
                x.to(self.device, non_blocking=True) for x in (batch.tokens, batch.rows, batch.labels)
            )
            hidden = self.model(tokens, kernels.Documents(batch.cu_seqlens, self.device), rows=rows)
            loss = kernels.linear_cross_entropy(hidden, self.model.head, labels) / self.targets
            loss.backward()
            total += loss.detach()
        return total

    def gradients(self) -> dict[str, torch.Tensor]:
        return self.adapters.tensors(self.adapters.grad)

    def update(self) -> None:
        self.optimizer.step(LR)


class HFPeft(Arm):
    """transformers + PEFT; with flash-linear-attention and causal-conv1d installed, transformers uses their kernels."""

    def load(self) -> None:
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(r=1, lora_alpha=32, lora_dropout=0.0, target_modules=list(TARGETS))
        self.model = get_peft_model(self.base(), config, autocast_adapter_dtype=self.device.type == "cpu")
        self.finish()

    def base(self) -> torch.nn.Module:
        from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig

        config = Qwen3_5TextConfig(**{k: v for k, v in self.text.items() if k not in ("model_type", "dtype")})
        config._attn_implementation = "sdpa"
        before = torch.get_default_dtype()
        torch.set_default_dtype(self.dtype)
        try:
            with self.device:
                model = Qwen3_5ForCausalLM(config)
        finally:
            torch.set_default_dtype(before)
        with torch.no_grad():
            for name, x in model.named_parameters():
                published = name.removeprefix("model.")
                x.copy_(random_tensor(published, x.shape, self.text["initializer_range"], x.device))
        return model

    def finish(self) -> None:
        """Adapters by name, checkpointing, optimiser, and the documents as rows of a batch."""
        if self.checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        self.lora = {_plain(name): p for name, p in self.model.named_parameters() if "lora_" in name}
        with torch.no_grad():
            for name, p in self.lora.items():
                p.copy_(adapter_tensor(name, p.shape))
        self.model.train()
        parameters = list(self.lora.values())
        if self.device.type == "cuda" and importlib.util.find_spec("bitsandbytes"):
            from bitsandbytes.optim import AdamW8bit

            self.optimizer = AdamW8bit(parameters, LR, weight_decay=0.01)
        else:
            self.optimizer = torch.optim.AdamW(parameters, LR, weight_decay=0.01, fused=True)
        tokens = torch.stack(self.tokens).to(self.device)
        labels = tokens.clone()
        labels[:, : tokens.shape[1] - self.trained] = -100
        rows = max(1, MICRO_BATCH // tokens.shape[1])
        self.batches = list(zip(tokens.split(rows), labels.split(rows), strict=True))

    def backward(self) -> torch.Tensor:
        self.optimizer.zero_grad()
        total = torch.zeros((), device=self.device)
        for tokens, labels in self.batches:
            loss = self.model(input_ids=tokens, labels=labels, use_cache=False, num_items_in_batch=self.targets).loss
            loss.backward()
            total += loss.detach()
        return total

    def gradients(self) -> dict[str, torch.Tensor]:
        return {name: p.grad for name, p in self.lora.items()}

    def update(self) -> None:
        torch.nn.utils.clip_grad_norm_(list(self.lora.values()), 1.0)
        self.optimizer.step()


class TRLLiger(HFPeft):
    """What TRL's SFTTrainer(use_liger_kernel=True) trains: Liger's kernels in the model, its fused linear loss."""

    def base(self) -> torch.nn.Module:
        from liger_kernel.transformers import _apply_liger_kernel_to_instance

        model = super().base()
        _apply_liger_kernel_to_instance(model=model, fused_linear_cross_entropy=True)
        return model


class Unsloth(HFPeft):
    """Unsloth's FastLanguageModel loads folders only: the random base is written to one first."""

    def load(self) -> None:
        from unsloth import FastLanguageModel

        with tempfile.TemporaryDirectory() as folder:
            device, self.device = self.device, torch.device("cpu")
            self.base().save_pretrained(folder)
            self.device = device
            tokenizer = Path(__file__).resolve().parents[1] / "psysafe" / "assets" / "tiny"
            for name in ("tokenizer.json", "tokenizer_config.json"):
                (Path(folder) / name).write_text((tokenizer / name).read_text())
            assert json.loads((Path(folder) / "config.json").read_text())["num_hidden_layers"]
            model, _ = FastLanguageModel.from_pretrained(
                folder, max_seq_length=MICRO_BATCH, dtype=self.dtype, load_in_4bit=False
            )
        self.model = FastLanguageModel.get_peft_model(
            model, r=1, lora_alpha=32, lora_dropout=0.0, target_modules=list(TARGETS), bias="none",
            use_gradient_checkpointing="unsloth" if self.checkpointing else False,
        )  # fmt: skip
        self.checkpointing = False
        self.finish()


def _plain(name: str) -> str:
    """PEFT's parameter name -> "layers.3.self_attn.q_proj.lora_A"."""
    name = name.removeprefix("base_model.model.model.").removeprefix("language_model.")
    return name.removesuffix(".weight").removesuffix(".default")


ARMS = {"ours": Ours, "hf-peft": HFPeft, "trl-liger": TRLLiger, "unsloth": Unsloth}
