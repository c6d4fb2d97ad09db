"""Calls that go to their kernel without PyTorch's dispatcher: when, that nothing else changes, what they cost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from mars import kernels
from mars.kernels._direct import differentiated, direct, unobserved
from mars.kernels.scale_causal_attention import registered
from tests.kernels.test_ops import NO_TRITON


class Seen(TorchDispatchMode):
    """Notes the operators of mars."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "mars":
            self.names.append(func.name().partition("::")[2])
        return func(*args, **(kwargs or {}))


class Subclass(torch.Tensor):
    pass


def test_a_plain_tensor_is_direct_and_what_is_watched_is_not():
    x = torch.ones(2, 3)
    assert direct(x, None)
    assert direct(torch.nn.Parameter(x, requires_grad=False))
    assert not direct(x.as_subclass(Subclass))
    assert not direct(x.to("meta"))
    assert not direct(torch.view_as_complex(x.repeat(1, 2).view(2, 3, 2)).conj())
    assert not direct(torch.view_as_complex(x.repeat(1, 2).view(2, 3, 2)).conj().imag)
    with Seen():
        assert not direct(x)
    with torch.inference_mode():
        assert direct(torch.ones(3))
    with forward_ad.dual_level():
        assert not direct(x)
    inside = []
    torch.func.vmap(lambda row: (inside.append(direct(row)), row)[1])(x)
    assert inside == [False]


def test_gradients_are_wanted_where_autograd_records():
    x = torch.ones(2, requires_grad=True)
    assert differentiated(None, torch.ones(1), x)
    assert not direct(x)
    assert unobserved(x)
    with torch.no_grad():
        assert not differentiated(x)
        assert direct(x)


def test_a_mode_still_sees_every_operator_and_the_results_are_the_same():
    torch.manual_seed(1)
    x, z = torch.randn(2, 4, 6), torch.randn(2, 4, 6, dtype=torch.complex64)
    rows, codebook = torch.randn(5, 3), torch.randn(7, 3)
    quantizer = torch.randn(2, 3, 4, 4), torch.randn(9, 3), torch.randn(1, 3, 3, 3, 3), torch.randn(1, 3)
    calls = {
        "cmx": lambda: kernels.cmx(x, (2, 3)),
        "inverse_cmx": lambda: kernels.inverse_cmx(x.view(2, 2, 2, 6), (2, 1)),
        "spectrogram_cmx": lambda: kernels.spectrogram_cmx(z, (2, 3), 0.1, 0.3),
        "inverse_spectrogram_cmx": lambda: kernels.inverse_spectrogram_cmx(x.view(2, 2, 2, 6), (2, 1), 0.1, 0.3),
        "nearest_code": lambda: kernels.nearest_code(rows, codebook),
        "multiscale_quantize": lambda: kernels.multiscale_quantize(*quantizer, [0, 0], [(1, 1), (4, 4)])[1],
    }
    for name, call in calls.items():
        with Seen() as seen:
            watched = call()
        assert name in seen.names
        assert torch.equal(call(), watched)


def test_gradients_of_attention_are_those_of_the_operator(monkeypatch):
    q, k, v, do = (torch.randn(2, 3, 5, 16) for _ in range(4))
    gain = torch.ones(3)

    def gradients():
        leaves = [t.clone().requires_grad_() for t in (q, k, v, gain)]
        out = kernels.scale_causal_attention(*leaves[:3], (1, 4), head_scale=leaves[3], backend="hybrid")
        return [out.detach(), *torch.autograd.grad(out, leaves, do)]

    found = gradients()
    monkeypatch.setattr(registered, "unobserved", lambda *_: False)
    for a, b in zip(found, gradients(), strict=True):
        assert torch.equal(a, b)


MOST = {  # calls of functions in one call of the operation; as registered operators they made twice as many
    "cmx": 64,
    "spectrogram_cmx": 74,
    "nearest_code": 95,
    "attention": 155,
    "attention with gradients": 420,
    "multiscale_quantize": 1800,
}


@pytest.mark.skipif(NO_TRITON is not None, reason=str(NO_TRITON))
def test_the_python_side_of_a_call_stays_small():
    """Counted, not timed: on a GPU most of a small call is this."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.host_calls"]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found.keys() == MOST.keys()
    assert {name: (calls, MOST[name]) for name, (calls, _) in found.items() if calls > MOST[name]} == {}
