"""The quantiser against `tests.reference_var`, in values and in where gradients go and do not go."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch.testing import assert_close

from mars.config import TokenizerConfig
from mars.models.quantizer import Quantizer, phi_index
from tests import reference_var

SQUARE = (1, 2, 3, 4)
WIDE = ((1, 2), (2, 3), (2, 5), (4, 7))
TICKS = {  # nearest of evenly spread ticks, by hand
    (10, 4): [0, 0, 1, 1, 1, 2, 2, 3, 3, 3],
    (10, 1): [0] * 10,
    (4, 1): [0] * 4,
    (4, 4): [0, 1, 2, 3],
    (7, 7): list(range(7)),
    (3, 2): [0, 1, 1],
    (1, 1): [0],
}


def quantizer(scales=SQUARE, **settings) -> Quantizer:
    defaults = {"codebook_size": 48, "code_dim": 6, "phi": 1, "dropout_start": 1, "quantizer_dropout": 0.0}
    q = Quantizer(TokenizerConfig(scales=scales, **defaults | settings))
    with torch.no_grad():  # rows of different length, or the two metrics would agree
        q.codebook.mul_(torch.rand(len(q.codebook), 1) * 1.5 + 0.3)
        q.phi_weight.mul_(2)
    return q


def latent(q: Quantizer, batch: int) -> torch.Tensor:
    return torch.randn(batch, q.config.code_dim, *q.scales[-1])


def expected(q: Quantizer, f: torch.Tensor, keep=None):
    """The reference on float64 copies of q's weights, which it returns for their gradients."""
    f, codebook = (t.detach().double().requires_grad_() for t in (f, q.codebook))
    phis = [
        (w.detach().double().requires_grad_(), b.detach().double().requires_grad_())
        for w, b in zip(q.phi_weight, q.phi_bias, strict=True)
    ]
    actual = reference_var.quantize(
        f,
        codebook,
        phis,
        TICKS[len(q.scales), q.config.phi],
        list(q.scales),
        metric=q.config.metric,
        ratio=q.config.phi_ratio,
        beta=q.config.beta,
        keep=keep,
    )
    return actual, f, codebook, phis


def close(actual, wanted, tolerance=1e-5):
    assert_close(actual.double(), wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("scales", "count"), TICKS)
def test_scales_share_convolutions_as_published(scales, count):
    assert phi_index(scales, count) == TICKS[scales, count]


@pytest.mark.parametrize("metric", ["l2", "cosine"])
@pytest.mark.parametrize(("scales", "phi"), [(SQUARE, 1), (SQUARE, 4), (WIDE, 4), ((3,), 1)], ids=str)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("training", [False, True])
def test_tokens_map_and_loss_are_the_references(metric, scales, phi, batch, training):
    q = quantizer(scales, metric=metric, phi=phi).train(training)
    f = latent(q, batch)
    (ids, straight, loss, running), *_ = expected(q, f)
    actual = q(f)
    assert torch.equal(actual.ids, ids)
    close(actual.latent, straight)
    close(actual.loss, loss)
    close(q.latent(actual.ids), running[-1])


def test_ten_scales_with_four_convolutions():
    q = quantizer((1, 2, 3, 4, 5, 6, 8, 10, 13, 16), phi=4, metric="l2", code_dim=3, codebook_size=32)
    f = latent(q, 1)
    (ids, straight, loss, _), *_ = expected(q, f)
    actual = q(f)
    assert actual.ids.shape == (1, 680)
    assert torch.equal(actual.ids, ids)
    close(actual.latent, straight)
    close(actual.loss, loss)


@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_of_equal_codes_the_first_is_chosen(metric):
    q = quantizer(metric=metric)
    with torch.no_grad():
        q.codebook[1::2] = q.codebook[::2]
    ids = q(latent(q, 2)).ids
    assert (ids % 2 == 0).all()
    assert len(ids.unique()) > 5


def grads(value, *tensors):
    return torch.autograd.grad(value, tensors, allow_unused=True, retain_graph=True)


def is_zero(grad) -> bool:
    return grad is None or not grad.any()


@pytest.mark.parametrize("phi", [1, 4])
def test_reconstruction_gradient_reaches_the_encoder_alone_and_unchanged(phi):
    q = quantizer(WIDE, phi=phi)
    f = latent(q, 2).requires_grad_()
    out = q(f).latent
    target = torch.randn_like(out)
    g_f, *rest = grads((out - target).square().sum(), f, q.codebook, q.phi_weight, q.phi_bias)
    assert torch.equal(g_f, 2 * (out - target).detach())  # straight through
    assert all(is_zero(g) for g in rest)


@pytest.mark.parametrize("beta", [0.0, 0.25, 0.7])
@pytest.mark.parametrize("phi", [1, 4])
def test_vq_loss_gradients_are_the_references(beta, phi):
    q = quantizer(WIDE, phi=phi, beta=beta, metric="l2")
    f = latent(q, 3).requires_grad_()
    (_, _, loss, _), f64, codebook, phis = expected(q, f)
    g_f, g_codebook, g_weight, g_bias = grads(q(f).loss, f, q.codebook, q.phi_weight, q.phi_bias)
    close(g_f, grads(loss, f64)[0] if beta else torch.zeros_like(f64))
    close(g_codebook, grads(loss, codebook)[0])
    for j, (weight, bias) in enumerate(phis):
        close(g_weight[j], grads(loss, weight)[0])
        close(g_bias[j], grads(loss, bias)[0])
    assert (g_f.abs().max() > 0) == (beta > 0)  # the encoder hears of the loss by commitment only
    assert g_codebook.abs().max() > 1e-4
    assert g_weight.abs().amax((1, 2, 3, 4)).min() > 1e-6


def test_commitment_leaves_codebook_and_convolutions_alone():
    low, high = quantizer(beta=0.0), quantizer(beta=1.0)
    high.load_state_dict(low.state_dict())
    f = latent(low, 2)
    for a, b in zip(*(grads(q(f).loss, q.codebook, q.phi_weight, q.phi_bias) for q in (low, high)), strict=True):
        assert torch.equal(a, b)


def test_only_chosen_codes_move():
    q = quantizer()
    found = q(latent(q, 1))
    (grad,) = grads(found.loss, q.codebook)
    moved = grad.abs().sum(1).nonzero().flatten()
    assert torch.equal(moved, found.ids.unique())


class Scripted(Quantizer):
    """Quantiser dropout as told instead of drawn."""

    keep: tuple[int, ...]

    def _draw_keep(self, batch, generator):
        return torch.tensor(self.keep)


@pytest.mark.parametrize("keep", [(1,), (3,), (4, 2, 1), (2, 2, 1)], ids=str)
def test_dropped_scales_leave_the_sum_and_the_loss_but_not_the_residual(keep):
    q = quantizer(WIDE, phi=4)
    f = latent(q, len(keep)).requires_grad_()
    whole = q.eval()(f)
    q.__class__, q.keep = Scripted, keep
    (_, straight, loss, running), f64, codebook, _ = expected(q, f, list(keep))
    actual = q.train()(f)
    assert torch.equal(actual.ids, whole.ids)
    close(actual.latent, straight)
    close(actual.loss, loss)
    close(grads(actual.loss, f)[0], grads(loss, f64)[0])
    close(grads(actual.loss, q.codebook)[0], grads(loss, codebook)[0])
    for b, n in enumerate(keep):  # the sum of a sample is that of its first n scales
        starts, total = q.starts, None
        for k in range(n):
            total = q.add_scale(k, actual.ids[b : b + 1, starts[k] : starts[k + 1]], total)
        assert_close(actual.latent[b : b + 1], total, rtol=1e-5, atol=1e-5)
        close(total[0], running[-1][b])


def test_dropout_draws_work_at_batch_one_and_from_the_generator():
    q = quantizer(quantizer_dropout=0.5, dropout_start=2)
    draws = [q._draw_keep(1, torch.Generator().manual_seed(i)).item() for i in range(400)]
    counts = [draws.count(n) for n in range(5)]
    assert counts[0] == counts[1] == 0
    assert min(counts[2:4]) > 40  # 400 / 2 / 3 = 67 expected
    assert counts[4] > 210
    f = latent(q, 1)
    a, b = (q.train()(f, torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(a.latent, b.latent)
    assert torch.equal(a.loss, b.loss)
    full = q.eval()(f)
    outputs = [q.train()(f, torch.Generator().manual_seed(i)).latent for i in range(20)]
    assert any(not torch.equal(x, full.latent) for x in outputs)
    assert any(torch.equal(x, full.latent) for x in outputs)


def test_dropout_off_and_evaluation_keep_all():
    q = quantizer(quantizer_dropout=1.0)
    f = latent(q, 4)
    assert torch.equal(q.eval()(f).latent, quantized_without_dropout(q, f))
    q = quantizer(quantizer_dropout=0.0)
    assert torch.equal(q.train()(f).latent, q.eval()(f).latent)


def quantized_without_dropout(q: Quantizer, f: torch.Tensor) -> torch.Tensor:
    plain = quantizer(quantizer_dropout=0.0)
    plain.load_state_dict(q.state_dict())
    return plain.train()(f).latent


@pytest.mark.parametrize(("scales", "phi"), [(SQUARE, 1), (WIDE, 4)], ids=["square", "wide"])
def test_teacher_forcing_is_what_generation_sees(scales, phi):
    q = quantizer(scales, phi=phi)
    ids = torch.randint(48, (3, q.starts[-1]))
    taught = q.teacher_inputs(ids)
    starts, total, inputs = q.starts, None, []
    for k in range(len(q.scales)):
        if k:
            inputs.append(q.next_input(k, total))
        total = q.add_scale(k, ids[:, starts[k] : starts[k + 1]], total)
    assert torch.equal(taught, torch.cat(inputs, 1))
    assert torch.equal(q.latent(ids), total)
    codebook, which = q.codebook.detach().double(), TICKS[len(q.scales), phi]
    phis = [(w.double(), b.double()) for w, b in zip(q.phi_weight.detach(), q.phi_bias.detach(), strict=True)]
    close(taught, reference_var.teacher_inputs(ids, codebook, phis, which, list(q.scales), q.config.phi_ratio))


def test_one_scale_has_no_teacher_inputs():
    q = quantizer((3,))
    assert q.teacher_inputs(torch.zeros(2, 9, dtype=torch.int64)).shape == (2, 0, 6)


@pytest.mark.parametrize("scales", [SQUARE, WIDE], ids=["square", "wide"])
def test_starts_partition_the_tokens(scales):
    q = quantizer(scales)
    assert q.starts[0] == 0
    assert [b - a for a, b in pairwise(q.starts)] == [h * w for h, w in q.scales]


def test_autocast_changes_nothing():
    q = quantizer()
    f = latent(q, 2)
    plain = q(f)
    summed, taught = q.latent(plain.ids), q.teacher_inputs(plain.ids)
    with torch.autocast("cpu", torch.bfloat16):
        found = q(f)
        assert torch.equal(found.ids, plain.ids)
        assert torch.equal(found.latent, plain.latent)
        assert torch.equal(found.loss, plain.loss)
        assert torch.equal(q.latent(plain.ids), summed)
        assert torch.equal(q.teacher_inputs(plain.ids), taught)


def test_no_process_group_is_needed():
    assert not torch.distributed.is_initialized()
    q = quantizer().train()
    assert torch.isfinite(q(latent(q, 1)).loss)
