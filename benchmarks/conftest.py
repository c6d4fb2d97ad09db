"""Machine, threads and dtype go into every result."""

from __future__ import annotations

import platform
from typing import Any

import pytest
import torch


@pytest.fixture(params=[1, 2], ids=["1thread", "2threads"])
def threads(request: pytest.FixtureRequest) -> Any:
    """Run with one and with two threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def machine(benchmark: Any) -> None:
    """Record where the benchmark ran; empty tensors are not filled, as they are in the tests."""
    torch.use_deterministic_algorithms(False)
    cpu = torch.cpu.get_capabilities()
    benchmark.extra_info |= {"machine": platform.machine(), "cpu": cpu.get("cpu_name"), "torch": torch.__version__}
