"""Spiking networks: conversion, training, encoders, robustness. Names are imported when first used, torch with them."""

import importlib
from typing import Any

from edgekit.compress.spiking.settings import EarlyExit, Spiking

__all__ = ["EarlyExit", "Frames", "Neuron", "Spiking", "SpikingNet", "freeze_spiking", "spiking"]

_HOMES = {
    "Frames": "frames",
    "Neuron": "neurons",
    "SpikingNet": "unroll",
    "freeze_spiking": "freeze",
    "spiking": "step",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"edgekit.compress.spiking.{_HOMES[name]}"), name)
    raise AttributeError(name)
