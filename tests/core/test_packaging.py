"""The package is what lies in the four folders, in a checkout and in a wheel."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from core.sources import LINKS, PROJECT, ROOT, files, modules

SETUPTOOLS = PROJECT["tool"]["setuptools"]


def test_packages_are_the_folders_with_an_init_file() -> None:
    on_disk = {name for name, path in modules().items() if path.name == "__init__.py"}
    assert sorted(SETUPTOOLS["packages"]) == sorted(on_disk)


def test_every_folder_with_modules_has_an_init_file() -> None:
    assert all((path.parent / "__init__.py").exists() for path in modules().values())


@pytest.mark.parametrize("name", LINKS)
def test_links_resolve_to_the_folders(name: str) -> None:
    link = ROOT / "edgekit" / name
    assert os.readlink(link) == f"../{name}"
    assert link.resolve() == ROOT / name
    assert SETUPTOOLS["package-dir"][f"edgekit.{name}"] == name


def test_bare_imports_of_the_folders_are_banned(tmp_path: Path) -> None:
    """From the repository root ``import compress`` would make a second copy of every module."""
    ruff = shutil.which("ruff", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    assert ruff, "ruff is in the test extra"
    for name in LINKS:
        done = subprocess.run(
            [ruff, "check", "--config", ROOT / "pyproject.toml", "--no-cache", "--stdin-filename", "x.py", "-"],
            input=f"import {name}\n", capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 1 and f"import edgekit.{name}" in done.stdout


def test_torch_is_pinned_exactly() -> None:
    assert "torch==2.13.0" in PROJECT["project"]["dependencies"]


def test_wheel_holds_every_file_and_nothing_else(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for folder in ("edgekit", *LINKS):
        shutil.copytree(ROOT / folder, source / folder, symlinks=True, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = ["pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", tmp_path, source]
    subprocess.run([sys.executable, "-m", *command], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    packed = {name for name in names if ".dist-info/" not in name}
    assert packed == set(files())
    assert "edgekit/py.typed" in packed
    assert any(name.endswith("licenses/LICENSE") for name in names)


def loaded_by(code: str) -> set[str]:
    """Top-level packages in ``sys.modules`` after ``code`` in a fresh interpreter."""
    script = f"""
import sys
try:
    {code}
except SystemExit:
    pass
print("\\n@", *sorted({{name.split(".")[0] for name in sys.modules}}))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(done.stdout.rpartition("@")[2].split())


HEAVY = {
    "torch",
    "numpy",
    "executorch",
    "litert_torch",
    "onnx",
    "onnxruntime",
    "brevitas",
    "ai_edge_litert",
    "plotly",
    "torchao",
    "sympy",
}


def test_import_edgekit_imports_nothing_heavy() -> None:
    assert not loaded_by("import edgekit; edgekit.__version__") & HEAVY


@pytest.mark.skipif(importlib.util.find_spec("edgekit.cli") is None, reason="edgekit.cli is not there yet")
def test_help_imports_nothing_heavy() -> None:
    assert not loaded_by("from edgekit.cli import main; sys.argv = ['edgekit', '--help']; main()") & HEAVY
