"""What is missing is named so that it can be installed."""

from __future__ import annotations

from pathlib import Path

import pytest

from mars.errors import MissingPackage, needed

ROOT = Path(__file__).parents[1]


def test_the_packages_are_named():
    with (
        pytest.raises(MissingPackage, match=r"^a soundfont needs a and b; run: pip install a b$"),
        needed("a soundfont", "a", "b"),
    ):
        import no_such_package  # noqa: F401


def test_other_errors_stay_what_they_are():
    with pytest.raises(ZeroDivisionError), needed("x", "a"):
        1 / 0  # noqa: B018


def test_nobody_is_told_to_install_a_project_that_no_index_holds():
    """A checkout can be installed with its extras (`pip install -e '.[data]'`); the name of mars cannot."""
    files = [p for folder in ("mars", "cli", "kernels") for p in (ROOT / folder).rglob("*.py")]
    files += [*(ROOT / "docs").glob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
    assert len(files) > 100
    assert [str(p) for p in files if "mars-audio" in p.read_text(encoding="utf-8")] == []
