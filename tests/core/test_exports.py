"""``__all__`` names what a module offers: every public function and class of its own, and nothing that is not there."""

from __future__ import annotations

import ast
import importlib

import pytest
from core.sources import modules

MODULES = {name: path for name, path in modules().items() if path.read_text().strip() and path.name != "__main__.py"}


@pytest.mark.parametrize("name", sorted(MODULES))
def test_all_is_what_can_be_imported(name: str) -> None:
    module = importlib.import_module(name)
    tree = ast.parse(MODULES[name].read_text())
    assert module.__doc__, f"{name} has no docstring"
    exported = list(getattr(module, "__all__", []))
    assert len(set(exported)) == len(exported)
    for entry in exported:
        assert getattr(module, entry, None) is not None, f"{name}.__all__ has {entry}, which is not there"
    own = {
        node.name
        for node in tree.body
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_") and not _is_command(node)
    }
    assert own <= set(exported), f"{name}.__all__ lacks {sorted(own - set(exported))}"


def _is_command(node: ast.FunctionDef | ast.ClassDef) -> bool:
    """A verb of the command line, registered by its decorator."""
    return any(".command" in ast.unparse(d) or ".callback" in ast.unparse(d) for d in node.decorator_list)


def test_public_functions_have_docstrings() -> None:
    lacking = []
    for name, path in MODULES.items():
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_") and not ast.get_docstring(node):
                lacking.append(f"{name}.{node.name}")
    assert not lacking
