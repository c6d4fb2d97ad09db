"""What all registered ops have in common: called directly, with whatever, they refuse and do not crash."""

from __future__ import annotations

import ast
import math
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import mars
from mars import cli, kernels
from mars.kernels import _backend, nearest_code, pack_codebook

OPS = torch.ops.mars
NO_TRITON = _backend.missing("triton", "cpu")
FUSED = ("scale_causal_attention", "scale_causal_attention_backward")
LENGTHS = [2, 3]
HUGE = 1 << 40


def randn(*shape, dtype=torch.float32):
    return torch.randn(shape, dtype=dtype)


def quantizer():
    return randn(2, 3, 4, 6), randn(9, 3), randn(2, 3, 3, 3, 3), randn(2, 3)


def heads():
    return randn(2, 3, 5, 16), randn(2, 3, 5, 16), randn(2, 3, 5, 16), randn(3)


def saved():
    """Of the backward of Triton's attention: do, q, k, v, head_scale, out, lse, 1 / |q|, 1 / |k|."""
    out = randn(2, 5, 3, 16).transpose(1, 2)
    return randn(2, 3, 5, 16), *heads(), out, randn(2, 3, 5), randn(2, 3, 5).abs(), randn(2, 3, 5).abs()


FIT = {  # arguments of each op, no two sizes alike where they may differ
    "cmx": lambda: (randn(2, 4, 9), 2, 3),
    "inverse_cmx": lambda: (randn(2, 6, 4, 5), 2, 3),
    "spectrogram_cmx": lambda: (randn(2, 4, 9, dtype=torch.complex64), 2, 3, 0.1, 0.3),
    "spectrogram_cmx_backward": lambda: (randn(2, 6, 2, 3), randn(2, 4, 9, dtype=torch.complex64), 2, 3, 0.1, 0.3),
    "inverse_spectrogram_cmx": lambda: (randn(2, 6, 4, 5), 2, 3, 0.1, 0.3, 1, 4),
    "nearest_code": lambda: (randn(5, 3), randn(7, 3), "l2"),
    "multiscale_quantize": lambda: (*quantizer(), [1, 0], [2, 3, 4, 6], "l2", 0.5, torch.tensor([2, 0])),
    "shifted_bicubic_matrices": lambda: (randn(1), [2, 3, 4, 6]),
    "linear_cross_entropy": lambda: (randn(4, 3), randn(5, 3), randn(5), torch.tensor([0, 4, 1, 1]), torch.float32),
    "scale_causal_attention": lambda: (*heads(), LENGTHS, 0.5),
    "scale_causal_attention_backward": lambda: (*saved(), LENGTHS, 0.5),
    "hybrid_attention": lambda: (*(x.bfloat16() for x in heads()), LENGTHS, 0.5, True),
    "hybrid_attention_backward": lambda: (randn(2, 3, 5, 16), *heads(), randn(0), LENGTHS, 0.5),
}
DEVICE_OF_FUSED = "cuda" if torch.cuda.is_available() else "cpu"


def call(name, arguments):
    """The results, on a device that has the op."""
    if name in FUSED:
        if NO_TRITON and DEVICE_OF_FUSED == "cpu":
            pytest.skip(NO_TRITON)
        arguments = [x.to(DEVICE_OF_FUSED) if isinstance(x, torch.Tensor) and x.is_cpu else x for x in arguments]
    found = getattr(OPS, name)(*arguments)
    return (found,) if isinstance(found, torch.Tensor) else found


def changed(name, changes):
    return [changes.get(i, value) for i, value in enumerate(FIT[name]())]


WRONG = [
    ("cmx", {1: 0}, "must be 1 or more"),
    ("cmx", {1: -2}, "must be 1 or more"),
    ("cmx", {1: 3}, "does not divide F=4"),
    ("cmx", {2: HUGE}, "does not divide T=9"),
    ("cmx", {0: randn(4)}, r"want x \(..., F, T\)"),
    ("inverse_cmx", {1: 3}, "want 9 channels, got 6"),
    ("inverse_cmx", {1: -2, 2: -3}, "must be 1 or more"),
    ("inverse_cmx", {0: randn(4, 5)}, r"want x \(..., channels, F, T\)"),
    ("spectrogram_cmx", {0: randn(2, 4, 9)}, "complex64 or complex128, got torch.float32"),
    ("spectrogram_cmx", {1: 3}, "does not divide F=4"),
    ("spectrogram_cmx", {3: 0.0}, "want epsilon in"),
    ("spectrogram_cmx", {4: math.nan}, "want scale in"),
    ("spectrogram_cmx_backward", {0: randn(1)}, r"want a gradient \(2, 6, 2, 3\) of torch.float32"),
    ("spectrogram_cmx_backward", {0: randn(2, 6, 2, 3, dtype=torch.float64)}, "want a gradient"),
    ("spectrogram_cmx_backward", {1: randn(2, 4, 9)}, "complex64 or complex128"),
    ("spectrogram_cmx_backward", {2: 0}, "must be 1 or more"),
    ("inverse_spectrogram_cmx", {0: randn(2, 6, 4, 5).half()}, "float32 or float64"),
    ("inverse_spectrogram_cmx", {2: 30}, "want 60 channels, got 6"),
    ("inverse_spectrogram_cmx", {3: math.inf}, "want epsilon in"),
    ("inverse_spectrogram_cmx", {5: -5}, r"got \(-5, 4\)"),
    ("inverse_spectrogram_cmx", {6: -1}, r"got \(1, -1\)"),
    ("nearest_code", {0: randn(5, 4)}, r"want x \(\.\.\., D\)"),
    ("nearest_code", {0: randn(15)}, r"want x \(\.\.\., D\)"),
    ("nearest_code", {0: torch.ones(5, 3, dtype=torch.int64)}, "want x of a floating-point dtype"),
    ("nearest_code", {1: randn(0, 3)}, "1 <= V"),
    ("nearest_code", {1: torch.ones(7, 3, dtype=torch.int8)}, "want a codebook of a floating-point dtype"),
    ("nearest_code", {2: "dot"}, "metric must be"),
    ("multiscale_quantize", {4: [1, 2]}, "want phi_index in 0..1"),
    ("multiscale_quantize", {4: [-1, 0]}, "want phi_index in 0..1"),
    ("multiscale_quantize", {4: [HUGE, 0]}, "want phi_index in 0..1"),
    ("multiscale_quantize", {4: [1]}, "one entry per scale"),
    ("multiscale_quantize", {5: [2, 3, 4, 7]}, "the last of the scales"),
    ("multiscale_quantize", {5: [0, 3, 4, 6]}, "want scales within"),
    ("multiscale_quantize", {5: [2, HUGE, 4, 6]}, "want scales within"),
    ("multiscale_quantize", {5: [2, 4, 6]}, r"want scales in pairs \(h, w\), got 3 numbers"),
    ("multiscale_quantize", {1: randn(9, 4)}, "codebook"),
    ("multiscale_quantize", {1: randn(0, 3)}, "codebook"),
    ("multiscale_quantize", {2: randn(2, 3, 3, 3, 2)}, "want weight"),
    ("multiscale_quantize", {3: randn(1, 3)}, "bias"),
    ("multiscale_quantize", {3: randn(2, 3).double()}, "all float32 or all float64"),
    ("multiscale_quantize", {6: "dot"}, "metric must be"),
    ("multiscale_quantize", {8: torch.tensor([2])}, "want keep"),
    ("shifted_bicubic_matrices", {1: [0, 3, 4, 6]}, "1 or more cells"),
    ("shifted_bicubic_matrices", {1: [2, 3, -4, 6]}, "1 or more cells"),
    ("shifted_bicubic_matrices", {1: [2, 3, 4]}, "in pairs"),
    ("shifted_bicubic_matrices", {1: []}, "1 or more cells"),
    ("linear_cross_entropy", {0: randn(4, 2)}, r"want x \(N, W\) and weight \(V, W\)"),
    ("linear_cross_entropy", {0: randn(12)}, r"want x \(N, W\) and weight \(V, W\)"),
    ("linear_cross_entropy", {1: randn(0, 3)}, "N and V at least 1"),
    ("linear_cross_entropy", {2: randn(4)}, r"want bias \(5,\)"),
    ("linear_cross_entropy", {2: randn(5).double()}, "one float dtype"),
    ("linear_cross_entropy", {3: torch.zeros(4)}, "target int64"),
    ("linear_cross_entropy", {3: torch.zeros(3, dtype=torch.int64)}, r"target \(4,\)"),
    ("linear_cross_entropy", {4: torch.int64}, "want products of a float dtype, got torch.int64"),
    *(
        (name, {place[0] + key: value for key, value in changes.items()}, message)
        for name, place in {"hybrid_attention": [0], "hybrid_attention_backward": [1]}.items()
        for changes, message in (({2: randn(2, 3, 5, 4)}, "want q, k, v"), ({0: randn(3, 5, 16)}, "want q, k, v"))
    ),
    *(
        (name, changes, message)
        for name, (lengths, scale) in {
            "scale_causal_attention": (4, 5),
            "scale_causal_attention_backward": (9, 10),
            "hybrid_attention": (4, 5),
            "hybrid_attention_backward": (6, 7),
        }.items()
        for changes, message in (
            ({lengths: [2, 4]}, "each 1 or more"),
            ({lengths: [6, -1]}, "each 1 or more"),
            ({lengths: [2, 3, 0]}, "each 1 or more"),
            ({lengths: []}, "each 1 or more"),
            ({scale: math.nan}, "want a finite scale"),
            ({scale: -1.0}, "want a finite scale"),
            ({lengths - 1 - (lengths == 6) - 4 * (lengths == 9): randn(2)}, r"want head_scale \(3,\)"),
        )
    ),
    ("scale_causal_attention", {1: randn(2, 3, 4, 16)}, "want q, k, v"),
    ("scale_causal_attention", {2: randn(2, 3, 5, 16).half()}, "one float dtype"),
    ("scale_causal_attention", dict.fromkeys((0, 1, 2), randn(2, 3, 5, 24)), "want heads of 16, 32, 64, 128 values"),
    ("scale_causal_attention", dict.fromkeys((0, 1, 2), randn(2, 3, 5, 16).double()), "got 16 in torch.float64"),
    ("scale_causal_attention_backward", {0: randn(2, 3, 4, 16)}, r"want \(2, 3, 5, 16\)"),
    ("scale_causal_attention_backward", {5: randn(2, 3, 5, 16).half()}, r"want \(2, 3, 5, 16\) of torch.float32"),
    ("scale_causal_attention_backward", {6: randn(2, 3)}, r"want \(2, 3, 5\) of torch.float32"),
    ("scale_causal_attention_backward", {7: randn(0)}, r"want \(2, 3, 5\) of torch.float32"),
    ("scale_causal_attention_backward", {8: randn(2, 3, 5).double()}, r"want \(2, 3, 5\) of torch.float32"),
    ("hybrid_attention_backward", {0: randn(2, 3, 4, 16)}, r"want \(2, 3, 5, 16\)"),
    ("hybrid_attention_backward", {5: randn(7)}, r"want \(0,\)"),
]


def test_every_op_is_tried():
    found = {name.partition("::")[2] for name in torch._C._dispatch_get_all_op_names() if name.startswith("mars::")}
    assert found == set(FIT) == {name for name, *_ in WRONG}


@pytest.mark.parametrize(("name", "changes", "message"), WRONG, ids=[f"{n}-{list(c)}-{m}" for n, c, m in WRONG])
def test_arguments_that_do_not_fit_are_refused(name, changes, message):
    with pytest.raises(ValueError, match=message):
        call(name, changed(name, changes))
    if "backward" in name and "attention" in name:
        return
    with FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(ValueError, match=message):
        call(name, changed(name, changes))


@pytest.mark.parametrize("name", FIT)
def test_shapes_without_data_are_those_of_the_results(name):
    results = call(name, FIT[name]())
    with FakeTensorMode():
        fakes = call(name, FIT[name]())
    metas = call(name, [x.to("meta") if isinstance(x, torch.Tensor) else x for x in FIT[name]()])
    for expected, *others in zip(results, fakes, metas, strict=True):
        for x in others:
            assert (x.shape, x.dtype, x.stride()) == (expected.shape, expected.dtype, expected.stride())


def resized(x, left):
    """x on a storage of its own, cut down to a part of its bytes."""
    x = x.clone()
    x.untyped_storage().resize_(int(left * x.nbytes) // x.itemsize * x.itemsize)
    return x


@pytest.mark.parametrize("left", [0, 0.99])
@pytest.mark.parametrize("name", set(FIT) - {"shifted_bicubic_matrices"})
def test_tensors_without_their_memory_are_refused(name, left):
    for i, x in enumerate(FIT[name]()):
        if isinstance(x, torch.Tensor) and x.numel():
            with pytest.raises(ValueError, match=r"want tensors with their values in memory; one .* made smaller"):
                call(name, changed(name, {i: resized(x, left)}))


def test_views_are_measured_by_what_they_reach():
    whole = randn(3, 8, 18)
    last = whole[2, 1::2, 1::2]
    assert torch.equal(OPS.cmx(last, 2, 3), OPS.cmx(last.clone(), 2, 3))
    assert torch.equal(OPS.cmx(last[:1].expand(4, 9), 2, 3), OPS.cmx(last[:1].repeat(4, 1), 2, 3))
    OPS.cmx(whole[:0, :, :18], 2, 3)
    whole.untyped_storage().resize_(whole.nbytes - whole.itemsize)
    with pytest.raises(ValueError, match="made smaller"):
        OPS.cmx(last, 2, 3)


@pytest.mark.parametrize("implementation", ["reference", "auto"])
def test_a_packed_codebook_takes_no_tensor_without_values(implementation):
    with kernels.use(implementation):
        x, codebook = randn(5, 3), randn(1100, 3)
        packed = pack_codebook(codebook)
        with FakeTensorMode():
            fake, fake_codebook = randn(5, 3), randn(1100, 3)
        for call_ in (
            lambda: nearest_code(fake, packed),
            lambda: pack_codebook(fake_codebook),
            lambda: nearest_code(resized(x, 0), packed),
            lambda: pack_codebook(resized(codebook, 0.5)),
        ):
            with pytest.raises(ValueError, match="want tensors with their values in memory"):
                call_()
        assert torch.equal(nearest_code(x, packed), nearest_code(x, codebook))


def test_no_cache_grows_without_bound():
    """functools.cache is for functions whose arguments are few: those without any, and the one named here."""
    parts, found = {Path(str(part.__file__)).parent for part in (mars, cli, kernels)}, set()
    for path in sorted({path for part in parts for path in part.rglob("*.py")}):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and ast.unparse(node.args):
                decorators = {ast.unparse(decorator) for decorator in node.decorator_list}
                if decorators & {"cache", "functools.cache", "lru_cache(maxsize=None)", "lru_cache(None)"}:
                    found.add(node.name)
    assert found == {"_warn"}, found  # warned once: of what is forgotten it would warn again
