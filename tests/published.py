"""Tensors under published names, by the fill rule of tests/data/parity/README.md."""

import json
import zlib

import numpy as np
import torch


def drawn(name, shape):
    """The rule's standard normal draw of a name."""
    source = np.random.RandomState(zlib.crc32(name.encode()) & 0x7FFFFFFF)
    return torch.from_numpy(np.asarray(source.standard_normal(shape), np.float32))


def filled(name, shape):
    """The rule's tensor of a published name."""
    values = drawn(name, shape)
    if len(shape) >= 2 and not name.endswith(("pos_embed", "pos_embedding", "pad_token")):
        return torch.from_numpy((values.numpy() / np.sqrt(np.prod(shape[1:]))).astype(np.float32))
    if len(shape) <= 1 and name.endswith("weight"):
        return 1 + 0.1 * values
    return 0.1 * values


def state(parity, network):
    """The state dict of one of meta.json's networks: unet_a, unet_b, vq, summarizer, dit."""
    keys = json.loads((parity / "meta.json").read_text())[network]["keys"]
    return {name: filled(name, shape) for name, shape in keys.items()}


def figures(parity, file):
    """A parity file's arrays as tensors."""
    arrays = np.load(parity / f"{file}.npz")
    return {name: torch.from_numpy(np.array(arrays[name])) for name in arrays.files}


def kl_of(vq):
    """The VQ's encoder and decoder with a posterior in the codebook's place."""
    named = {k: v for k, v in vq.items() if not k.startswith(("quant", "encoder.conv_out"))}
    sizes = {"encoder.conv_out": (6, *vq["encoder.conv_out.weight"].shape[1:])}
    sizes["quant_conv"] = (6, 6, 1, 1)
    for name, size in sizes.items():
        named[f"{name}.weight"] = filled(f"{name}.weight", size)
        named[f"{name}.bias"] = filled(f"{name}.bias", size[:1])
    return named
