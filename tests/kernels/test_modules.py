"""The quantiser and the attention as modules, used alone; their numbers as a model's parts are tests/models'."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from mars.kernels import MultiScaleVQ, ScaleCausalAttention, area_downsample, multiscale_quantize

LENGTHS = (1, 4, 9, 3)


def test_a_quantiser_gives_latent_ids_and_loss():
    vq = MultiScaleVQ(6, 40, (1, 2, (3, 4)), phi=2, metric="l2").eval()
    f = torch.randn(5, 6, 3, 4, requires_grad=True)
    latent, ids, loss = vq(f)
    wanted_ids, totals = multiscale_quantize(
        f, vq.codebook, vq.phi_weight, vq.phi_bias, vq.phi_index, [(1, 1), (2, 2), (3, 4)]
    )
    assert torch.equal(ids, wanted_ids)
    assert_close(latent, totals[-1])
    assert_close(vq.latent(ids), totals[-1])
    assert_close(loss, (totals - f).square().mean() * 1.25)
    (2 * latent).sum().backward()
    assert torch.equal(f.grad, torch.full_like(f, 2))  # straight through
    assert vq.codebook.grad is None


def test_a_quantiser_learns_what_it_is_shown():
    torch.manual_seed(0)
    vq = MultiScaleVQ(4, 16, (1, 2, 4))
    f = 0.5 * torch.randn(8, 4, 4, 4)
    optimizer = torch.optim.Adam(vq.parameters(), 0.03)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        _, _, loss = vq(f)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_dropout_keeps_the_first_scales_in_training_alone():
    vq = MultiScaleVQ(4, 16, (1, 2, 4), dropout=1.0, dropout_start=2, residuals=True)
    f = torch.randn(64, 4, 4, 4)
    quantized = vq(f, torch.Generator().manual_seed(1))
    kept = quantized.keep_mask.sum(1)
    assert set(kept.tolist()) == {2, 3}
    two, three = kept.argmin(), kept.argmax()
    starts = vq.starts
    assert_close(
        quantized.latent[two], vq.add_scale(1, quantized.ids[two, None, 1:5], None)[0] + first(vq, quantized, two)
    )
    assert_close(quantized.latent[three], vq.latent(quantized.ids[three, None])[0])
    assert quantized.residuals.shape == (64, starts[-1], 4)
    assert_close(quantized.residuals[:, 0], area_downsample(f, (1, 1)).flatten(1))
    assert vq.eval()(f).keep_mask is None
    assert vq(f).residuals is None


def first(vq, quantized, i):
    return vq.add_scale(0, quantized.ids[i, None, :1], None)[0]


def test_teacher_inputs_are_those_of_generation():
    vq = MultiScaleVQ(4, 16, (1, 2, 4)).eval()
    ids = torch.randint(16, (3, 21))
    inputs, total = vq.teacher_inputs(ids), None
    for k, (start, end) in enumerate([(0, 1), (1, 5)]):
        total = vq.add_scale(k, ids[:, start:end], total)
        assert_close(vq.next_input(k + 1, total), inputs[:, end - 1 : vq.starts[k + 2] - 1])


def test_attention_is_that_of_its_weights():
    layer = ScaleCausalAttention(24, 3, LENGTHS)
    with torch.no_grad():
        for p in (layer.q_bias, layer.v_bias, layer.log_scale):
            p.add_(torch.randn_like(p))
    x = torch.randn(2, 17, 24)
    q, k, v = (F.linear(x, w).unflatten(2, (3, 8)).transpose(1, 2) for w in layer.qkv.weight.chunk(3))
    q, v = (y + b.view(3, 1, 8) for y, b in ((q, layer.q_bias), (v, layer.v_bias)))
    scale_of = torch.repeat_interleave(torch.arange(4), torch.tensor(LENGTHS))
    y = F.scaled_dot_product_attention(
        F.normalize(q, dim=-1) * layer.log_scale[0].clamp_max(100).exp(),
        F.normalize(k, dim=-1),
        v,
        scale_of[:, None] >= scale_of,
        scale=1.0,
    )
    assert_close(layer(x), layer.proj(y.transpose(1, 2).flatten(2)), rtol=1e-4, atol=1e-5)


def test_attention_scale_by_scale_is_that_of_all_at_once():
    layer = ScaleCausalAttention(24, 3, LENGTHS)
    x = torch.randn(2, 17, 24)
    with torch.no_grad():
        cache, parts, start = layer.new_cache(2), [], 0
        for part in x.split(LENGTHS, dim=1):
            parts.append(layer(part, cache, start))
            start += part.shape[1]
        assert_close(torch.cat(parts, dim=1), layer(x), rtol=1e-4, atol=1e-5)
    assert layer.new_cache(1, torch.bfloat16)[0].dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda: MultiScaleVQ(4, 16, ()), "want dim, codebook_size and the sides of one or more scales at least 1"),
        (lambda: MultiScaleVQ(0, 16, (1, 2, 3, 4)), "at least 1; got 0, 16"),
        (lambda: MultiScaleVQ(4, 16, (1, 2), phi=4), r"want phi and dropout_start in 1\.\.2 .* got 4, 1, 0.0"),
        (lambda: MultiScaleVQ(4, 16, (1, 2), phi=1, dropout=2), r"dropout in 0\.\.1; got 1, 1, 2"),
        (lambda: ScaleCausalAttention(24, 5, LENGTHS), "want heads that divide dim.* got dim 24, heads 5"),
        (lambda: ScaleCausalAttention(24, 3, (1, 0)), r"scales of 1 or more tokens; got .* lengths \[1, 0\]"),
        (lambda: ScaleCausalAttention(24, 3, ()), "one or more scales"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(made, message):
    with pytest.raises(ValueError, match=message):
        made()


def test_modules_say_what_they_are_and_can_be_copied():
    vq = MultiScaleVQ(4, 16, (1, (2, 3)), phi=2)
    assert repr(vq) == "MultiScaleVQ(dim=4, codebook_size=16, scales=1x1 2x3, metric=cosine, phi=2)"
    f = torch.randn(2, 4, 2, 3)
    assert torch.equal(copy.deepcopy(vq).eval()(f).ids, vq.eval()(f).ids)
