"""Estimators against the formulas of their papers, finite differences and samples."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from edgekit.compress.binary import Binary
from edgekit.compress.binary.estimators import estimating_error, exponent, frequency_for, laplace_error, power, sign, slope
from edgekit.compress.binary.layer import BinaryLayer, Moments

O_VALUES = (1.0, 1.5, 2.0, 3.0, 5.0, 10.0)


def test_sign_of_zero_is_positive_and_its_gradient_is_the_slope() -> None:
    z = torch.tensor([-2.0, -0.5, -0.0, 0.0, 0.3, 1.2], requires_grad=True)
    for kind in ("ste", "polynomial", "reste", "identity"):
        z.grad = None
        b = sign(z, kind, 3.0)
        assert b.tolist() == [-1, -1, 1, 1, 1, 1]
        (b * torch.arange(1.0, 7.0)).sum().backward()  # type: ignore[no-untyped-call]
        assert z.grad is not None
        torch.testing.assert_close(z.grad, torch.arange(1.0, 7.0) * slope(z.detach(), kind, 3.0))


def test_reste_with_exponent_one_is_the_clipped_straight_through() -> None:
    z = torch.linspace(-2, 2, 401)
    assert torch.equal(slope(z, "reste", 1.0), (z.abs() <= 1.5).float())
    assert torch.equal(slope(z, "ste"), (z.abs() <= 1).float())


@pytest.mark.parametrize("o", O_VALUES)
def test_restes_slope_is_that_of_the_power_function(o: float) -> None:
    """Finite differences between m and t, the finite slope f(m)/m inside, nothing outside; even, with a jump of o at m."""
    z = torch.linspace(0.12, 1.48, 50, dtype=torch.float64)
    h = 1e-6
    torch.testing.assert_close(slope(z, "reste", o), (power(z + h, o) - power(z - h, o)) / (2 * h), rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(slope(-z, "reste", o), slope(z, "reste", o))
    assert slope(torch.tensor([1.51, -3.0]), "reste", o).tolist() == [0, 0]
    inner, outer = slope(torch.tensor([0.1, 0.1 + 1e-7], dtype=torch.float64), "reste", o).tolist()
    assert inner == pytest.approx(float(power(torch.tensor([0.1]), o)) / 0.1, rel=1e-6)
    assert inner / outer == pytest.approx(o, rel=1e-4)


def test_restes_slope_at_zero() -> None:
    assert float(slope(torch.zeros(1), "reste", 3.0)) == pytest.approx(4.6416, abs=1e-4)  # 0.1^(-2/3)


def test_a_larger_exponent_errs_less_and_is_less_stable() -> None:
    z = torch.randn(20000, generator=torch.Generator().manual_seed(0)) * 0.7
    errors = [estimating_error(z, o) for o in O_VALUES]
    spreads = [float(slope(z, "reste", o).var()) for o in O_VALUES]
    assert errors == sorted(errors, reverse=True) and spreads == sorted(spreads)


def test_the_exponent_grows_from_one_to_its_end() -> None:
    for kind in ("cos", "linear"):
        values = [exponent(e / 20, 3.0, kind) for e in range(21)]
        assert values[0] == 1 and values[-1] == pytest.approx(3) and values == sorted(values)
    assert exponent(0.5, 3.0, "cos") == pytest.approx(1 + 2 * (1 - math.cos(math.pi / 4)))


def test_polynomial_slope_is_bi_reals_triangle() -> None:
    assert slope(torch.tensor([0.0, 0.25, -0.5, 1.0, 2.0]), "polynomial").tolist() == [2, 1.5, 1, 0, 0]


@given(st.floats(0.02, 30.0))
def test_laplace_error_is_the_mean_over_laplacian_weights(x: float) -> None:
    """Against numerical integration of (1 - |sin(x u)|) exp(-u) over u."""
    u = torch.linspace(0, 40, 400001, dtype=torch.float64)
    wanted = float(torch.trapezoid((1 - torch.sin(x * u).abs()) * torch.exp(-u), u))
    assert laplace_error(x) == pytest.approx(wanted, abs=2e-4)


@given(st.floats(0.37, 0.95), st.floats(1e-4, 1.0))
def test_a_frequency_gives_its_error(error: float, size: float) -> None:
    assert laplace_error(frequency_for(error, size) * size) == pytest.approx(error, abs=1e-6)


def layer(estimator: str, **more: object) -> BinaryLayer:
    torch.manual_seed(0)
    moments = Moments(torch.zeros(3), torch.ones(3), torch.zeros(4), torch.ones(4))
    settings = Binary(estimator=estimator, **more)  # type: ignore[arg-type]
    return BinaryLayer(torch.randn(4, 3, 3, 3) * 0.1, None, ([1, 1], [1, 1], [1, 1], 1), "binary", settings, moments)


def test_bipers_weights_are_periodic() -> None:
    """A period more changes nothing, half a period changes every sign."""
    made = layer("biper", frequency=20.0)
    x, signs = torch.randn(2, 3, 5, 5), made.signs()
    before = made(x)
    made.weight.data += 2 * math.pi / 20
    assert torch.equal(made.signs(), signs)
    torch.testing.assert_close(made(x), before)
    made.weight.data += math.pi / 20
    assert torch.equal(made.signs(), -signs)


def test_bipers_first_stage_has_the_sines_gradient_and_the_seconds_signs() -> None:
    made = layer("biper", frequency=20.0, norm="none", shift=False).double()
    made.real_weights = made.real_activations = True
    x, probe = torch.randn(2, 3, 5, 5).double(), torch.randn(2, 4, 5, 5).double()
    (made(x) * probe).sum().backward()
    assert made.weight.grad is not None
    for index in ((0, 0, 0, 0), (3, 2, 1, 2), (1, 1, 2, 0)):
        values = []
        for step in (1e-6, -1e-6):
            with torch.no_grad():
                made.weight[index] += step
                values.append(float((made(x) * probe).sum()))
                made.weight[index] -= step
        assert float(made.weight.grad[index]) == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-4, abs=1e-6)
    wave = made._weight().detach()
    made.real_weights = False
    assert torch.equal(made._weight().detach(), torch.where(wave >= 0, 1.0, -1.0).double())
    made.weight.grad = None
    (made._weight() * torch.ones(4, 3, 3, 3)).sum().backward()
    torch.testing.assert_close(made.weight.grad, 20 * torch.cos(20 * made.weight.detach()))


def test_bipers_regularizer_is_the_mean_of_a_half_for_many_periods() -> None:
    assert float(layer("biper", frequency=5000.0).regularizer()) == pytest.approx(0.5, abs=0.06)


@pytest.mark.parametrize("scale", ["channel", "tensor"])
@pytest.mark.parametrize("norm", ["batch", "none"])
def test_a_baked_layer_computes_what_the_trained_one_does(scale: str, norm: str) -> None:
    made = layer("reste", scale=scale, norm=norm)
    generator = torch.Generator().manual_seed(1)
    for p in made.parameters():
        p.data += 0.3 * torch.randn(p.shape, generator=generator)  # gains of both signs
    if norm == "batch":
        made.train()(torch.randn(8, 3, 6, 6, generator=generator))
    made.eval()
    x = torch.randn(4, 3, 6, 6, generator=generator)
    baked = made.baked()
    assert baked.threshold is not None
    signs = torch.where(x >= baked.threshold.view(-1, 1, 1), 1.0, -1.0)
    found = torch.nn.functional.conv2d(signs, baked.weight, baked.bias, padding=1)
    torch.testing.assert_close(found, made(x), rtol=1e-4, atol=1e-4)
    sizes = baked.weight.abs().flatten(1)
    assert torch.equal(sizes, sizes.amax(1, keepdim=True).expand_as(sizes))
