"""The layout, the wheel and the installed package keep what the documentation says of them."""

from __future__ import annotations

import ast
import importlib.metadata
import os
import re
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path

import pytest

import mars

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
FOLDERS = {"mars": "mars", "mars/kernels": "kernels", "mars/cli": "cli"}  # in the package: in the repository
FILES = {  # the same of each file
    f"{package}/{path.relative_to(ROOT / folder).as_posix()}": path
    for package, folder in FOLDERS.items()
    for path in sorted((ROOT / folder).rglob("*"))
    if path.is_file() and path.suffix != ".pyc"
}
OPS = sorted({path.parent.name for path in (ROOT / "kernels").glob("*/*.py")})


def run(*command: str | Path, **options: object) -> str:
    """Standard output of a command that must succeed."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_there_are_no_symbolic_links():
    """A clone on Windows would turn them into text files."""
    places = [ROOT / name for name in ("mars", "kernels", "cli", "tests", "benchmarks", "scripts", "docs")]
    assert [path for place in places for path in [place, *place.rglob("*")] if path.is_symlink()] == []


@pytest.mark.parametrize("package", FOLDERS)
def test_each_package_is_imported_from_its_folder(package, tmp_path):
    code = f"import {package.replace('/', '.')} as package; print(package.__file__)"
    assert Path(run(sys.executable, "-c", code, cwd=tmp_path).strip()) == ROOT / FOLDERS[package] / "__init__.py"


@pytest.mark.parametrize("op", OPS)
def test_every_op_has_its_files(op):
    expected = [f"kernels/{op}/{name}.py" for name in ("__init__", "op", "reference")]
    expected += [f"tests/kernels/test_{op}.py", f"benchmarks/bench_{op}.py"]
    missing = [name for name in expected if not (ROOT / name).is_file()]
    assert missing == []


def test_the_docs_index_names_every_page():
    pages = {path.name for path in (ROOT / "docs").glob("*.md")} - {"index.md"}
    assert set(re.findall(r"\]\(([\w-]+\.md)\)", (ROOT / "docs/index.md").read_text())) == pages


def test_versions_agree():
    assert PROJECT["version"] == mars.__version__ == importlib.metadata.version("mars-audio")


@pytest.mark.parametrize("script", PROJECT["scripts"])
def test_scripts_are_installed_and_explain_themselves(script, tmp_path):
    assert "Usage:" in run(Path(sysconfig.get_path("scripts")) / script, "--help", cwd=tmp_path)


@pytest.mark.parametrize("extra", ["data", "eval", "crepe", "tensorboard", "hub", "flash-attn", "xformers"])
def test_every_extra_is_in_the_documentation(extra):
    page = (ROOT / "docs/installing.md").read_text(encoding="utf-8")
    assert PROJECT["optional-dependencies"][extra]
    assert f"`{extra}`" in page


def test_the_citation_is_of_this_version_and_of_the_paper():
    text = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {PROJECT['version']}\n" in text
    assert f"\nlicense: {PROJECT['license']}\n" in text
    assert "arXiv:2509.26007" in text


def test_import_is_light(tmp_path):
    code = "import sys, torch; had = set(sys.modules); import mars.models; print(*set(sys.modules) - had)"
    heavy = {
        "triton",
        "matplotlib",
        "flash_attn",
        "xformers",
        "librosa",
        "soxr",
        "fluidsynth",
        "sklearn",
        "torchmetrics",
        "huggingface_hub",
        "markdown_it",
    }
    assert heavy.intersection(run(sys.executable, "-c", code, cwd=tmp_path).split()) == set()


def test_no_code_runs_data_or_a_shell():
    """No unpickling, no evaluation of strings, no unchecked archive members, no shell.

    But for the one reader of weights that others published as pickles, which lets PyTorch read tensors alone.
    """
    banned = {
        "pickle",
        "cloudpickle",
        "dill",
        "joblib",
        "marshal",
        "shelve",
        "torch.load",
        "torch.save",
        "weights_only",
    }
    banned |= {"eval", "exec", "yaml.load", "os.system", "shell"}
    found = []
    for path in FILES.values():
        if path.suffix != ".py":
            continue
        tree = ast.parse(path.read_text())
        safe = [
            part
            for node in ast.walk(tree)
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load"
            for keyword in node.keywords
            if ast.unparse(keyword) == "weights_only=True" and path == ROOT / "mars/evaluate/embedders/weights.py"
            for part in (node.func, keyword)
        ]
        for node in ast.walk(tree):
            if node in safe:
                continue
            match node:
                case ast.Name() | ast.Attribute():
                    names = [ast.unparse(node)]
                case ast.Import(names=aliases):
                    names = [alias.name for alias in aliases]
                case ast.ImportFrom(module=module, names=aliases):
                    names = [str(module), *(f"{module}.{alias.name}" for alias in aliases)]
                case ast.keyword(arg=str(name)):
                    names = [name]
                case _:
                    continue
            bad = [name for name in names if name in banned or name.endswith(".extractall")]
            found += [f"{path.relative_to(ROOT)}: {name}" for name in bad]
    assert found == []


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this checkout, unpacked."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    run(*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, ROOT)
    (file,) = folder.glob("*.whl")
    with zipfile.ZipFile(file) as archive:
        archive.extractall(folder / "content")
    return folder / "content"


def test_a_wheel_without_kernels_is_for_any_machine(tmp_path):
    """As `make wheel` makes it."""
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    run(
        *pip,
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "--config-settings=wheel.cmake=false",
        "--wheel-dir",
        tmp_path,
        ROOT,
    )
    (file,) = tmp_path.glob("*.whl")
    assert file.name == f"mars_audio-{mars.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(file) as archive:
        names = set(archive.namelist())
    assert set(FILES) <= names
    assert not [name for name in names if name.endswith((".so", ".dylib", ".dll"))]


def test_wheel_holds_all_of_mars_and_nothing_else(wheel):
    assert [path.name for path in wheel.iterdir() if path.suffix != ".dist-info"] == ["mars"]
    assert [name for name in FILES if not (wheel / name).is_file()] == []


@pytest.mark.parametrize("pattern", ["py.typed", "presets.toml", "**/*.safetensors", "**/*.flac"])
def test_wheel_holds_the_data(wheel, pattern):
    assert list((wheel / "mars").glob(pattern))


def test_wheel_runs_without_the_checkout(wheel, tmp_path):
    # -S: no .pth files, among them the one by which an editable install leads back to the checkout
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(wheel), *sys.path])}
    code = "import mars; print(mars.__file__, flush=True); from mars.cli.generate import main; main()"
    out = run(sys.executable, "-S", "-c", code, "--help", cwd=tmp_path, env=environment)
    assert out.startswith(str(wheel / "mars/__init__.py"))
    assert "Usage:" in out
