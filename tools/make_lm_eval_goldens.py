"""Writes tests/fixtures/eval/lm_eval_goldens.json: the scores of lm-eval 0.4.13 on the fixture rows.

    pip install lm_eval==0.4.13        # in a throw-away environment that also has torch, transformers and this project
    PYTHONPATH=. python tools/make_lm_eval_goldens.py

The model is a tiny Qwen3.5 with seeded random weights, in transformers; the tokenizer a small byte-level BPE made from
the fixture's own text (both are written beside the goldens). Three variants: plain, plain with a system text, and the
chat template with a system text. max_length is short, so that some contexts are cut.
"""

import json
import tempfile
from pathlib import Path

import datasets
import lm_eval
import tokenizers
import torch
from lm_eval.api.metrics import aggregate_subtask_metrics, pooled_sample_stderr
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3_5ForCausalLM, Qwen3_5TextConfig

from psysafe import load_model
from psysafe.checkpoint.base import published_tensors

FIXTURES = Path(__file__).resolve().parents[1] / "tests" / "fixtures" / "eval"
MAX_LENGTH = 128
SYSTEM = "You are a helpful assistant"
VARIANTS = {"plain": {}, "system": {"system_instruction": SYSTEM},
            "chat": {"system_instruction": SYSTEM, "apply_chat_template": True}}  # fmt: skip
ADDED = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
# What Qwen3.5's template does with a system and a user message (tests/chat_golden.json has the whole of it).
TEMPLATE = (
    "{%- for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}"
    "{%- if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
MANAGER = TaskManager()
CONFIG = dict(
    model_type="qwen3_5_text", architectures=["Qwen3_5ForCausalLM"], hidden_size=48, intermediate_size=80,
    num_hidden_layers=4, layer_types=["linear_attention", "linear_attention", "linear_attention", "full_attention"],
    num_attention_heads=4, num_key_value_heads=2, head_dim=16, linear_num_key_heads=2, linear_num_value_heads=4,
    linear_key_head_dim=16, linear_value_head_dim=16, linear_conv_kernel_dim=4, tie_word_embeddings=False,
    rms_norm_eps=1e-3, initializer_range=0.1, max_position_embeddings=4096,
    rope_parameters=dict(rope_type="default", rope_theta=10_000_000, partial_rotary_factor=0.25,
                         mrope_section=[1, 1, 0], mrope_interleaved=True),
)  # fmt: skip


def main() -> None:
    write_model()
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(FIXTURES / "model" / "tokenizer.json"), eos_token=ADDED[0],
                                        chat_template=TEMPLATE)  # fmt: skip
    tokenizer.name_or_path = "fixture"
    lm = HFLM(pretrained=reference(), tokenizer=tokenizer, max_length=MAX_LENGTH, batch_size=1, device="cpu")
    goldens = {"lm_eval": lm_eval.__version__, "max_length": MAX_LENGTH, "system_text": SYSTEM}
    for name, options in VARIANTS.items():
        goldens[name] = {"hellaswag": hellaswag(lm, options), "mmlu": mmlu(lm, options)}
    text = json.dumps(goldens, indent=0, ensure_ascii=False)
    (FIXTURES / "lm_eval_goldens.json").write_text(text + "\n", encoding="utf-8")
    print(f"{len(text):,} characters")


def write_model() -> None:
    folder = FIXTURES / "model"
    folder.mkdir(exist_ok=True)
    backend = tokenizers.Tokenizer(models.BPE())
    backend.normalizer = normalizers.NFC()
    pattern = tokenizers.Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(pattern, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    text = [(FIXTURES / f"{name}.jsonl").read_text(encoding="utf-8") for name in ("hellaswag", "mmlu")]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(text, trainers.BpeTrainer(vocab_size=507, initial_alphabet=alphabet))
    backend.add_tokens([AddedToken(token, special="think" not in token, normalized=False) for token in ADDED])
    (folder / "tokenizer.json").write_text(backend.to_str(), encoding="utf-8")
    config = CONFIG | {"vocab_size": backend.get_vocab_size()}
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


def reference() -> Qwen3_5ForCausalLM:
    """transformers' model with the weights that `random:` gives ours."""
    config = json.loads((FIXTURES / "model" / "config.json").read_text())
    config = Qwen3_5TextConfig(**config)
    config._attn_implementation = "eager"
    model = Qwen3_5ForCausalLM(config).eval()
    ours = published_tensors(load_model(f"random:{FIXTURES / 'model' / 'config.json'}"))
    state = {name if name.startswith("lm_head") else f"model.{name}": x.clone() for name, x in ours.items()}
    model.load_state_dict(state)
    return model.float()


def hellaswag(lm: HFLM, options: dict) -> dict:
    files = {"validation": str(FIXTURES / "hellaswag.jsonl"), "train": str(FIXTURES / "hellaswag.jsonl")}
    return evaluate(lm, "hellaswag", {"dataset_path": "json", "dataset_kwargs": {"data_files": files}}, options)


def mmlu(lm: HFLM, options: dict) -> dict:
    rows = [json.loads(line) for line in (FIXTURES / "mmlu.jsonl").read_text(encoding="utf-8").splitlines()]
    by_subject = {}
    for subject in sorted({row["subject"] for row in rows}):
        with tempfile.NamedTemporaryFile("w", suffix=".jsonl") as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows if row["subject"] == subject))
            file.flush()
            files = {"test": file.name, "dev": file.name}
            change = {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": files}}
            by_subject[subject] = evaluate(lm, f"mmlu_{subject}", change, options)
    sizes = [len(part["samples"]) for part in by_subject.values()]
    accuracies = [part["acc"] for part in by_subject.values()]
    errors = [part["acc_stderr"] for part in by_subject.values()]
    whole = {
        "acc": aggregate_subtask_metrics(accuracies, sizes),
        "acc_stderr": float(pooled_sample_stderr(errors, sizes)),
    }
    return {"subjects": by_subject, **whole}


def evaluate(lm: HFLM, task: str, change: dict, options: dict) -> dict:
    datasets.disable_progress_bars()
    # The registered task, with only the place of its data changed.
    built = MANAGER._factory.build(MANAGER._entry(task), overrides={"task": task, **change}, registry=MANAGER._index)
    out = lm_eval.simple_evaluate(model=lm, tasks=[built], num_fewshot=0, log_samples=True, **options)
    metrics = {k.replace(",none", ""): v for k, v in out["results"][task].items() if k.startswith("acc")}
    samples = [
        {"arguments": [list(a) for a in s["arguments"]], "log_likelihoods": [float(r[0][0]) for r in s["resps"]]}
        | {key: s[key] for key in ("acc", "acc_norm") if key in s}
        for s in sorted(out["samples"][task], key=lambda s: s["doc_id"])
    ]
    return {**metrics, "samples": samples}


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
