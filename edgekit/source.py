"""Models and data that a recipe or the command line names.

A factory (``file.py:name`` or ``package.module:name``) is the user's own code and is imported only here, only when it is named.
Everything else that comes from a file is data: weights are read from safetensors or by ``torch.load(weights_only=True)``, a
``.pt2`` by edgekit's own reader, which executes nothing.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.util
import inspect
import io
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from edgekit.data import Data
from edgekit.errors import DataError, EdgekitError, FormatError, InputError, ModelError, cause
from edgekit.intake import check_model

__all__ = ["load_data", "load_model", "load_weights", "model_fingerprint"]

M = TypeVar("M", bound=nn.Module)


def load_model(spec: str, seed: int = 0) -> nn.Module:
    """The model that ``spec`` names, in evaluation mode on the CPU.

    Args:
        spec: ``file.py:factory``, ``package.module:factory`` or a ``.pt2`` file with a float model.
        seed: torch's seed while the factory runs; passed to it if it has a parameter ``seed``.

    Raises:
        InputError: no such file, module or factory.
        ModelError: the factory failed, returned something else than an ``nn.Module``, or its parameters cannot be used.
        FormatError: the ``.pt2`` is damaged or holds pickled objects.
    """
    if spec.endswith(".pt2"):
        from edgekit.frozen import read_exported

        return _Exported(read_exported(Path(spec)).module(check_guards=False), spec)
    model = _call(_factory(spec), spec, seed, ModelError)
    if not isinstance(model, nn.Module):
        found = f"the class {model.__name__}" if isinstance(model, type) else type(model).__name__
        raise ModelError(f"{_name(spec)} returned {found}; expected a torch.nn.Module")
    return check_model(model, _name(spec))


class _Exported(nn.Module):
    """A float ``.pt2`` as an ordinary module; one that was exported for a batch of one runs sample by sample."""

    def __init__(self, module: nn.Module, name: str) -> None:
        super().__init__()
        for verb in ("train", "eval"):  # torch.export puts functions there that raise
            module.__dict__.pop(verb, None)
        self.module = module
        graph: Any = module.graph
        self.graph = graph
        sizes = [n.meta["val"].shape[0] for n in graph.nodes if n.op == "placeholder" and n.meta["val"].dim()]
        fixed = {s for s in sizes if isinstance(s, int)}
        if fixed - {1}:
            raise ModelError(f"{name}: exported for a batch of {max(fixed)}; export it for one sample or a free batch size")
        self.one_by_one = bool(fixed)

    def forward(self, *xs: Tensor) -> Any:
        if not self.one_by_one or len(xs[0]) == 1:
            return self.module(*xs)
        results = [self.module(*(x[i : i + 1] for x in xs)) for i in range(len(xs[0]))]
        if isinstance(results[0], Tensor):
            return torch.cat(results)
        return tuple(torch.cat(column) for column in zip(*results, strict=True))


def load_data(spec: str, seed: int = 0) -> Data:
    """The :class:`edgekit.data.Data` that the factory ``spec`` returns; ``seed`` as in :func:`load_model`.

    Raises:
        InputError: no such file, module or factory.
        DataError: the factory failed, or returned something else.
    """
    data = _call(_factory(spec), spec, seed, DataError)
    if not isinstance(data, Data):
        raise DataError(f"{_name(spec)} returned {type(data).__name__}; expected an edgekit.data.Data")
    return data


def load_weights(model: M, path: Path) -> M:
    """Load a state dict from ``.safetensors``, or from a torch file without executing anything in it; returns the model.

    A torch file may hold the state dict itself or a mapping with it under "state_dict", "model" or "weights".

    Raises:
        FormatError: the file is missing, damaged, or would need to execute code.
        ModelError: names or shapes do not fit the model.
    """
    path = Path(path)
    if not path.is_file():
        raise FormatError(f"{path}: no such file")
    state = _state(path)
    own = model.state_dict()
    missing = [k for k in own if k not in state and not k.endswith("num_batches_tracked")]
    unknown = [k for k in state if k not in own]
    if missing or unknown:
        words = [f"{label} {', '.join(keys[:3])}{' ...' if len(keys) > 3 else ''}" for label, keys in
                 (("the file lacks", missing), ("the model has no", unknown)) if keys]  # fmt: skip
        raise ModelError(f"{path}: these weights are of another model: {'; '.join(words)}")
    for key, value in state.items():
        if value.shape != own[key].shape:
            raise ModelError(f"{path}: {key} has shape {tuple(value.shape)}, the model's is {tuple(own[key].shape)}")
    model.load_state_dict(state, strict=False)
    return model


def model_fingerprint(model: nn.Module, sample: tuple[Tensor, ...]) -> str:
    """SHA-256 over the weights and the exported graph; over weights and source text where the model cannot be exported.

    The graph is taken because a model may change without its file changing (a helper module, a library).
    """
    total = hashlib.sha256()
    for key, value in sorted(model.state_dict().items()):
        total.update(f"{key}{value.dtype}{tuple(value.shape)}".encode())
        total.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    try:
        with redirect_stderr(io.StringIO()):  # torch prints the graph of a model that it cannot export
            exported = torch.export.export(model, sample, strict=False)
        total.update(str(exported.graph).encode())
        for key, constant in sorted(exported.constants.items()):
            if isinstance(constant, Tensor):
                total.update(f"{key}{constant.dtype}{tuple(constant.shape)}".encode())
                total.update(constant.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    except Exception:  # capture explains what is wrong with it; here only a key is needed
        total.update(repr(model).encode())
    return total.hexdigest()


def _state(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return dict(load_file(path))
        except SafetensorError as error:
            raise FormatError(f"{path}: not a whole safetensors file ({error})") from None
    try:
        found: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        if not zipfile.is_zipfile(path):
            raise FormatError(f"{path}: truncated or not a torch file; save the weights as safetensors") from None
        raise FormatError(
            f"{path}: holds more than tensors ({str(error).splitlines()[0][:120]}), which edgekit never executes; "
            "save model.state_dict() as safetensors"
        ) from None
    for key in ("state_dict", "model", "weights"):
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found = found[key]
    if not isinstance(found, dict) or not all(isinstance(v, Tensor) for v in found.values()):
        raise FormatError(f"{path}: holds {type(found).__name__}, not a state dict; save model.state_dict()")
    return dict(found)


def _factory(spec: str) -> Callable[..., Any]:
    file, _, name = spec.rpartition(":")
    if not file or not name.isidentifier():
        raise InputError(f"{spec!r}: expected file.py:factory or package.module:factory")
    path = Path(file)
    if path.suffix == ".py" and not path.is_file():
        raise InputError(f"{file}: no such file")
    with _importable(path.parent.absolute() if path.suffix == ".py" else Path.cwd()):
        try:
            module = _import_file(path) if path.suffix == ".py" else importlib.import_module(file)
        except EdgekitError:
            raise
        except Exception as error:
            if isinstance(error, ModuleNotFoundError) and error.name and file.startswith(error.name):
                raise InputError(
                    f"{file}: no such module, and no file {file.replace('.', '/')}.py in the current folder"
                ) from None
            raise InputError(f"{file}: cannot be imported: {cause(error)}") from error
    found = getattr(module, name, None)
    if not callable(found):
        names = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
        close = difflib.get_close_matches(name, names, 1)
        raise InputError(f"{file}: no function {name!r}" + (f"; did you mean {close[0]!r}?" if close else ""))
    return found  # type: ignore[no-any-return]


def _import_file(path: Path) -> Any:
    """The file as a module of a name of its own, once for each content."""
    name = f"edgekit_user_{path.stem}_{hashlib.sha256(str(path.absolute()).encode() + path.read_bytes()).hexdigest()[:12]}"
    if name in sys.modules:
        return sys.modules[name]
    specification = importlib.util.spec_from_file_location(name, path)
    if specification is None or specification.loader is None:
        raise InputError(f"{path}: cannot be imported as Python")
    module = sys.modules[name] = importlib.util.module_from_spec(specification)
    try:
        specification.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _call(factory: Callable[..., Any], spec: str, seed: int, kind: type[EdgekitError]) -> Any:
    """What the factory returns; its own failure becomes one sentence with the line of the user's file."""
    path = Path(spec.rpartition(":")[0])
    try:
        takes_seed = "seed" in inspect.signature(factory).parameters
    except (TypeError, ValueError):
        takes_seed = False
    with _importable(path.parent.absolute() if path.suffix == ".py" else Path.cwd()):
        torch.manual_seed(seed)
        try:
            return factory(seed=seed) if takes_seed else factory()
        except EdgekitError:
            raise
        except Exception as error:
            raise kind(f"{_name(spec)} failed: {cause(error)}") from error


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """The user's folder can be imported from meanwhile, as if the file were run; its modules are forgotten afterwards.

    Else ``from data import ...`` of one folder would find the ``data`` of another that was used before.
    """
    before = set(sys.modules)
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        for name in set(sys.modules) - before:
            file = getattr(sys.modules[name], "__file__", None)
            if file and Path(file).parent == folder and not name.startswith("edgekit_user_"):
                del sys.modules[name]
        if str(folder) in sys.path:
            sys.path.remove(str(folder))


def _name(spec: str) -> str:
    file, _, name = spec.rpartition(":")
    return f"{Path(file).name if file.endswith('.py') else file}:{name}"
