"""Images to classes: a network of timm in which samples of a batch never meet.

    image in [-1, 1] -> standardised as timm says -> network -> a logit per class

Batch normalisation makes an image's result, and so its loss, hang on its neighbours in the batch,
which differ with the number of workers. In its place stands group normalisation (Wu & He 2018,
16 channels to a group), or, under weights that were trained with it, the same layer frozen at
the statistics it has. Layers that drop at random do not drop.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import timm
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from jaxtyping import Float
from timm.data import resolve_model_data_config
from timm.layers import DropPath, freeze_batch_norm_2d
from torch import Tensor, nn

from raylarge.errors import UserError
from raylarge.models import state_dicts, weights

_GROUP = 16  # channels


class Classifier(ModelMixin, ConfigMixin):
    """A network of timm with a head for some classes."""

    mean: Tensor
    deviation: Tensor

    @register_to_config
    def __init__(
        self,
        network: str = "resnet18",
        classes: Sequence[str] = ("no", "yes"),
        frozen: bool = False,
    ) -> None:
        """Draw the weights.

        Args:
            network: its name in timm.
            classes: their names, in the order of the logits.
            frozen: batch normalisation stays, frozen, and not group normalisation.
        """
        super().__init__()
        made = _made(network, len(classes))
        self.body = freeze_batch_norm_2d(made) if frozen else _grouped(made)
        for module in self.body.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            if isinstance(module, DropPath):
                module.drop_prob = 0.0
        known = resolve_model_data_config(self.body)
        self.register_buffer("mean", torch.tensor(known["mean"]).reshape(3, 1, 1))
        self.register_buffer("deviation", torch.tensor(known["std"]).reshape(3, 1, 1))

    def forward(self, image: Float[Tensor, "B 3 P P"]) -> Float[Tensor, "B classes"]:
        """The logits of each image."""
        found: Tensor = self.body(((image + 1) / 2 - self.mean) / self.deviation)
        return found.float()


def build(network: str, classes: Sequence[str], side_px: int, path: str = "") -> Classifier:
    """A classifier for images of a side, with random weights or those of a file.

    Args:
        network: its name in timm.
        classes: in the order of the logits.
        side_px: of the images.
        path: weights of this network, with whatever head: timm's, or a `Classifier`'s. Those of
            another head stay behind.

    Raises:
        UserError: no such network, one that does not take such images, or not its weights.
    """
    state = _stored(path) if path else {}
    frozen = any(name.endswith("running_mean") for name in state)
    made = Classifier(network, list(classes), frozen)
    if state:
        _fill(made.body, state, network)
    try:
        with torch.no_grad():
            made.eval()(torch.zeros(1, 3, side_px, side_px))
    except (AssertionError, RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"classifier.network={network} does not take images of {side_px} px ({reason}); "
            f"choose one that takes any size, such as resnet18."
        ) from error
    return made.train()


def _made(network: str, classes: int) -> nn.Module:
    """A network of timm; nothing is fetched."""
    if ":" in network or not timm.is_model(network.split(".")[0]):
        near = ", ".join(timm.list_models(f"*{network[:6]}*")[:3]) or "resnet18"
        raise UserError(f"classifier.network={network} is no network of timm; near it are: {near}.")
    made: nn.Module = timm.create_model(network, pretrained=False, num_classes=classes)
    return made


def _grouped(module: nn.Module) -> nn.Module:
    """A network with group normalisation in place of batch normalisation.

    Layer by layer, as few networks of timm let one choose the norm, and some join it with the
    activation, which then follows it.
    """
    for name, child in module.named_children():
        if isinstance(child, nn.modules.batchnorm._BatchNorm):
            channels = child.num_features
            groups = math.gcd(channels, max(1, channels // _GROUP))
            norm = nn.GroupNorm(groups, channels, child.eps)
            after = [getattr(child, key) for key in ("drop", "act") if hasattr(child, key)]
            module.add_module(name, nn.Sequential(norm, *after) if after else norm)
        else:
            _grouped(child)
    return module


def _stored(path: str) -> state_dicts.State:
    """A file's tensors in timm's names."""
    state = weights.read_tensors(path)
    if any(name.startswith("body.") for name in state):  # a Classifier's own
        state = {k.removeprefix("body."): v for k, v in state.items() if k[:5] == "body."}
    return {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}


def _fill(network: Any, state: state_dicts.State, name: str) -> None:
    """Copy all weights but a head's of other classes.

    Raises:
        UserError: they are not this network's.
    """
    wanted = network.state_dict()
    state = state_dicts.strip_prefixes(state, wanted)
    heads = network.pretrained_cfg.get("classifier") or ()
    heads = (heads,) if isinstance(heads, str) else tuple(heads)
    own = tuple(f"{head}." for head in heads)
    same = all(
        state.get(key, value).shape == value.shape
        for key, value in wanted.items()
        if key.startswith(own)
    )
    if not same and own:
        state, wanted = weights.without_prefixes(state, own), weights.without_prefixes(wanted, own)
    weights.check_names(wanted, state, f"classifier.network={name}")
    network.load_state_dict(state, strict=False)
