"""PatchGAN: size, reach, losses, and the weight that balances it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mars.models.discriminator import Discriminator, adaptive_weight, hinge_loss


@pytest.mark.parametrize(
    ("channels", "shape", "out"),
    [
        (3, (256, 256), (30, 30)),
        (2, (256, 256), (30, 30)),
        (32, (64, 64), (6, 6)),
        (1, (48, 80), (4, 8)),
        (1, (24, 25), (1, 1)),
    ],
)
def test_one_logit_per_patch(channels, shape, out):
    with torch.device("meta"):
        model = Discriminator(channels)
        assert model(torch.zeros(2, channels, *shape)).shape == (2, 1, *out)


def test_it_has_the_published_number_of_parameters():
    with torch.device("meta"):
        count = sum(p.numel() for p in Discriminator(3).parameters())
    convolutions = (3 * 64 + 64 * 128 + 128 * 256 + 256 * 512 + 512) * 16
    assert count == convolutions + 64 + 1 + 2 * (128 + 256 + 512)  # biases at both ends, and the norms
    assert round(count / 1e6, 2) == 2.77  # 2 766 529; "2.76" cut off


def test_it_starts_as_published():
    torch.manual_seed(0)
    model = Discriminator(3)
    for m in model.modules():
        if isinstance(m, nn.Conv2d):
            assert m.weight.std().item() == pytest.approx(0.02, rel=0.06)
            assert m.bias is None or not m.bias.any()
        if isinstance(m, nn.BatchNorm2d):
            assert m.weight.mean().item() == pytest.approx(1, abs=0.01)
            assert m.weight.std().item() == pytest.approx(0.02, rel=0.25)
            assert not m.bias.any()
        if isinstance(m, nn.LeakyReLU):
            assert m.negative_slope == 0.2


def test_a_logit_sees_seventy_by_seventy_cells():
    model = Discriminator(1, width=4).double()
    for i, m in enumerate(model):  # without the statistics, which spread over the whole map
        if isinstance(m, nn.BatchNorm2d):
            model[i] = nn.Identity()
    with torch.no_grad():
        for p in model.parameters():
            p.abs_().add_(0.01)  # nothing can cancel
    x = torch.zeros(1, 1, 160, 160, dtype=torch.float64, requires_grad=True)
    y = model(x)
    y[0, 0, y.shape[2] // 2, y.shape[3] // 2].backward()
    rows, columns = x.grad[0, 0].nonzero().unbind(1)
    assert rows.max() - rows.min() + 1 == 70
    assert columns.max() - columns.min() + 1 == 70
    assert len(rows) == 70 * 70


def test_a_nonfinite_batch_leaves_nothing_behind():
    model = Discriminator(1, width=4)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    model(torch.full((1, 1, 64, 64), float("nan")))
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_hinge_loss_by_hand():
    real, fake = torch.tensor([2.0, 1.0, 0.0, -1.0]), torch.tensor([-3.0, -1.0, 0.0, 1.0])
    assert hinge_loss(real, fake).item() == 0.5 * ((0 + 0 + 1 + 2) / 4 + (0 + 0 + 1 + 2) / 4)
    assert hinge_loss(torch.full((3,), 1.5), torch.full((3,), -1.5)).item() == 0
    assert hinge_loss(torch.zeros(3), torch.zeros(3)).item() == 1
    real, fake = torch.zeros(2, requires_grad=True), torch.zeros(2, requires_grad=True)
    hinge_loss(real, fake).backward()
    assert (real.grad < 0).all()  # descending raises the logits of real ones
    assert (fake.grad > 0).all()


def test_adaptive_weight_is_the_ratio_of_gradient_norms():
    weight = torch.randn(4, 3, requires_grad=True)
    x = torch.randn(3)
    y = weight @ x
    ratio = adaptive_weight((3 * y).sum(), (-2 * y).sum(), weight)
    assert ratio.item() == pytest.approx(1.5, rel=1e-3)
    assert not ratio.requires_grad
    assert weight.grad is None
    (y.sum()).backward()  # the graph is still there


@pytest.mark.parametrize(
    ("reconstruction", "adversarial", "wanted"), [(1.0, 0.0, 1e4), (0.0, 1.0, 0.0), (0.0, 0.0, 0.0)]
)
def test_adaptive_weight_is_finite_without_a_gradient(reconstruction, adversarial, wanted):
    weight = torch.ones(3, requires_grad=True)
    y = weight.sum()
    ratio = adaptive_weight(reconstruction * y, adversarial * y, weight)
    assert ratio.item() == pytest.approx(wanted, abs=1e-6)
