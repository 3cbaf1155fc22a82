"""The emulated arm64 Linux for tests, made once and kept in the user's cache folder: about 25 MB for tflite-runtime, and 158 MB
more for executorch, nearly all of it the torch that its Python module is linked with."""

from __future__ import annotations

import pytest

from edgekit.devices import arm64_root
from edgekit.errors import EdgekitError, InputError


@pytest.fixture(scope="session")
def arm64() -> None:
    """Made, or checked; a test that cannot have it fails and says why, but where apt is set to no Debian 12 it is skipped."""
    _made("tflite-runtime")


@pytest.fixture(scope="session")
def arm64_executorch() -> None:
    """The same with executorch."""
    _made("executorch")


def _made(runtime: str) -> None:
    try:
        arm64_root.setup([runtime])
    except InputError as error:
        pytest.skip(str(error)) if "Debian 12 has it" in str(error) else pytest.fail(f"no arm64 Linux for this test: {error}")
    except EdgekitError as error:
        pytest.fail(f"no arm64 Linux for this test: {error}")
