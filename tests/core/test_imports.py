"""What `import edgekit` and `edgekit --help` load, counted in modules, not seconds."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = {
    "torch", "numpy", "pydantic", "yaml", "executorch", "litert_torch", "onnx", "onnxruntime", "brevitas", "plotly", "jinja2",
    "torchao", "tensorflow", "sklearn",
}  # fmt: skip


def loaded(code: str) -> set[str]:
    """Modules in sys.modules of a fresh interpreter after the code."""
    ending = "\nimport sys; print('\\n@' + ' '.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code + ending], capture_output=True, text=True, check=True)
    return set(done.stdout.rpartition("@")[2].split())


HELP = """
import sys
from edgekit.cli import main
sys.argv = ["edgekit", {args}]
try: main()
except SystemExit as end: assert not end.code, end.code
"""


def test_import_edgekit_loads_nothing() -> None:
    found = loaded("import edgekit; edgekit.__version__; dir(edgekit)")
    assert {m for m in found if m.startswith("edgekit")} - {"edgekit"} <= {m for m in found if m.startswith("__editable__")}
    assert HEAVY & found == set()


@pytest.mark.parametrize("args", ['"--help"', '"--version"', '"run", "--help"', '"init", "--help"'])
def test_help_loads_no_torch(args: str) -> None:
    found = loaded(HELP.format(args=args))
    assert HEAVY & found <= (set() if args == '"--help"' else {"pydantic"})  # typer itself parses options with pydantic


def test_frozen_programs_and_targets_load_no_converter() -> None:
    code = "import edgekit; edgekit.load, edgekit.run; from edgekit.targets import TARGETS, get\n"
    found = loaded(code + "for name in TARGETS: get(name).available()")
    assert "torch" in found
    assert not {"executorch", "litert_torch", "onnx", "onnxruntime", "brevitas", "plotly", "tensorflow", "ai_edge_litert"} & found


def test_every_public_name_is_found() -> None:
    import edgekit

    for name in edgekit.__all__:
        assert getattr(edgekit, name) is not None
    assert set(edgekit.__all__) <= set(dir(edgekit))
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = edgekit.nothing
