"""Random networks as firmware: the emulated board equals the numpy reference to the last bit, layer by layer."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pytest
import random_nets
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from edgekit.targets import cortex_m, get
from edgekit.targets.cortex_m.preparation import prepare, simulate

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(cortex_m.M4.available() is not None, reason="needs arm-none-eabi-gcc and qemu-system-arm"),
]
FEW = settings(max_examples=4, deadline=None, phases=(Phase.explicit, Phase.generate), suppress_health_check=list(HealthCheck))
SETS = {"cortex-m0": "portable", "cortex-m4": "dsp", "cortex-m55": "mve"}


@pytest.mark.slow
@pytest.mark.parametrize("core", SETS)
def test_random_networks_equal_their_reference(core: str) -> None:
    target = get(core)

    @FEW
    @given(random_nets.plans())
    def boot(plan: random_nets.Plan) -> None:
        program = random_nets.program(plan)
        x = torch.randn(2, *plan.shape, generator=torch.Generator().manual_seed(plan.seed)).numpy()
        firmware = prepare(program, SETS[core])
        with tempfile.TemporaryDirectory() as folder:
            path = target.lower(program, Path(folder) / "model.c").path
            (found,) = target.run(path, [x])
            taps = target.taps(path, program, [x[:1]])
        simulated = [simulate(firmware, [x[i : i + 1]]) for i in range(2)]
        assert [name for name, values in simulated[0][0].items() if not np.array_equal(values, taps[name])] == []
        assert all(np.array_equal(found[i], outputs[0][0]) for i, (_, outputs) in enumerate(simulated))

    boot()


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(random_nets.plans(), st.sampled_from(("portable", "dsp", "mve")))
def test_random_networks_are_within_one_step_of_the_frozen_program(plan: random_nets.Plan, kernel_set: str) -> None:
    program = random_nets.program(plan)
    x = torch.randn(1, *plan.shape, generator=torch.Generator().manual_seed(plan.seed))
    firmware = prepare(program, kernel_set)
    taps, _ = simulate(firmware, [x.numpy()])
    forced, _ = program.forced_outputs({k: torch.from_numpy(v) for k, v in taps.items()}, x)
    gaps = {n: int(np.abs(forced[n].numpy().astype(int) - taps[n]).max(initial=0)) for n in taps}
    assert max(gaps.values()) <= 1
    assert firmware.arena <= 1.1 * firmware.bound
