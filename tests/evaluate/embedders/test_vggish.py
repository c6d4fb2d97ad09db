"""VGGish's front end against its formulae, its network against the published layout."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F

from mars.errors import CheckpointError
from mars.evaluate.embedders import vggish
from mars.files import sha256

SHAPES = {  # of AudioSet's variables vggish/<name>, with TensorFlow's (height, width, in, out) and (in, out)
    "conv1": (3, 3, 1, 64),
    "conv2": (3, 3, 64, 128),
    "conv3_1": (3, 3, 128, 256),
    "conv3_2": (3, 3, 256, 256),
    "conv4_1": (3, 3, 256, 512),
    "conv4_2": (3, 3, 512, 512),
    "fc1_1": (12288, 4096),
    "fc1_2": (4096, 4096),
    "fc2": (4096, 128),
}
NAMES = [f"features.{i}" for i in (0, 3, 6, 8, 11, 13)] + [f"embeddings.{i}" for i in (0, 2, 4)]


def test_log_mel_is_the_published_formula():
    waveform = torch.randn(2, 2000, dtype=torch.float64) * 0.3
    found = vggish.log_mel(waveform)
    assert found.shape == (2, 11, 64)

    def mel(f: float) -> float:
        return 1127 * math.log(1 + f / 700)

    edges = [mel(125) + i * (mel(7500) - mel(125)) / 65 for i in range(66)]
    for frame in (0, 10):
        samples = waveform[1, frame * 160 : frame * 160 + 400].numpy()
        hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(400) / 400)
        magnitudes = np.abs(np.fft.rfft(samples * hann, 512))
        for band in (0, 1, 31, 63):
            total = 0.0
            for k in range(1, 257):
                m = mel(k * 16_000 / 512)
                up = (m - edges[band]) / (edges[band + 1] - edges[band])
                down = (edges[band + 2] - m) / (edges[band + 2] - edges[band + 1])
                total += max(0.0, min(up, down)) * magnitudes[k]
            assert float(found[1, frame, band]) == pytest.approx(math.log(total + 0.01), rel=1e-10)


def test_google_framing():
    waveform = torch.randn(2, 64_000) * 0.01
    waveform[0, 100], waveform[0, 200] = 0.5, -0.9  # the signed peak counts
    actual = vggish.examples(waveform)
    assert actual.shape == (2, 7, 96, 64)
    for note, gain in ((0, 2.0), (1, 10.0)):  # a quiet note gains 20 dB at most
        for i in (0, 3, 6):
            window = waveform[note : note + 1, 8000 * i : 8000 * i + 16_000] * gain
            expected = vggish.log_mel(window)[0, :96].float()
            torch.testing.assert_close(actual[note, i], expected, rtol=1e-5, atol=1e-5)
    loud = vggish.examples(waveform / waveform.amax(1, keepdim=True), "google")
    torch.testing.assert_close(vggish.examples(waveform, "google-16-bit"), loud)  # however quiet
    assert bool(vggish.examples(torch.zeros(1, 64_000), "google-16-bit").isfinite().all())
    assert vggish.examples(torch.zeros(1, 23_999)).shape[1] == 1
    assert vggish.examples(torch.zeros(1, 24_000)).shape[1] == 2


@pytest.mark.parametrize(("framing", "count"), [("google", 7), ("google-16-bit", 7), ("torchvggish", 4)])
def test_no_notes_make_no_examples(framing, count):
    assert vggish.log_mel(torch.zeros(0, 64_000)).shape == (0, 398, 64)
    assert vggish.examples(torch.zeros(0, 64_000), framing).shape == (0, count, 96, 64)


def test_torchvggish_framing():
    waveform = torch.randn(2, 64_000)
    found = vggish.examples(waveform, "torchvggish")
    assert found.shape == (2, 4, 96, 64)
    torch.testing.assert_close(found.flatten(1, 2), vggish.log_mel(waveform)[:, :384].float())


@pytest.mark.parametrize(("framing", "least"), [("google", 16_000), ("torchvggish", 15_600)])
def test_short_notes_are_refused(framing, least):
    assert vggish.examples(torch.zeros(1, least), framing).shape[1] == 1
    with pytest.raises(ValueError, match=rf"want floating-point \(B, samples >= {least}\), got torch.float32"):
        vggish.examples(torch.zeros(1, least - 1), framing)


def test_parameters_are_the_published_ones():
    with torch.device("meta"):
        state = vggish.VGGish().state_dict()
    assert list(state) == [f"{name}.{kind}" for name in NAMES for kind in ("weight", "bias")]
    for name, shape in zip(NAMES, SHAPES.values(), strict=True):
        assert state[f"{name}.weight"].permute(*((2, 3, 1, 0) if len(shape) == 4 else (1, 0))).shape == shape
        assert state[f"{name}.bias"].shape == shape[-1:]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Random weights in both forms."""
    folder = tmp_path_factory.mktemp("vggish")
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for name, shape in zip(NAMES, SHAPES.values(), strict=True):
        turned = (shape[3], shape[2], *shape[:2]) if len(shape) == 4 else shape[::-1]
        bound = (3 / math.prod(turned[1:])) ** 0.5
        tensors[f"{name}.weight"] = torch.empty(turned).uniform_(-bound, bound, generator=generator)
        tensors[f"{name}.bias"] = torch.empty(turned[0]).uniform_(-0.1, 0.1, generator=generator)
    torch.save(tensors, folder / "weights.pth")
    safetensors.torch.save_file(tensors, folder / "weights.safetensors")
    return {path.suffix: path for path in folder.iterdir()}


def test_embeddings_are_what_the_published_layout_gives(weights):
    network = vggish.load(weights[".pth"])
    assert network.sha256 == sha256(weights[".pth"])
    waveform = torch.randn(3, 64_000) * torch.tensor([[0.001], [0.1], [1.0]])
    found = network.embed(waveform).frames
    assert found.shape == (3, 7, 128)
    assert float(found.min()) < 0  # before any activation
    assert network.embed(waveform[:0]).frames.shape == (0, 7, 128)
    state = network.state_dict()
    x = vggish.examples(waveform)[1, 2][None, None]
    for name in NAMES[:6]:
        x = F.relu(F.conv2d(x, state[f"{name}.weight"], state[f"{name}.bias"], padding=1))
        if name not in ("features.6", "features.11"):
            x = F.max_pool2d(x, 2)
    # Flattened by time, then band, then channel.
    x = torch.stack([x[0, c, t, b] for t in range(6) for b in range(4) for c in range(512)])
    for name in NAMES[6:]:
        x = state[f"{name}.weight"] @ (x if name == "embeddings.0" else F.relu(x)) + state[f"{name}.bias"]
    torch.testing.assert_close(found[1, 2], x, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        vggish.load(weights[".safetensors"]).embed(waveform[1:2]).frames[0, 2], x, rtol=1e-4, atol=1e-5
    )


def test_the_framing_decides_the_examples_and_is_in_the_hash(weights):
    networks = [vggish.load(weights[".pth"], framing) for framing in ("google", "google-16-bit", "torchvggish")]
    assert len({network.front_end for network in networks}) == 3
    found = [network.embed(0.01 * torch.randn(1, 64_000)).frames for network in networks]
    assert [x.shape[1] for x in found] == [7, 7, 4]
    assert not torch.equal(found[0], found[1])


def small(**changes: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """Tensors of the right names and shapes that take no space on disk."""
    with torch.device("meta"):
        shapes = {name: x.shape for name, x in vggish.VGGish().state_dict().items()}
    tensors = {name: torch.zeros(()).expand(shape) for name, shape in shapes.items()} | changes
    return {name: x for name, x in tensors.items() if x is not None}


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        (small(**{"embeddings.4.bias": None}), r"lacks tensor embeddings.4.bias"),
        (
            small(**{"features.0.weight": torch.zeros(64, 3, 3, 3)}),
            r"features.0.weight has shape \(64, 3, 3, 3\)",
        ),
        (small(extra=torch.zeros(2)), r"has an unknown tensor extra"),
        ({"state_dict": small()}, r"holds something else than tensors by name"),
        ([1, 2], r"holds something else than tensors by name"),
    ],
    ids=["missing", "shape", "unexpected", "nested", "no tensors"],
)
def test_other_weights_are_refused(tmp_path, tensors, reason):
    torch.save(tensors, tmp_path / "weights.pth")
    with pytest.raises(CheckpointError, match=reason):
        vggish.load(tmp_path / "weights.pth")


class Payload:
    def __reduce__(self):
        return (Path.touch, (Path("touched"),))


def test_files_that_are_no_weights_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=r"absent.pth does not exist; want VGGish's weights, vggish-10086976.pth"):
        vggish.load(tmp_path / "absent.pth")
    torch.save({"features.0.weight": Payload()}, tmp_path / "payload.pth")
    with pytest.raises(CheckpointError, match=r"payload.pth cannot be read as PyTorch weights; it is damaged or"):
        vggish.load(tmp_path / "payload.pth")
    assert not (tmp_path / "touched").exists()
    for name, reason in {"half.pth": "cannot be read as PyTorch", "half.safetensors": "is not a readable"}.items():
        (tmp_path / name).write_bytes(b"PK\x03\x04 and no more")
        with pytest.raises(CheckpointError, match=rf"{name} {reason}"):
            vggish.load(tmp_path / name)
