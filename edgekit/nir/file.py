"""Reads and writes ``.nir`` files (HDF5) with errors in one sentence, and never more than the file's own numbers.

Reading builds each node by nir's own classes; what it does not accept is said of the node. A file that points outside of itself
(external links or storage, virtual data sets) is refused.
"""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

import numpy as np

from edgekit.errors import EdgekitError, FormatError, InputError, UnsupportedError, missing_extra
from edgekit.files import write_whole
from edgekit.nir.semantics import KINDS, flatten

__all__ = ["NIR_MAJOR", "read", "require", "same", "to_bytes", "write"]

NIR_MAJOR = 1
"""Files of nir up to this major version are read."""

_LARGEST = 1 << 31
"""Bytes of all numbers in a file, unpacked."""


def read(path: Path) -> Any:
    """The ``nir.NIRGraph`` of a file, its edges and kinds of nodes checked.

    Raises:
        FormatError: the file is missing, truncated, no NIR file, from a newer nir, or points outside of itself; or a node lacks a
            field or has one of a wrong shape. Names the node.
        UnsupportedError: a node of a kind that NIR 1.0.8 does not have, or a graph that cannot be run.
        MissingTool: nir is not installed.
    """
    path = Path(path)
    h5py = require()
    if not path.is_file():
        raise FormatError(f"{path}: no such file")
    try:
        with h5py.File(path, "r") as file:
            version = _version(path, file)
            if "node" not in file:
                raise FormatError(f"{path}: an HDF5 file without a NIR graph (no group 'node')")
            tree = _tree(path, h5py, file["node"], [0])
    except EdgekitError:
        raise
    except Exception as error:  # h5py raises OSError, RuntimeError, KeyError, ValueError for damaged bytes
        raise FormatError(f"{path}: truncated, damaged or no NIR file ({str(error).splitlines()[0][:160]})") from error
    graph = _node(path, "", tree, version)
    try:
        flatten(graph)
    except UnsupportedError as error:
        raise UnsupportedError(f"{path}: {error}") from error
    return graph


def write(path: Path, graph: Any) -> None:
    """Write a graph, whole or not at all; the same graph gives the same bytes.

    Raises:
        InputError: the graph holds something that a file cannot.
        MissingTool: nir is not installed.
    """
    write_whole(Path(path), to_bytes(graph))


def to_bytes(graph: Any) -> bytes:
    """The bytes of a ``.nir`` file."""
    require()
    import nir

    buffer = io.BytesIO()
    try:
        nir.write(buffer, graph)
    except (TypeError, ValueError) as error:
        raise InputError(f"this NIR graph cannot be written: {str(error).splitlines()[0]}") from error
    return buffer.getvalue()


def same(a: Any, b: Any) -> list[str]:
    """What differs between two graphs, node by node, in words; empty: nothing. Order and number types do not count."""
    found: list[str] = []
    _compare("", a, b, found)
    return found


def _compare(name: str, a: Any, b: Any, found: list[str]) -> None:
    where = f"node {name}" if name else "the graph"
    if type(a).__name__ != type(b).__name__:
        found.append(f"{where}: {type(a).__name__} and {type(b).__name__}")
        return
    if hasattr(a, "nodes"):
        if sorted(map(tuple, a.edges)) != sorted(map(tuple, b.edges)):
            found.append(f"{where}: edges {sorted(set(a.edges) ^ set(b.edges))}")
        for key in sorted(set(a.nodes) | set(b.nodes)):
            if key not in a.nodes or key not in b.nodes:
                found.append(f"node {name}{key} is in one of them only")
            else:
                _compare(f"{name}{key}", a.nodes[key], b.nodes[key], found)
    fields = {k: v for k, v in vars(a).items() if k not in ("nodes", "edges", "metadata", "input_type", "output_type")}
    found += [f"{where}: {k} differs" for k, v in fields.items() if not _equal(v, getattr(b, k, None))]
    for key in sorted(set(a.metadata) | set(b.metadata)):
        if not _equal(a.metadata.get(key), b.metadata.get(key)):
            found.append(f"{where}: metadata {key} is {a.metadata.get(key)!r} and {b.metadata.get(key)!r}")


def _equal(a: Any, b: Any) -> bool:
    if a is None or b is None or isinstance(a, str) or isinstance(b, str):
        return a is b or (isinstance(a, str) and isinstance(b, str) and a == b)
    x, y = np.asarray(a), np.asarray(b)
    if x.ndim < 2 and y.ndim < 2 and 1 in (x.size, y.size):  # a stride of 1 may stand as (1, 1)
        x, y = np.broadcast_arrays(x, y)
    return bool(np.array_equal(x, y))


def require() -> Any:
    """The module h5py.

    Raises:
        MissingTool: nir, which brings it, is not installed.
    """
    try:
        import h5py
        import nir  # noqa: F401
    except ImportError as error:
        raise missing_extra("nir", "neuromorphic") from error
    return h5py


def _version(path: Path, file: Any) -> str:
    raw = file["version"][()] if "version" in file else b"unknown"
    version = raw.decode("utf8", "replace") if isinstance(raw, bytes) else str(raw)
    major = version.split(".")[0]
    if major.isdigit() and int(major) > NIR_MAJOR:
        raise FormatError(f"{path}: written by nir {version}; this edgekit reads files of nir {NIR_MAJOR}.x and older")
    return version


def _tree(path: Path, h5py: Any, group: Any, size: list[int]) -> dict[str, Any]:
    """A group as nested dicts of numbers and strings."""
    tree: dict[str, Any] = {}
    for key in group:
        if not isinstance(group.get(key, getlink=True), h5py.HardLink):
            raise FormatError(f"{path}: {group.name}/{key} points to another place; edgekit does not follow it")
        item = group[key]
        if isinstance(item, h5py.Group):
            tree[key] = _tree(path, h5py, item, size)
            continue
        if item.external or item.is_virtual:
            raise FormatError(f"{path}: {item.name} keeps its numbers in another file; edgekit does not follow it")
        size[0] += math.prod(item.shape or ()) * item.dtype.itemsize
        if size[0] > _LARGEST:
            raise FormatError(f"{path}: more than {_LARGEST >> 30} GiB of numbers; this is no network of edgekit's")
        value = item[()]
        if item.dtype.kind == "f" and (bad := int(np.isnan(value).sum())):  # infinite: no leak, no spikes
            raise FormatError(f"{path}: {item.name} holds {bad} NaN values of {np.size(value)}; make the file again")
        tree[key] = value.decode("utf8") if isinstance(value, bytes) else value
    return tree


def _node(path: Path, name: str, tree: dict[str, Any], version: str) -> Any:
    import nir

    what, where = tree.get("type"), f"node {name}" if name else "the graph"
    if what == "NIRGraph":
        inner = f"{name}." if name else ""
        nodes = tree.get("nodes", {})
        if not isinstance(nodes, dict) or not all(isinstance(n, dict) for n in nodes.values()):
            raise FormatError(f"{path}: {where} has no nodes; the file is damaged")
        try:
            edges = [(_text(a), _text(b)) for a, b in tree.get("edges", [])]
        except (TypeError, ValueError) as error:
            raise FormatError(f"{path}: {where} has edges that are no pairs of names; the file is damaged") from error
        built = {k: _node(path, f"{inner}{k}", n, version) for k, n in nodes.items()}
        return nir.NIRGraph(built, edges, metadata=tree.get("metadata", {}), type_check=False)
    if what not in KINDS:
        raise UnsupportedError(
            f"{path}: {where} is a {what!r}, which NIR 1.0.8 does not have (the file is of nir {version}); replace it there"
        )
    try:
        return nir.ir.dict2NIRNode(dict(tree))
    except KeyError as error:
        raise FormatError(f"{path}: {where} ({what}) has no {error.args[0]}; the file (nir {version}) is damaged") from error
    except (AssertionError, TypeError, ValueError, AttributeError, IndexError) as error:
        reason = str(error).splitlines()[0].replace(f"{what}.__init__() ", "") if str(error) else type(error).__name__
        raise FormatError(f"{path}: {where} ({what}) cannot be made: {reason} (the file is of nir {version})") from error


def _text(value: Any) -> str:
    return value.decode("utf8") if isinstance(value, bytes) else str(value)
