"""Peak memory is that of the tensors alive at once."""

from __future__ import annotations

import torch

from mars.memory import peak_memory

CPU = torch.device("cpu")


def test_counts_what_is_alive_at_once():
    def run():
        a = torch.ones(1000, 1000)
        b = a @ a
        del a
        c = b.softmax(-1)
        del b, c

    assert peak_memory(run, CPU) == 8_000_000  # two of the three at any time


def test_memory_held_before_does_not_count():
    held = [torch.ones(1_000_000)]
    assert peak_memory(lambda: held.append(torch.ones(500_000)), CPU) == 2_000_000
    assert peak_memory(lambda: held[0].add_(1), CPU) < 100  # the 1 as a tensor
