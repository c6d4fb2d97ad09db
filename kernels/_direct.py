"""This module says when a call may run its kernel at once, without PyTorch's dispatcher.

Of a small call most of the time goes into the registered operator, which is there to be traced, exported, counted and
differentiated. Where nothing of that goes on, the function behind it is called by itself: the same function, with the
same checks and the same result.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch._C import _len_torch_dispatch_stack
from torch._C._functorch import peek_interpreter_stack
from torch.autograd import forward_ad

_PLAIN = (Tensor, torch.nn.Parameter)  # a subclass has a behaviour of its own


def unobserved(*tensors: Tensor | None) -> bool:
    """Return whether nobody but autograd would notice that the tensors' operator is not called.

    False while something is compiled, exported, traced, or run under a dispatch mode (fake tensors, counters), a
    transform of `torch.func` or forward-mode differentiation; and for subclasses, tensors without data, and views that
    conjugate or negate on reading.
    """
    if (
        torch.compiler.is_compiling()
        or _len_torch_dispatch_stack()
        or peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
        or forward_ad._current_level >= 0
    ):
        return False
    for x in tensors:
        if x is not None and (type(x) not in _PLAIN or x.is_meta or x.is_neg() or x.is_conj()):
            return False
    return True


def differentiated(*tensors: Tensor | None) -> bool:
    """Return whether autograd will want a gradient of what is computed from the tensors."""
    if torch.is_grad_enabled():
        for x in tensors:
            if x is not None and x.requires_grad:
                return True
    return False


def direct(*tensors: Tensor | None) -> bool:
    """Return whether a call on the tensors may run its kernel at once: `unobserved`, and not `differentiated`."""
    return not differentiated(*tensors) and unobserved(*tensors)
