"""Imports point one way, heavy packages are imported where they are used, and no file is a drawer for odds and ends."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from core.sources import ROOT, imports, imports_at_import, modules

MODULES = modules()
BASE = (
    "edgekit.errors", "edgekit.files", "edgekit.artifact", "edgekit.data", "edgekit.costs", "edgekit.frozen", "edgekit.nir",
    "edgekit.marked_yaml", "edgekit.validation",
)  # fmt: skip
MAY_IMPORT = {
    "edgekit.compress": (*BASE, "edgekit.compress"),
    "edgekit.firmware_sim": (*BASE, "edgekit.firmware_sim"),
    "edgekit.targets": (*BASE, "edgekit.compress", "edgekit.firmware_sim", "edgekit.targets"),
    **dict.fromkeys(BASE, BASE),
}
"""What each layer may import of edgekit; a module named in none may import everything."""

LAZY = {
    "accelerate", "ai_edge_litert", "ai_edge_quantizer", "brevitas", "brevitas_examples", "executorch", "h5py", "litert_torch",
    "nir", "onnx", "onnxruntime", "onnxscript", "plotly", "sklearn", "torchao",
}  # fmt: skip


def below(module: str, packages: tuple[str, ...]) -> bool:
    return any(module == p or module.startswith(p + ".") for p in packages)


def of_edgekit(path: Path) -> set[str]:
    """Modules of edgekit that a file imports."""
    found = set()
    for name in imports(ast.parse(path.read_text())):
        while name.startswith("edgekit.") and name not in MODULES:
            name = name.rpartition(".")[0]
        if name in MODULES:
            found.add(name)
    return found


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_point_one_way(module: str) -> None:
    allowed = next((may for layer, may in MAY_IMPORT.items() if below(module, (layer,))), None)
    if module != "edgekit" and allowed is not None:
        wrong = {name for name in of_edgekit(MODULES[module]) if name != "edgekit" and not below(name, allowed)}
        assert not wrong, f"{module} may import only {', '.join(allowed)}"


@pytest.mark.parametrize("module", sorted(MODULES))
def test_heavy_packages_are_imported_where_they_are_used(module: str) -> None:
    at_import = {name.split(".")[0] for name in imports_at_import(ast.parse(MODULES[module].read_text()))}
    assert not at_import & LAZY
    if module == "edgekit" or below(module, ("edgekit.errors", "edgekit.files", "edgekit.artifact", "edgekit.firmware_sim")):
        assert not at_import & {"torch", "numpy"}


def test_edgekit_itself_imports_nothing() -> None:
    names = set(imports_at_import(ast.parse(MODULES["edgekit"].read_text())))
    assert all(name.split(".")[0] in {"__future__", "typing", "importlib", "collections"} for name in names)


def test_nothing_is_named_utils() -> None:
    drawers = {"util", "utils", "helper", "helpers", "misc", "common"}
    folders = [ROOT / folder for folder in ("edgekit", "compress", "targets", "firmware_sim", "tests", "examples", "benchmarks")]
    assert not [path for folder in folders for path in folder.rglob("*") if path.stem in drawers]
