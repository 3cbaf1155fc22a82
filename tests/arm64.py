"""The emulated arm64 Linux for tests, with tflite-runtime only: about 25 MB, downloaded once and kept in the user's cache
folder."""

from __future__ import annotations

import pytest

from edgekit.devices import arm64_root
from edgekit.errors import EdgekitError, InputError


@pytest.fixture(scope="session")
def arm64() -> None:
    """Made, or checked; a test that cannot have it fails and says why, but where apt is set to no Debian 12 it is skipped."""
    try:
        arm64_root.setup(["tflite-runtime"])
    except InputError as error:
        pytest.skip(str(error)) if "Debian 12 has it" in str(error) else pytest.fail(f"no arm64 Linux for this test: {error}")
    except EdgekitError as error:
        pytest.fail(f"no arm64 Linux for this test: {error}")
