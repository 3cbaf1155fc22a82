"""``profile.json``: what is written is read back, one entry for each device and target, and damage is said."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from edgekit import devices, profile_table
from edgekit.errors import FormatError, InputError
from edgekit.profile import LayerCost, Profile, load, save

PROFILE = Profile(
    "qemu:mps2-an386", "cortex-m4", "model.c", "0" * 64, "instructions", 1000, 500,
    (LayerCost("conv", "qconv2d", 500, instructions=900, share=0.9),), {"flash_bytes": 4096}, notes=("a note",),
)  # fmt: skip


def test_profiles_are_kept_by_device_and_target(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    assert load(path) == ()
    save(path, PROFILE)
    save(path, replace(PROFILE, device="local"), replace(PROFILE, total=2000))
    assert load(path) == (replace(PROFILE, device="local"), replace(PROFILE, total=2000))


@pytest.mark.parametrize("text", ["", "{}", '{"format": 1, "profiles": [{"layers": 3}]}', '{"format": 99, "profiles": []}'])
def test_a_damaged_file_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "profile.json"
    path.write_text(text)
    with pytest.raises(FormatError, match=r"profile\.json"):
        load(path)


def test_an_unknown_device_is_refused() -> None:
    with pytest.raises(InputError, match="'abacus' is unknown"):
        devices.connect("abacus")


def test_shares_line_up() -> None:
    shown = [profile_table.text(v, "share %") for v in (22.42, 2.143, 0.03573, 0.0, None)]
    assert shown == ["22.4", "2.1", "0.0", "0.0", "-"] and profile_table.text(0.03573, "a MAC") == "0.03573"
