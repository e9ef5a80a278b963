"""The server against its own engine, mixed adapters against one, and both against `transformers serve`.

    python -m benchmarks.serve --only engine --new-tokens 128 --out benchmarks/results/serve-engine.json

Three questions, in new tokens a second of CPU time (other processes lengthen wall time, which is shown beside it):

    engine        what HTTP, JSON and streaming cost: the server against `Engine.run` with the same requests
    adapters      what several adapters in one batch cost: the engine with 3 and 8 of them against 1, none merged
    transformers  the same tiny model, the same requests, 1 and 8 clients at a time

Greedy. In the first two there is no end token, so that all write the same number of tokens. Clients run in a process of
their own, which does not count. Medians of runs that take turns. The last line is JSON.
"""

import asyncio
import contextlib
import http.client
import importlib.metadata
import importlib.util
import itertools
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.serve_clients import prompts
from psysafe.checkpoint.adapter import attach_many, save_adapter
from psysafe.checkpoint.base import load_model
from psysafe.cli import Parser, whole_number
from psysafe.data.tokenizer import Tokenizer, load_tokenizer
from psysafe.files import ASSETS, write_atomic
from psysafe.generation.engine import Engine
from psysafe.generation.generator import CLOSING
from psysafe.generation.request import Request, RequestOptions
from psysafe.model.decoder import Qwen3_5
from psysafe.model.lora import attach, detach
from psysafe.model.mixed_adapters import MixedAdapters
from psysafe.program import main_guard
from psysafe.runtime import start, versions
from psysafe.serve.app import App, Policy
from psysafe.serve.page import Page
from psysafe.serve.protocol import Served
from psysafe.serve.server import Server
from psysafe.serve.settings import bind, host_names
from psysafe.serve.worker import Worker

SLOTS, CONTEXT = 8, 256
LARGE = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 8, "num_key_value_heads": 4,
         "head_dim": 128, "linear_num_key_heads": 8, "linear_num_value_heads": 16, "linear_key_head_dim": 64,
         "linear_value_head_dim": 64}  # fmt: skip
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)


class Work(NamedTuple):
    requests: int
    new_tokens: int  # of each


class Rate(dict):
    """Tokens a second: of CPU time and of wall time."""

    def __init__(self, tokens: int, cpu_s: float, wall_s: float):
        super().__init__(tokens=tokens, cpu=tokens / cpu_s, wall=tokens / wall_s)


def main(argv: Sequence[str]) -> int:
    parser = Parser("python -m benchmarks.serve", description=__doc__.partition("\n")[0])
    parser.add_argument("--requests", type=whole_number, default=16)
    parser.add_argument("--new-tokens", type=whole_number, default=24)
    parser.add_argument("--repeats", type=whole_number, default=3)
    parser.add_argument("--only", nargs="+", default=list(STUDIES), choices=list(STUDIES))
    parser.add_argument("--out", metavar="FILE", help="write the JSON document there, too")
    args = parser.parse_args(argv)
    runtime = start("cpu")
    torch.set_deterministic_debug_mode("default")
    report = {"device": runtime.device_name, "slots": SLOTS, "requests": args.requests,
              "new_tokens": args.new_tokens, "repeats": args.repeats, "versions": versions()}  # fmt: skip
    work = Work(args.requests, args.new_tokens)
    for name in args.only:
        report[name] = STUDIES[name](work, args.repeats)
    line = json.dumps(report)
    if args.out:
        write_atomic(Path(args.out), line + "\n")
    print(line)
    return 0


def in_turns(runs: dict[str, Callable[[], Rate]], repeats: int, against: str) -> dict[str, dict]:
    """Each run's rates and its ratio to another's, printed as a table: medians over repeats in which all take turns."""
    rates: dict[str, list[Rate]] = {name: [] for name in runs}
    for run in runs.values():
        run()  # warm-up
    for _ in range(repeats):
        for name, run in runs.items():
            rates[name].append(run())
    result = {}
    for name, measured in rates.items():
        ratios = [rate["cpu"] / other["cpu"] for rate, other in zip(measured, rates[against], strict=True)]
        row = {key: statistics.median(rate[key] for rate in measured) for key in ("tokens", "cpu", "wall")}
        result[name] = row | {"ratio": statistics.median(ratios)}
        columns = f"{row['cpu']:9,.1f} t/s of CPU {row['wall']:9,.1f} t/s {result[name]['ratio']:7.3f}"
        print(f"{name:34s} {columns}", flush=True)
    return result


# The engine and the server around it


def study_engine(work: Work, repeats: int) -> dict:
    tokenizer, result = load_tokenizer("assets:tiny"), {}
    for name, model in (("large", large_model()), ("bundled", load_model("assets:tiny"))):
        n_parameters = sum(p.numel() for p in model.parameters())
        print(f"{name}: {n_parameters / 1e6:,.0f} M parameters")
        with running(model, tokenizer, work) as url:
            runs = {"engine alone": lambda model=model: run_engine(model, tokenizer, work)}
            for stream in (False, True):
                how = "streamed" if stream else "not streamed"
                runs[f"server, {how}"] = lambda url=url, s=stream: run_clients(url, "base", work, s, SLOTS)
            result[name] = in_turns(runs, repeats, "engine alone") | {"parameters": n_parameters}
    return result


def large_model(layers: int = 6) -> Qwen3_5:
    """Random weights in the architecture's shapes, with the bundled tokenizer's vocabulary."""
    config = json.loads((ASSETS / "tiny" / "config.json").read_text())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "config.json")
        kinds = config["layer_types"][:4] * layers
        path.write_text(json.dumps(config | LARGE | {"num_hidden_layers": layers, "layer_types": kinds[:layers]}))
        return load_model(f"random:{path}")


def messages(prompt: str) -> list[dict]:
    return [{"role": "user", "content": prompt}]


def make_engine(model: Qwen3_5, tokenizer: Tokenizer, adapters: MixedAdapters | None = None) -> Engine:
    closing = tokenizer.encode(CLOSING)
    return Engine(model, SLOTS, CONTEXT, (), closing, tokenizer.think_end_id, adapters=adapters)


def run_engine(model: Qwen3_5, tokenizer: Tokenizer, work: Work, attached: MixedAdapters | None = None) -> Rate:
    """The requests through `Engine.run`, the adapters dealt out in turn."""
    names = itertools.cycle(attached.names if attached else [None])
    options = RequestOptions(max_new_tokens=work.new_tokens)
    requests = [
        Request(i, tokenizer.encode_chat(messages(prompt), True), options=options, adapter=next(names))
        for i, prompt in enumerate(prompts(work.requests))
    ]
    engine = make_engine(model, tokenizer, attached)
    with stopwatch() as rate:
        tokens = sum(1 for _ in engine.run(requests))
    return rate(tokens)


@contextlib.contextmanager
def stopwatch() -> Iterator[Callable[[int], Rate]]:
    """Inside, time runs; afterwards what was yielded turns a number of tokens into rates."""
    begin = time.process_time(), time.perf_counter()
    end = []
    yield lambda tokens: Rate(tokens, end[0] - begin[0], end[1] - begin[1])
    end += [time.process_time(), time.perf_counter()]


@contextlib.contextmanager
def running(model: Qwen3_5, tokenizer: Tokenizer, work: Work) -> Iterator[str]:
    """A server in this process, on a free port -> its address."""
    worker = Worker(make_engine(model, tokenizer), tokenizer, work.requests)
    served = Served({"base": None}, CONTEXT, model.config.vocab_size, SLOTS + work.requests, work.new_tokens)
    with bind("127.0.0.1", 0, "") as listener:
        policy = Policy(host_names("127.0.0.1", listener))
        server = Server(App(served, tokenizer, worker, policy, Page()), grace_s=5)
        thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listener])))
        thread.start()
        while not server.started and thread.is_alive():
            time.sleep(0.01)
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


def run_clients(url: str, model: str, work: Work, stream: bool, clients: int, pid: int = 0) -> Rate:
    """All requests from a process of their own, `clients` at a time. CPU time of this process, or of `pid`'s."""
    fields = {"model": model, "max_tokens": work.new_tokens, "temperature": 0, "stream": stream}
    task = {"url": url, "requests": work.requests, "clients": clients, "fields": fields}
    clock = (lambda: cpu_seconds(pid)) if pid else time.process_time
    begin = clock()
    command = [sys.executable, str(Path(__file__).resolve().with_name("serve_clients.py"))]
    done = subprocess.run(command, input=json.dumps(task), stdout=subprocess.PIPE, text=True, check=True)
    reply = json.loads(done.stdout)
    return Rate(reply["tokens"], clock() - begin, reply["seconds"])


# Adapters


def study_adapters(work: Work, repeats: int) -> dict:
    tokenizer, model = load_tokenizer("assets:tiny"), large_model()
    with tempfile.TemporaryDirectory() as parent:
        folders = [random_adapter(model, Path(parent, f"adapter-{i}"), i) for i in range(8)]
        runs = {}
        for count in (1, 3, 8):
            names = [folder.name for folder in folders[:count]]
            attached = dict(zip(names, folders, strict=False))

            def run(attached: dict[str, Path] = attached) -> Rate:
                rate = run_engine(model, tokenizer, work, attach_many(model, attached))
                detach(model)
                return rate

            runs["1 adapter" if count == 1 else f"{count} adapters"] = run
        return in_turns(runs, repeats, "1 adapter")


def random_adapter(model: Qwen3_5, folder: Path, seed: int) -> Path:
    """A rank-1 adapter with random numbers, saved in PEFT's format."""
    adapters = attach(model, 1, 32.0, seed=seed)
    with torch.no_grad():
        adapters.param.normal_(0, 0.01, generator=torch.Generator().manual_seed(seed))
    save_adapter(adapters, folder, "random", multimodal=False)
    detach(model)
    return folder


# transformers


def study_transformers(work: Work, repeats: int) -> dict:
    """`python -m psysafe.serve` and `transformers serve`, each a process, on the bundled model."""
    if importlib.util.find_spec("transformers") is None or importlib.util.find_spec("fastapi") is None:
        print("transformers[serving] is not installed: not measured")
        return {"not measured": "transformers[serving] is not installed"}
    result = {"versions": {name: importlib.metadata.version(name) for name in ("transformers", "fastapi")}}
    with tempfile.TemporaryDirectory() as parent:
        folder = shutil.copytree(ASSETS / "tiny", Path(parent, "tiny"))
        (folder / "chat_template.jinja").write_text(TEMPLATE)  # transformers has no template of its own
        our_port, their_port = free_ports(2)
        ours = [sys.executable, "-m", "psysafe.serve", "--port", our_port, "--model", str(folder)]
        theirs = [shutil.which("transformers", path=os.path.dirname(sys.executable)), "serve", "--port", their_port,
                  "--device", "cpu", "--dtype", "float32", "--host", "127.0.0.1"]  # fmt: skip
        with process(ours) as (our_url, our_pid), process(theirs) as (their_url, their_pid):
            for clients in (1, 8):
                runs = {
                    f"ours, {counted_clients(clients)}": lambda n=clients: run_clients(
                        our_url, "base", work, False, n, our_pid
                    ),
                    f"transformers, {counted_clients(clients)}": lambda n=clients: run_clients(
                        their_url, str(folder), work, False, n, their_pid
                    ),
                }
                result |= in_turns(runs, repeats, f"transformers, {counted_clients(clients)}")
    return result


def counted_clients(n: int) -> str:
    return "1 client" if n == 1 else f"{n} clients"


def free_ports(count: int) -> list[str]:
    """Different ones, because all are bound before the first is let go."""
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [str(probe.getsockname()[1]) for probe in probes]


@contextlib.contextmanager
def process(command: list[str]) -> Iterator[tuple[str, int]]:
    """A server as a process -> (address, process id), once it answers."""
    url = f"http://127.0.0.1:{command[command.index('--port') + 1]}"
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            wait_for(url, server)
            yield url, server.pid
        finally:
            server.terminate()


def wait_for(url: str, server: subprocess.Popen, seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while True:
        connection = http.client.HTTPConnection(url.removeprefix("http://"))
        try:
            connection.request("GET", "/health")
            connection.getresponse().read()
            return
        except OSError:
            if server.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"{url}: the server did not start") from None
            time.sleep(0.2)
        finally:
            connection.close()


def cpu_seconds(pid: int) -> float:
    """User and system time of a process, from /proc."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


STUDIES = {"engine": study_engine, "adapters": study_adapters, "transformers": study_transformers}


if __name__ == "__main__":
    sys.exit(main_guard(main))
