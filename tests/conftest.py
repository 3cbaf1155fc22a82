"""One thread, one seed and one hypothesis profile for all tests."""

from __future__ import annotations

import warnings

import hypothesis
import numpy as np
import pytest
import torch

torch.set_num_threads(1)
hypothesis.settings.register_profile("edgekit", derandomize=True, deadline=None, database=None, max_examples=60)
hypothesis.settings.load_profile("edgekit")
warnings.filterwarnings("ignore", module=r"(torchao|executorch|litert_torch|onnxscript|torch\.utils\._pytree)")


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test starts from the same random state."""
    torch.manual_seed(0)
    np.random.seed(0)
