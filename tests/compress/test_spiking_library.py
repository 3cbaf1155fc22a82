"""Encoders, event cameras, learned delays, Meta-SpikeFormer's blocks, transfer from static images."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgekit.compress.spiking import Frames, Spiking
from edgekit.compress.spiking.delays import Delayed, anneal, optimizer_groups, run_synapses
from edgekit.compress.spiking.encoders import camera, direct, event_frames, latency, poisson, rate, saccade
from edgekit.compress.spiking.metaformer import Attention, MetaSpikeFormer, RepConv, fuse_repconv
from edgekit.compress.spiking.neurons import Neuron, neurons_of
from edgekit.compress.spiking.transfer import Pairs, cka, pairs_of, sliding_share, train_transfer
from edgekit.errors import DataError


def test_rate_counts_are_rounded_and_even() -> None:
    x = torch.rand(50, 3)
    spikes = rate(x, 8)
    assert spikes.shape == (50, 8, 3) and set(spikes.unique().tolist()) <= {0.0, 1.0}
    assert torch.equal(spikes.sum(1), torch.floor(x.double() * 8 + 0.5).float())
    gaps = rate(torch.tensor([[0.25]]), 16).flatten().nonzero().flatten().diff()
    assert gaps.tolist() == [4, 4, 4]


def test_poisson_latency_and_direct() -> None:
    x = torch.tensor([[0.0, 0.3, 1.0]])
    drawn = poisson(x, 4000, torch.Generator().manual_seed(0)).mean(1)[0]
    assert drawn.tolist() == pytest.approx([0.0, 0.3, 1.0], abs=0.03)
    times = latency(torch.tensor([[1.0, 0.5, 0.01, 0.0]]), 9)[0]
    assert times.sum(0).tolist() == [1, 1, 1, 0]
    assert times.argmax(0).tolist()[:3] == [0, 4, 8]
    assert torch.equal(direct(x, 3)[:, 2], x)


def test_event_frames_are_counts_by_hand() -> None:
    t, x, y, p = (torch.tensor(v) for v in ([0, 10, 10, 99], [1, 2, 2, 0], [0, 1, 1, 0], [0, 1, 1, 1]))
    frames = event_frames(t, x, y, p, (2, 3), 10, 100, binary=False)
    assert frames.shape == (10, 2, 2, 3) and frames.sum() == 4
    assert frames[0, 0, 0, 1] == 1 and frames[1, 1, 1, 2] == 2 and frames[9, 1, 0, 0] == 1


def test_a_camera_sees_edges_that_move() -> None:
    still = torch.rand(1, 1, 8, 8).expand(1, 4, 8, 8)
    assert camera(still).sum() == 0
    image = torch.zeros(1, 12, 16)
    image[:, :, 6:] = 1.0
    events = camera(saccade(image, 10, 3.0))
    assert events.shape == (1, 9, 2, 12, 16) and set(events.unique().tolist()) == {0.0, 1.0}
    near, far = events[:, :, :, 3:9, 2:8].sum(), events[:, :, :, 3:9, 8:12].sum()
    assert near > 10 and far == 0  # the edge moves left; zeros come in at the right border
    # a pixel's events add up to its log intensity, to one threshold
    many = camera(saccade(image, 10, 3.0), threshold=0.1, most=100)
    video = torch.log(saccade(image, 10, 3.0) + 0.1)
    assert float((video[:, -1] - video[:, 0] - 0.1 * (many[:, :, 0] - many[:, :, 1]).sum(1)).abs().max()) <= 0.1 + 1e-5


def test_a_rounded_delay_is_one_tap_and_arrives_on_time() -> None:
    layer = Delayed(3, 2, 8, tail=True).eval()
    kernel = layer.kernel()
    assert kernel.shape == (2, 3, 9)
    assert torch.equal((kernel != 0).sum(-1), torch.ones(2, 3, dtype=torch.int64))
    assert torch.allclose(kernel.sum(-1), layer.weight)
    found = layer.synapses()
    assert int(found.delay.min()) >= 0 and int(found.delay.max()) <= 8
    x = torch.zeros(20, 1, 3)
    x[4, 0, 1] = 1
    out = layer(x)
    assert len(out) == 20 + 4
    for pre, post, weight, delay in zip(found.pre, found.post, found.weight, found.delay, strict=True):
        if int(pre) == 1:
            assert float(out[4 + int(delay), 0, int(post)]) == pytest.approx(float(weight))
    random = (torch.rand(20, 4, 3) < 0.3).float()
    assert torch.allclose(run_synapses(found, random, 2, 24), layer(random), atol=1e-5)


def test_the_width_anneals_and_keeps_the_weight() -> None:
    layer = Delayed(4, 4, 12)
    for epoch in (0, 3, 5, 20):
        anneal([layer], epoch, 20)
        assert torch.allclose(layer.kernel().sum(-1), layer.weight, atol=1e-5)
    assert layer.sigma == pytest.approx(0.23)
    layer.position.data.fill_(100)
    layer.clamp()
    assert float(layer.position.max()) == 6
    x = torch.ones(5, 1, 4)
    assert torch.allclose(layer.eval()(x), F.linear(x, layer.weight), atol=1e-5)  # the largest position is no delay


def lags(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Spikes of two channels, (30, N, 2); the class is which comes first, by 6 to 10 steps."""
    generator = torch.Generator().manual_seed(seed)
    first = torch.randint(2, 8, (count,), generator=generator)
    lag = torch.randint(6, 11, (count,), generator=generator)
    y = torch.randint(0, 2, (count,), generator=generator)
    x = torch.zeros(30, count, 2)
    rows = torch.arange(count)
    x[first, rows, y] = 1
    x[first + lag, rows, 1 - y] = 1
    return x, y


@pytest.mark.slow
def test_delays_learn_what_a_leaky_layer_cannot() -> None:
    accuracies = []
    for largest in (12, 0):
        torch.manual_seed(0)
        hidden, neuron = Delayed(2, 24, largest), Neuron(0.8, steps=30, tau=1.5, surrogate="arctangent")
        hidden.weight.data = hidden.weight.data.abs() + 0.2
        head = nn.Linear(24, 2)
        model = nn.ModuleList([hidden, head])
        optimizer = torch.optim.Adam(optimizer_groups(model, 1e-2, 10.0))
        x, y = lags(256, 0)
        for epoch in range(120):
            anneal([hidden], epoch, 120)
            hidden.train()
            spikes = neuron(hidden(x).flatten(0, 1)).reshape(30, 256, 24)
            optimizer.zero_grad()
            F.cross_entropy(head(spikes.sum(0)), y).backward()
            optimizer.step()
            hidden.clamp()
        hidden.eval()
        xt, yt = lags(256, 1)
        with torch.no_grad():
            out = head(neuron(hidden(xt).flatten(0, 1)).reshape(30, 256, 24).sum(0))
        accuracies.append(float((out.argmax(1) == yt).float().mean()))
    assert accuracies[0] > 0.9 and accuracies[1] < 0.8


def trained_norms(model: nn.Module, *inputs: Tensor) -> None:
    """Statistics in the batch norms that differ from 0 and 1."""
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.weight, 0.5, 1.5)
            nn.init.normal_(m.bias, 0, 0.3)
    model.train()
    with torch.no_grad():
        model(*inputs)
    model.eval()


def test_a_fused_repconv_is_the_three() -> None:
    part = nn.Sequential(RepConv(6), nn.BatchNorm2d(6))
    x = torch.randn(4, 6, 7, 7)
    trained_norms(part, x)
    with torch.no_grad():
        before = part(x)
        assert fuse_repconv(part) == 1
        assert torch.allclose(part(x), before, atol=1e-5)
    assert isinstance(part[1], nn.Identity)


def test_attention_is_the_same_in_either_order_and_masks() -> None:
    q, k, v = ((torch.rand(3, 8, 4, 4) < 0.4).float() for _ in range(3))
    part = Attention(8, 2, lambda th: Neuron(th, steps=1), "sdsa3")
    got: list[Tensor] = []
    part.out.register_forward_hook(lambda _m, a, _o: got.append(a[0]))
    part.mixed(q, k, v)
    flat = [t.flatten(2).reshape(3, 2, 4, 16).transpose(2, 3) for t in (q, k, v)]
    other = (flat[0] @ flat[1].transpose(2, 3)) @ flat[2] * 0.125
    assert torch.equal(got[0], other.transpose(2, 3).reshape(3, 8, 4, 4))
    mask = Attention(8, 2, lambda th: Neuron(th, steps=1), "sdsa1").mixed(q, k, v)
    fires = (k * v).sum((2, 3), keepdim=True) >= 0.5
    assert torch.equal(mask, q * fires)


@pytest.mark.parametrize("form", ["sdsa1", "sdsa3"])
def test_every_product_of_the_spikeformer_has_spikes(form: str) -> None:
    torch.manual_seed(0)
    net = MetaSpikeFormer(3, dims=(8, 8, 16, 16), heads=2, steps=2, depths=(1, 1, 1, 1, 1), form=form)  # type: ignore[arg-type]
    x = torch.rand(2, 3, 32, 32)
    trained_norms(net, x)
    with torch.no_grad():
        before = net(x)
        assert fuse_repconv(net) == 8
        assert torch.allclose(net(x), before, atol=1e-3)
        binary: list[bool] = []
        for m in net.modules():
            if isinstance(m, nn.Conv2d | nn.Linear):
                m.register_forward_hook(lambda _m, a, _o: binary.append(bool(((a[0] == 0) | (a[0] == 1)).all())))
        net(x)
    depthwise = sum(isinstance(m, nn.Conv2d) and m.groups > 1 for m in net.modules())
    assert binary.count(False) <= 1 + 2 * depthwise  # the first, and what follows a depthwise one without neurons between
    assert len(neurons_of(net)) > 10


def test_cka() -> None:
    a = torch.randn(40, 6, dtype=torch.float64)
    q, _ = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64))
    assert float(cka(a, a)) == pytest.approx(1, abs=1e-6)
    assert float(cka(a, 3 * a @ q + 5)) == pytest.approx(1, abs=1e-6)
    assert float(cka(a, torch.randn(40, 6, dtype=torch.float64))) < 0.5


def test_static_images_go_over_into_events() -> None:
    data = Pairs(torch.ones(64, 3, 2, 4, 4), torch.arange(64) % 2, torch.zeros(10, 4, 4), torch.arange(10) % 2)
    assert [sliding_share(d) for d in (0.0, 0.5, 1.0)] == [0, 0.125, 1]
    static, events, _ = pairs_of(data, torch.arange(64), 0.0, torch.Generator().manual_seed(0))
    assert static.shape == events.shape and static.sum() == 0
    assert torch.equal(*pairs_of(data, torch.arange(64), 1.0, torch.Generator().manual_seed(0))[:2])
    with pytest.raises(DataError, match="no static image has label 1"):
        pairs_of(
            Pairs(data.events, data.labels, data.static[:1], data.static_labels[:1]), torch.arange(4), 0.0, torch.Generator()
        )


def test_transfer_trains_the_event_head() -> None:
    from edgekit.compress.capture import capture
    from edgekit.compress.spiking.amplitude import fold_amplitudes
    from edgekit.compress.spiking.calibrate import calibrate
    from edgekit.compress.spiking.graph import free_batches, survey
    from edgekit.compress.spiking.unroll import unroll

    torch.manual_seed(0)
    images = torch.zeros(80, 8, 8)
    y = torch.arange(80) % 2
    images[y == 0, 2:6, 3] = 1
    images[y == 1, 3, 2:6] = 1
    events = camera(saccade(images + 0.05 * torch.rand_like(images), 5, 2.0))
    net = nn.Sequential(nn.Conv2d(2, 6, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(96, 2))
    graph = free_batches(capture(Frames(net).eval(), (events[:1],)))
    snn = unroll(graph, survey(graph, True), lambda _: Neuron(steps=4, tau=2.0), 4, frames=True)
    settings = Spiking(method="train", frames=True, neuron="lif", steps=4, epochs=8, learning_rate=1e-2, train_batch_size=16)
    calibrate(snn, graph, (events[:32],), settings)
    fold_amplitudes(snn)
    losses = train_transfer(snn, Pairs(events[:40], y[:40], images, y), settings)
    assert losses[-1] < losses[0]
    with torch.no_grad():
        assert float((snn.module(events[40:]).argmax(1) == y[40:]).float().mean()) > 0.9
