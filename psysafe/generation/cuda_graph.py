"""A decode step as one CUDA graph."""

from collections.abc import Callable

import torch
from torch import Tensor


@torch.inference_mode()
def captured(step: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """The step as one CUDA graph, replayed by a launch of a few microseconds. Its result lies in the same memory each
    time. The step must be harmless while no slot is live: it runs before it is captured."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):  # for whatever is compiled or allocated at first use
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        report = step()

    def replay() -> Tensor:
        graph.replay()
        return report

    return replay
