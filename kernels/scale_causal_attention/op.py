"""This is the contract of `scale_causal_attention`, VAR's attention (Tian et al. 2024, arXiv:2404.02905, §3.2).

MARS_ATTENTION chooses the implementation: "auto", or one of `BACKENDS`, which is then an error where it cannot run. It
is read when this module is imported. "auto" follows MARS_KERNELS, and is otherwise

- on CUDA "triton" in 16 bits, which needs no mask and fuses the normalisation; "dense" (without a mask) for a single
  scale, and "grouped" for float32, which it was measured to be fastest in, and for what the Triton kernels do not take:
  heads of other than 16, 32, 64 or 128 values, float64;
- on a CPU "hybrid" where it is the fastest of the processor (`hybrid.pays`), else "grouped", which keeps less for its
  backward. The processor's features decide and no stopwatch, so that a run can be repeated;
- "grouped" elsewhere.

There is no native kernel in C++: PyTorch's fused forward and oneDNN's matrix products are near what the CPU can do.
On one core of a Xeon with AMX, forward and backward at L = 680, D = 64, B = 2, H = 16, "hybrid" takes 119 ms in float32
and 60 ms in bfloat16, where one masked `scaled_dot_product_attention` takes 162 and 125; with the normalisation 130
and 78 against 183 and 146.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from mars.errors import ConfigError, KernelError
from mars.kernels import _backend
from mars.kernels.scale_causal_attention import backends, hybrid, reference, registered
from mars.kernels.scale_causal_attention.heads import TRITON_DTYPES, TRITON_SIZES

AttentionBackend = Literal["triton", "hybrid", "grouped", "dense", "flash", "xformers", "flex", "reference"]
BACKENDS: tuple[AttentionBackend, ...] = get_args(AttentionBackend)
_CHOICES = ("auto", *BACKENDS)

_choice = os.environ.get("MARS_ATTENTION", "auto")

_PACKAGES = {"flash": ("flash_attn", "flash-attn"), "xformers": ("xformers", "xformers")}


def scale_causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Sequence[int],
    scale: float | None = None,
    *,
    head_scale: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Let each token attend to all tokens of its own and of coarser scales.

    On a CPU the rows of a scale stay what they are when keys or values of a finer one are not finite; in a compiled
    graph they do with "hybrid". Elsewhere asking would make the host wait, and NaN can pass the masks.

    Args:
        q, k, v: (B, H, L, D), any strides, all of one float dtype; autocast casts them as for a matrix product.
        lengths: tokens of each scale, coarse to fine, each 1 or more; they add up to L.
        scale: factor on the scores before the softmax, 0 or more. None: 1 / sqrt(D), as in PyTorch's
            `scaled_dot_product_attention`, but 1 with `head_scale`, which takes its place.
        head_scale: (H,). With it q and k are first divided by their Euclidean norms, in float32, and q is multiplied
            by the scale of its head.
        backend: one of `BACKENDS` instead of the choice of MARS_ATTENTION.

    Returns:
        (B, H, L, D), of the dtype of q.

    Raises:
        ValueError: the shapes or dtypes differ or do not fit, a length is below 1, scale is negative or not finite, or
            there is no such backend.
        ConfigError: MARS_ATTENTION is none of them.
        KernelError: the backend asked for by name cannot run here, and why.
    """
    lengths = tuple(lengths)
    scale = _check("scale_causal_attention", q, k, v, scale, head_scale)
    if not lengths or min(lengths) < 1 or not q.shape[2] == k.shape[2] == sum(lengths):
        raise ValueError(
            f"scale_causal_attention: want q, k, v (B, H, {sum(lengths)}, D) for scales of {list(lengths)} tokens, "
            f"each 1 or more; got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    q, k, v = _autocast(q, k, v)
    name = _chosen(backend, q, lengths, head_scale is not None)
    return _backend.select("scale_causal_attention", _TABLE, name)(q, k, v, head_scale, lengths, scale)


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """Compute the softmax attention of all q (B, H, n, D) to all k, v (B, H, m, D); scale None: 1 / sqrt(D).

    With n = m it is `scale_causal_attention` of a single scale, else PyTorch's fused attention.

    Raises:
        ValueError, ConfigError, KernelError: as `scale_causal_attention`.
    """
    scale = _check("attention", q, k, v, scale, None)
    if 0 < q.shape[2] == k.shape[2]:
        return scale_causal_attention(q, k, v, (q.shape[2],), scale)
    q, k, v = _autocast(q, k, v)
    return F.scaled_dot_product_attention(q, k, v, scale=scale)


def cached_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    values: Tensor,
    start: int,
    scale: float | None = None,
    *,
    head_scale: Tensor | None = None,
) -> Tensor:
    """Compute one scale of `scale_causal_attention`, for generation, from the keys and values of the coarser ones.

    Args:
        q, k, v: (B, H, n, D), of the new scale.
        keys, values: (B, H, L, D), filled before `start`; the new k (normalised, with `head_scale`) and v are written
            to `start` and after.
        start: tokens of the coarser scales.
        scale, head_scale: as for `scale_causal_attention`.

    Returns:
        (B, H, n, D).

    Raises:
        ValueError: the shapes or dtypes do not fit, or the new scale does not fit after `start`.
    """
    scale = _check("cached_attention", q, k, v, scale, head_scale)
    n, end = q.shape[2], start + q.shape[2]
    room = (*q.shape[:2], max(end, keys.shape[2] if keys.ndim == 4 else 0), q.shape[3])
    if start < 0 or k.shape[2] != n or keys.shape != room or values.shape != room or keys.dtype != values.dtype:
        raise ValueError(
            f"cached_attention: want k, v like q and keys, values (B, H, {end} or more, D) from 0 <= start; got start "
            f"{start}, q {tuple(q.shape)}, k {tuple(k.shape)}, keys {tuple(keys.shape)} {keys.dtype}, "
            f"values {tuple(values.shape)} {values.dtype}"
        )
    if head_scale is not None:
        q, k = reference.normalize(q, k, head_scale)
    keys[:, :, start:end], values[:, :, start:end] = k, v
    return attention(q.to(keys.dtype), keys[:, :, :end], values[:, :, :end], scale)


def availability(device: str | None = None) -> dict[str, str | None]:
    """Return for each of `BACKENDS` why it cannot run on a device type, or None where it can.

    Where the device is not named it is CUDA if there is one, else the CPU. Packages and FlexAttention are tried with a
    real call, forward and backward, in bfloat16 on CUDA and in float32 elsewhere, once a process.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    return {name: _missing(name, device, dtype) for name in BACKENDS}


def _check(op: str, q: Tensor, k: Tensor, v: Tensor, scale: float | None, head_scale: Tensor | None) -> float:
    """Raise ValueError where the arguments do not fit, and return the scale that None stands for."""
    if q.ndim != 4 or k.shape != v.shape or k.ndim != 4 or q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3]:
        raise ValueError(
            f"{op}: want q, k, v (B, H, tokens, D), k and v alike; "
            f"got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    if not q.dtype == k.dtype == v.dtype or not q.is_floating_point():
        raise ValueError(f"{op}: want q, k, v of one float dtype, got {q.dtype}, {k.dtype}, {v.dtype}")
    if scale is None:
        scale = q.shape[3] ** -0.5 if head_scale is None and q.shape[3] else 1.0
    if not 0 <= scale < float("inf"):
        raise ValueError(f"{op}: want a finite scale of 0 or more, got {scale}")
    if head_scale is not None and (head_scale.shape != q.shape[1:2] or not head_scale.is_floating_point()):
        raise ValueError(
            f"{op}: want head_scale ({q.shape[1]},) of a float dtype, got {tuple(head_scale.shape)} {head_scale.dtype}"
        )
    return scale


def _autocast(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    device = q.device.type
    if q.is_meta or q.dtype == torch.float64 or not torch.is_autocast_enabled(device):  # meta tensors have no autocast
        return q, k, v
    dtype = torch.get_autocast_dtype(device)
    return q.to(dtype), k.to(dtype), v.to(dtype)


def choice() -> str:
    """Return what MARS_ATTENTION asks for, "auto" included, or raise ConfigError where it is none of `BACKENDS`."""
    if _choice not in _CHOICES:  # not when it is read: an error of an import could not be told as one line
        raise ConfigError(f"MARS_ATTENTION: want one of {', '.join(_CHOICES)}, got {_choice!r}")
    return _choice


def _chosen(backend: str | None, q: Tensor, lengths: Sequence[int], normalised: bool) -> str:
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"scale_causal_attention: want a backend of {', '.join(BACKENDS)}; got {backend!r}")
    requested, device = choice(), _backend.device_type(q)
    name = backend or requested
    if name != "auto":
        if not torch.compiler.is_compiling() and (why := _missing(name, device, q.dtype)) is not None:
            raise KernelError(f"scale_causal_attention: {name} cannot run: {why}")
        return name
    kernels = _kernels(device)
    if kernels == "reference":
        return kernels
    if kernels == "triton" and _fits_triton(q):
        if device == "cuda" and len(lengths) == 1:  # nothing is masked, which is what PyTorch's own kernels are best at
            return "dense"
        if q.dtype in _ON_CUDA or _backend.choice() == "triton":
            return "triton"
    if device == "cpu" and hybrid.pays(q.dtype, len(backends.groups(lengths)), normalised):
        return "hybrid"
    return "grouped"


# In which the Triton kernels are fastest on CUDA. Forward and backward on an H200, 8 samples of the published model: in
# bfloat16 0.27 ms of the device against 0.39 of one masked call; in float32 8.4 ms, masked 2.15, "grouped" 2.01.
_ON_CUDA = (torch.bfloat16, torch.float16)


def _hidden_shows(name: str, k: Tensor, v: Tensor, lengths: Sequence[int]) -> bool:
    """Return whether what is not finite in a finer scale may pass a mask; not asked where the host would wait."""
    if name not in _MASKS or torch.compiler.is_compiling() or isinstance(k, FakeTensor) or k.device.type != "cpu":
        return False
    return backends.hiding(lengths, _MASKS[name]) > 0 and not backends.finite(k.detach(), v.detach())


def _fits_triton(q: Tensor) -> bool:
    return q.shape[3] in TRITON_SIZES and q.dtype in TRITON_DTYPES


_MEANING = {"native": "native", "reference": "native", "triton": "triton"}  # of what other operations run on


def _kernels(device: str) -> str:
    """Return what MARS_KERNELS means here: "triton", "reference" or, where PyTorch's own kernels are used, "native"."""
    choice = _backend.choice()
    if choice == "reference":
        return choice
    if device == "cpu" and choice in ("auto", "native"):
        return "native"
    if torch.compiler.is_compiling():  # which on CUDA needs Triton itself, and cannot trace the search for it
        return "triton" if device == "cuda" or choice == "triton" else "native"
    return _backend.select("scale_causal_attention", _MEANING, _backend.backend(device))


def _missing(name: str, device: str, dtype: torch.dtype) -> str | None:
    if name == "triton":
        return _backend.missing("triton", device)
    if name == "hybrid" and device != "cpu":
        return "it runs on the CPU"
    if name in _PACKAGES:
        module, package = _PACKAGES[name]
        if importlib.util.find_spec(module) is None:
            return f"{package} is not installed: pip install {package}"
    if name in _PACKAGES or name == "flex":
        return _tried(name, device, dtype)
    return None


@lru_cache(maxsize=64)
def _tried(name: str, device: str, dtype: torch.dtype) -> str | None:
    """Call a backend beside the reference, and return why it does not work, or None where it does."""
    generator = torch.Generator().manual_seed(0)
    lengths = (1, 4, backends.GROUP, 32)  # of a group with a mask, and of a scale without one
    try:
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autocast(device, enabled=False),
            warnings.catch_warnings(action="ignore"),
        ):
            qkv, do = (torch.randn(2, sum(lengths), n, 2, 64, generator=generator).to(device, dtype) for n in (3, 1))

            def outcome(attend: backends.Attend, leaf: Tensor) -> tuple[Tensor, ...]:
                leaf.requires_grad_()
                q, k, v = leaf.permute(2, 0, 3, 1, 4)
                out = attend(q, k, v, lengths, 0.125)
                return out.detach(), *torch.autograd.grad(out, leaf, do[:, :, 0].transpose(1, 2).to(out.dtype))

            expected = outcome(reference.scale_causal_attention, qkv.double())
            actual = outcome(_PLAIN[name], qkv)
    except Exception as error:  # whatever goes wrong in another package is the reason
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    worst = max(float((a - b).abs().max()) for a, b in zip(actual, expected, strict=True))
    allowed = 8 * torch.finfo(dtype).eps * max(float(x.abs().max()) for x in expected)
    return None if worst <= allowed else f"it is off by {worst:.1e} from the reference, where {allowed:.1e} is rounding"


def _triton(q: Tensor, k: Tensor, v: Tensor, head_scale: Tensor | None, lengths: Sequence[int], scale: float) -> Tensor:
    return registered.fused(q, k, v, head_scale, lengths, scale)


def _hybrid(q: Tensor, k: Tensor, v: Tensor, head_scale: Tensor | None, lengths: Sequence[int], scale: float) -> Tensor:
    return registered.hybrid_of(q, k, v, head_scale, lengths, scale)


def _plain(
    name: str, q: Tensor, k: Tensor, v: Tensor, head_scale: Tensor | None, lengths: Sequence[int], scale: float
) -> Tensor:
    """Normalise first, where that is wanted, and compute again without masks where they hid too little."""
    if head_scale is not None:
        q, k = reference.normalize(q, k, head_scale)
    out = _PLAIN[name](q, k, v, lengths, scale)
    return backends.per_scale(q, k, v, lengths, scale) if _hidden_shows(name, k, v, lengths) else out


_PLAIN: dict[str, backends.Attend] = {  # what normalises nothing itself
    "grouped": backends.grouped,
    "dense": backends.dense,
    "flash": backends.flash,
    "xformers": backends.xformers,
    "flex": backends.flex,
    "reference": reference.scale_causal_attention,
}
_MASKS = {  # tokens of a group
    "grouped": None,
    "flash": None,
    "xformers": None,
    "dense": sys.maxsize,
    "reference": sys.maxsize,
}
_TABLE: dict[str, Callable[..., Tensor]] = {
    "triton": _triton,
    "hybrid": _hybrid,
    **{name: partial(_plain, name) for name in _PLAIN},
}
