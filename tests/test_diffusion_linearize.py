"""linearize against torch.func.jvp in float64: networks as they are used, and single operations."""

import gc
import weakref

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel, VQModel
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import avg_pool2d, dropout, gelu, group_norm, interpolate, layer_norm
from torch.nn.functional import scaled_dot_product_attention as attention

from raylarge.diffusion.linearize import linearize
from raylarge.models.autoencoder import Autoencoder
from raylarge.models.light_autoencoder import LightAutoencoder


def drawn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def apart(f, x, v):
    """How far the derivative is from torch's, along two directions; the value must be f(x)."""
    with torch.no_grad():
        value, along = linearize(f, x)
        with sdpa_kernel(SDPBackend.MATH):
            wanted = torch.func.jvp(f, (x,), (v,))[1]
        both = [(along(v), wanted), (along(-2 * v), -2 * wanted)]  # as often as one likes
        same = torch.equal(value, f(x)) and all(got.dtype == to.dtype for got, to in both)
        away = [float((got - to).abs().max() / (1 + to.abs().max())) for got, to in both]
    return max(away) if same and all(got.shape == to.shape for got, to in both) else float("inf")


OPERATIONS = {
    "both summands": lambda x: x.mul(2.0) + x.sin(),
    "both of a difference": lambda x: x.exp() - x,
    "from a constant": lambda x: 3.0 - x,
    "less a constant": lambda x: x - torch.ones(5, dtype=x.dtype),
    "a constant less": lambda x: torch.ones(1, 3, 1, 1, dtype=x.dtype) - x,
    "a smaller summand": lambda x: x[:, :, :1] + torch.ones_like(x),
    "alpha": lambda x: torch.add(x, x * x, alpha=3),
    "rsub": lambda x: torch.rsub(x, 2.0),
    "product": lambda x: x * x.cos(),
    "matrix product": lambda x: x.mT @ x,
    "matrix product with a constant": lambda x: drawn(4, 6) @ x.reshape(2, 3, 6, 5),
    "quotient": lambda x: (x / 3) / (2 + x * x),
    "shapes": lambda x: torch.cat([*x.movedim(1, -1).chunk(2, 3), drawn(2, 6, 5, 1)], 3)[:, 1:],
    "stack": lambda x: torch.stack([x, torch.zeros_like(x)]).flatten(1).unflatten(1, (2, -1)),
    "unbind": lambda x: x.unbind(1)[1].squeeze(0) + x.split([1, 2], dim=1)[0][:, 0],
    "a mean and a maximum": lambda x: x.mean(dim=1, keepdim=True) + x.amax(),
    "sizes": lambda x: x.view(x.size(0), -1) / (x.shape[1] * x.numel()),
    "constants made like it": lambda x: torch.ones(3, 1, 1).to(x) * x + torch.ones(1).type_as(x),
    "cut off": lambda x: x + (x * x).detach() + torch.zeros_like(x),
    "unknown": lambda x: torch.cumsum(x, 1).tanh().clamp(-0.5, 0.5) ** 3,
    "pad": lambda x: nn.functional.pad(x, (0, 1, 0, 1)),
    "pool": lambda x: avg_pool2d(interpolate(x, scale_factor=2.0, mode="nearest"), 2),
    "bilinear": lambda x: interpolate(x, size=(9, 7), mode="bilinear"),
    "to another precision": lambda x: x.to(torch.float32).double(),
    "gelu": lambda x: gelu(x) + gelu(x, approximate="tanh"),
    "relu and silu": lambda x: torch.relu(x) + nn.functional.silu(x) + nn.functional.relu(x - 1),
    "dropout at rest": lambda x: dropout(x, 0.5, training=False),
    "norms without weights": lambda x: group_norm(x, 3) + layer_norm(x, (5,)),
    "attention of one": lambda x: attention(x, x, x, scale=0.3),
    "attention with constants": lambda x: attention(x, *drawn(2, 2, 3, 4, 5).unbind()),
    "attention to constants": lambda x: attention(drawn(2, 3, 4, 5), x, drawn(2, 3, 6, 5, seed=1)),
    "masked attention": lambda x: attention(x, x, x, is_causal=True),
    "constants beside": lambda x: x * torch.linspace(0, 1, 5, dtype=x.dtype).exp().cumsum(0),
}  # fmt: skip


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations(name):
    x, v = drawn(2, 3, 6, 5, seed=2), drawn(2, 3, 6, 5, seed=3)
    tolerance = 1e-6 if name == "to another precision" else 1e-10
    assert apart(OPERATIONS[name], x, v) <= tolerance


@pytest.mark.parametrize("heads", [1, 2])
def test_a_unet_with_its_context(heads):
    torch.manual_seed(0)
    network = UNet2DConditionModel(
        sample_size=8, in_channels=3, out_channels=3, block_out_channels=(32, 64),
        layers_per_block=1, cross_attention_dim=16, attention_head_dim=heads, norm_num_groups=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    ).double().eval()  # fmt: skip
    context = drawn(2, 5, 16)
    f = lambda x: network(x, 500, context)[0]  # noqa: E731
    assert apart(f, drawn(2, 3, 8, 8), drawn(2, 3, 8, 8, seed=1)) <= 1e-10


BLOCKS = {
    "block_out_channels": (32, 64),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "norm_num_groups": 8,
}


@pytest.mark.parametrize(
    "network",
    [
        lambda: VQModel(latent_channels=3, **BLOCKS),
        lambda: AutoencoderKL(latent_channels=4, **BLOCKS),
        lambda: AutoencoderTiny(
            encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4
        ),
        lambda: LightAutoencoder(width=16, blocks=1),
    ],
    ids=["vq", "kl", "tiny", "light"],
)  # fmt: skip
def test_autoencoders_both_ways(network):
    torch.manual_seed(0)
    codec = Autoencoder(network().double().eval())
    image = drawn(2, 3, 32, 32)
    with torch.no_grad():
        latent = codec.encode(image)
    assert apart(codec.encode, image, drawn(2, 3, 32, 32, seed=1)) <= 1e-10
    assert apart(codec.decode, latent, drawn(*latent.shape, seed=1)) <= 1e-10


@pytest.mark.parametrize("channels_last", [False, True])
def test_half_precision_keeps_the_direction(channels_last):
    torch.manual_seed(0)
    codec = Autoencoder(VQModel(latent_channels=3, **BLOCKS).double().eval())
    image, v = drawn(2, 3, 32, 32), drawn(2, 3, 32, 32, seed=1)
    with torch.no_grad():
        with sdpa_kernel(SDPBackend.MATH):
            exact = torch.func.jvp(codec.encode, (image,), (v,))[1]
        layout = torch.channels_last if channels_last else torch.preserve_format
        codec.network.to(torch.bfloat16).to(memory_format=layout)
        _, along = linearize(codec.encode, image.bfloat16())
        got = along(v.bfloat16())
    assert nn.functional.cosine_similarity(got.double().flatten(), exact.flatten(), 0) > 0.995


@pytest.mark.parametrize(
    ("f", "told"),
    [
        (lambda x: (x + 1).mul_(2), "in place"),
        (lambda x: nn.functional.relu(x + 1, inplace=True), "in place"),
        (lambda x: dropout(x, 0.5), "eval"),
        (lambda x: torch.ones(3), "does not depend"),
    ],
)
def test_what_cannot_be_linearized_is_refused(f, told):
    with pytest.raises(RuntimeError, match=told):
        linearize(f, drawn(2, 3))


def test_a_derivative_inside_another_value_stays_apart():
    """The tape of one call does not know the tensors of another."""
    x = drawn(4)
    first, along = linearize(lambda z: z.sin(), x)
    _, onward = linearize(lambda z: z * first, x)  # first is a constant here
    v = drawn(4, seed=1)
    assert torch.allclose(onward(v), v * x.sin())
    assert torch.allclose(along(v), v * x.cos())


def test_nothing_is_kept_when_the_derivative_goes():
    """No circle of references: memory returns without the garbage collector."""
    gc.disable()
    try:
        kept = []

        def f(x):
            made = nn.functional.silu(x * 2)
            kept.append(weakref.ref(made))
            return made + 1

        value, along = linearize(f, drawn(8))
        del value, along
        assert kept[0]() is None
    finally:
        gc.enable()


@pytest.mark.parametrize(
    "f",
    [
        lambda x: x.max(dim=1).values + x[:, 0],
        lambda x: torch.fft.fft(x).real,
    ],
)
def test_values_without_a_derivative_beside_others_are_refused(f):
    with pytest.raises(RuntimeError, match="without a derivative"):
        linearize(f, drawn(2, 3))


def test_lists_by_keyword_and_lists_that_grow():
    def f(x):
        parts = [x]
        made = torch.stack(parts).sum(0)
        parts.append(made)
        return torch.cat(tensors=[x, made * x, torch.ones_like(x)], dim=0)

    assert apart(f, drawn(2, 3), drawn(2, 3, seed=1)) <= 1e-10


def test_a_constant_that_was_changed_since_is_told():
    factor = torch.ones(3, dtype=torch.float64)
    _, along = linearize(lambda x: x * factor, drawn(2, 3))
    factor.mul_(3)
    with pytest.raises(RuntimeError, match="changed in place"):
        along(drawn(2, 3))
