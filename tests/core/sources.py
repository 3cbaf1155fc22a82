"""Where edgekit's source files lie, for the tests that read them."""

from __future__ import annotations

import ast
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PARTS = {
    "edgekit": "edgekit",
    "edgekit.compress": "compress",
    "edgekit.targets": "targets",
    "edgekit.firmware_sim": "firmware_sim",
}
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
LINKS = ("compress", "targets", "firmware_sim")


def files() -> dict[str, Path]:
    """Every file of the package by its path in an installation, links not followed."""
    found: dict[str, Path] = {}
    for package, folder in PARTS.items():
        for path in sorted((ROOT / folder).rglob("*")):
            if path.is_file() and not path.is_symlink() and "__pycache__" not in path.parts and path.suffix != ".pyc":
                if folder == "edgekit" and path.relative_to(ROOT).parts[1] in LINKS:
                    continue
                found[f"{package.replace('.', '/')}/{path.relative_to(ROOT / folder)}"] = path
    return found


def modules() -> dict[str, Path]:
    """Every module by its dotted name."""
    python = {name: path for name, path in files().items() if name.endswith(".py")}
    return {name[:-3].replace("/", ".").removesuffix(".__init__"): path for name, path in python.items()}


def imports(tree: ast.AST) -> Iterator[str]:
    """Dotted names that a module imports anywhere; ``from a import b`` gives ``a.b``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imports_at_import(tree: ast.Module) -> Iterator[str]:
    """Those that run when the module is imported: not inside functions and not for type checkers only."""
    todo: list[ast.stmt] = list(tree.body)
    while todo:
        node = todo.pop()
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield from imports(ast.Module([node], []))
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            todo += node.orelse
        elif isinstance(node, ast.ClassDef | ast.If | ast.Try | ast.With):
            todo += [child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt)]
