"""Post-training quantization and quantization-aware training. Names are imported when first used, torch with them."""

from typing import Any

from edgekit.compress.ptq.settings import PTQ, QAT

__all__ = ["PTQ", "QAT", "quantize_model"]


def __getattr__(name: str) -> Any:
    if name == "quantize_model":
        from edgekit.compress.ptq.quantize import quantize_model

        return quantize_model
    raise AttributeError(name)
