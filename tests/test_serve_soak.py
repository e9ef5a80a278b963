"""Minutes of service: memory stays flat; and lm-eval as a client.

pytest tests/test_serve_soak.py -m soak -s
"""

# ruff: noqa: F811  (a test's arguments are fixtures, which are imported)

import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.live_server import JSON, TEXT, Live, config, live_server, model, question, tokenizer  # noqa: F401
from tests.test_serve_limits import leave

ROOT = Path(__file__).resolve().parents[1]
REQUESTS, BLOCK = 2000, 250
MAX_GROWTH = 8e6  # bytes, from the second block on


def memory(pid: int) -> int:
    """Bytes of resident memory of a process."""
    return int(re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())[1]) * 1024


def one(live: Live, i: int) -> int:
    """A request of one of many kinds; its status, 499 where the client leaves."""
    draw = random.Random(i)
    fields = {
        "max_tokens": draw.randint(1, 6),
        "seed": i,
        "temperature": draw.choice([0, 1]),
        "n": draw.choice([1, 1, 2]),
    }
    text = "word " * draw.randint(1, 30) + str(i)
    if i % 10 == 0:
        leave(live, {**question(text, **fields), "stream": i % 20 == 0}).close()
        return 499
    if i % 10 == 1:
        return live.ask({"model": "base", "prompt": text, "logprobs": 3, **fields}, TEXT)[0]
    if i % 10 == 2:
        return live.ask(question(text, unknown=text))[0]
    extra = {
        "stream": i % 2 == 0,
        "stop": [str(i % 7)],
        "presence_penalty": draw.choice([0, 1]),
        "logprobs": i % 3 == 0,
    }
    return live.ask(question(text, **{**fields, **extra}), headers=JSON)[0]


@pytest.mark.soak
def test_memory_stays_flat_over_two_thousand_requests():
    command = [sys.executable, "-m", "psysafe.serve", "--port", "0", "--slots", "4", "--context", "256"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True) as process:
        port = next(int(match[1]) for line in process.stderr if (match := re.search(r":(\d+)/v1", line)))
        live, sizes, statuses, begin = Live(None, None, None, port), [], [], time.monotonic()
        with ThreadPoolExecutor(8) as clients, ThreadPoolExecutor(1) as reader:
            log = reader.submit(process.stderr.read)
            for first in range(0, REQUESTS, BLOCK):
                statuses += clients.map(lambda i: one(live, i), range(first, first + BLOCK))
                live.until(lambda: live.health()["active"] == 0, 60)
                sizes.append(memory(process.pid))
                print(f"{first + BLOCK} requests: {sizes[-1] / 1e6:.1f} MB", flush=True)
            health = live.health()
            process.terminate()
            assert "Traceback" not in log.result()
        assert process.wait(20) == 143
    counts = {status: statuses.count(status) for status in sorted(set(statuses))}
    growth = sizes[-1] - sizes[1]
    result = {"requests": REQUESTS, "seconds": round(time.monotonic() - begin), "statuses": counts,
              "resident_mb": [round(size / 1e6, 1) for size in sizes], "growth_mb": round(growth / 1e6, 2)}  # fmt: skip
    print(json.dumps(result))
    assert counts.keys() == {200, 400, 499} and health["active"] == health["queued"] == 0
    assert growth < MAX_GROWTH


@pytest.mark.soak
def test_lm_eval_asks_it(model, tokenizer, tmp_path):
    """lm-eval 0.4's local-chat-completions, on a task of two rows; needs lm_eval[api] on the path."""
    if shutil.which("lm_eval") is None:
        pytest.skip("lm_eval is not installed")
    rows = [{"q": "Hello", "a": "Hello you"}, {"q": "What is it?", "a": "Hello you"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "own.yaml").write_text(f"""
task: own
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tmp_path}/rows.jsonl}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{q}}}}"
doc_to_target: "{{{{a}}}}"
generation_kwargs: {{until: ["###"], max_gen_toks: 40, do_sample: false, temperature: 0}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
""")
    with live_server(model, tokenizer) as live:
        live.says = tokenizer.encode("Both.</think>\n\nHello you###and more")
        address = f"model=base,base_url={live.url}/chat/completions,num_concurrent=2,max_retries=1"
        command = ["lm_eval", "run", "--model", "local-chat-completions", "--model_args", address, "--tasks", "own",
                   "--include_path", str(tmp_path), "--apply_chat_template"]  # fmt: skip
        environment = os.environ | {"OPENAI_API_KEY": "none"}
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert re.search(r"exact_match\|↑ +\| +1\|", done.stdout), done.stdout[-2000:]
