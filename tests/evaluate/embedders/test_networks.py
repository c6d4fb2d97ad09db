"""Inception-v3 as its state dict is published: names, shapes, grids, the order of the paths."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from mars.errors import ConfigError
from mars.evaluate.embedders.networks import ConvUnit, Mixed, Step, build, initialise


@pytest.fixture(scope="module")
def inception():
    return initialise(build("inception", 27), 0).eval()


def test_inception_has_the_published_size(inception):
    state = inception.state_dict()
    assert len(state) == 566
    assert sum(p.numel() for p in inception.parameters()) == pytest.approx(21.84e6, rel=1e-3)


SHAPES = {
    "Conv2d_1a_3x3.conv.weight": (32, 1, 3, 3),
    "Conv2d_4a_3x3.bn.running_var": (192,),
    "Mixed_5b.branch5x5_2.conv.weight": (64, 48, 5, 5),
    "Mixed_5b.branch_pool.conv.weight": (32, 192, 1, 1),
    "Mixed_5d.branch3x3dbl_3.conv.weight": (96, 96, 3, 3),
    "Mixed_6a.branch3x3.conv.weight": (384, 288, 3, 3),
    "Mixed_6b.branch7x7_2.conv.weight": (128, 128, 1, 7),
    "Mixed_6b.branch7x7dbl_2.conv.weight": (128, 128, 7, 1),
    "Mixed_6e.branch7x7dbl_5.conv.weight": (192, 192, 1, 7),
    "Mixed_7a.branch7x7x3_4.conv.weight": (192, 192, 3, 3),
    "Mixed_7b.branch1x1.conv.weight": (320, 1280, 1, 1),
    "Mixed_7c.branch3x3_2b.conv.weight": (384, 384, 3, 1),
    "Mixed_7c.branch3x3dbl_3a.conv.weight": (384, 384, 1, 3),
    "Mixed_7c.branch_pool.bn.num_batches_tracked": (),
    "fc.weight": (27, 2048),
    "fc.bias": (27,),
}


def test_weights_have_the_published_names_and_shapes(inception):
    state = inception.state_dict()
    assert {name: tuple(state[name].shape) for name in SHAPES} == SHAPES


def test_grids_at_the_published_size(inception):
    grids = {}
    handles = [
        block.register_forward_hook(lambda _, __, out, name=name: grids.update({name: tuple(out.shape[1:])}))
        for name, block in inception.named_children()
    ]
    with torch.inference_mode():
        features = inception.features(torch.randn(1, 1, 299, 299))
    for handle in handles:
        handle.remove()
    assert features.shape == (1, 2048)
    assert inception.fc(features.clone()).shape == (1, 27)
    assert grids["Conv2d_1a_3x3"] == (32, 150, 150)
    assert grids["Mixed_5d"] == (288, 35, 35)
    assert grids["Mixed_6e"] == (768, 17, 17)
    assert grids["Mixed_7c"] == (2048, 8, 8)


def test_inception_takes_the_whole_note(inception):
    with torch.inference_mode():
        assert inception(torch.randn(2, 1, 128, 256)).shape == (2, 27)


def test_the_last_block_concatenates_its_paths_in_the_published_order(inception):
    block, x = inception.Mixed_7b, torch.randn(1, 1280, 4, 5)
    single = block.branch3x3_1(x)
    double = block.branch3x3dbl_2(block.branch3x3dbl_1(x))
    paths = [
        block.branch1x1(x),
        block.branch3x3_2a(single),
        block.branch3x3_2b(single),
        block.branch3x3dbl_3a(double),
        block.branch3x3dbl_3b(double),
        block.branch_pool(F.avg_pool2d(x, 3, 1, 1)),
    ]
    torch.testing.assert_close(block(x), torch.cat(paths, 1))


def test_reducing_blocks_end_with_the_pooled_input(inception):
    x = torch.randn(1, 288, 9, 9)
    out = inception.Mixed_6a(x)
    assert out.shape == (1, 768, 4, 4)
    torch.testing.assert_close(out[:, :384], inception.Mixed_6a.branch3x3(x))
    torch.testing.assert_close(out[:, 480:], F.max_pool2d(x, 3, 2))


def test_paths_that_begin_alike_are_computed_once():
    first = Step("first", 4)
    block = Mixed(3, (first, Step("a", 5)), (first, Step("b", 6)))
    calls = []
    block.first.register_forward_hook(lambda *_: calls.append(1))
    assert block(torch.randn(2, 3, 8, 8)).shape == (2, 11, 8, 8)
    assert len(calls) == 1
    assert block.out == 11


def test_a_unit_is_convolution_batch_norm_relu():
    unit, x = ConvUnit(2, 3, (3, 3), 2, (1, 1)), torch.randn(4, 2, 9, 9)
    assert unit.bn.eps == 0.001
    y = unit.conv(x)
    mean, variance = y.mean((0, 2, 3), keepdim=True), y.var((0, 2, 3), keepdim=True, unbiased=False)
    torch.testing.assert_close(unit(x), F.relu((y - mean) / (variance + 0.001).sqrt()))


def test_the_seed_alone_decides_the_weights():
    first, second, other = (initialise(build("tiny", 5), seed).state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not torch.equal(first["fc.weight"], other["fc.weight"])
    assert first["fc.weight"].abs().max() <= 0.2


def test_tiny_keeps_the_axis_of_frequency():
    network = initialise(build("tiny", 5), 0).eval()
    x = torch.zeros(2, 1, 128, 64)
    x[0, 0, 20], x[1, 0, 100] = 1.0, 1.0
    features = network.features(x).unflatten(1, (96, 8))
    assert network.dim == 768
    changed = (features[0] != features[1]).any(0)
    assert changed[1]
    assert changed[6]
    assert not changed[4]


def test_an_unknown_network_is_an_error():
    with pytest.raises(ConfigError, match="known: inception, tiny"):
        build("resnet", 5)
