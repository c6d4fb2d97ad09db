"""Weights in the layout of the published VAR (Tian et al. 2024, arXiv:2404.02905), as models of mars.

The two compute the same, so that one layout maps to the other tensor by tensor; docs/images.md lists what corresponds
to what. Written from the layout's description: names, shapes and order of the modulations.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mars import checkpoint
from mars.config import TokenizerConfig, VARConfig
from mars.errors import CheckpointError
from mars.kernels.nearest_code.op import Metric
from mars.models.quantizer import Quantizer
from mars.models.var import VAR, key

SCALES = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)  # of the published models at 256 x 256 pixels

_CLASS = f"condition.{key('class')}"
# Published name: ours. Whole parts between dots, the longest first; what is not here has the same name in both.
_NAMES = {
    "head_nm.ada_lin.1": "head_ada.1",
    "shared_ada_lin.1": "shared_ada.1",
    "ada_lin.1": "ada.1",
    "ada_gss": "offset",
    "class_emb": _CLASS,
    "pos_start": "start_position",
    "pos_1LC": "position",
    "lvl_embed": "level",
    "word_embed": "embed",
    "mat_qkv": "qkv",
    "scale_mul_1H11": "log_scale",
    "ffn.fc1": "mlp.0",
    "ffn.fc2": "mlp.2",
}
_LEVELS = "lvl_1L"  # buffer: of each token, its scale
_BUFFERS = re.compile(r"lvl_1L|attn_bias_for_masking|blocks\.\d+\.attn\.zero_k_bias")  # what follows from the rest
_ENCODER = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")  # the autoencoder around the quantiser


def read_transformer(state: Mapping[str, Tensor], scales: Sequence[int] | None = None) -> VAR:
    """Make a `VAR` of the published transformer's state dict, with either kind of AdaLN; in evaluation mode.

    Its one condition is "class", whose last row is the unconditional one.

    Args:
        state: tensors by name, as `torch.load(path, weights_only=True)` gives them.
        scales: sides of the square grids of tokens, coarse to fine; None: as the buffer `lvl_1L` tells.

    Raises:
        CheckpointError: a tensor is missing, unknown, of another shape or not finite.
    """
    tensors = {_renamed(name, _NAMES): tensor for name, tensor in state.items() if not _BUFFERS.fullmatch(name)}
    for name, tensor in state.items():
        if name.endswith("zero_k_bias") and bool(tensor.any()):
            raise CheckpointError(f"state dict: {name} is not 0, and keys have no bias here")
    for name in (f"{_CLASS}.weight", "position", "embed.weight", "head.weight", "blocks.0.attn.log_scale"):
        if name not in tensors:
            raise CheckpointError(f"state dict lacks {_published(name)}; want the published VAR's transformer")
    codebook_size, width = tensors["head.weight"].shape
    sides = _sides(state) if scales is None else tuple(scales)
    depth = 1 + max(int(found[1]) for name in tensors if (found := re.match(r"blocks\.(\d+)\.", name)))
    tokenizer = _tokenizer(sides, codebook_size, tensors["embed.weight"].shape[1], phi=1)
    config = VARConfig(
        depth=depth,
        width=width,
        heads=tensors["blocks.0.attn.log_scale"].shape[1],
        shared_adaln="shared_ada.1.weight" in tensors,
        drop_path=0.1 * depth / 24,  # the published rule; for further training
    )
    var = VAR(config, tokenizer, classes={"class": len(tensors[f"{_CLASS}.weight"]) - 1})
    _load(var, tensors)
    return var.eval()


def read_quantizer(
    state: Mapping[str, Tensor], scales: Sequence[int] = SCALES, *, metric: Metric = "l2", ratio: float = 0.5
) -> Quantizer:
    """Make a `Quantizer` of the published autoencoder's state dict, or of its quantiser's alone; in evaluation mode.

    The convolutional encoder and decoder around it are not read: mars has others.

    Args:
        state: tensors by name, as `torch.load(path, weights_only=True)` gives them.
        scales: sides of the square grids of tokens, coarse to fine.
        metric: "cosine" for a model trained with `using_znorm`.
        ratio: `quant_resi` of the model, which its weights do not tell.

    Raises:
        CheckpointError: a tensor is missing, unknown, of another shape or not finite.
    """
    own = {name.removeprefix("quantize."): t for name, t in state.items() if not name.startswith(_ENCODER)}
    own.pop("ema_vocab_hit_SV", None)  # how often codes were used
    if "embedding.weight" not in own:
        raise CheckpointError("state dict lacks quantize.embedding.weight; want the published VAR's autoencoder")
    count = sum(re.fullmatch(r"quant_resi\.qresi_ls\.\d+\.weight", name) is not None for name in own)
    tensors = {"codebook": own.pop("embedding.weight")}
    for ours, theirs in (("phi_weight", "weight"), ("phi_bias", "bias")):
        parts = [own.pop(f"quant_resi.qresi_ls.{i}.{theirs}", None) for i in range(count)]
        found = [part for part in parts if part is not None]
        if not found or len(found) < count or len({part.shape for part in found}) > 1:
            raise CheckpointError(
                f"state dict: want quant_resi.qresi_ls.0 and on with a {theirs} each, all of one shape"
            )
        tensors[ours] = torch.stack(found)
    if own:
        raise CheckpointError(f"state dict has an unknown tensor {min(own)}; want the published VAR's autoencoder")
    size, dim = tensors["codebook"].shape
    quantizer = Quantizer(_tokenizer(scales, size, dim, phi=count, metric=metric, phi_ratio=ratio))
    checkpoint.load_weights(quantizer, tensors, "state dict")
    return quantizer.eval()


def _tokenizer(scales: Sequence[int], size: int, dim: int, **settings: object) -> TokenizerConfig:
    grids = tuple((side, side) for side in scales)
    fixed = {"quantizer_dropout": 0.0, "dropout_start": 1}  # VAR's has none
    return TokenizerConfig(scales=grids, codebook_size=size, code_dim=dim, **fixed, **settings)  # type: ignore[arg-type]


def _sides(state: Mapping[str, Tensor]) -> tuple[int, ...]:
    """The sides of the grids whose tokens the buffer of levels counts."""
    if _LEVELS not in state:
        raise CheckpointError(f"state dict lacks the buffer {_LEVELS}; give scales")
    counts = torch.bincount(state[_LEVELS].flatten().long()).tolist()
    sides = tuple(math.isqrt(count) for count in counts)
    if [side * side for side in sides] != counts:
        raise CheckpointError(f"state dict: {_LEVELS} counts {counts} tokens, which are no square grids; give scales")
    return sides


def _load(var: VAR, tensors: Mapping[str, Tensor]) -> None:
    own = var.state_dict()
    for name in sorted(own.keys() ^ tensors.keys()):
        what = "lacks" if name in own else "has an unknown tensor"
        raise CheckpointError(f"state dict {what} {_published(name)}; want the published VAR's transformer")
    checkpoint.load_weights(var, tensors, "state dict")


def _renamed(name: str, names: Mapping[str, str]) -> str:
    for old, new in names.items():
        found = re.sub(rf"(^|\.){re.escape(old)}($|\.)", rf"\g<1>{new}\g<2>", name)
        if found != name:
            return found
    return name


def _published(name: str) -> str:
    return _renamed(name, {ours: theirs for theirs, ours in _NAMES.items()})
