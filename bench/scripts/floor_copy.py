"""Floor of a save's stall: copy all state into a buffer that is warm.

Usage: floor_copy.py SIZE_MB REPEATS
"""

from __future__ import annotations

import ctypes
import sys
import time

import torch

from bench import workload
from bench.crowd import answer


def tensors(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """Every tensor of the state."""
    state = [value for slot in optimizer.state.values() for value in slot.values() if torch.is_tensor(value)]
    return [parameter.detach() for parameter in model.parameters()] + state


if __name__ == "__main__":
    model, optimizer = workload.large(int(sys.argv[1]))
    source = tensors(model, optimizer)
    target = [tensor.clone() for tensor in source]
    seconds = []
    for _ in range(int(sys.argv[2])):
        workload.large_step(model, optimizer)
        started = time.monotonic()
        for to, tensor in zip(target, source, strict=True):
            ctypes.memmove(to.data_ptr(), tensor.data_ptr(), tensor.nbytes)
        seconds.append(time.monotonic() - started)
    size_mb = sum(tensor.nbytes for tensor in source) / 1e6
    answer({"stall_s": seconds[1:], "size_mb": size_mb})
