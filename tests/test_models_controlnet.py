"""A ControlNet starts as nothing, learns to listen, and is a denoiser like any other."""

import pytest
import torch
from diffusers import ControlNetModel
from torch.nn.attention import SDPBackend, sdpa_kernel

from raylarge.diffusion.schedule import Schedule
from raylarge.errors import UserError
from raylarge.models import controlnet, unet
from raylarge.models.denoiser import Denoiser, guided

CONFIG = unet.UNetConfig(channels=(32, 64), attention=(False, True), layers=1, heads=4)


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return unet.build(CONFIG, (3, 8, 8), context=16).eval()


def loud(network, factor=4):
    """A ControlNet whose zero convolutions are not zero any more."""
    torch.manual_seed(1)
    made = controlnet.build(network, factor).eval()
    zeros = [made.controlnet_cond_embedding.conv_out, made.controlnet_mid_block]
    for module in [*zeros, *made.controlnet_down_blocks]:
        torch.nn.init.normal_(module.weight, std=0.1)
    return made


def inputs(batch=2):
    torch.manual_seed(2)
    return torch.randn(batch, 3, 8, 8), torch.randn(batch, 5, 16)


def controls(batch=2, side=32):
    torch.manual_seed(3)
    return torch.rand(batch, 3, side, side) * 2 - 1


@pytest.mark.parametrize("factor", [1, 2, 4, 8, 16])
def test_a_new_controlnet_changes_nothing_at_any_factor(network, factor):
    made = controlnet.build(network, factor)
    x_t, context = inputs()
    control = controls(side=8 * factor)
    controlled = controlnet.Controlled(network, made, Schedule(prediction="sample"), control)
    assert isinstance(controlled, Denoiser)
    assert torch.equal(controlled(x_t, 500, context), network(x_t, 500, context))
    widths = made.config.conditioning_embedding_out_channels
    assert tuple(widths) == (16, 32, 96, 256, 256)[: len(widths)]


def test_the_copy_computes_what_the_unet_computes(network):
    made = controlnet.build(network, 4)
    torch.nn.init.dirac_(made.controlnet_mid_block.weight)
    found = []
    hook = network.mid_block.register_forward_hook(
        lambda module, args, output: found.append(output)
    )
    x_t, context = inputs()
    network(x_t, 500, context)
    hook.remove()
    middle = made(x_t, 500, context, controls(), return_dict=False)[1]
    assert torch.equal(middle, found[0])


def test_training_opens_the_zero_convolutions(network):
    torch.manual_seed(4)
    made = controlnet.build(network, 4)
    x_t, context = inputs()
    optimizer = torch.optim.Adam(made.parameters(), lr=1e-2)

    def predicted(control):
        return controlnet.Controlled(network, made, Schedule(prediction="sample"), control)(
            x_t, 500, context
        )

    def step():
        optimizer.zero_grad()
        (predicted(controls()) - 1).square().mean().backward()
        optimizer.step()

    plain = network(x_t, 500, context)
    step()
    with torch.no_grad():
        assert not torch.allclose(predicted(controls()), plain, atol=1e-4)
    # The control's own last layer starts at zero as well, behind the others: it hears a step later.
    step()
    with torch.no_grad():
        assert not torch.allclose(predicted(controls()), predicted(-controls()), atol=1e-4)


def test_guidance_repeats_each_control_for_its_own_window(network):
    made, schedule = loud(network), Schedule()
    x_t, context = inputs()
    control = controls()
    both = controlnet.Controlled(network, made, schedule, control)
    with torch.no_grad():
        c, u = both(x_t, 500, context), both(x_t, 500, torch.zeros_like(context))
        assert torch.allclose(guided(both, 2.5)(x_t, 500, context), u + 2.5 * (c - u), atol=1e-4)
        for k in range(2):
            alone = controlnet.Controlled(network, made, schedule, control[k : k + 1])
            assert torch.allclose(
                alone(x_t[k : k + 1], 500, context[k : k + 1]), c[k : k + 1], atol=1e-5
            )
        other = controlnet.Controlled(network, made, schedule, control.flip(0))
        assert not torch.allclose(other(x_t, 500, context), c, atol=1e-2)


def test_forward_mode_goes_through_the_control(network):
    made = loud(network).double()
    denoiser = guided(
        controlnet.Controlled(unet_double(network), made, Schedule(), controls()), 2.0
    )
    x_t, context = (part.double() for part in inputs())
    along = torch.randn(x_t.shape, dtype=torch.float64)

    def x_0(at):
        return denoiser(at, 500, context)

    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        exact = torch.func.jvp(x_0, (x_t,), (along,))[1]
        step = 1e-5
        difference = (x_0(x_t + step * along) - x_0(x_t - step * along)) / (2 * step)
    assert torch.allclose(exact, difference, rtol=1e-4, atol=1e-5)


def unet_double(network):
    copy = unet.UNet.from_config(network.config)
    copy.load_state_dict(network.state_dict())
    return copy.double()


def test_an_image_is_lifted_to_the_patch():
    assert torch.equal(controlnet.lift(controls(), 32), controls())
    flat = torch.full((1, 3, 8, 8), -0.25)
    for side in (16, 32, 64):
        assert torch.allclose(controlnet.lift(flat, side), torch.full((1, 3, side, side), -0.25))
    ramp = torch.linspace(-1, 1, 8).expand(1, 3, 8, 8)  # along the columns
    lifted = controlnet.lift(ramp, 32)
    assert (lifted[..., 4:-4].diff(dim=-1) > 0).all()
    assert lifted.diff(dim=-2).abs().max() < 1e-5


def test_what_does_not_fit_is_refused_with_the_cure(network):
    made = controlnet.build(network, 4)
    x_t, context = inputs()
    small = controlnet.Controlled(network, made, Schedule(), controls(side=16))
    with pytest.raises(UserError, match=r"control is 16x16 px, the latent needs 32x32 px; lift"):
        small(x_t, 500, context)
    three = controlnet.Controlled(network, made, Schedule(), controls(batch=3))
    with pytest.raises(UserError, match="2 latents cannot share 3 controls"):
        three(x_t, 500, context)
    with pytest.raises(UserError, match="12 px cannot be lifted to a patch of 32 px"):
        controlnet.lift(controls(side=12), 32)
    with pytest.raises(UserError, match="factor 6"):
        controlnet.build(network, 6)


def test_a_controlnet_comes_back_from_its_folder(network, tmp_path):
    made = loud(network)
    made.save_pretrained(tmp_path)
    again = ControlNetModel.from_pretrained(tmp_path)
    x_t, context = inputs()
    with torch.no_grad():
        pair = [
            controlnet.Controlled(network, each, Schedule(), controls())(x_t, 500, context)
            for each in (made, again)
        ]
    assert torch.equal(*pair)
