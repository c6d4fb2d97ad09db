"""Devices that lack float64."""

from __future__ import annotations

import torch

from mars.runtime import float64_device


def test_mps_gives_way_to_the_cpu():
    found = [float64_device(torch.device(name)).type for name in ("cpu", "cuda", "mps")]
    assert found == ["cpu", "cuda", "cpu"]
