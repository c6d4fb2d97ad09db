"""What `import mars` offers: few names, all typed, and nothing heavy before it is used."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import mars

ROOT = Path(__file__).resolve().parents[1]


def run(*command: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False, cwd=cwd)


def test_the_names_are_there_and_no_others():
    assert set(mars.__all__) <= set(dir(mars))
    for name in mars.__all__:
        assert getattr(mars, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'loud'"):
        mars.loud  # noqa: B018


def test_its_import_brings_no_pytorch(tmp_path):
    code = "import sys; had = set(sys.modules); import mars; print(*set(sys.modules) - had)"
    loaded = run(sys.executable, "-c", code, cwd=tmp_path).stdout.split()
    assert "mars" in loaded
    assert not {"torch", "numpy", "rich", "click", "markdown_it", "huggingface_hub"}.intersection(loaded)


@pytest.fixture(scope="module")
def types(tmp_path_factory) -> Path:
    """The package put together for mypy, which knows no mapping of folders."""
    place = ROOT / "build/types/mars"
    if not place.is_dir():
        place = tmp_path_factory.mktemp("types") / "mars"
        place.mkdir()
        for path in (*(ROOT / "mars").iterdir(), ROOT / "kernels", ROOT / "cli"):
            (place / path.name).symlink_to(path)
    return place.parent


def test_what_a_user_writes_is_typed(types, tmp_path):
    """With the settings and the cache of `make types`, so that PyTorch is not read again."""
    pytest.importorskip("mypy", reason="the extra lint is not installed")
    settings = tmp_path / "pyproject.toml"
    content = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    settings.write_text(re.sub(r'mypy_path = ".*?"', f'mypy_path = "{types}"', content), encoding="utf-8")
    done = run(sys.executable, "-m", "mypy", "--config-file", settings, ROOT / "tests/user.py", cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    spoilt = tmp_path / "spoilt.py"
    spoilt.write_text("import mars\nmars.load().generate('64')\n", encoding="utf-8")
    done = run(sys.executable, "-m", "mypy", "--config-file", settings, spoilt, cwd=ROOT)
    assert done.returncode == 1
    assert re.search(r'spoilt.py:2: error: Argument 1 to "generate" of "Model".*"str"', done.stdout), done.stdout
