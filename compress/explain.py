"""What ``torch.export`` reports over many lines, said in one: the model's source line, what it does there, and the remedy."""

from __future__ import annotations

import re

__all__ = ["explain_export_error", "source_line"]

_FRAME = re.compile(r'File "([^"]+)", line (\d+), in (\w+)')


def explain_export_error(error: BaseException) -> str:
    """One sentence for an exception of ``torch.export``: the model's line, what it does there, and the remedy.

    Unknown failures give torch's own first line.
    """
    text = str(error)
    source = source_line(text) or next(iter(re.findall(r"Caused by: \((?:[^)\n]*/)?([^/)\n]+\.py:\d+) in", text)), "")
    where = f"{source}: " if source else ""
    for pattern, sentence in _EXPORT_ERRORS:
        if re.search(pattern, f"{type(error).__name__}: {text}", re.IGNORECASE | re.DOTALL):
            return where + sentence
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return f"{where}torch.export cannot capture the model ({lines[0][:200] if lines else type(error).__name__})"


_EXPORT_ERRORS: tuple[tuple[str, str], ...] = (
    (
        r"could not guard on data-dependent|DataDependentOutputException|GuardOnDataDependentSymNode.*Eq\(",
        "the model takes a branch that depends on the values of a tensor; compute both branches and choose with torch.where, "
        "or move the decision out of the model",
    ),
    (
        r"data-dependent expression|GuardOnDataDependentSymNode|UserError.*data.dependent",
        "the model turns the values of a tensor into a size or a Python number (.item(), int(), .tolist()); "
        "use a size that is known when the model is built",
    ),
    (
        r"\.numpy\(\) is not supported|numpy\.ndarray|Cannot (access|convert).*(data pointer|numpy)",
        "the model leaves torch for numpy; write that step with torch operators",
    ),
    (
        r"specialized .* constant|Constraints violated|ConstraintViolationError",
        "the model fixes a dimension that was to be dynamic; export it for one shape",
    ),
    (
        r"mutat.*(view|leaf)|a view of a leaf Variable",
        "the model writes into a view in place; build the result with torch.cat, torch.where or a multiplication instead",
    ),
)
"""Pattern in "class: text" of an exception, and the sentence for it; the first match counts."""


def source_line(trace: str) -> str:
    """ "file.py:line" of the innermost frame that is not torch's own."""
    frames = [(file, line) for file, line, _ in _FRAME.findall(trace) if "site-packages/torch/" not in file.replace("\\", "/")]
    if not frames:
        return ""
    file, line = frames[-1]
    return f"{file.replace(chr(92), '/').rpartition('/')[2]}:{line}"
