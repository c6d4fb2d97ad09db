"""The transformer against `tests.reference_var`; caching, causality, initialisation and size."""

from __future__ import annotations

import math

import pytest
import torch
from torch.testing import assert_close

from mars.config import TokenizerConfig, VARConfig, preset
from mars.labels import CLOSED, sizes
from mars.models.quantizer import Quantizer
from mars.models.tokenizer import drop_path
from mars.models.var import VAR
from tests.reference_var import ReferenceVAR

CLASSES = sizes(CLOSED, {})

SCALES = ((1, 1), (2, 2), (3, 4), (4, 6))
TALL = ((2, 1), (3, 2), (5, 2))  # several start tokens
LONG = ((1, 1), (4, 4), (10, 10), (11, 10))  # past the attention's group


def var(scales=SCALES, *, perturb: float = 0.25, **settings) -> VAR:
    """A small transformer all of whose weights matter: as initialised, branches and head are almost closed."""
    tokenizer = TokenizerConfig(scales=scales, codebook_size=19, code_dim=5, phi=1, dropout_start=1)
    model = VAR(VARConfig(**{"depth": 2, "width": 24, "heads": 3, "drop_path": 0.0} | settings), tokenizer)
    if perturb:
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p) * perturb)
    return model.eval()


def inputs(model: VAR, batch: int):
    x = torch.randn(batch, model.starts[-1] - model.lengths[0], 5)
    names = model.config.condition
    condition = torch.stack([torch.randint(CLASSES[n], (batch,)) for n in names], 1) if names else torch.zeros(batch, 0)
    return x, condition.long()


def reference_of(model: VAR, shared: bool) -> ReferenceVAR:
    """The same weights in the published layout, in float64."""
    reference = ReferenceVAR(
        classes=128,
        width=model.config.width,
        heads=model.config.heads,
        depth=model.config.depth,
        scales=[(n, 1) for n in model.lengths],
        dim=5,
        vocabulary=19,
        shared=shared,
    )
    pairs = [
        (reference.labels, model.condition["pitch"].weight),
        (reference.start_pos, model.start_position[0]),
        (reference.pos, model.position[0]),
        (reference.level, model.level.weight),
        (reference.word_w, model.embed.weight),
        (reference.word_b, model.embed.bias),
        (reference.head_ada_w, model.head_ada[1].weight),
        (reference.head_ada_b, model.head_ada[1].bias),
        (reference.head_w, model.head.weight),
        (reference.head_b, model.head.bias),
    ]
    if shared:
        pairs += [(reference.shared_w, model.shared_ada[1].weight), (reference.shared_b, model.shared_ada[1].bias)]
    for to, block in zip(reference.layers, model.blocks, strict=True):
        attn = block.attn
        pairs += [
            (to.qkv, attn.qkv.weight),
            (to.q_bias, attn.q_bias),
            (to.v_bias, attn.v_bias),
            (to.log_scale, attn.log_scale.flatten()),
            (to.proj_w, attn.proj.weight),
            (to.proj_b, attn.proj.bias),
            (to.fc1_w, block.mlp[0].weight),
            (to.fc1_b, block.mlp[0].bias),
            (to.fc2_w, block.mlp[2].weight),
            (to.fc2_b, block.mlp[2].bias),
        ]
        if shared:
            pairs.append((to.ada_offset, block.offset[0, 0]))
        else:
            pairs += [(to.ada_w, block.ada[1].weight), (to.ada_b, block.ada[1].bias)]
    with torch.no_grad():
        for to, value in pairs:
            to.copy_(value)
    return reference


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("scales", [SCALES, TALL, LONG], ids=["square", "tall", "long"])
def test_logits_are_the_references(scales, shared):
    model = var(scales, condition=("pitch",), shared_adaln=shared)
    reference = reference_of(model, shared)
    x, condition = inputs(model, 3)
    condition[1] = CLASSES["pitch"]  # the null row
    assert torch.equal(model.null_condition(1)[0], condition[1])
    logits = model(x, condition)
    expected = reference(x.double(), condition[:, 0])
    assert logits.dtype == torch.float32
    assert_close(logits.double(), expected, rtol=1e-4, atol=1e-4)
    assert expected.std() > 0.5  # otherwise nothing was compared


@pytest.mark.parametrize("shared", [False, True])
def test_gradients_are_the_references(shared):
    model = var(condition=("pitch",), shared_adaln=shared)
    reference = reference_of(model, shared)
    x, condition = inputs(model, 2)
    ids = torch.randint(19, (2 * model.starts[-1],))
    torch.nn.functional.cross_entropy(model(x, condition).flatten(0, 1), ids).backward()
    torch.nn.functional.cross_entropy(reference(x.double(), condition[:, 0]).flatten(0, 1), ids).backward()
    assert len(list(reference.parameters())) == len(list(model.parameters()))
    for a, b in [
        (model.position.grad[0], reference.pos.grad),
        (model.condition["pitch"].weight.grad, reference.labels.grad),
        (model.blocks[0].attn.qkv.weight.grad, reference.layers[0].qkv.grad),
        (model.blocks[0].attn.log_scale.grad.flatten(), reference.layers[0].log_scale.grad),
        (model.head_ada[1].weight.grad, reference.head_ada_w.grad),
        (model.embed.weight.grad, reference.word_w.grad),
    ]:
        assert b.abs().max() > 1e-6
        assert_close(a.double(), b, rtol=1e-3, atol=1e-5 * b.abs().max().item())


def test_attention_sharpness_stops_at_a_hundred():
    model = var(condition=("pitch",))
    x, condition = inputs(model, 1)
    with torch.no_grad():
        for block in model.blocks:
            block.attn.log_scale.fill_(math.log(100))
        a = model(x, condition)
        for block in model.blocks:
            block.attn.log_scale.fill_(9.0)
        b = model(x, condition)
    assert torch.equal(a, b)


SETTINGS = [
    {"condition": ("pitch",)},
    {"condition": ("velocity", "family", "pitch", "source"), "shared_adaln": True},
    {"condition": ()},
    {"condition": (), "shared_adaln": True},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=["one", "four-shared", "none", "none-shared"])
@pytest.mark.parametrize("scales", [SCALES, TALL, LONG, ((3, 2),)], ids=["square", "tall", "long", "single"])
@torch.no_grad()
def test_cached_steps_are_the_whole_forward(scales, settings):
    model = var(scales, **settings)
    x, condition = inputs(model, 2)
    whole = model(x, condition)
    embedded = model.embed_condition(condition)
    modulations, cache = model.modulations(embedded), model.new_cache(2, torch.float32)
    parts = []
    for k, n in enumerate(model.lengths):
        start = model.starts[k] - model.lengths[0]
        part = None if k == 0 else x[:, start : start + n]
        parts.append(model.step(k, part, embedded, modulations, cache))
    assert_close(torch.cat(parts, 1), whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("k", [1, 2, 3])
@torch.no_grad()
def test_a_scales_input_reaches_its_own_and_finer_logits_only(k):
    """The input of scale k is made of the tokens before k, so it may be seen from scale k on."""
    model = var(LONG, condition=("pitch",))
    x, condition = inputs(model, 2)
    before = model(x, condition)
    start, end = (model.starts[i] - model.lengths[0] for i in (k, k + 1))
    for i in {start, end - 1}:
        y = x.clone()
        y[:, i] += 3
        after = model(y, condition)
        assert torch.equal(after[:, : model.starts[k]], before[:, : model.starts[k]])
        assert (after[:, model.starts[k] :] != before[:, model.starts[k] :]).any(-1).all()


@torch.no_grad()
def test_tokens_of_a_scale_reach_only_finer_logits():
    """Through the quantiser: logits of scale k depend on the tokens of scales < k."""
    scales = SCALES
    quantizer = Quantizer(TokenizerConfig(scales=scales, codebook_size=19, code_dim=5, phi=1, dropout_start=1))
    model = var(scales)
    ids = torch.randint(19, (1, model.starts[-1]))
    condition = torch.zeros(1, 0, dtype=torch.int64)
    before = model(quantizer.teacher_inputs(ids), condition)
    for k in range(len(scales)):
        changed = ids.clone()
        changed[:, model.starts[k]] = (changed[:, model.starts[k]] + 1) % 19
        after = model(quantizer.teacher_inputs(changed), condition)
        seen = model.starts[k + 1]
        assert torch.equal(after[:, :seen], before[:, :seen])
        assert (after[:, seen:] != before[:, seen:]).any(-1).all()


@torch.no_grad()
def test_every_attribute_counts_and_null_is_one_more_class():
    names = ("family", "source", "pitch", "velocity")
    model = var(condition=names)
    x, condition = inputs(model, 1)
    logits = model(x, condition)
    null = model.null_condition(1)
    assert null.tolist() == [[11, 3, 128, 5]]
    for i in range(len(names)):
        other = condition.clone()
        other[:, i] = null[:, i]
        assert not torch.equal(model(x, other), logits)
    rows = [model.condition[name].weight[c] for name, c in zip(names, condition[0], strict=True)]
    assert_close(model.embed_condition(condition)[0], sum(rows))


@torch.no_grad()
def test_without_conditions_one_learned_vector_stands_in():
    model = var(condition=())
    x, condition = inputs(model, 3)
    assert condition.shape == model.null_condition(3).shape == (3, 0)
    assert len(model.condition) == 0
    a = model(x, condition)
    model.start.add_(1)
    assert not torch.equal(model(x, condition), a)


@pytest.mark.parametrize("shared", [False, True])
def test_initialisation_is_the_published_one(shared):
    width, depth = 192, 3
    model = var(perturb=0, width=width, heads=3, depth=depth, shared_adaln=shared, condition=("family", "pitch"))
    std = (1 / (3 * width)) ** 0.5

    def check(value, expected, tolerance=0.06):
        assert value.std().item() == pytest.approx(expected, rel=tolerance)
        assert abs(value.mean().item()) < 6 * expected / value.numel() ** 0.5

    check(model.head.weight, 0.02 * std)
    check(model.embed.weight, std)
    check(model.condition["pitch"].weight, std)
    check(model.position, std)
    check(model.level.weight, std, 0.15)
    check(model.start_position, std, 0.2)
    check(model.head_ada[1].weight, 0.5 * std)
    for block in model.blocks:
        check(block.attn.qkv.weight, std)
        check(block.mlp[0].weight, std)
        check(block.attn.proj.weight, std / (2 * depth) ** 0.5)
        check(block.mlp[2].weight, std / (2 * depth) ** 0.5)
        assert torch.equal(block.attn.log_scale, torch.full((1, 3, 1, 1), math.log(4)))
        assert not block.attn.q_bias.any()
        assert not block.attn.v_bias.any()
        assert block.attn.qkv.bias is None
        if shared:
            check(block.offset[:, :, :2], 1e-3 / width**0.5, 0.2)
            check(block.offset[:, :, 2:], 0.5 / width**0.5, 0.2)
    for ada in [model.shared_ada] if shared else [block.ada for block in model.blocks]:
        check(ada[1].weight[: 2 * width], 1e-3 * std)
        check(ada[1].weight[2 * width :], 0.5 * std)
    biases = [m.bias for m in model.modules() if isinstance(m, torch.nn.Linear) and m.bias is not None]
    assert len(biases) > 5
    assert not any(b.any() for b in biases)


@torch.no_grad()
def test_it_starts_out_predicting_all_codes_alike():
    model = var(perturb=0, condition=("pitch",))
    x, condition = inputs(model, 2)
    ids = torch.randint(19, (2 * model.starts[-1],))
    loss = torch.nn.functional.cross_entropy(model(x, condition).flatten(0, 1), ids)
    assert loss.item() == pytest.approx(math.log(19), abs=0.02)


@pytest.mark.parametrize(("name", "low", "high"), [("paper", 321e6, 325e6), ("notes", 5e6, 12e6), ("smoke", 1e5, 4e5)])
def test_parameter_counts(name, low, high):
    config = preset(name)
    with torch.device("meta"):
        model = VAR(config.var, config.tokenizer)
    assert low < sum(p.numel() for p in model.parameters()) < high


@pytest.mark.parametrize("name", ["paper", "truncated", "cmx"])
def test_blocks_of_the_paper_have_the_published_size(name):
    config = preset(name)
    with torch.device("meta"):
        model = VAR(config.var, config.tokenizer)
    matrices = sum(p.numel() for n, p in model.blocks.named_parameters() if p.ndim == 2)
    assert matrices == 73_728 * config.var.depth**3


@pytest.mark.parametrize("settings", SETTINGS, ids=["one", "four-shared", "none", "none-shared"])
def test_bfloat16_autocast_stays_close_and_finite(settings):
    model = var(LONG, perturb=0.1, **settings)
    x, condition = inputs(model, 2)
    exact = model(x, condition).detach()
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(x, condition)
        embedded = model.embed_condition(condition)
        assert all(torch.isfinite(m).all() for m in model.modulations(embedded))
    assert logits.dtype == torch.float32
    assert (logits - exact).norm() < 0.05 * exact.norm()
    logits.square().mean().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_stochastic_depth_follows_the_generator_and_only_in_training():
    model = var(drop_path=0.5, depth=3, condition=("pitch",))
    x, condition = inputs(model, 4)
    with torch.no_grad():
        still = model(x, condition)
        model.train()
        a, b, c = (model(x, condition, torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    assert not torch.equal(a, still)


def test_drop_path_rises_linearly_and_keeps_the_mean():
    keep = drop_path(5, 20_000, 0.4, torch.Generator().manual_seed(0))
    assert keep.shape == (5, 2, 20_000, 1, 1)
    for i in range(5):
        rate = 0.4 * i / 4
        assert (keep[i] == 0).float().mean().item() == pytest.approx(rate, abs=0.01)
        assert keep[i].mean().item() == pytest.approx(1, abs=0.02)
        assert keep[i].max().item() == pytest.approx(1 / (1 - rate))
        assert len(keep[i].unique()) <= 2
    assert drop_path(5, 2, 0, None) is None
    assert (drop_path(1, 8, 0.9, None) == 1).all()  # the first block is always kept
