"""The clients of benchmarks/serve.py, a process that loads nothing large: a task as JSON on stdin, totals on stdout."""

import http.client
import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor


def prompts(count: int) -> list[str]:
    return [f"Question {i}: " + "what do you see today? " * (1 + i % 4) for i in range(count)]


def main() -> None:
    task = json.load(sys.stdin)
    conversations = [[{"role": "user", "content": text}] for text in prompts(task["requests"])]
    bodies = [{"messages": messages, **task["fields"]} for messages in conversations]
    begin = time.perf_counter()
    with ThreadPoolExecutor(task["clients"]) as pool:
        tokens = sum(pool.map(lambda body: ask(task["url"], body), bodies))
    print(json.dumps({"tokens": tokens, "seconds": time.perf_counter() - begin}))


def ask(url: str, body: dict) -> int:
    """The number of new tokens of an answer, as its usage says."""
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=600)
    body = body | ({"stream_options": {"include_usage": True}} if body["stream"] else {})
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {"content-type": "application/json"})
    response = connection.getresponse()
    text = response.read().decode()
    connection.close()
    if response.status != 200:
        raise RuntimeError(f"HTTP {response.status}: {text[:300]}")
    if body["stream"]:
        events = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: {")]
        text = events[-1]
    return json.loads(text)["usage"]["completion_tokens"]


if __name__ == "__main__":
    main()
