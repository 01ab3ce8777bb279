"""Image classifier: a network of timm in which the samples of a batch are independent.

    image in [-1, 1] -> standardised as timm does -> network -> a logit per class

With batch normalisation the loss of an image would depend on the others in its batch, which
change with the number of workers. It is replaced by group normalisation (Wu & He 2018, 16
channels to a group) or, with weights that were trained with it, frozen. Dropout is off.
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
    """A network of timm with a logit for each class."""

    mean: Tensor
    deviation: Tensor

    @register_to_config
    def __init__(
        self,
        network: str = "resnet18",
        classes: Sequence[str] = ("no", "yes"),
        frozen: bool = False,
    ) -> None:
        """Initialize with random weights.

        Args:
            network: its name in timm.
            classes: names, in the order of the logits.
            frozen: freeze batch normalisation instead of replacing it by group normalisation.
        """
        super().__init__()
        body = _timm_network(network, len(classes))
        self.body = freeze_batch_norm_2d(body) if frozen else _grouped(body)
        for module in self.body.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            if isinstance(module, DropPath):
                module.drop_prob = 0.0
        data = resolve_model_data_config(self.body)
        self.register_buffer("mean", torch.tensor(data["mean"]).reshape(3, 1, 1))
        self.register_buffer("deviation", torch.tensor(data["std"]).reshape(3, 1, 1))

    def forward(self, image: Float[Tensor, "B 3 P P"]) -> Float[Tensor, "B classes"]:
        """Return the logits of each image."""
        logits: Tensor = self.body(((image + 1) / 2 - self.mean) / self.deviation)
        return logits.float()


def build(network: str, classes: Sequence[str], side_px: int, path: str = "") -> Classifier:
    """Build a classifier for images of a side, with random weights or those of a file.

    Args:
        network: its name in timm.
        classes: in the order of the logits.
        side_px: of the images.
        path: weights of timm's network or of a `Classifier`; a head of other classes is dropped.

    Raises:
        UserError: an unknown network, one that does not accept such images, or weights of another.
    """
    state = _timm_state(path) if path else {}
    frozen = any(name.endswith("running_mean") for name in state)
    classifier = Classifier(network, list(classes), frozen)
    if state:
        _fill(classifier.body, state, network)
    try:
        with torch.no_grad():
            classifier.eval()(torch.zeros(1, 3, side_px, side_px))
    except (AssertionError, RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"classifier.network={network} does not take images of {side_px} px ({reason}); "
            f"choose one that takes any size, such as resnet18."
        ) from error
    return classifier.train()


def _timm_network(network: str, classes: int) -> nn.Module:
    if ":" in network or not timm.is_model(network.split(".")[0]):
        near = ", ".join(timm.list_models(f"*{network[:6]}*")[:3]) or "resnet18"
        raise UserError(
            f"classifier.network={network} is no network of timm; similar names: {near}."
        )
    body: nn.Module = timm.create_model(network, pretrained=False, num_classes=classes)
    return body


def _grouped(module: nn.Module) -> nn.Module:
    """Replace batch normalisation by group normalisation.

    Some networks of timm fuse the norm with an activation, which is kept after it.
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


def _timm_state(path: str) -> state_dicts.State:
    """Return the tensors of a file under timm's names."""
    state = weights.read_tensors(path)
    if any(name.startswith("body.") for name in state):
        state = {k.removeprefix("body."): v for k, v in state.items() if k[:5] == "body."}
    return {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}


def _fill(network: Any, state: state_dicts.State, name: str) -> None:
    """Copy all weights, except those of a head of other classes.

    Raises:
        UserError: the weights are not this network's.
    """
    expected = network.state_dict()
    state = state_dicts.strip_prefixes(state, expected)
    heads = network.pretrained_cfg.get("classifier") or ()
    heads = tuple(f"{head}." for head in ((heads,) if isinstance(heads, str) else heads))
    head = [(key, value) for key, value in expected.items() if key.startswith(heads)]
    if heads and any(state.get(key, value).shape != value.shape for key, value in head):
        state = weights.without_prefixes(state, heads)
        expected = weights.without_prefixes(expected, heads)
    weights.check_names(expected, state, f"classifier.network={name}")
    network.load_state_dict(state, strict=False)
