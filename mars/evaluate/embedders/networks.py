"""Networks that tell pitches or instruments apart by a picture of a note.

`Inception` is Inception-v3 (Szegedy et al. 2016, arXiv:1512.00567, §6 and figures 5 to 7) without its auxiliary head,
with one input channel and a padded stem, as Nistal et al. (2020, arXiv:2006.09266) use it. The names of its weights
are torchvision's, so that theirs can be loaded. `Tiny` is a small convolutional network for tests and small machines.

Letters: B batch, C channels, (H, W) frequency and time.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mars.errors import ConfigError
from mars.runtime import stream

AVERAGE, MAXIMUM = "average", "maximum"  # steps of a path that have no weights


class ConvUnit(nn.Module):
    """Convolution, batch norm and ReLU: (B, in, H, W) -> (B, out, H', W')."""

    def __init__(
        self,
        channels: int,
        out: int,
        kernel: tuple[int, int] = (1, 1),
        stride: int = 1,
        padding: tuple[int, int] = (0, 0),
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, out, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(out, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class Step(NamedTuple):
    """One convolution of a path. With stride 1 it keeps the size of the grid, with 2 it pads nothing."""

    name: str
    out: int
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1


Steps = tuple[Step | str, ...]


class Mixed(nn.Module):
    """Paths side by side, their ends concatenated over the channels; paths that begin alike share that beginning."""

    def __init__(self, channels: int, *paths: Steps) -> None:
        super().__init__()
        self.paths = paths
        self.out = 0
        for path in paths:
            width = channels
            for step in path:
                if isinstance(step, Step):
                    same = (step.kernel[0] // 2, step.kernel[1] // 2)
                    padding = same if step.stride == 1 else (0, 0)
                    if not hasattr(self, step.name):
                        self.add_module(step.name, ConvUnit(width, step.out, step.kernel, step.stride, padding))
                    width = step.out
            self.out += width

    def forward(self, x: Tensor) -> Tensor:
        done: dict[Steps, Tensor] = {(): x}
        for path in self.paths:
            for n, step in enumerate(path):
                if path[: n + 1] not in done:
                    done[path[: n + 1]] = self._apply_step(step, done[path[:n]])
        return torch.cat([done[path] for path in self.paths], dim=1)

    def _apply_step(self, step: Step | str, x: Tensor) -> Tensor:
        if step == AVERAGE:
            return F.avg_pool2d(x, 3, stride=1, padding=1)
        if step == MAXIMUM:
            return F.max_pool2d(x, 3, stride=2)
        assert isinstance(step, Step)
        return self.get_submodule(step.name)(x)


def _mixed_35(channels: int, pool: int) -> Mixed:
    """Build the block of figure 5, for the 35 x 35 grid."""
    dbl = (Step("branch3x3dbl_1", 64), Step("branch3x3dbl_2", 96, (3, 3)), Step("branch3x3dbl_3", 96, (3, 3)))
    return Mixed(
        channels,
        (Step("branch1x1", 64),),
        (Step("branch5x5_1", 48), Step("branch5x5_2", 64, (5, 5))),
        dbl,
        (AVERAGE, Step("branch_pool", pool)),
    )


def _reduce_35(channels: int) -> Mixed:
    """Build the block from the 35 x 35 grid to 17 x 17."""
    dbl = (Step("branch3x3dbl_1", 64), Step("branch3x3dbl_2", 96, (3, 3)), Step("branch3x3dbl_3", 96, (3, 3), 2))
    return Mixed(channels, (Step("branch3x3", 384, (3, 3), 2),), dbl, (MAXIMUM,))


def _mixed_17(channels: int, width: int) -> Mixed:
    """Build the block of figure 6, with n = 7, for the 17 x 17 grid."""
    row, column = (1, 7), (7, 1)
    return Mixed(
        channels,
        (Step("branch1x1", 192),),
        (Step("branch7x7_1", width), Step("branch7x7_2", width, row), Step("branch7x7_3", 192, column)),
        (
            Step("branch7x7dbl_1", width),
            Step("branch7x7dbl_2", width, column),
            Step("branch7x7dbl_3", width, row),
            Step("branch7x7dbl_4", width, column),
            Step("branch7x7dbl_5", 192, row),
        ),
        (AVERAGE, Step("branch_pool", 192)),
    )


def _reduce_17(channels: int) -> Mixed:
    """Build the block from the 17 x 17 grid to 8 x 8."""
    return Mixed(
        channels,
        (Step("branch3x3_1", 192), Step("branch3x3_2", 320, (3, 3), 2)),
        (
            Step("branch7x7x3_1", 192),
            Step("branch7x7x3_2", 192, (1, 7)),
            Step("branch7x7x3_3", 192, (7, 1)),
            Step("branch7x7x3_4", 192, (3, 3), 2),
        ),
        (MAXIMUM,),
    )


def _mixed_8(channels: int) -> Mixed:
    """Build the block of figure 7, for the 8 x 8 grid: the last 3 x 3 of two paths is split into a row and a column."""
    single = (Step("branch3x3_1", 384),)
    double = (Step("branch3x3dbl_1", 448), Step("branch3x3dbl_2", 384, (3, 3)))
    return Mixed(
        channels,
        (Step("branch1x1", 320),),
        (*single, Step("branch3x3_2a", 384, (1, 3))),
        (*single, Step("branch3x3_2b", 384, (3, 1))),
        (*double, Step("branch3x3dbl_3a", 384, (1, 3))),
        (*double, Step("branch3x3dbl_3b", 384, (3, 1))),
        (AVERAGE, Step("branch_pool", 192)),
    )


class Network(nn.Module):
    """A picture (B, 1, H, W) to features (B, dim) and, through the layer `fc`, to logits (B, classes)."""

    dim: int
    fc: nn.Linear

    def features(self, x: Tensor) -> Tensor:
        """Return what `fc` reads, (B, dim)."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.features(x))


class Inception(Network):
    """Inception-v3 for pictures of one channel, of 75 x 75 cells or more."""

    dim = 2048

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = ConvUnit(1, 32, (3, 3), 2, (1, 1))
        self.Conv2d_2a_3x3 = ConvUnit(32, 32, (3, 3), 1, (1, 1))
        self.Conv2d_2b_3x3 = ConvUnit(32, 64, (3, 3), 1, (1, 1))
        self.Conv2d_3b_1x1 = ConvUnit(64, 80)
        self.Conv2d_4a_3x3 = ConvUnit(80, 192, (3, 3))
        self.Mixed_5b = _mixed_35(192, 32)
        self.Mixed_5c = _mixed_35(self.Mixed_5b.out, 64)
        self.Mixed_5d = _mixed_35(self.Mixed_5c.out, 64)
        self.Mixed_6a = _reduce_35(self.Mixed_5d.out)
        self.Mixed_6b = _mixed_17(self.Mixed_6a.out, 128)
        self.Mixed_6c = _mixed_17(self.Mixed_6b.out, 160)
        self.Mixed_6d = _mixed_17(self.Mixed_6c.out, 160)
        self.Mixed_6e = _mixed_17(self.Mixed_6d.out, 192)
        self.Mixed_7a = _reduce_17(self.Mixed_6e.out)
        self.Mixed_7b = _mixed_8(self.Mixed_7a.out)
        self.Mixed_7c = _mixed_8(self.Mixed_7b.out)
        self.fc = nn.Linear(self.dim, classes)

    def features(self, x: Tensor) -> Tensor:
        """Return the average over the last grid, (B, 2048)."""
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = F.max_pool2d(x, 3, stride=2)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x))
        x = F.max_pool2d(x, 3, stride=2)
        for name, block in self.named_children():
            if name.startswith("Mixed"):
                x = block(x)
        return x.mean((2, 3))


class Tiny(Network):
    """Four convolutions that halve the grid; the features keep the axis of frequency, averaged over time.

    height: of the pictures, a multiple of 16.
    """

    def __init__(self, classes: int, height: int = 128) -> None:
        super().__init__()
        widths = (1, 24, 48, 96, 96)
        self.convolutions = nn.Sequential(*(ConvUnit(a, b, (3, 3), 2, (1, 1)) for a, b in pairwise(widths)))
        self.dim = widths[-1] * height // 16
        self.fc = nn.Linear(self.dim, classes)

    def features(self, x: Tensor) -> Tensor:
        """Return the features (B, 96 height / 16)."""
        return self.convolutions(x).mean(3).flatten(1)


NETWORKS: dict[str, type[Network]] = {"inception": Inception, "tiny": Tiny}


def outline(name: str, classes: int) -> Network:
    """Build a network on the meta device: it has shapes but takes no memory.

    Raises:
        ConfigError: there is no network of that name.
    """
    if name not in NETWORKS:
        raise ConfigError(f"unknown network {name!r:.80}; known: {', '.join(NETWORKS)}")
    with torch.device("meta"):
        return NETWORKS[name](classes)


def build(name: str, classes: int) -> Network:
    """Build a network on the CPU with uninitialised weights; load some, or `initialise` them.

    Raises:
        ConfigError: there is no network of that name.
    """
    return outline(name, classes).to_empty(device="cpu")  # drawing weights that are thrown away would take seconds


def initialise(network: Network, seed: int) -> Network:
    """Return the network with weights drawn from `seed`: normal with deviation 0.1, cut at two deviations; biases 0."""
    generator = stream(seed, 2)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_parameters()
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.1, a=-0.2, b=0.2, generator=generator)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)
    return network
