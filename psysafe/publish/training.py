"""The card's table on training: the whole recipe, from config.toml, and how the loss went, from metrics.jsonl."""

from collections import Counter

from psysafe.corpus.texts import answer_of
from psysafe.data.languages import languages, row_language
from psysafe.data.rows import read_rows
from psysafe.printable import counted, in_markdown
from psysafe.program import UserError
from psysafe.publish.run import Base, Run, data_sets
from psysafe.training.config import TrainConfig
from psysafe.version import __version__

NOT_RECORDED = "not recorded"
# Of the rows whose language is known: a few quotations in another language do not make a model of it.
MIN_CARD_SHARE = 0.05


def table(run: Run, base: Base) -> list[str]:
    rows = {"base": _base(base), **_adapter(run), **_rows(run.config), **_steps(run), **_optimiser(run.config)}
    rows |= {**_losses(run), "psysafe": __version__}
    return ["| | this run |", "| --- | --- |", *(f"| {name} | {in_markdown(text)} |" for name, text in rows.items())]


def _base(base: Base) -> str:
    if base.is_bundled:
        where = f" ({base.hub_id})" if base.hub_id else ""
        return f"the bundled miniature of the psysafe project{where}, frozen"
    return f"{base.hub_id}{f' at commit {base.revision}' if base.revision else ''}, frozen"


def _adapter(run: Run) -> dict[str, str]:
    config = run.adapter.config
    numbers = sum(module.A.numel() + module.B.numel() for module in run.adapter.modules.values())
    targets = config["target_modules"]
    named = targets if isinstance(targets, str) else ", ".join(targets[:12]) + (", ..." if len(targets) > 12 else "")
    return {"adapter": f"LoRA, rank {config['r']}, alpha {config['lora_alpha']:g}, {numbers:,} parameters on {named}"}


def _rows(config: TrainConfig) -> dict[str, str]:
    rows = {"training rows": described(config.data)}
    if config.contrast_ratio:
        target = f"KL to the base, weight {config.kl_weight:g}" if config.kl_weight else "the base's own answers"
        rows["contrast rows"] = f"{described(config.contrast_data)}; {config.contrast_ratio:g} a training row, {target}"
    system = config.system if config.system in ("none", "v0", "v1") else "a text that is not published here"
    rows["system prompt of the rows"] = system
    rows["longest row"] = f"{config.max_tokens:,} tokens; longer ones: {config.long_rows}"
    return rows


def described(names: list[str]) -> str:
    """Rows by where others find them; files of this machine are counted, not named."""
    known = data_sets(names)
    bundled = any(name.startswith("assets:") for name in names)
    n_own = sum(not name.startswith("assets:") and not data_sets([name]) for name in names)
    parts = [*known, *(["bundled with the psysafe project"] if bundled else [])]
    return "; ".join([*parts, *([f"{counted(n_own, 'file')} not published here"] if n_own else [])]) or "none"


def languages_of(names: list[str]) -> list[str]:
    """The languages of training rows, by their codes, the commonest first; those that the project has a table of.

    [] where any of the files is on the hub or not readable here: half of the rows would not speak for all.
    """
    if data_sets(names):
        return []
    try:
        codes = Counter(row_language(row.fields, answer_of(row)) for row in read_rows(names))
    except (UserError, OSError):
        return []
    del codes[None]
    return [code for code, n in codes.most_common() if code in languages() and n >= MIN_CARD_SHARE * codes.total()]


def _steps(run: Run) -> dict[str, str]:
    config, steps = run.config, [row for row in run.rows if "loss" in row]
    planned = f"{config.max_steps:,} steps" if config.max_steps else f"{counted(config.epochs, 'epoch')}"
    taken = f"{steps[-1]['step']:,} taken" if steps else f"how many were taken is {NOT_RECORDED}"
    tokens = f", {sum(row.get('tokens', 0) for row in steps):,} tokens" if steps else ""
    return {"steps": f"{planned} of {counted(config.batch_size, 'row')} a step; {taken}{tokens}"}


def _optimiser(config: TrainConfig) -> dict[str, str]:
    is_mixed = config.optimizer == "adamw8bit" and config.min_8bit_size > 1
    eight_bit = f" (fp32 state below {config.min_8bit_size:,} elements)" if is_mixed else ""
    return {
        "optimiser": f"{config.optimizer}{eight_bit}, betas {config.beta1:g} and {config.beta2:g}, eps {config.eps:g}, "
        f"weight decay {config.weight_decay:g}, gradient norm at most {config.max_grad_norm:g}",
        "learning rate": f"{config.lr:g}, {config.warmup_steps:,} steps of warm-up, then a cosine to 0",
        "precision": f"{config.dtype} for the frozen weights, float32 for the adapter",
        "seed": str(config.seed),
    }


def _losses(run: Run) -> dict[str, str]:
    losses = [row["loss"] for row in run.rows if row.get("loss") is not None]
    rows = {"training loss": f"{losses[0]:.4f} at first, {losses[-1]:.4f} at last" if losses else NOT_RECORDED}
    validations = [(row["step"], row["val_loss"]) for row in run.rows if row.get("val_loss") is not None]
    if validations:
        texts = [f"{loss:.4f} after step {step:,}" for step, loss in (validations[0], validations[-1])]
        rows["validation loss"] = ", ".join(dict.fromkeys(texts))
    which = "the last" if run.config.keep_best == "last" else f"that of the best validation ({run.config.keep_best})"
    return rows | {"adapter of these files": which}
