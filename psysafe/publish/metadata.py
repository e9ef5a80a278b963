"""What the hub reads by machine: the card's YAML block, and .eval_results/*.yaml.

Formats: https://huggingface.co/docs/hub/model-cards and https://huggingface.co/docs/hub/eval-results. Of all figures
only MMLU's and HellaSwag's go in: they need no judge, and the hub compares them between models.
"""

from collections.abc import Sequence

from huggingface_hub import EvalResult, EvalResultEntry, ModelCardData, eval_result_entries_to_yaml
from huggingface_hub.utils import yaml_dump

from psysafe.publish.contents import Upload
from psysafe.publish.figures import Score
from psysafe.publish.run import Base, Run, data_sets
from psysafe.publish.training import languages_of

TAGS = ["psysafe", "lora", "safety", "refusal", "mental-health", "arxiv:2606.09697"]


def card_data(
    run: Run, base: Base, repository: str, license_id: str, scores: Sequence[Score], merged: str, gguf: str
) -> ModelCardData:
    config = run.config
    languages = languages_of(config.data)
    given = {
        "base_model": base.hub_id or None,
        "base_model_relation": relation(merged, gguf) if base.hub_id else None,
        "library_name": library(merged, gguf),
        "pipeline_tag": "text-generation",
        "language": languages[0] if len(languages) == 1 else languages or None,
        "license": license_id,
        "tags": TAGS,
        "datasets": data_sets([*config.data, *config.contrast_data]) or None,
    }
    if scores:  # a model-index of no results would be an invalid one
        given |= {"model_name": repository.partition("/")[2], "eval_results": [_eval_result(one) for one in scores]}
    return ModelCardData(**given)


def relation(merged: str, gguf: str) -> str:
    """What the repository's weights are to the base; of a repository with GGUF files the hub itself says quantized."""
    return "finetune" if merged else "quantized" if gguf else "adapter"


def library(merged: str, gguf: str) -> str:
    return "transformers" if merged else "gguf" if gguf else "peft"


def _eval_result(score: Score) -> EvalResult:
    of = score.benchmark
    return EvalResult(
        task_type="text-generation",
        task_name=of.name,
        dataset_type=of.data_set,
        dataset_name=of.name,
        dataset_config=of.config,
        dataset_split=of.split,
        dataset_revision=score.revision or None,
        metric_type="accuracy",
        metric_name=score.notes,
        metric_value=score.value,
    )


def eval_results(scores: Sequence[Score]) -> list[Upload]:
    """One file a benchmark. The task's name is that of the data set's configuration, as in the hub's own benchmarks."""
    files = []
    for score in scores:
        entry = EvalResultEntry(
            dataset_id=score.benchmark.data_set,
            task_id=score.benchmark.config,
            value=score.value,
            dataset_revision=score.revision or None,
            date=score.date,
            notes=score.notes,
        )
        text = yaml_dump(eval_result_entries_to_yaml([entry]))
        files.append(Upload(f".eval_results/{score.benchmark.kind}.yaml", text.encode(), "--results"))
    return files
