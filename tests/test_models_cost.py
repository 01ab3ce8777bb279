"""Costs against figures measured on the published networks, and tables computed from those."""

import pytest
import torch
from torch import nn

from raylarge.geometry import Patch, origins
from raylarge.models import autoencoder, cost, unet
from raylarge.models.cost import CallCounts, CallFlops
from raylarge.models.summarizer import Summarizer

PUBLISHED = CallFlops(unet=210.6e9, decode=670.8e9, encode=345.2e9)
PATCH = Patch(side_px=256, factor=4, channels=3, scales=8)
PEAK = 989.4  # dense bf16 TFLOP/s of an H100


def overlapping(side_px, stride_lat):
    """Windows of 64 latent cells that cover a square canvas."""
    return len(origins(side_px // 4, 64, stride_lat)) ** 2


def joint(patches, steps, corrections, guided=2, passes=1):
    """Algorithm S2 with its guide: N S [g (1 + m K) U + K (D + 2 E)] + S (g U + D).

    m is 2 for a pass of the derivative and the estimate after the move, 1 without the latter.
    """
    total = patches * steps * corrections
    unet = guided * (patches * steps + passes * total + steps)
    return CallCounts(unet=unet, decode=total + steps, encode=2 * total)


def strided(count, steps, guided=2):
    """Overlapping windows denoised together (Graikos et al.): n S g U."""
    return CallCounts(unet=count * steps * guided)


def petaflops(counts):
    return cost.total_flops(counts, PUBLISHED) / 1e15


def test_the_published_networks_cost_what_was_measured():
    with torch.device("meta"):
        network = unet.build(unet.UNetConfig(), PATCH.latent, 512)
        codec = autoencoder.Autoencoder(autoencoder.vq_f4())
    found = cost.network_flops(network, codec, PATCH, context=(65, 512))
    assert found.unet == pytest.approx(PUBLISHED.unet, rel=0.03)
    assert found.decode == pytest.approx(PUBLISHED.decode, rel=0.03)
    assert found.encode == pytest.approx(PUBLISHED.encode, rel=0.03)


def test_the_summarizer_is_counted_with_its_attention():
    """5.1: the 3.4 that a counter shows under no_grad leaves out torch's fused attention."""
    with torch.device("meta"):
        network = Summarizer().eval()
    grid, scale = torch.empty(1, 1024, 8, 8), torch.zeros(1, dtype=torch.long)
    found = cost.forward_flops(network, grid, scale)
    layers = 12 * 65 * (4 * 512**2 + 2 * 512 * 2048 + 2 * 65 * 512)
    around = 64 * 1024 * 512 + 65 * 512**2
    assert found == 2 * (layers + around)
    assert found == pytest.approx(5.1e9, rel=0.01)
    assert torch.backends.mha.get_fastpath_enabled()


def test_flops_are_two_per_mac_on_any_device_and_weights_stay():
    network = nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), nn.Flatten(), nn.Linear(5 * 64, 7))
    before = {name: value.clone() for name, value in network.state_dict().items()}
    assert cost.forward_flops(network, torch.rand(2, 3, 8, 8)) == 2 * 2 * (
        8 * 8 * 5 * 3 * 9 + 5 * 64 * 7
    )
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    copied = cost.on_meta(network)
    assert {p.device.type for p in copied.parameters()} == {"meta"}
    assert {p.device.type for p in network.parameters()} == {"cpu"}


def test_tied_weights_stay_tied():
    network = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4))
    network[2].weight = network[0].weight
    copied = cost.on_meta(network)
    assert copied[2].weight is copied[0].weight
    assert copied[1].running_mean.is_meta


@pytest.mark.parametrize(
    ("side_px", "stride", "count"),
    [
        *[(1024, s, n) for s, n in ((4, 2401), (8, 625), (16, 169), (32, 49))],
        *[(4096, s, n) for s, n in ((4, 58_081), (8, 14_641), (16, 3721), (32, 961))],
    ],
)
def test_windows_of_a_canvas(side_px, stride, count):
    assert overlapping(side_px, stride) == count


# Evaluations without the guide's, PFLOP with them, seconds at 60 and 50 % of one card's peak.
JOINT = [
    ("1024, S 50, K 1", (16, 50, 1, 2, 1), (3200, 800, 1600), 1.82, 3.1, 3.7),
    ("1024, m 2", (16, 50, 1, 2, 2), (4800, 800, 1600), 2.16, 3.6, 4.4),
    ("4096, S 50, K 1", (256, 50, 1, 2, 1), (51_200, 12_800, 25_600), 28.3, 47.6, 57.1),
    ("4096, m 2", (256, 50, 1, 2, 2), (76_800, 12_800, 25_600), 33.7, 56.7, 68.0),
    ("4096, S 20, K 10", (256, 20, 10, 2, 2), (215_040, 51_200, 102_400), 115.0, 194, 233),
]


@pytest.mark.parametrize(
    ("how", "windows", "total", "at_60", "at_50"),
    [row[1:] for row in JOINT],
    ids=[row[0] for row in JOINT],
)
def test_joint_sampling(how, windows, total, at_60, at_50):
    counts, steps = joint(*how), how[1]
    assert counts == CallCounts(*windows) + CallCounts(unet=2 * steps, decode=steps)
    assert petaflops(counts) == pytest.approx(total, rel=0.005)
    assert cost.seconds(counts, PUBLISHED, 0.6 * PEAK) == pytest.approx(at_60, rel=0.015)
    assert cost.seconds(counts, PUBLISHED, 0.5 * PEAK) == pytest.approx(at_50, rel=0.015)


def test_without_correction_or_guidance():
    assert joint(16, 50, 0, guided=1) == CallCounts(unet=16 * 50 + 50, decode=50)


@pytest.mark.parametrize(
    ("side_px", "evaluations", "total"), [(4096, 44_652, 9.4), (1024, 2028, 0.43)]
)
def test_seam_removal(side_px, evaluations, total):
    counts = strided(overlapping(side_px, 16), steps=6)
    assert counts == CallCounts(unet=evaluations)
    assert petaflops(counts) == pytest.approx(total, rel=0.01)


def test_the_final_decode():
    counts = CallCounts(decode=overlapping(4096, 16))
    assert counts == CallCounts(decode=3721)
    assert petaflops(counts) == pytest.approx(2.50, rel=0.005)
    assert cost.seconds(counts, PUBLISHED, 0.6 * PEAK) == pytest.approx(4.2, rel=0.015)


@pytest.mark.parametrize(
    ("side_px", "stride", "total"),
    [
        *[(1024, s, f) for s, f in ((4, 50.6), (8, 13.2), (16, 3.56), (32, 1.03))],
        *[(4096, s, f) for s, f in ((4, 1223), (8, 308), (16, 78.4), (32, 20.2))],
    ],
)
def test_strided_sampling(side_px, stride, total):
    counts = strided(overlapping(side_px, stride), 50)  # the final decode is not in these
    assert petaflops(counts) == pytest.approx(total, rel=0.005)


def test_a_rate_is_positive():
    with pytest.raises(ValueError, match="TFLOP/s is not positive"):
        cost.seconds(CallCounts(unet=1), PUBLISHED, 0.0)
