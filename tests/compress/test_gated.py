"""Gated components: what is cut out equals what the gates let through, and gradients stay in the open groups."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from edgekit.compress.lowrank.gated import GatedLinear, extract, gated, open_groups, orthogonality
from edgekit.errors import InputError


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 40), nn.ReLU(), nn.Linear(40, 10)).eval()


def test_all_gates_open_at_full_rank_is_the_original() -> None:
    model, x = net(), torch.randn(9, 64)
    made = gated(model, ["0"], 8, 8, 5)
    assert torch.allclose(made[0](x), model[0](x), atol=1e-5) and float(orthogonality(made)) < 1e-8
    assert not torch.allclose(gated(model, ["0"], 2, 1, 2)[0](x), model[0](x), atol=1e-2)
    with pytest.raises(InputError, match="more than the rank 40"):
        gated(model, ["2"], 10, 8, 5)
    with pytest.raises(InputError, match="has a gated form"):
        gated(model, ["1"], 1, 1, 1)


@pytest.mark.parametrize("shape", [(6, 64), (6, 3, 64)])
def test_a_cut_out_model_computes_what_its_group_saw(shape: tuple[int, ...]) -> None:
    made, x = gated(net(), ["0", "2"], 4, 3, 5), torch.randn(*shape)
    sizes = []
    for group in range(5):
        small = extract(made, [group])
        with open_groups(made, torch.full((6,), group)):
            assert torch.allclose(made(x), small(x), atol=1e-6)
        assert not any(isinstance(m, GatedLinear) for m in small.modules())
        sizes.append(sum(p.numel() for p in small.parameters()))
    assert set(sizes) == {7 * (64 + 48) + 48 + 7 * (48 + 40) + 40 + 410}
    counts = [sum(p.numel() for p in extract(made, range(n)).parameters()) for n in range(6)]
    assert counts == sorted(counts)  # more groups, more components; shared ones alone are a model too
    assert torch.allclose(extract(made, range(5))(x), made(x), atol=1e-5)
    large = extract(gated(net(), ["2"], 40, 0, 0), [])  # two thin layers would be larger than one
    assert isinstance(large[2], nn.Linear)


def test_components_of_other_groups_have_no_part_in_a_batch() -> None:
    made, x = gated(net(), ["0"], 4, 3, 5), torch.randn(4, 64)
    with open_groups(made, torch.tensor([1, 1, 3, 3])):
        made(x).square().sum().backward()
    layer = made[0]
    touched = {int(o) for o, g in zip(layer.owner, layer.s.grad, strict=True) if g != 0}
    assert touched == {-1, 1, 3} and layer.opened is None
    closed = [i for i, o in enumerate(layer.owner) if int(o) in (0, 2, 4)]
    assert (layer.u.grad[:, closed] == 0).all() and (layer.v.grad[:, closed] == 0).all()


def test_digits_by_groups_of_classes() -> None:
    found = pytest.importorskip("sklearn.datasets").load_digits()
    x, y = torch.from_numpy(found.data).float() / 16, torch.from_numpy(found.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x, y = x[order], y[order]
    torch.manual_seed(0)
    made = gated(net(), ["0", "2"], 6, 4, 5)
    optimizer = torch.optim.Adam(made.parameters(), 3e-3)
    for _ in range(8):
        for part in torch.randperm(1197).split(64):
            with open_groups(made, y[part] // 2):
                loss = F.cross_entropy(made(x[part]), y[part]) + 1e-3 * orthogonality(made)
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
    own = y[1197:] // 2 == 0
    small, images, labels = extract(made, [0]), x[1197:][own], y[1197:][own]
    right = (small(images).argmax(1) == labels).float().mean()
    with open_groups(made, torch.zeros(len(images), dtype=torch.long)):
        assert torch.equal(made(images).argmax(1), small(images).argmax(1))
    assert right > 0.95 and sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in net().parameters()) / 2
