"""The operations, the models, a training step and a resume on CUDA, against the CPU: `pytest tests -m gpu`.

The same tests run on the CPU, on other implementations where there are any, so that they are known to be right before
a GPU is at hand.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from mars import kernels
from mars.config import preset
from mars.labels import condition_ids
from mars.model import Model
from mars.models.quantizer import Quantizer
from mars.models.tokenizer import Tokenizer
from mars.models.var import VAR
from mars.runtime import stream
from mars.train.plan import Notes
from mars.train.tokenizer import TokenizerStage
from mars.train.var import VARStage

CUDA = pytest.param(
    "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")]
)
everywhere = pytest.mark.parametrize("device", ["cpu", CUDA])


def close(actual, expected, tolerance=1e-4):
    torch.testing.assert_close(actual.double().cpu(), expected.double(), rtol=tolerance, atol=tolerance)


@everywhere
@pytest.mark.parametrize("factors", [(2, 2), (1, 3), (4, 8), (3, 1)], ids=str)
@pytest.mark.parametrize("turned", [False, True], ids=["frames contiguous", "bins contiguous"])
def test_cmx(device, factors, turned):
    z = torch.randn(3, 12, 24, dtype=torch.complex64)
    z[0, 0, :3] = 0
    moved = (z.mT.contiguous().mT if turned else z).to(device)
    for dtype in (torch.uint8, torch.float16, torch.float32, torch.float64):
        x = (z.real * 50).to(dtype)
        with kernels.use("reference"):
            expected = kernels.cmx(x, factors)
        assert torch.equal(kernels.cmx(x.to(device), factors).cpu(), expected)
        assert torch.equal(kernels.inverse_cmx(expected.to(device), factors).cpu(), x)
    leaf, exact = moved.clone().requires_grad_(), z.to(torch.complex128).requires_grad_()
    y, wanted = kernels.spectrogram_cmx(leaf, factors, 0.01, 0.2), kernels.spectrogram_cmx(exact, factors, 0.01, 0.2)
    close(y.detach(), wanted.detach())
    do = torch.randn(y.shape)
    (grad,), (wanted_grad,) = (
        torch.autograd.grad(out, of, do.to(out.dtype).to(out.device)) for out, of in ((y, leaf), (wanted, exact))
    )
    close(torch.view_as_real(grad), torch.view_as_real(wanted_grad), 1e-3)
    back = kernels.inverse_spectrogram_cmx(y.detach(), factors, 0.01, 0.2, (1, 2))
    assert back.shape == (3, 15, 24)


@everywhere
@pytest.mark.parametrize("metric", ["l2", "cosine"])
@pytest.mark.parametrize("size", [(1, 1, 1), (37, 300, 8), (2500, 2100, 33), (70, 4100, 200)], ids=str)
def test_nearest_code(device, size, metric):
    n, v, d = size
    x, codebook = torch.randn(n, d), torch.randn(v, d)
    x[0, 0] = torch.nan
    if v > 10:
        codebook[5:9] = codebook[4]  # ties
    expected = kernels.nearest_code(x, codebook, metric)
    x, codebook = x.to(device), codebook.to(device)
    assert torch.equal(kernels.nearest_code(x, codebook, metric).cpu(), expected)
    assert torch.equal(kernels.nearest_code(x, kernels.pack_codebook(codebook, metric)).cpu(), expected)


@everywhere
@pytest.mark.parametrize("keep", [None, (1, 3, 2)])
def test_multiscale_quantize(device, keep):
    scales, which = [(1, 1), (2, 3), (5, 7)], [0, 1, 1]
    f, codebook = torch.randn(3, 6, 5, 7), torch.randn(50, 6)
    weight, bias = torch.randn(2, 6, 6, 3, 3) / 7, torch.randn(2, 6) / 7
    kept = None if keep is None else torch.tensor(keep)

    def outcome(where, name):
        leaves = [t.to(where).requires_grad_() for t in (codebook.clone(), weight.clone(), bias.clone())]
        with kernels.use(name):
            k = None if kept is None else kept.to(where)
            ids, totals = kernels.multiscale_quantize(f.to(where), *leaves, which, scales, keep=k)
        return ids, totals.detach(), *torch.autograd.grad(totals.square().sum(), leaves)

    ids, *rest = outcome(device, "auto")
    expected, *wanted = outcome("cpu", "reference")
    assert torch.equal(ids.cpu(), expected)
    for a, b in zip(rest, wanted, strict=True):
        close(a, b, 1e-3)


@everywhere
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("normalised", [False, True], ids=["raw", "normalised"])
@pytest.mark.parametrize(
    ("lengths", "D"), [((1, 4, 9, 16), 16), ((50, 3, 150, 64), 64), ((7,), 24), ((5, 6), 24)], ids=str
)
def test_attention(device, lengths, D, normalised, dtype):
    qkv = torch.randn(2, sum(lengths), 3, 3, D).to(dtype)
    gain = torch.tensor([2.0, -1.0, 0.5])
    do = torch.randn(2, 3, sum(lengths), D).to(dtype)

    def outcome(where, dtype, backend):
        leaf, head_scale = qkv.to(where, dtype).requires_grad_(), gain.to(where).requires_grad_()
        q, k, v = leaf.permute(2, 0, 3, 1, 4)
        scale = head_scale if normalised else None
        out = kernels.scale_causal_attention(q, k, v, lengths, 0.25, head_scale=scale, backend=backend)
        of = [leaf, head_scale] if normalised else [leaf]
        return out.detach(), *torch.autograd.grad(out, of, do.to(where, dtype))

    tolerance = 2e-3 if dtype == torch.float32 else 6e-2
    for a, b in zip(outcome(device, dtype, None), outcome("cpu", torch.float64, "reference"), strict=True):
        torch.testing.assert_close(a.double().cpu(), b.double(), rtol=tolerance, atol=tolerance * float(b.abs().max()))


@everywhere
def test_the_loss_of_a_linear_head(device):
    x, weight, bias, target = torch.randn(9, 5), torch.randn(7, 5), torch.randn(7), torch.arange(9) % 7
    exact = torch.nn.functional.cross_entropy(x @ weight.T + bias, target)
    close(kernels.linear_cross_entropy(*(t.to(device) for t in (x, weight, bias, target))), exact)


def smoke(stage="tokenizer", *values):
    return preset("smoke", ("train.precision=float32", *values), stage)


@everywhere
def test_the_models_give_the_same_as_on_the_cpu(device):
    c = smoke()
    tokenizer, var = Tokenizer(c).eval(), VAR(c.var, c.tokenizer).eval()
    x = torch.randn(2, *c.audio.shape).clamp(-1, 1)
    quantizer = tokenizer.quantizer
    assert isinstance(quantizer, Quantizer)
    condition = condition_ids([dict.fromkeys(c.var.condition)] * 2, c.var.condition)
    with torch.no_grad():
        ids = tokenizer.encode(x)
        decoded = tokenizer.reconstruct(quantizer.latent(ids))
        logits = var(quantizer.teacher_inputs(ids), condition)
        tokenizer.to(device), var.to(device)
        assert (
            tokenizer.encode(x.to(device)).cpu() == ids
        ).double().mean() > 0.9  # a near-tie may turn, and those after
        close(tokenizer.reconstruct(quantizer.latent(ids.to(device))), decoded, 1e-3)
        close(var(quantizer.teacher_inputs(ids.to(device)), condition.to(device)), logits, 1e-3)


@everywhere
def test_generation_depends_on_seed_and_index_alone(device):
    c = smoke()
    model = Model(c, Tokenizer(c).eval().to(device), VAR(c.var, c.tokenizer).eval().to(device))
    many = model.generate(5, seed=2, iterations=1)
    assert torch.equal(many[3].ids, model.generate(1, seed=2, start=3, iterations=1)[0].ids)
    assert all(bool(note.waveform.isfinite().all()) for note in many)


def stage_on(name, device):
    c, where = smoke(name), torch.device(device)
    notes = Notes(c.audio.samples)
    if name == "tokenizer":
        return TokenizerStage(c, notes, where, 0)
    tokens = torch.randint(c.tokenizer.codebook_size, (8, c.tokenizer.tokens), dtype=torch.int32)
    return VARStage(c, notes, Tokenizer(c).to(where), tokens, where, 0)


@everywhere
@pytest.mark.parametrize("name", ["tokenizer", "var"])
def test_steps_go_on_after_a_resume_as_without_one(name, device):
    torch.manual_seed(3)
    straight = stage_on(name, device)
    torch.manual_seed(3)
    other, batch = stage_on(name, device), straight.batch(np.arange(4))
    losses = [float(straight.step(i, [batch], [stream(0, i)])["loss"]) for i in range(2)]
    other.step(0, [batch], [stream(0, 0)])
    torch.manual_seed(3)
    resumed = stage_on(name, device)
    resumed.load_state(other.state(), Path("memory"))
    assert float(resumed.step(1, [batch], [stream(0, 1)])["loss"]) == pytest.approx(losses[1], rel=1e-4)
    assert all(np.isfinite(losses))
