"""What a model costs: parameters, bytes on disk, time for one image and images a second."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from stillroom.metrics.modes import eval_mode

SECONDS = 0.2
"""Time spent on each of the two measurements."""


def cost(net: nn.Module, example: Tensor) -> dict[str, float]:
    """parameters; bytes (of its parameters and buffers, shared ones once, as in a safetensors file without its header); latency_ms,
    the median for a batch of one; throughput, images a second at the batch of `example`; threads that torch used for them.

    In eval mode without gradients, on the device that the net is on, after one warm-up call. Both figures hold for this machine under its
    load of the moment.
    """
    tensors = {tensor.data_ptr(): tensor for tensor in net.state_dict().values()}
    with eval_mode(net), torch.inference_mode():
        single, batch = (_median(lambda x=x: net(x), x) for x in (example[:1], example))  # type: ignore[misc]
    return {
        "parameters": parameters(net),
        "bytes": sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()),
        "latency_ms": single * 1e3,
        "throughput": len(example) / batch,
        "threads": torch.get_num_threads(),
    }


def parameters(net: nn.Module) -> int:
    """How many numbers a network learns or holds frozen, shared ones once; buffers do not count."""
    return sum(parameter.numel() for parameter in net.parameters())


def _median(call: Callable[[], object], example: Tensor) -> float:
    """Median seconds of a call, of as many as fit into SECONDS."""
    wait = torch.cuda.synchronize if example.is_cuda else lambda: None
    call()
    wait()
    seconds: list[float] = []
    while not seconds or sum(seconds) < SECONDS:
        start = time.perf_counter()
        call()
        wait()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)
