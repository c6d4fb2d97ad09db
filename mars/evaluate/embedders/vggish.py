"""VGGish (Hershey et al. 2017, arXiv:1609.09430): log-mel front end and network, as released for AudioSet.

The embedding is the last layer's 128 values before any activation, without the release's PCA and 8-bit quantisation,
as Fréchet Audio Distance uses it (Kilgour et al. 2019, arXiv:1812.08466). No weights come with mars: `load` reads
those of torchvggish (vggish-10086976.pth, 276 MiB, https://github.com/harritaylor/torchvggish/releases).
"""

from __future__ import annotations

import hashlib
import math
from functools import cache
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from mars import checkpoint
from mars.errors import CheckpointError, ConfigError
from mars.evaluate.embedders.features import Embedding
from mars.evaluate.embedders.weights import read_weights
from mars.files import sha256
from mars.runtime import float64_device

PUBLISHED = "vggish-10086976.pth"  # 276 MiB
SAMPLE_RATE = 16_000  # Hz
WINDOW, HOP, N_FFT = 400, 160, 512  # samples
BANDS, LOW, HIGH = 64, 125.0, 7500.0  # Hz
FRAMES = 96  # of an example

Framing = Literal["google", "google-16-bit", "torchvggish"]
QUIETEST: dict[Framing, float] = {"google": 0.1, "google-16-bit": 0.1 / 2**15}  # level that notes are raised from

_NOTES = 32  # transformed at a time


def log_mel(waveform: Tensor) -> Tensor:
    """Compute log(mel + 0.01), float64 (B, frames, 64), of waveforms (B, samples) at 16 kHz.

    Windows of 25 ms every 10 ms without padding: 1 + (samples - 400) // 160 frames. Periodic Hann window, magnitudes
    of a 512-point transform, triangles that are straight on the mel scale 1127 ln(1 + f / 700). On the CPU for
    waveforms on MPS, which has no float64.
    """
    waveform = waveform.to(float64_device(waveform.device)).double()
    frames = waveform.unfold(-1, WINDOW, HOP)
    window = torch.hann_window(WINDOW, dtype=torch.float64, device=waveform.device)
    filters = _filterbank().to(waveform.device)
    spectrograms = waveform.new_empty(*frames.shape[:2], BANDS)
    for start in range(0, len(frames), _NOTES):
        spectrum = torch.fft.rfft(frames[start : start + _NOTES] * window, N_FFT)
        spectrograms[start : start + _NOTES] = (spectrum.abs() @ filters + 0.01).log()
    return spectrograms


def examples(waveform: Tensor, framing: Framing = "google") -> Tensor:
    """Return the network's input, float32 (B, examples, 96, 64) of waveforms (B, samples) at 16 kHz.

    - "google": each note over its highest sample, or over 0.1 if that is higher; windows of 16,000 samples every
      8,000, of whose 98 frames the first 96 are used. 7 examples of 64,000 samples. That of google-research's
      Fréchet Audio Distance, as it is meant.
    - "google-16-bit": as that program treats 16-bit files, whose samples it does not scale to [-1, 1]: the limit of
      0.1 is below one step, so that every note is raised to full scale, however quiet.
    - "torchvggish": no change of level; 96 frames after 96 frames. 4 examples of 64,000 samples.

    A rest at the end that does not fill an example is left out.

    Raises:
        ConfigError: another shape, integers, or notes too short for one example.
    """
    least = WINDOW + (FRAMES - 1) * HOP if framing == "torchvggish" else SAMPLE_RATE
    if waveform.ndim != 2 or waveform.shape[1] < least or not waveform.is_floating_point():
        expected = f"floating-point (B, samples >= {least})"
        raise ConfigError(f"vggish.examples: want {expected}, got {waveform.dtype} {tuple(waveform.shape)}")
    if framing == "torchvggish":
        return log_mel(waveform).unfold(1, FRAMES, FRAMES).mT.float()
    peak = waveform.amax(1, keepdim=True)  # of the signed signal, as published
    count = 1 + (waveform.shape[1] - SAMPLE_RATE) // (SAMPLE_RATE // 2)
    # Windows start on the hop's grid, so that their frames are those of the whole note.
    frames = log_mel(waveform / peak.clamp(min=QUIETEST[framing]))
    return frames.unfold(1, FRAMES, SAMPLE_RATE // 2 // HOP)[:, :count].mT.float()


class VGGish(nn.Module):
    """The network, with the parameter names of torchvggish."""

    id = "vggish"
    sample_rate = SAMPLE_RATE
    dim = 128
    classes: tuple[str, ...] | None = None

    def __init__(self, framing: Framing = "google") -> None:
        super().__init__()
        self.framing = framing
        self.sha256 = ""  # of the file that the weights are from
        layers: list[nn.Module] = []
        channels = 1
        for stage in ((64,), (128,), (256, 256), (512, 512)):
            for width in stage:
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(inplace=True)]
                channels = width
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.embeddings = nn.Sequential(
            nn.Linear(6 * 4 * 512, 4096), nn.ReLU(inplace=True), nn.Linear(4096, 4096), nn.ReLU(inplace=True),
            nn.Linear(4096, 128),
        )  # fmt: skip

    def forward(self, examples: Tensor) -> Tensor:
        """Return embeddings (N, 128) of examples (N, 96, 64)."""
        maps = self.features(examples.unsqueeze(1))  # (N, 512, 6, 4)
        return self.embeddings(maps.permute(0, 2, 3, 1).flatten(1))  # the weights expect channels last

    @property
    def front_end(self) -> str:
        """Hex sum of what decides the frames besides the weights."""
        return hashlib.sha256(f"{self.framing} framing".encode()).hexdigest()

    @torch.inference_mode()
    def embed(self, waveforms: Tensor) -> Embedding:
        """Return frames (B, examples, 128) of waveforms (B, samples) at 16 kHz."""
        weight = self.embeddings[-1].weight
        assert isinstance(weight, Tensor)
        device = weight.device
        parts = []
        for notes in waveforms.split(_NOTES):
            seen = examples(notes.to(device), self.framing).to(device)
            parts.append(self(seen.flatten(0, 1)).view(*seen.shape[:2], self.dim).cpu())
        return Embedding(torch.cat(parts))


def load(path: Path, framing: Framing = "google") -> VGGish:
    """Load VGGish with the weights of a .safetensors file or of torchvggish's .pth, in evaluation mode.

    Raises:
        CheckpointError: there is no such file, or its tensors are not those of VGGish.
    """
    try:
        tensors = checkpoint.read_tensors(path) if path.suffix == ".safetensors" else read_weights(path)
        network = VGGish(framing)
        checkpoint.load_weights(network, tensors, path)
    except CheckpointError as error:
        raise CheckpointError(f"{error}; want VGGish's weights, {PUBLISHED} of torchvggish") from None
    network.sha256 = sha256(path)
    return network.eval().requires_grad_(False)


@cache
def _filterbank() -> Tensor:
    """Return the mel filters, float64 (257, 64)."""

    def mel(hertz: Tensor) -> Tensor:
        return 1127 * (1 + hertz / 700).log()

    bins = mel(torch.linspace(0, SAMPLE_RATE / 2, N_FFT // 2 + 1, dtype=torch.float64))[:, None]
    low, high = (1127 * math.log(1 + f / 700) for f in (LOW, HIGH))
    edges = torch.linspace(low, high, BANDS + 2, dtype=torch.float64)
    lower, centre, upper = edges[:-2], edges[1:-1], edges[2:]
    return torch.minimum((bins - lower) / (centre - lower), (upper - bins) / (upper - centre)).clamp(min=0)
