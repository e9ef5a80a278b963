"""Counts for /metrics, in Prometheus's text format: requests, tokens, seconds; no text of anybody."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

PREFIX = "psysafe_"
COUNTERS = {
    "requests_total": "Requests to the completion endpoints, by model and HTTP status (499: the client left).",
    "tokens_total": "Tokens read (prompt) and written (completion).",
    "request_seconds_sum": "Seconds from request to the end of its answer.",
    "request_seconds_count": "Answers counted in request_seconds_sum.",
    "first_token_seconds_sum": "Seconds from request to the first token of its answer.",
    "first_token_seconds_count": "Answers counted in first_token_seconds_sum.",
}


@dataclass
class Record:
    """What is noted of one request, for the log and the metrics: never a word of it."""

    path: str = "-"
    model: str = "-"
    status: int = 0
    prompt_tokens: int = 0
    tokens: int = 0
    seconds: float = 0.0
    first_token_seconds: float | None = None

    @property
    def line(self) -> str:
        """The line of the access log."""
        tokens = f"{self.prompt_tokens}+{self.tokens} tokens"
        return f"{self.status} {self.path} {self.model} {tokens} {self.seconds * 1000:.0f} ms"


class Metrics:
    def __init__(self):
        self.counts: Counter[tuple[str, tuple[tuple[str, str], ...]]] = Counter()

    def add(self, name: str, value: float = 1, **labels: object) -> None:
        self.counts[name, tuple((key, str(label)) for key, label in labels.items())] += value

    def note(self, record: Record) -> None:
        """Counts a finished completion."""
        model = record.model
        self.add("requests_total", model=model, status=record.status)
        self.add("tokens_total", record.prompt_tokens, model=model, kind="prompt")
        self.add("tokens_total", record.tokens, model=model, kind="completion")
        if record.first_token_seconds is not None:
            self.add("request_seconds_sum", record.seconds, model=model)
            self.add("request_seconds_count", model=model)
            self.add("first_token_seconds_sum", record.first_token_seconds, model=model)
            self.add("first_token_seconds_count", model=model)

    def text(self, gauges: Mapping[str, tuple[float, str]]) -> str:
        """The page. gauges: name -> (value now, what it is)."""
        lines = []
        for name, sentence in COUNTERS.items():
            lines += [f"# HELP {PREFIX}{name} {sentence}", f"# TYPE {PREFIX}{name} counter"]
            for (counted, labels), value in sorted(self.counts.items()):
                if counted == name:
                    listed = ",".join(f'{key}="{_escaped(label)}"' for key, label in labels)
                    lines.append(f"{PREFIX}{name}{{{listed}}} {value:.10g}")
        for name, (value, sentence) in gauges.items():
            lines += [f"# HELP {PREFIX}{name} {sentence}", f"# TYPE {PREFIX}{name} gauge", f"{PREFIX}{name} {value:g}"]
        return "\n".join(lines) + "\n"


def _escaped(label: str) -> str:
    return label.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
