"""The packaged model gives the same tokens on the native kernels and on plain PyTorch, and trains on both alike."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import mars
from mars import audio, kernels
from mars.data import builtin
from mars.kernels import _backend
from mars.models.tokenizer import Tokenizer

pytestmark = pytest.mark.skipif(
    _backend.missing("native", "cpu") is not None, reason=str(_backend.missing("native", "cpu"))
)


@pytest.fixture(scope="module")
def model():
    return mars.load()


def assert_nearly_all_agree(ids, wanted):
    """Two codes may be equally near but for rounding, or a draw as near to both, and all that follows differs then."""
    agree = (ids == wanted).all(1)
    assert agree.sum() >= 0.95 * len(agree) - 1, agree


def test_encoding_gives_the_same_tokens(model):
    waveforms = builtin.load().waveforms(np.arange(0, 242, 6))
    native = model.encode(waveforms)
    with kernels.use("reference"):
        assert_nearly_all_agree(model.encode(waveforms), native)


def test_generation_gives_the_same_tokens(model):
    native = torch.stack([note.ids for note in model.generate(3, seed=5)])
    with kernels.use("reference"):
        assert_nearly_all_agree(torch.stack([note.ids for note in model.generate(3, seed=5)]), native)


def test_a_training_step_has_the_same_loss_and_gradients(model):
    x = audio.multiplexed(builtin.load().waveforms(np.arange(4)), model.config.audio)

    def step():
        torch.manual_seed(0)
        tokenizer = Tokenizer(model.config)
        y, quantized = tokenizer(x, torch.Generator().manual_seed(0))
        loss = (y - x).square().mean() + quantized.loss
        loss.backward()
        return loss.detach(), {name: p.grad for name, p in tokenizer.named_parameters()}

    loss, gradients = step()
    with kernels.use("reference"):
        expected, others = step()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    for name, gradient in gradients.items():
        error = (gradient - others[name]).norm() / others[name].norm().clamp_min(1e-12)
        assert error < 1e-4, name
