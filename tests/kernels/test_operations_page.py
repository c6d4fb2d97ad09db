"""docs/operations.md: every snippet runs, is short, and every public operation has its place."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest

from mars import kernels

PAGE = (Path(__file__).parents[2] / "docs/operations.md").read_text(encoding="utf-8")
SNIPPETS = {
    re.findall(r"^#+ `?(\w+)`?", PAGE[: match.start()], re.MULTILINE)[-1]: match[1]
    for match in re.finditer(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
}


@pytest.mark.parametrize("name", SNIPPETS)
def test_snippets_run_as_they_stand(name):
    source = SNIPPETS[name]
    assert source.count("\n") <= 10
    assert re.search(rf"\b{name}\(", source)
    exec(compile(source, f"docs/operations.md, {name}", "exec"), {})  # noqa: S102  # the page's own


def test_every_operation_is_on_the_page():
    public = [name for name, value in vars(kernels).items() if callable(value) and not name.startswith("_")]
    text = re.sub(r"^```.*?^```", "", PAGE, flags=re.MULTILINE | re.DOTALL)
    named = {word for code in re.findall(r"`([^`]+)`", text) for word in re.findall(r"\w+", code)}
    assert {name for name in public if name not in named} == set()
    functions = [name for name in public if inspect.isfunction(getattr(kernels, name)) and name in SNIPPETS]
    assert {"nearest_code", "multiscale_quantize", "cmx", "scale_causal_attention"} < set(functions)


@pytest.mark.parametrize("name", [n for n in SNIPPETS if inspect.isfunction(getattr(kernels, n))])
def test_signatures_on_the_page_are_the_functions(name):
    """What stands on the page as `name(arguments)` first: the arguments in the function's order, with its defaults."""
    section = PAGE[re.search(rf"^## `{name}`", PAGE, re.MULTILINE).end() :]
    written = re.search(rf"`{name}\((.*?)\)`", section, re.DOTALL)[1]
    parameters = inspect.signature(getattr(kernels, name)).parameters
    arguments = [part.strip() for part in re.split(r",\s*(?![^()]*\))", written)]
    assert len(arguments) == len(parameters)
    for argument, parameter in zip(arguments, parameters.values(), strict=True):
        argument_name, _, default = argument.partition("=")
        if re.fullmatch(r"\w{2,}", argument_name):  # a name, and not a letter or a pair
            assert argument_name == parameter.name
        assert default == ("" if parameter.default is parameter.empty else repr(parameter.default).replace("'", '"'))
