"""The whole coarse-to-fine quantiser at the sizes of two presets."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mars.config import preset
from mars.models.quantizer import Quantizer


@pytest.mark.benchmark(group="multiscale_quantize")
@pytest.mark.parametrize("name", ["notes", "paper"])
def bench_quantizer(benchmark: Any, threads: int, name: str) -> None:
    quantizer = Quantizer(preset(name).tokenizer).eval()
    f = torch.randn(4, quantizer.config.code_dim, *quantizer.scales[-1])
    benchmark.extra_info |= {"notes": len(f), "dtype": "float32"}
    with torch.inference_mode():
        assert torch.isfinite(benchmark(quantizer, f).latent).all()
