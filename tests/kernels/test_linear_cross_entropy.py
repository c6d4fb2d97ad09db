"""The cross-entropy in chunks of rows is that of all logits at once, and so are its gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mars.kernels import _backend, linear_cross_entropy, token_scores, use
from mars.kernels.linear_cross_entropy import chunked
from mars.runtime import peak_memory

SHAPES = [(1, 3, 2), (1, 8, 131), (7, 1, 5), (64, 24, 40), (131, 33, 1021)]  # rows, width, codes


def inputs(n: int, width: int, codes: int, spread: float = 1.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, weight, bias = torch.randn(n, width), torch.randn(codes, width) * spread, torch.randn(codes) * spread
    return x, weight, bias, torch.randint(codes, (n,))


def results(function, x: Tensor, weight: Tensor, bias: Tensor, target: Tensor) -> list[Tensor]:
    """Loss and gradients."""
    leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
    value = function(*leaves, target)
    return [value.detach(), *torch.autograd.grad(3 * value, leaves)]


def whole(x: Tensor, weight: Tensor, bias: Tensor, target: Tensor) -> Tensor:
    logits = F.linear(x, weight, bias)
    return F.cross_entropy(logits if logits.dtype == torch.float64 else logits.float(), target)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("spread", [0.0, 1.0, 40.0], ids=["equal", "usual", "extreme"])
@pytest.mark.parametrize("rows", [1, 3, 1000])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_as_exact_as_all_logits_at_once(shape, rows, spread, dtype, monkeypatch):
    x, weight, bias, target = inputs(*shape, spread=spread)
    monkeypatch.setitem(chunked.CHUNK, "cpu", rows * shape[2])
    exact = results(whole, x.double(), weight.double(), bias.double(), target)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        ours, eager = results(linear_cross_entropy, x, weight, bias, target), results(whole, x, weight, bias, target)
        losses, right = token_scores(x, weight, bias, target)
        logits = F.linear(x, weight, bias).float()
    for a, b, c in zip(ours, eager, exact, strict=True):
        assert a.dtype == torch.float32
        assert (a - c).norm() <= 2 * (b - c).norm() + max(torch.finfo(dtype).eps, 1e-6) * c.norm()
    assert losses.mean().item() == pytest.approx(ours[0].item(), rel=1e-5, abs=1e-7)
    torch.testing.assert_close(losses, F.cross_entropy(logits, target, reduction="none"), rtol=1e-5, atol=1e-4)
    assert torch.equal(right, logits.argmax(1) == target)


def test_a_certain_and_a_hopeless_token():
    x, weight = torch.tensor([[1.0], [1.0]]), torch.tensor([[2000.0], [-2000.0], [0.0]])
    values = results(linear_cross_entropy, x, weight, torch.zeros(3), torch.tensor([0, 1]))
    assert values[0] == 2000  # the mean of 0 and 4000
    assert values[1].tolist() == [[0.0], [6000.0]]
    assert all(v.isfinite().all() for v in values)


def test_what_is_not_finite_stays_visible():
    x, weight, bias, target = inputs(4, 3, 5)
    x[2, 1] = float("nan")
    assert results(linear_cross_entropy, x, weight, bias, target)[0].isnan()
    weight[1, 1] = float("inf")
    assert not results(linear_cross_entropy, x.nan_to_num(), weight, bias, target)[0].isfinite()


def test_the_logits_never_exist(monkeypatch):
    n, width, codes = 512, 16, 4096
    monkeypatch.setitem(chunked.CHUNK, "cpu", 32 * codes)
    arguments = inputs(n, width, codes)
    needed = 4 * (codes * width * 3 + 3 * 32 * codes)  # the weight's gradient, some copies of it, and a chunk's logits
    cpu = torch.device("cpu")
    assert peak_memory(lambda: results(linear_cross_entropy, *arguments), cpu) < needed < n * codes * 4
    assert peak_memory(lambda: token_scores(*arguments), cpu) < needed


def test_a_plan_takes_the_chunks_of_the_device_planned_for(monkeypatch):
    monkeypatch.setattr(chunked, "CHUNK", {"cpu": 4, "other": 8})
    x = torch.zeros(9, 3)
    assert chunked.rows_at_once(x, 2) == 2
    with _backend.planned("cuda"):
        assert chunked.rows_at_once(x, 2) == 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_operator_keeps_its_contract(dtype):
    x, weight, bias, target = inputs(6, 5, 9)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    torch.library.opcheck(torch.ops.mars.linear_cross_entropy.default, (*leaves, target, dtype))


def test_the_gradient_is_that_of_the_loss(monkeypatch):
    monkeypatch.setitem(chunked.CHUNK, "cpu", 2 * 9)
    x, weight, bias, target = inputs(5, 4, 9)
    leaves = [t.double().requires_grad_() for t in (x, weight, bias)]
    assert torch.autograd.gradcheck(lambda *leaves: linear_cross_entropy(*leaves, target), leaves)


def test_compiled_without_a_graph_break():
    x, weight, bias, target = inputs(6, 5, 9)
    compiled = torch.compile(linear_cross_entropy, fullgraph=True, backend="aot_eager")
    for a, b in zip(
        results(compiled, x, weight, bias, target),
        results(linear_cross_entropy, x, weight, bias, target),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_the_reference_is_chosen_by_name():
    x, weight, bias, target = inputs(6, 5, 9)
    ours = results(linear_cross_entropy, x, weight, bias, target)
    with use("reference"):
        plain = results(linear_cross_entropy, x, weight, bias, target)
        losses, right = token_scores(x, weight, bias, target)
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    found = token_scores(x, weight, bias, target)
    torch.testing.assert_close(found[0], losses, rtol=1e-4, atol=1e-5)
    assert torch.equal(found[1], right)


def test_a_second_backward_gives_the_same_gradient():
    x, weight, bias, target = inputs(6, 5, 9)
    loss = linear_cross_entropy(x.requires_grad_(), weight, bias, target)
    first, second = (torch.autograd.grad(loss, x, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_a_second_derivative_is_refused_and_not_left_out():
    x, weight, bias, target = inputs(6, 5, 9)
    x.requires_grad_()

    def penalty():
        loss = linear_cross_entropy(x, weight, bias, target)
        (dx,) = torch.autograd.grad(loss, x, create_graph=True)
        return torch.autograd.grad(loss + dx.square().sum(), x)[0]

    with pytest.raises(RuntimeError, match="it is differentiable once"):
        penalty()
    with use("reference"):
        assert penalty().isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_without_gradients_their_work_is_left_out(dtype, monkeypatch):
    monkeypatch.setitem(chunked.CHUNK, "cpu", 3 * 40)
    arguments = inputs(8, 5, 40)
    leaves = [t.clone().requires_grad_() for t in arguments[:3]]
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        expected = linear_cross_entropy(*leaves, arguments[3])
        assert expected.requires_grad
        monkeypatch.setattr(chunked, "mean_and_gradients", None)  # what computes them cannot be called from here on
        actual = [linear_cross_entropy(*arguments)]
        for no_gradients in (torch.no_grad(), torch.inference_mode()):
            with no_gradients:
                actual.append(linear_cross_entropy(*leaves, arguments[3]))
    assert all(torch.equal(value, expected.detach()) and not value.requires_grad for value in actual)
    with torch.no_grad():
        memory = peak_memory(lambda: linear_cross_entropy(*arguments), torch.device("cpu"))
    assert memory < 4 * 40 * 5 + 4 * 4 * 3 * 40  # a head's weight, and the logits of a chunk a few times over


@pytest.mark.parametrize("implementation", ["auto", "reference"])
@pytest.mark.parametrize("function", [linear_cross_entropy, token_scores])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(6, 4)}, r"want x \(N, W\) and weight \(V, W\)"),
        ({"x": torch.zeros(0, 5), "target": torch.zeros(0, dtype=torch.int64)}, "at least 1"),
        ({"bias": torch.zeros(8)}, r"want bias \(9,\)"),
        ({"target": torch.zeros(5, dtype=torch.int64)}, r"target \(6,\)"),
        ({"target": torch.zeros(6)}, "target int64"),
        ({"weight": torch.zeros(9, 5).double()}, "one float dtype"),
        ({"target": torch.tensor([0, 1, 2, 3, 4, 9])}, r"want targets in 0\.\.8, got 0 to 9"),
        ({"target": torch.tensor([0, 1, 2, 3, 4, -100])}, r"want targets in 0\.\.8, got -100 to 4"),
        ({"target": torch.tensor([0, 1, 2, 3, 4, -1])}, r"want targets in 0\.\.8, got -1 to 4"),
    ],
)
def test_what_does_not_fit_is_named(change, message, function, implementation):
    arguments = dict(zip(("x", "weight", "bias", "target"), inputs(6, 5, 9), strict=True)) | change
    with use(implementation), pytest.raises(ValueError, match=f"^{function.__name__}: .*{message}"):
        function(**arguments)
