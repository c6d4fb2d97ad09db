"""The floor plan of the code (docs/architecture.md): sizes of folders, ways of imports, words that stay in cli/."""

from __future__ import annotations

import ast
import inspect
import re
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import mars

ROOT = Path(__file__).parents[1]
MOST_FILES = 16
# From the ground up: a room imports from its own floor, where nothing goes round in a circle, and from those below.
FLOORS = (
    {"errors", "files", "text", "lock", "runtime", "terminal", "arguments"},
    {"kernels", "labels", "config", "checkpoint", "hub"},
    {"audio", "data", "models", "pages"},
    {"notes", "model"},
    {"runs", "evaluate", "instrument"},
    {"train"},
    {"cli", "__main__"},
)


@cache
def modules() -> dict[str, Path]:
    """The package's modules by name, as they are once installed."""
    found = {}
    for folder in ("mars", "kernels", "cli"):
        for path in (ROOT / folder).rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            parts = parts[:-1] if parts[-1] == "__init__" else parts
            found[".".join(parts if parts[0] == "mars" else ("mars", *parts))] = path
    return found


@cache
def imports(module: str) -> set[str]:
    """The modules of the package that a module imports anywhere in it; the packages that it is in are not counted."""
    named = set()
    for node in ast.walk(ast.parse(modules()[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                named.add(inner if inner in modules() else node.module)
        elif isinstance(node, ast.Import):
            named |= {alias.name for alias in node.names}
    return {name for name in named & modules().keys() if not f"{module}.".startswith(f"{name}.")}


def room(module: str) -> str:
    return module.split(".")[1]


def circles() -> Iterator[list[str]]:
    """Every circle of imports that a walk along them closes."""
    done: set[str] = set()

    def walk(module: str, path: list[str]) -> Iterator[list[str]]:
        if module in path:
            yield [*path[path.index(module) :], module]
        elif module not in done:
            for other in sorted(imports(module)):
                yield from walk(other, [*path, module])
            done.add(module)

    for module in modules():
        yield from walk(module, [])


def test_no_folder_is_a_shed():
    sizes = Counter(path.parent.relative_to(ROOT).as_posix() for path in modules().values())
    large = {folder: size for folder, size in sizes.items() if size > MOST_FILES}
    assert not large, f"{large}: at most {MOST_FILES} files a folder; give what belongs together a room of its own"


def test_imports_go_round_in_no_circle():
    found = [" -> ".join(circle) for circle in circles()]
    assert not found, f"import circles: {found}; move what both need to a module below them"


def test_imports_go_down():
    floors = {name: i for i, floor in enumerate(FLOORS) for name in floor}
    unknown = sorted({room(m) for m in modules() if "." in m} - floors.keys())
    assert not unknown, f"no floor for {unknown}; say in FLOORS, and in docs/architecture.md, where it stands"
    up = [
        f"{modules()[module].relative_to(ROOT)} imports {other}"
        for module in modules()
        if "." in module
        for other in sorted(imports(module))
        if floors[room(other)] > floors[room(module)]
    ]
    assert not up, f"imports from a floor above: {up}; hand over what is needed, or move it down (docs/architecture.md)"


def test_evaluation_and_runs_do_not_know_each_other():
    pairs = ({"evaluate", "runs"}, {"data", "models"}, {"audio", "models"})
    crossed = [
        f"{modules()[module].relative_to(ROOT)} imports {other}"
        for module in modules()
        if "." in module
        for other in sorted(imports(module))
        if {room(module), room(other)} in pairs
    ]
    assert not crossed, f"{crossed}: rooms of one floor; move what both need to one below"


def test_flags_are_of_the_command_line():
    """Of ours: what pip is told is no option of a command of mars."""
    flags = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in sorted((ROOT / "mars").rglob("*.py"))
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if re.search(r"[\"' (`]--[a-z]", line.replace("pip install --no-deps", ""))
    ]
    assert not flags, f"flags outside cli/: {flags}; name the argument in backquotes, and the command shows its option"


def test_what_one_calls_first_is_typed():
    public = [mars.load, *(getattr(mars.Model, name) for name in ("encode", "decode", "generate", "iterate"))]
    vague = [
        f"{function.__qualname__}: {name}: {annotation}"
        for function in public
        for name, annotation in inspect.get_annotations(function).items()
        if re.search(r"\bAny\b", str(annotation))
    ]
    assert not vague, f"{vague} in mars/model.py: name the type"


def test_the_picture_shows_every_room():
    page = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    missing = [name for floor in FLOORS for name in sorted(floor) if not re.search(rf"\b{name}\b", page)]
    assert not missing, f"docs/architecture.md lacks {missing}; say there what they are for"
    absent = [p for p in re.findall(r"`((?:mars|kernels|cli|tests|docs|benchmarks)/[\w./-]+)`", page)
              if not (ROOT / p).exists()]  # fmt: skip
    assert not absent, f"docs/architecture.md names {absent}, which do not exist; mend the table"
