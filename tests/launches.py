"""Counts what a call would launch on a GPU: kernels of Triton's, which are left out here, and PyTorch's operations."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from torch.utils._python_dispatch import TorchDispatchMode


class _Operations(TorchDispatchMode):
    """Counts operations but for views and allocations, which launch nothing."""

    def __init__(self, found: Counter[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        returns = func._schema.returns
        view = any(r.alias_info is not None and not r.alias_info.is_write for r in returns)
        if not view and "empty" not in func.name() and func.namespace == "aten":
            self.found[func.name().partition("::")[2]] += 1
        return func(*args, **(kwargs or {}))


def launches(call: Callable[[], object]) -> Counter[str]:
    """Names and numbers of what `call()` launches; what it returns has no values.

    It must not go through a registered operator, which hides them.
    """
    from triton.runtime.interpreter import GridExecutor

    found: Counter[str] = Counter()

    def counted(self: Any, *args: Any, **kwargs: Any) -> None:
        found[self.fn.__name__] += 1

    with pytest.MonkeyPatch.context() as patch, _Operations(found):
        patch.setattr(GridExecutor, "__call__", counted)
        call()
    return found
