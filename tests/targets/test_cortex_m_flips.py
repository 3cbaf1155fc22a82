"""One wrong bit anywhere in the constants of a flashed image: the firmware stops before its first inference and names it."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
from bit_flips import flips, segments, summary
from nets import residual_net

from edgekit.firmware_sim.qemu import run
from edgekit.targets import cortex_m, get
from edgekit.targets.cortex_m import elf, host

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(cortex_m.M4.available() is not None, reason="needs arm-none-eabi-gcc and qemu-system-arm"),
]


@pytest.mark.parametrize("core", ["cortex-m0", "cortex-m4", "cortex-m55"])
def test_every_flipped_bit_is_caught_and_its_constant_named(core: str, tmp_path: Path) -> None:
    program, target = residual_net(4), get(core)
    path = target.lower(program, tmp_path / f"model{target.SUFFIX}").path
    facts, built = host.built(path.parent)
    data = bytes(sum(spec.size for spec in facts.inputs))
    assert run(built, data).checked().code == 0
    found = list(flips(built, data, 24, tmp_path))
    assert summary(found) == {"flips": 24, "caught": 24, "hung": 0, "computed": 0, "other": 0}
    assert len({f.segment for f in found}) > 5


def test_all_constants_are_checked(tmp_path: Path) -> None:
    path = cortex_m.M4.lower(residual_net(8), tmp_path / "model.c").path
    image = elf.read(host.built(path.parent)[1].elf)
    section = next(s for s in image.sections if s.name == ".weights")
    known = sorted(segments(image))
    assert all(section.offset <= start and start + size <= section.offset + section.size for start, size in known)
    gaps = [b - (a + n) for (a, n), (b, _) in pairwise(known)]
    assert all(0 <= gap < 16 for gap in gaps)  # between two of them lies only what aligns the next
