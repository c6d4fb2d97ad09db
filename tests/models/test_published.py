"""Weights in the published layout: what is read from them computes what `tests.reference_var` does with the same."""

from __future__ import annotations

import re

import pytest
import torch
from torch.testing import assert_close

from mars.errors import CheckpointError
from mars.models.published import read_quantizer, read_transformer
from mars.models.sampling import sample
from tests import reference_var
from tests.reference_var import ReferenceVAR

SIDES = (1, 2, 3, 4, 5)
GRIDS = [(n, n) for n in SIDES]
WHICH = [
    0,
    1,
    2,
    2,
    3,
]  # the convolution of each of five scales, of four: the nearest of ticks at 1/12, 13/36, 23/36, 11/12
WIDTH, HEADS, DEPTH, CODES, DIM, CLASSES = 24, 3, 2, 40, 6, 10


def random_reference(shared: bool) -> ReferenceVAR:
    model = ReferenceVAR(
        classes=CLASSES, width=WIDTH, heads=HEADS, depth=DEPTH, scales=GRIDS, dim=DIM, vocabulary=CODES, shared=shared
    )
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.3)
    return model


def transformer_state(model: ReferenceVAR) -> dict[str, torch.Tensor]:
    """The reference's weights in float32, under the published names and in the published shapes, buffers included."""
    length = sum(model.lengths)
    levels = torch.tensor([[k for k, n in enumerate(model.lengths) for _ in range(n)]])
    state = {
        "pos_start": model.start_pos[None],
        "pos_1LC": model.pos[None],
        "lvl_1L": levels,
        "attn_bias_for_masking": torch.zeros(1, 1, length, length),
        "class_emb.weight": model.labels,
        "lvl_embed.weight": model.level,
        "word_embed.weight": model.word_w,
        "word_embed.bias": model.word_b,
        "head_nm.ada_lin.1.weight": model.head_ada_w,
        "head_nm.ada_lin.1.bias": model.head_ada_b,
        "head.weight": model.head_w,
        "head.bias": model.head_b,
    }
    if model.shared:
        state |= {"shared_ada_lin.1.weight": model.shared_w, "shared_ada_lin.1.bias": model.shared_b}
    for i, layer in enumerate(model.layers):
        block = {
            "attn.mat_qkv.weight": layer.qkv,
            "attn.q_bias": layer.q_bias,
            "attn.v_bias": layer.v_bias,
            "attn.zero_k_bias": torch.zeros(WIDTH),
            "attn.scale_mul_1H11": layer.log_scale.view(1, HEADS, 1, 1),
            "attn.proj.weight": layer.proj_w,
            "attn.proj.bias": layer.proj_b,
            "ffn.fc1.weight": layer.fc1_w,
            "ffn.fc1.bias": layer.fc1_b,
            "ffn.fc2.weight": layer.fc2_w,
            "ffn.fc2.bias": layer.fc2_b,
        }
        if model.shared:
            block["ada_gss"] = layer.ada_offset[None, None]
        else:
            block |= {"ada_lin.1.weight": layer.ada_w, "ada_lin.1.bias": layer.ada_b}
        state |= {f"blocks.{i}.{name}": tensor for name, tensor in block.items()}
    return {name: t.detach().float() if t.is_floating_point() else t for name, t in state.items()}


def quantizer_state() -> dict[str, torch.Tensor]:
    """A random one, with something of the encoder and the decoder, which are not read."""
    state = {
        "encoder.conv_in.weight": torch.randn(2, 2),
        "decoder.conv_in.weight": torch.randn(2, 2),
        "quant_conv.weight": torch.randn(2, 2),
        "post_quant_conv.weight": torch.randn(2, 2),
        "quantize.ema_vocab_hit_SV": torch.zeros(len(SIDES), CODES),
        "quantize.embedding.weight": torch.randn(CODES, DIM),
    }
    for i in range(4):
        state[f"quantize.quant_resi.qresi_ls.{i}.weight"] = torch.randn(DIM, DIM, 3, 3) / (9 * DIM) ** 0.5
        state[f"quantize.quant_resi.qresi_ls.{i}.bias"] = torch.randn(DIM) / 10
    return state


def weights(state):
    """Codebook and convolutions for the reference, in float64."""
    named = {name.removeprefix("quantize."): t.double() for name, t in state.items()}
    phis = [tuple(named[f"quant_resi.qresi_ls.{i}.{part}"] for part in ("weight", "bias")) for i in range(4)]
    return named["embedding.weight"], phis


def test_the_quantiser_gives_the_same_tokens_and_maps():
    state = quantizer_state()
    codebook, phis = weights(state)
    quantizer = read_quantizer(state, SIDES)
    f = torch.randn(4, DIM, 5, 5)
    arguments = {"metric": "l2", "ratio": 0.5, "beta": 0.25}
    ids, mapped, _, _ = reference_var.quantize(f.double(), codebook, phis, WHICH, GRIDS, **arguments)
    found = quantizer(f)
    assert torch.equal(found.ids, ids)
    assert_close(found.latent.double(), mapped, rtol=1e-5, atol=1e-5)
    inputs = reference_var.teacher_inputs(ids, codebook, phis, WHICH, GRIDS, 0.5)
    assert_close(quantizer.teacher_inputs(ids).double(), inputs, rtol=1e-5, atol=1e-5)
    alone = {name.removeprefix("quantize."): t for name, t in state.items() if name.startswith("quantize.")}
    assert torch.equal(read_quantizer(alone, SIDES)(f).ids, ids)


@pytest.mark.parametrize("shared", [False, True], ids=["AdaLN of each block", "shared AdaLN"])
def test_the_transformer_gives_the_same_logits(shared):
    reference = random_reference(shared)
    var = read_transformer(transformer_state(reference))
    assert not var.training
    assert list(var.starts) == [0, 1, 5, 14, 30, 55]
    inputs, label = torch.randn(3, 54, DIM), torch.tensor([0, 7, CLASSES])  # the last is the unconditional row
    assert torch.equal(var.null_condition(1), label[2:, None])
    logits = reference(inputs.double(), label)
    assert logits.std() > 0.5
    assert_close(var(inputs, label[:, None]).double(), logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shared", [False, True], ids=["AdaLN of each block", "shared AdaLN"])
def test_guided_greedy_generation_gives_the_same_tokens(shared):
    reference, state = random_reference(shared), quantizer_state()
    codebook, phis = weights(state)
    labels = torch.tensor([3, 0, 9])
    tokens = torch.zeros(3, 55, dtype=torch.int64)
    start = 0
    for k, side in enumerate(SIDES):  # what is not drawn yet is not seen
        inputs = reference_var.teacher_inputs(tokens, codebook, phis, WHICH, GRIDS, 0.5)
        t, part = 1.5 * k / 4, slice(start, start + side**2)
        given, free = (reference(inputs, c)[:, part] for c in (labels, torch.full((3,), CLASSES)))
        tokens[:, part] = ((1 + t) * given - t * free).argmax(-1)
        start += side**2
    var, quantizer = read_transformer(transformer_state(reference)), read_quantizer(state, SIDES)
    with torch.inference_mode():
        ids, _ = sample(
            var, quantizer, labels[:, None], torch.rand(3, 55), cfg=1.5, top_k=1, top_p=1.0, precision="float32"
        )
    assert torch.equal(ids, tokens)
    assert len(set(tokens.flatten().tolist())) > 5


def test_scales_can_be_given_where_the_weights_do_not_tell():
    state = transformer_state(random_reference(False))
    del state["lvl_1L"]
    with pytest.raises(CheckpointError, match="lacks the buffer lvl_1L; give `scales`"):
        read_transformer(state)
    assert read_transformer(state, SIDES).lengths == [1, 4, 9, 16, 25]
    with pytest.raises(CheckpointError, match="tensor position has shape"):
        read_transformer(state, (1, 2, 3, 4))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"class_emb.weight": None}, "lacks class_emb.weight; want the published VAR's transformer"),
        ({"blocks.0.attn.scale_mul_1H11": None}, "lacks blocks.0.attn.scale_mul_1H11"),
        ({"blocks.1.ffn.fc2.bias": None}, r"lacks blocks.1.ffn.fc2.bias"),
        ({"blocks.1.ada_lin.1.weight": None}, r"lacks blocks.1.ada_lin.1.weight"),
        ({"tail.weight": torch.zeros(2)}, "has an unknown tensor tail.weight"),
        ({"blocks.0.attn.zero_k_bias": torch.ones(WIDTH)}, "blocks.0.attn.zero_k_bias is not 0"),
        ({"head.bias": torch.full((CODES,), torch.nan)}, "head.bias holds values that are not finite"),
        ({"lvl_1L": torch.zeros(1, 3)}, r"counts \[3\] tokens, which are no square grids"),
    ],
)
def test_other_state_dicts_are_refused(change, message):
    state = transformer_state(random_reference(False)) | change
    with pytest.raises(CheckpointError, match=message):
        read_transformer({name: tensor for name, tensor in state.items() if tensor is not None})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quantize.embedding.weight": None}, "lacks quantize.embedding.weight"),
        ({"quantize.quant_resi.qresi_ls.2.bias": None}, "qresi_ls.0 and on with a bias each"),
        ({"quantize.quant_resi.qresi_ls.1.weight": None}, "qresi_ls.0 and on with a weight each"),
        ({"quantize.other": torch.zeros(2)}, "unknown tensor other"),
        ({"quantize.embedding.weight": torch.zeros(CODES, DIM + 1)}, "tensor phi_weight has shape"),
    ],
)
def test_other_quantisers_are_refused(change, message):
    state = quantizer_state() | change
    with pytest.raises(CheckpointError, match=re.escape(message)):
        read_quantizer({name: tensor for name, tensor in state.items() if tensor is not None}, SIDES)
