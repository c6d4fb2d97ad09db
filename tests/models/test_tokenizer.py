"""Tokenizer: layout of patches, blocks against PyTorch's own layer, agreement of its entry points, learning."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import mars
from mars.audio import multiplexed
from mars.config import AudioConfig, Config, TokenizerConfig, preset, preset_names
from mars.data import builtin
from mars.models.tokenizer import REFINED_AT_ONCE, Block, Tokenizer

AUDIO = AudioConfig(n_fft=64, hop=16, bins=24, frames=20, samples=300, cmx=(2, 1))  # CMX tensor (2, 12, 20)


def config(scales=((1, 1), (2, 2), (3, 5)), patch=(4, 4), audio=AUDIO, **settings) -> Config:
    defaults = {
        "width": 24,
        "depth": 2,
        "heads": 3,
        "layer_scale": 0.0,
        "drop_path": 0.0,
        "codebook_size": 32,
        "code_dim": 6,
        "phi": 2,
        "dropout_start": 1,
        "quantizer_dropout": 0.0,
    }
    return Config(
        preset="test", audio=audio, tokenizer=TokenizerConfig(patch=patch, scales=scales, **defaults | settings)
    )


GRIDS = {
    "equal": {},  # patches (3, 5), latent (3, 5)
    "coarser": {"scales": ((1, 1), (2, 3))},
    "finer": {"scales": ((2, 1), (4, 7))},
    "wide patches": {"patch": (6, 2), "scales": ((1, 2), (2, 10))},
}


def images(c: Config, batch: int = 2) -> torch.Tensor:
    return torch.rand(batch, *c.audio.shape) * 2 - 1


@pytest.mark.parametrize("name", preset_names())
def test_shapes_of_every_preset(name):
    c = preset(name, ("tokenizer.depth=1",))
    with torch.device("meta"):
        model = Tokenizer(c)
        x = torch.zeros(2, *c.audio.shape)
        z = model.latent(x)
        assert z.shape == (2, c.tokenizer.code_dim, *c.tokenizer.latent)
        assert model.reconstruct(z).shape == x.shape


def test_the_papers_tokenizer_has_two_vit_b():
    with torch.device("meta"):
        model = Tokenizer(preset("paper"))
    count = sum(p.numel() for p in model.parameters())
    assert 170e6 < count < 175e6
    encoder = sum(p.numel() for p in model.encoder.blocks.parameters())
    assert encoder == 12 * (12 * 768**2 + 13 * 768 + 2 * 768)  # ViT-B's blocks, with LayerScale


@pytest.mark.parametrize("settings", GRIDS.values(), ids=GRIDS)
@pytest.mark.parametrize("batch", [1, 3])
def test_shapes(settings, batch):
    c = config(**settings)
    model, x = Tokenizer(c).eval(), images(c, batch)
    y, quantized = model(x)
    assert y.shape == x.shape
    assert y.dtype == torch.float32
    assert quantized.ids.shape == (batch, c.tokenizer.tokens)
    assert quantized.ids.min() >= 0
    assert quantized.ids.max() < 32


@pytest.mark.parametrize("settings", [{}, {"patch": (6, 2)}, {"patch": (2, 10)}, {"patch": (12, 20)}], ids=str)
def test_patches_are_cut_row_by_row_and_put_back(settings):
    c = config(**settings)
    model, x = Tokenizer(c), images(c)
    cut = []
    model.embed.register_forward_pre_hook(lambda module, args: cut.append(args[0]))
    model.latent(x)
    (patches,) = cut
    (p, q), (rows, columns) = c.tokenizer.patch, c.patches
    assert patches.shape == (2, rows * columns, 2 * p * q)
    for i in range(rows):
        for j in range(columns):
            part = x[:, :, i * p : (i + 1) * p, j * q : (j + 1) * q]
            assert torch.equal(patches[:, i * columns + j], part.flatten(1))

    class Echo(nn.Module):
        def forward(self, patch, latent, generator):
            return patches, latent

    model.decoder, model.head = Echo(), nn.Identity()
    assert torch.equal(model.reconstruct(torch.zeros(2, 6, *c.tokenizer.latent)), x)


def test_latent_tokens_fill_the_grid_row_by_row():
    model = Tokenizer(config())

    class Number(nn.Module):
        def forward(self, patch, latent, generator):
            return patch, torch.arange(15.0).view(1, 15, 1).expand(len(patch), -1, 24)

    model.encoder = Number()
    nn.init.constant_(model.to_code.weight, 1 / 24)
    z = model.latent(images(config()))
    assert_close(z[0, 0], torch.arange(15.0).view(3, 5))
    tokens = []
    model.from_code.register_forward_pre_hook(lambda module, args: tokens.append(args[0]))
    model.reconstruct(z)
    assert_close(tokens[0][0, :, 0], torch.arange(15.0))


@pytest.mark.parametrize("layer_scale", [0.0, 0.3])
@pytest.mark.parametrize("keep", [None, (2.0, 0.0)])
@torch.no_grad()
def test_blocks_are_pre_norm_transformer_layers(layer_scale, keep):
    block = Block(24, 3, layer_scale).eval()
    for p in block.parameters():
        p.add_(torch.randn_like(p) * 0.2)
    theirs = nn.TransformerEncoderLayer(24, 3, 96, 0.0, "gelu", 1e-6, batch_first=True, norm_first=True)
    pairs = [
        (theirs.norm1, block.norm1),
        (theirs.norm2, block.norm2),
        (theirs.self_attn.out_proj, block.attn.proj),
        (theirs.linear1, block.mlp[0]),
        (theirs.linear2, block.mlp[2]),
    ]
    for to, own in pairs:
        to.load_state_dict(own.state_dict())
    theirs.self_attn.in_proj_weight.copy_(block.attn.qkv.weight)
    theirs.self_attn.in_proj_bias.copy_(block.attn.qkv.bias)
    factors = keep or (1.0, 1.0)
    for layer, scale, factor in (
        (theirs.self_attn.out_proj, block.scale1, factors[0]),
        (theirs.linear2, block.scale2, factors[1]),
    ):
        whole = factor * (torch.ones(24) if scale is None else scale)  # folded into the last product
        layer.weight.mul_(whole[:, None])
        layer.bias.mul_(whole)
    x = torch.randn(2, 11, 24)
    mask = None if keep is None else torch.tensor(keep).view(2, 1, 1, 1).expand(2, 2, 1, 1)
    assert_close(block(x, mask), theirs.train()(x), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_every_token_attends_to_every_token():
    c = config()
    model, x = Tokenizer(c).eval(), images(c, 1)
    before, other = model.latent(x), x.clone()
    other[0, 1, -1, -1] = 3
    assert (model.latent(other) != before).any(1).all()
    y = model.reconstruct(before)
    before[0, :, -1, -1] += 3
    assert ((model.reconstruct(before) - y).abs().amax((1, 2, 3)) > 0).all()
    first = (model.reconstruct(before) - y)[0, :, :4, :4]
    assert first.abs().max() > 0


@torch.no_grad()
def test_positions_of_both_groups_coincide_where_their_grids_do():
    c = config()
    vit = Tokenizer(c).encoder
    seen = []
    vit.blocks[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    zeros = torch.zeros(1, 15, 24)
    vit(zeros, zeros, None)
    patch, latent = seen[0].split(15, dim=1)
    assert_close(patch - vit.level[0], latent - vit.level[1])
    assert not torch.equal(vit.level[0], vit.level[1])


@torch.no_grad()
def test_positions_are_resampled_to_the_other_grid():
    vit = Tokenizer(config(scales=((1, 1), (6, 10)))).encoder  # twice the patch grid (3, 5)
    ramp = torch.arange(3.0)[:, None] * 10 + torch.arange(5.0)
    vit.position.copy_(ramp.reshape(1, 15, 1).expand(1, 15, 24))
    vit.level.zero_()
    seen = []
    vit.blocks[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    vit(torch.zeros(1, 15, 24), torch.zeros(1, 60, 24), None)
    assert torch.equal(seen[0][0, :15, 0], ramp.flatten())
    grid = seen[0][0, 15:, 0].view(6, 10)
    means = grid.view(3, 2, 5, 2).mean((1, 3))
    assert_close(means[1:2, 1:4], ramp[1:2, 1:4], rtol=0.02, atol=0.02)
    assert (grid.diff(dim=0)[:, 3] > 1).all()
    assert (grid.diff(dim=1)[3, 1:-1] > 0.2).all()


@pytest.mark.parametrize("settings", GRIDS.values(), ids=GRIDS)
@torch.no_grad()
def test_encoding_then_decoding_is_the_forward_pass(settings):
    c = config(**settings)
    model, x = Tokenizer(c).eval(), images(c)
    y, quantized = model(x)
    ids = model.encode(x)
    assert torch.equal(ids, quantized.ids)
    assert_close(model.decode(ids), y.clamp(-1, 1), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_decoding_stays_in_range():
    c = config()
    model = Tokenizer(c).eval()
    model.head.weight.mul_(1000)
    y = model.decode(model.encode(images(c)))
    assert y.min() == -1
    assert y.max() == 1


@torch.no_grad()
def test_samples_do_not_see_each_other():
    c = config()
    model, x = Tokenizer(c).eval(), images(c, 3)
    together = model(x)[0]
    for b in range(3):
        assert_close(model(x[b : b + 1])[0], together[b : b + 1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layer_scale", [0.0, 1e-5])
def test_every_parameter_gets_a_gradient(layer_scale):
    c = config(scales=((1, 1), (2, 3)), layer_scale=layer_scale)
    model, x = Tokenizer(c), images(c)
    with torch.no_grad():  # the mask token starts at 1e-6 and the last layers at 0.02
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.05)
    y, quantized = model(x)
    ((y - x).square().mean() + quantized.loss).backward()
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        assert p.grad.any(), name
        assert torch.isfinite(p.grad).all(), name


def test_training_randomness_comes_from_the_generator():
    c = config(drop_path=0.5, quantizer_dropout=0.5)
    model, x = Tokenizer(c), images(c, 8)
    with torch.no_grad():
        a, b, other = (model(x, torch.Generator().manual_seed(s))[0] for s in (1, 1, 2))
        assert torch.equal(a, b)
        assert not torch.equal(a, other)
        assert torch.equal(model.eval()(x)[0], model(x)[0])


def test_bfloat16_autocast_keeps_the_quantiser_in_float32():
    c = config()
    model, x = Tokenizer(c), images(c)
    with torch.autocast("cpu", torch.bfloat16):
        y, quantized = model(x)
    assert y.dtype == quantized.latent.dtype == quantized.loss.dtype == torch.float32
    ((y - x).square().mean() + quantized.loss).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize("settings", [{}, {"scales": ((2, 1), (4, 7)), "patch": (6, 2)}], ids=["square", "odd"])
def test_it_overfits_one_batch(settings):
    """Two pictures: what tells them apart has to pass through the tokens."""
    c = config(width=48, codebook_size=64, **settings)
    model = Tokenizer(c)
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=0.08)  # 0.02 is meant for a width of 768
    rows, columns = torch.linspace(0, 3, 12)[:, None], torch.linspace(0, 5, 20)
    x = torch.stack([torch.stack((torch.sin(rows * b + columns), torch.cos(rows - b * columns))) for b in (1, 2)])
    adam = torch.optim.Adam(model.parameters(), lr=2e-3)
    losses = []
    while len(losses) < 300 and (not losses or losses[-1] > losses[0] / 20):
        y, quantized = model(x)
        reconstruction = (y - x).square().mean()
        losses.append(reconstruction.item())
        adam.zero_grad()
        (reconstruction + quantized.loss).backward()
        adam.step()
    assert losses[0] > 0.3
    assert losses[-1] <= losses[0] / 20
    with torch.no_grad():
        ids = model.eval().encode(x)
        assert (model.decode(ids) - x).square().mean() < losses[0] / 10
    assert not torch.equal(ids[0], ids[1])


def error(model: Tokenizer, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return (model.reconstruct(model.quantizer.latent(ids)) - x).square().mean((1, 2, 3))


@pytest.fixture(scope="module")
def packaged() -> tuple[Tokenizer, torch.Tensor]:
    """The packaged tokenizer and two notes that it has not heard."""
    model, notes = mars.load(), builtin.load()
    return model.tokenizer, multiplexed(notes.waveforms(notes.split("test")[::25][:2]), model.config.audio)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_refined_tokens_say_more_of_every_note(packaged, mode):
    model, x = packaged
    with mode():
        found = {steps: model.refine(x, steps) for steps in (0, 1, 6)}
    with torch.no_grad():
        assert torch.equal(found[0], model.encode(x))
        errors = {steps: error(model, x, ids) for steps, ids in found.items()}
    assert (errors[1] <= errors[0] * (1 + 1e-5)).all()
    assert (errors[6] < 0.98 * errors[0]).all()
    assert all(p.grad is None for p in model.parameters())


def test_samples_are_refined_by_themselves():
    torch.manual_seed(0)
    c = config()
    model, x = Tokenizer(c).eval(), images(c, REFINED_AT_ONCE + 2)
    together = model.refine(x, 3)
    with torch.no_grad():
        alone = torch.cat([model.refine(part, 3) for part in x.split(1)])
        assert_close(error(model, x, alone), error(model, x, together), rtol=1e-2, atol=0)
        assert (error(model, x, together) <= error(model, x, model.encode(x)) * (1 + 1e-5)).all()
    assert model.refine(x[:0], 3).shape == (0, together.shape[1])
