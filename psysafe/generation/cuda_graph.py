"""A decode step as one CUDA graph."""

from collections.abc import Callable
from typing import TypeVar

import torch

Result = TypeVar("Result")


def warm_up(step: Callable[[], object]) -> None:
    """Runs a step as a capture will: for whatever is compiled or allocated at first use."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(stream)


def captured(step: Callable[[], Result], pool: tuple[int, int]) -> Callable[[], Result]:
    """The step, warmed up, as one CUDA graph, replayed by a launch of a few microseconds. Its result lies in the same
    memory each time. Nothing runs while it is captured, so the slots may be in use.

    pool: memory that graphs share which never run at the same time (`torch.cuda.graph_pool_handle`).
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        result = step()

    def replay() -> Result:
        graph.replay()
        return result

    return replay
