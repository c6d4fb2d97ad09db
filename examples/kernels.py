"""The operations and modules of mars.kernels in a model of your own: a small autoencoder of maps, with tokens.

    pip install -e .
    python examples/kernels.py          # some seconds

docs/operations.md has every operation with its formula, limits and cost.
"""

import argparse
import time

import torch
from torch import nn

from mars import kernels

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--steps", type=int, default=200)
steps = parser.parse_args().steps
torch.manual_seed(0)

encoder = nn.Sequential(nn.Conv2d(1, 32, 4, 4), nn.GELU(), nn.Conv2d(32, 16, 1))
vq = kernels.MultiScaleVQ(dim=16, codebook_size=256, scales=(1, 2, 4, 8))
decoder = nn.Sequential(nn.Conv2d(16, 32, 1), nn.GELU(), nn.ConvTranspose2d(32, 1, 4, 4))
optimizer = torch.optim.Adam([*encoder.parameters(), *vq.parameters(), *decoder.parameters()], 2e-3)

axis = torch.linspace(-1, 1, 32)


def waves(count):
    """Plane waves of random direction, (count, 1, 32, 32)."""
    a, b, phase = torch.randn(3, count, 1, 1, 1) * 4
    return torch.sin(a * axis[:, None] + b * axis + phase)


for step in range(steps):
    x = waves(64)
    quantized, ids, loss = vq(encoder(x))
    reconstruction = (decoder(quantized) - x).square().mean()
    optimizer.zero_grad()
    (reconstruction + loss).backward()
    optimizer.step()
    if step % 50 == 0 or step == steps - 1:
        print(f"step {step}: squared error {reconstruction:.4f}, {ids.unique().numel()} codes in use")

# The search alone, beside the same in plain PyTorch; `python -m mars.kernels` says what this machine has.
x, codebook = torch.randn(16384, 32), torch.randn(4096, 32)
for implementation in ("reference", "auto"):
    with kernels.use(implementation):
        kernels.nearest_code(x, codebook)  # warm
        began = time.perf_counter()
        kernels.nearest_code(x, codebook)
        print(f"nearest of 4,096 codes for 16,384 rows, {implementation}: {time.perf_counter() - began:.4f} s")
