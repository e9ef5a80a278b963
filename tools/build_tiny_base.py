"""Builds what `torchrun train.py` starts from: sample rows, tokenizer, config and trained weights of the tiny base.

    python tools/build_tiny_base.py                 everything, about 40 minutes on one core
    python tools/build_tiny_base.py --text-only     writes nothing: are the committed rows and tokenizer reproduced?

The base is a small Qwen3.5 (three delta-net layers, then one with attention; tied head). All of its weights are
trained, on the corpus that `tiny_corpus` writes. Text, rows and tokenizer come out the same everywhere; weights only on
the same processor with the same torch. The committed ones were trained in one run, resumed once at step 3,000, whose
learning rates are RATES to within two per cent; a build from scratch gives slightly different ones.
`probe_tiny_base.py` says what a base does with prompts that it has not read.
"""

import argparse
import itertools
import json
import sys
import time
from pathlib import Path

import tiny_corpus
import torch
import torch.nn.functional as F
from safetensors.torch import save
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from kernels.ops import gated_delta_rule as delta_rule  # noqa: E402
from psysafe.checkpoint.base import build, published_tensors, randomise  # noqa: E402
from psysafe.data.tokenizer import THINK_END  # noqa: E402
from psysafe.data.tokenizer import Tokenizer as ChatTokenizer  # noqa: E402
from psysafe.files import write_atomic  # noqa: E402
from psysafe.model.config import ModelConfig  # noqa: E402
from psysafe.model.decoder import Qwen3_5  # noqa: E402

TINY = ROOT / "psysafe" / "assets" / "tiny"

VOCAB_SIZE = 2560
STEPS = 7000
STEP_TOKENS = 1024
MAX_DOCUMENT = 256
# (step, learning rate), straight lines between. At 3e-3 the base learns to answer, but hardly looks at what it is asked
# about; with a lower rate and more weight on the reasoning, where that is decided, it tells the topics apart.
RATES = ((0, 0.0), (100, 3e-3), (3000, 3e-3), (3001, 2e-3), (3100, 2e-3), (3450, 1.5e-3), (STEPS, 0.0))
REASONING_WEIGHT, REASONING_WEIGHT_FROM = 4.0, 3000
THREADS = 1  # with more, sums would be added in another order, and another machine would give other weights

# Qwen3.5's added tokens in its own order, and which of them are special (dropped when a text is shown).
SPECIAL = [
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>"),
    *("<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>"),
    *("<|image_pad|>", "<|video_pad|>"),
]
PLAIN = [
    *("<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>"),
    *("<|repo_name|>", "<|file_sep|>", "<tool_response>", "</tool_response>", "<think>", "</think>"),
]
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)


def train_tokenizer() -> str:
    """tokenizer.json of a byte-level BPE, trained on what the base reads between the added tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(SPECIAL) - len(PLAIN),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )

    def pieces():
        for messages in tiny_corpus.base_documents(20_000):
            for message in messages:
                if message["role"] == "assistant":
                    yield f"\n{message['reasoning_content']}\n"
                    yield f"\n\n{message['content']}"
                else:
                    yield f"{message['role']}\n{message['content']}"

    tokenizer.train_from_iterator(pieces(), trainer)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL])
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in PLAIN])
    return tokenizer.to_str(pretty=True) + "\n"


def text_files() -> dict[str, str]:
    """Every file but the weights: path from the tiny model's folder -> text."""
    tokenizer_json = train_tokenizer()
    token_id = Tokenizer.from_str(tokenizer_json).token_to_id
    layers = 4
    text_config = {
        "model_type": "qwen3_5_text",
        "dtype": "bfloat16",
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 192,
        "intermediate_size": 576,
        "num_hidden_layers": layers,
        "layer_types": [("linear_attention", "full_attention")[(i + 1) % 4 == 0] for i in range(layers)],
        "full_attention_interval": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "attn_output_gate": True,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "linear_conv_kernel_dim": 4,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 32,
        "linear_value_head_dim": 32,
        "mamba_ssm_dtype": "float32",
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "initializer_range": 0.02,
        "max_position_embeddings": 4096,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000,
            "partial_rotary_factor": 0.25,
            "mrope_interleaved": True,
            "mrope_section": [3, 3, 2],
        },
        "tie_word_embeddings": True,
        "use_cache": True,
        "eos_token_id": token_id("<|endoftext|>"),
    }
    config = {"architectures": ["Qwen3_5ForCausalLM"], **text_config}
    generation = {
        "do_sample": True,
        "temperature": 0.6,
        "top_k": 20,
        "top_p": 0.95,
        "eos_token_id": [token_id("<|im_end|>"), token_id("<|endoftext|>")],
        "pad_token_id": token_id("<|endoftext|>"),
    }
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "model_max_length": 4096,
        "clean_up_tokenization_spaces": False,
    }
    files = {
        "config.json": config,
        "generation_config.json": generation,
        "tokenizer_config.json": tokenizer_config,
    }
    rows = {"train": tiny_corpus.training_rows(), "val": tiny_corpus.validation_rows()}
    return {
        "tokenizer.json": tokenizer_json,
        **{name: json.dumps(content, indent=2) + "\n" for name, content in files.items()},
        **{f"../rows/{name}.jsonl": "".join(json.dumps(row) + "\n" for row in part) for name, part in rows.items()},
    }


def packed_steps(tokenizer: ChatTokenizer, steps: int):
    """Yields (tokens (T,), trained (T,) bool, reasoning (T,) bool, cu_seqlens (n+1,)) for each step: whole documents,
    T <= STEP_TOKENS. reasoning: the trained tokens before </think>, where there is reasoning."""
    documents = (tokenizer.encode_trained(messages) for messages in tiny_corpus.base_documents(10**9))
    (think_end,) = tokenizer.encode(THINK_END)
    waiting = next(documents)
    for _ in range(steps):
        tokens, trained, reasoning, ends = [], [], [], [0]
        while len(tokens) + len(waiting[0]) <= STEP_TOKENS:
            assert len(waiting[0]) <= MAX_DOCUMENT, tokenizer.decode(waiting[0])
            tokens += waiting[0]
            trained += waiting[1]
            reasoning += _reasoning_part(*waiting, think_end)
            ends.append(len(tokens))
            waiting = next(documents)
        masks = torch.tensor(trained), torch.tensor(reasoning)
        yield torch.tensor(tokens), *masks, torch.tensor(ends, dtype=torch.int32)


def _reasoning_part(ids: list[int], trained: list[bool], think_end: int) -> list[bool]:
    start, end = trained.index(True), max(i for i, token in enumerate(ids) if token == think_end)
    is_empty = end - start <= 4  # <think> and line breaks
    return [trained[i] and i < end and not is_empty for i in range(len(ids))]


def learning_rate(step: int) -> float:
    """RATES at a step."""
    for (start, low), (end, high) in itertools.pairwise(RATES):
        if step <= end:
            return low + (high - low) * (step - start) / (end - start)
    return 0.0


def all_weights_train(model: Qwen3_5) -> list[torch.nn.Parameter]:
    """Makes every weight trainable and returns them."""
    for module in model.modules():
        if type(module).__name__ == "GatedDeltaNet":
            # The model's own split of this GEMM gives its weight no gradient: there it is always frozen.
            def project(x, u, layer=module.in_proj):
                return F.linear(x, layer.weight).split(tuple(layer.parts.values()), dim=1)

            module.project = project
    return [parameter.requires_grad_() for parameter in model.parameters()]


def initialise(model: Qwen3_5) -> None:
    """Seeded random weights as the architecture starts: N(0, 0.02) matrices, norms at one, decays from slow to fast."""
    randomise(model)
    with torch.no_grad():
        for name, x in published_tensors(model).items():
            if name.endswith("A_log"):
                x.copy_(torch.linspace(1, 16, len(x)).log())
            elif name.endswith("dt_bias"):
                # softplus(dt_bias) from 0.001 to 0.1, in equal factors.
                steps = torch.logspace(-3, -1, len(x))
                x.copy_(steps + (-torch.expm1(-steps)).log())
            elif name.endswith("linear_attn.norm.weight"):
                x.fill_(1)
            elif name.endswith("norm.weight"):
                x.zero_()
            elif name.endswith("conv1d.weight"):
                x.mul_(10)  # it sums four taps: at 0.02 each the layer's output would be almost zero


def train(config: dict, tokenizer: ChatTokenizer, steps: int) -> Qwen3_5:
    """The base after `steps` steps of AdamW over all weights in fp32, loss on the assistant's tokens."""
    # Documents have about 64 tokens: with chunks of 64 half of the delta rule's work is padding.
    delta_rule.CHUNK = 32
    model = build(ModelConfig.from_dict(config), "cpu", torch.float32)
    initialise(model)
    weights = all_weights_train(model)
    matrices = [w for w in weights if w.ndim > 1]
    vectors = [w for w in weights if w.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    print(f"{sum(w.numel() for w in weights):,} parameters, {steps} steps of <= {STEP_TOKENS} tokens", flush=True)
    start, n_tokens = time.time(), 0
    for step, (tokens, trained, reasoning, cu_seqlens) in enumerate(packed_steps(tokenizer, steps), 1):
        lr = learning_rate(step * STEPS // steps)
        for group in optimizer.param_groups:
            group["lr"] = lr
        # Row t predicts token t + 1, so the loss needs the rows before trained tokens.
        rows = trained.nonzero().squeeze(1) - 1
        weight = torch.ones(len(rows))
        if step * STEPS // steps > REASONING_WEIGHT_FROM:
            weight[reasoning[rows + 1]] = REASONING_WEIGHT
        hidden = model(tokens, cu_seqlens, rows=rows)
        losses = F.cross_entropy(model.logits(hidden), tokens[rows + 1], reduction="none")
        loss = (losses * weight).sum() / weight.sum()
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        n_tokens += len(tokens)
        if step == 1:
            without = [name for name, w in model.named_parameters() if w.grad is None or not w.grad.any()]
            assert not without, f"no gradient reaches {without}"
        if step % 25 == 0 or step == steps:
            rate = n_tokens / (time.time() - start)
            line = f"step {step:5d}  loss {loss.item():.4f}  lr {lr:.2e}  grad norm {norm:.3f}  {rate:,.0f} tokens/s"
            print(line, flush=True)
    return model


def weights_file(model: Qwen3_5, steps: int) -> bytes:
    """model.safetensors under the published names and dtypes: BF16, but F32 for A_log and the gated norm."""
    tensors = {}
    for name, x in published_tensors(model).items():
        dtype = torch.float32 if name.endswith(("A_log", "linear_attn.norm.weight")) else torch.bfloat16
        tensors[f"model.language_model.{name}"] = x.to(dtype).contiguous()
    return save(tensors, {"format": "pt", "steps": str(steps), "text_sha256": tiny_corpus.digest()})


def compare(files: dict[str, str], folder: Path) -> int:
    """Returns 0 if every file in the folder is as this script writes it, else 1; prints which differ."""
    different = [name for name, text in files.items() if _read(folder / name) != text]
    for name in different:
        print(f"{(folder / name).resolve()}: not what this script writes; build again", file=sys.stderr)
    if not different:
        print(f"{len(files)} files as committed")
    return int(bool(different))


def _read(path: Path) -> str | None:
    return path.read_text(encoding="utf-8") if path.exists() else None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=TINY, help="the model's folder; rows go to ../rows beside it")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"training steps of the base (default {STEPS})")
    parser.add_argument("--text-only", action="store_true", help="write nothing, compare the text")
    arguments = parser.parse_args()
    torch.set_num_threads(THREADS)
    files = text_files()
    if arguments.text_only:
        return compare(files, arguments.out)
    for name, text in files.items():
        path = (arguments.out / name).resolve()
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, text)
    tokenizer = ChatTokenizer(Tokenizer.from_str(files["tokenizer.json"]))
    model = train(json.loads(files["config.json"]), tokenizer, arguments.steps)
    write_atomic(arguments.out / "model.safetensors", weights_file(model, arguments.steps))
    return 0


if __name__ == "__main__":
    sys.exit(main())
