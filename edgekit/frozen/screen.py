"""What a ``.pt2`` may contain before torch is allowed to read it.

Torch's own reader trusts the file. Besides pickled sample inputs, tensors and objects, these parts of a ``.pt2`` reach Python's
``eval``, ``exec`` or ``import``, so each is compared with a list of what is allowed, and everything else is refused:

- a node's ``target`` is looked up below ``torch`` and called: ``torch.os.system`` would do;
- a symbolic size (``expr_str``) goes through sympy's ``sympify``, which is ``eval``;
- names of nodes, inputs and buffers are pasted into generated Python source;
- a pytree's context can name a module that is then imported;
- ``guards_code`` is Python source: it is dropped.
"""

from __future__ import annotations

import ast
import json
import re
from typing import Any

__all__ = ["Refused", "screen_graph", "screen_members", "screen_payloads"]


class Refused(Exception):
    """The file holds something edgekit does not load; the message is the reason, without the file's name."""


_MEMBERS = re.compile(
    r"\.data/(serialization_id|version)|version|archive_format|archive_version|byteorder|models/model\.json"
    r"|data/(weights|constants)/model_(weights|constants)_config\.json|data/weights/weight_\d+|data/constants/tensor_\d+"
    r"|data/sample_inputs/model\.pt|extra/.+"
)
_PAYLOAD = re.compile(r"(weight|tensor)_\d+")
_NAME = re.compile(r"[\w.+\-]*")
_OVERLOAD = re.compile(r"torch\.ops\.(aten|edgekit|prims|quantized_decomposed)\.(?!(from_file|save)\.)\w+\.\w+")
_ARITHMETIC = re.compile(
    r"_operator\.(getitem|add|sub|mul|floordiv|truediv|mod|neg|pos|pow|eq|ne|lt|le|gt|ge|and_|or_|not_)"
    r"|torch\.sym_(int|float|max|min|not|ite|sum|sqrt)|math\.(ceil|floor|trunc|sqrt)"
    r"|torch\.ops\.higher_order\.wrap_with_(autocast|set_grad_enabled)"
)
_TREE_TYPES = frozenset([None, "builtins.tuple", "builtins.list", "builtins.dict", "collections.OrderedDict"])
_SYMPY = re.compile(
    "Symbol|Integer|Float|Rational|Add|Mul|Pow|Max|Min|Mod|And|Or|Not|Equality|Unequality|StrictLessThan|StrictGreaterThan|LessThan"
    "|GreaterThan|FloorDiv|ModularIndexing|Where|PythonMod|CleanDiv|CeilToInt|FloorToInt|CeilDiv|PowByNatural|FloatPow|FloatTrueDiv"
    "|IntTrueDiv|TruncToFloat|TruncToInt|RoundToInt|ToFloat|Identity"
)
_OBJECTS = ("as_custom_obj", "as_opaque", "as_operator", "custom_obj", "custom_obj_values")
_SYMBOL = re.compile(r"[a-z]+\d*")


def screen_members(names: list[str]) -> None:
    """Refuse archives with members that an exported program does not have, or has twice.

    Raises:
        Refused: naming the first such member.
    """
    for name in names:
        if not _MEMBERS.fullmatch(name):
            raise Refused(f"member {name!r} is none of an exported program's (a pickled or compiled object?)")
    if len(set(names)) != len(names):
        raise Refused(f"member {next(n for n in names if names.count(n) > 1)!r} is there twice")


def screen_payloads(member: str, data: bytes) -> None:
    """Refuse a weights or constants table (``*_config.json``) that points at anything but raw tensors.

    Raises:
        Refused: naming the first such tensor.
    """
    try:
        table = json.loads(data)["config"].items()
        for name, entry in table:
            if entry.get("use_pickle", True) is not False:
                raise Refused(f"tensor {name!r} is stored as a pickle")
            if not _NAME.fullmatch(name) or not _PAYLOAD.fullmatch(entry["path_name"]):
                raise Refused(f"tensor {name!r} is stored as {entry['path_name']!r}, not as a plain tensor")
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise Refused(f"{member} is damaged ({type(error).__name__}: {error})") from error


def screen_graph(data: bytes) -> bytes:
    """The graph (``models/model.json``) if every string in it is harmless, without its ``guards_code``.

    Raises:
        Refused: naming the first string that is not.
    """
    try:
        graph = json.loads(data)
        guards = graph.pop("guards_code", None)
        _screen(graph, "")
        return json.dumps({**graph, "guards_code": []}).encode() if guards else data
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise Refused(f"models/model.json is damaged ({type(error).__name__}: {error})") from error


def _screen(value: Any, key: str) -> None:
    if isinstance(value, dict):
        for inner, item in value.items():
            if not _NAME.fullmatch(inner):
                raise Refused(f"the name {inner!r} in the graph is no name")
            if inner in _OBJECTS and item:
                raise Refused("the graph holds a custom object")
            if inner == "metadata" and all(isinstance(text, str) for text in item.values()):
                continue  # texts for people, stack traces and module paths: never evaluated
            _screen(item, inner)
    elif isinstance(value, list):
        for item in value:
            _screen(item, key)
    elif isinstance(value, str):
        _CHECKS.get(key, _check_name)(value)


def _check_name(text: str) -> None:
    if not _NAME.fullmatch(text):
        raise Refused(f"the name {text!r} in the graph is no name")


def _check_target(target: str) -> None:
    if not _ARITHMETIC.fullmatch(target) and not _OVERLOAD.fullmatch(target):
        raise Refused(f"the graph calls {target!r}, which is no operator of aten or edgekit")


def _check_tree(text: str) -> None:
    if not text:
        return

    def walk(spec: Any) -> None:
        if spec["type"] not in _TREE_TYPES or (spec["context"] is not None and _holds_dict(json.loads(spec["context"]))):
            raise Refused(f"inputs or outputs are arranged in a {spec['type']!r}; use tuples, lists and dicts")
        for child in spec["children_spec"]:
            walk(child)

    walk(json.loads(text)[1])


def _holds_dict(value: Any) -> bool:
    return isinstance(value, dict) or (isinstance(value, list) and any(map(_holds_dict, value)))


def _check_expression(text: str) -> None:
    """Only sympy's own printed form: numbers, ``Symbol('s0', integer=True)``, and sums and products of such."""
    refused = Refused(f"a symbolic size is {text[:80]!r}, which is no arithmetic")
    try:
        tree = ast.parse(text, mode="eval")
    except (SyntaxError, MemoryError) as error:
        raise refused from error
    fine: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            if not isinstance(node.func, ast.Name) or not _SYMPY.fullmatch(node.func.id):
                raise refused
            fine.add(id(node.func))
            if node.func.id == "Symbol" and len(node.args) == 1 and isinstance(node.args[0], ast.Constant):
                if not isinstance(node.args[0].value, str) or not _SYMBOL.fullmatch(node.args[0].value):
                    raise refused
                fine.add(id(node.args[0]))
        elif isinstance(node, ast.Name):
            if id(node) not in fine and not re.fullmatch(r"[a-z]{1,2}\d+|true|false", node.id):
                raise refused
        elif isinstance(node, ast.Constant):
            if id(node) not in fine and not isinstance(node.value, bool | int | float):
                raise refused
        elif not isinstance(node, ast.Expression | ast.BinOp | ast.UnaryOp | ast.keyword | ast.operator | ast.unaryop | ast.Load):
            raise refused


_CHECKS = {
    "target": _check_target,
    "as_string": lambda _: None,  # printed with repr wherever it becomes source
    "as_strings": lambda _: None,
    "in_spec": _check_tree,
    "out_spec": _check_tree,
    "expr_str": _check_expression,
}
