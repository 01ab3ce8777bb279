"""Named overrides of the jobs' configurations; `preset=NAME` on the command line.

A preset is a function: what it prepares and trains, what that costs and what came of it. Costs
are those of `plan=true` (all of them: python -m benchmarks.train_memory only=presets), at an
assumed 35 % of an H100's peak and 2.5 dollars an hour; FIDs are the papers', quoted. Where the
papers are silent, as they are on the steps of every training, the choice is ours.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import Any

from raylarge.errors import UserError

Overrides = dict[str, dict[str, Any]]
"""By `prepare` or a model's name."""

_FAST = {"precision": "bf16", "channels_last": True, "checkpoint_every": 1000, "sheet_every": 5000}
_FALLS = {"schedule": "cosine"}


def _recipe(steps: int, batch: int, lr: float, warmup: int, **more: Any) -> dict[str, Any]:
    return {"steps": steps, "batch": batch, "lr": lr, "warmup": warmup, **more}


def tiny() -> Overrides:
    """64 px patches of scales 0-3 on two cores, about 4 million parameters: minutes.

    From one small slide, whose lowest band of rows is held out. Expect mud, to the slide's
    palette and coarse structure; the learning rate falls to 0 when the time is up. It predicts
    v: predicting noise, 216 steps gave saturated green and black (benchmarks/LOG.md).
    Measured: benchmarks/results/demo_2cores_202612.md.
    """
    tile = {
        "patch_px": 64,
        "scales": [0, 1, 2, 3],
        "tissue": [0.5, 0.4, 0.3, 0.25],
        "crops": 700,
        "split": "band",
        "val_fraction": 0.2,
        "block_tiles": 256,
    }
    unet = {"channels": [32, 64, 128], "attention": [False, False, True], "layers": 1}
    ldm = {
        "unet": {**unet, "heads": 4, "groups": 16},
        "summarizer": {"width": 128, "layers": 2, "heads": 4},
        "prediction": "v_prediction",
    }
    vae, cdm = {"width": 64, "blocks": 3}, {"width": 128, "depth": 4, "heads": 4}
    return {
        "prepare": {"tile": tile, "embed": {"encoder": "efficientnet_lite0"}},
        "vae": _recipe(4000, 16, 2e-3, 50, betas=[0.9, 0.95], vae=vae, **_FALLS),
        "ldm": _recipe(20000, 32, 1e-3, 100, ldm=ldm, **_FALLS),
        "cdm": _recipe(
            20000, 32, 5e-4, 100, cdm={**cdm, "learn_sigma": False, "standardised": True}, **_FALLS
        ),
    }


def small() -> Overrides:
    """64 px patches of scales 0-5 on one GPU, 41.6 million parameters: hours.

    From a few whole sections of 10,000 px at 0.7 µm/px (add tile.mpp=0.7 where the files do not
    say it), the lowest rows of each held out. The encoder is trained on ImageNet's labels: a
    stand-in that needs no network, not a pathology encoder. U-Net of 36.4 M, Summarizer of
    5.2 M, CDM of 22.0 M, a light autoencoder of 2.5 M, all ours.

    It predicts v, as `tiny` does: noise predicted at t = 981 is off by 70 times its error in
    x_0, which hours are few to mend (benchmarks/LOG.md). Cost: by its FLOPs a third of an hour
    of an H100; networks this small are bound by launching kernels, so expect two to four hours.
    Expect nuclei and glands of the right size and place, not sharp ones. Not measured yet.
    """
    prepare = {
        "tile": {
            "patch_px": 64,
            "scales": [0, 1, 2, 3, 4, 5],
            "tissue": [0.5, 0.4, 0.3, 0.25, 0.2],
            "base_mpp": 0.7,
            "crops": 500,
            "split": "band",
            "val_fraction": 0.15,
        },
        "embed": {"encoder": "efficientnet_lite0"},
        "shard": {"quality": 95},
    }
    ldm = {
        "unet": {"channels": [96, 192, 288], "attention": [False, True, True], "heads": 8},
        "summarizer": {"width": 256, "layers": 6, "heads": 8},
        "prediction": "v_prediction",
    }
    vae, cdm = {"width": 128, "blocks": 4}, {"width": 384, "depth": 8, "heads": 6}
    cdm |= {"learn_sigma": False, "standardised": True}
    return {
        "prepare": prepare,
        "vae": _recipe(30000, 64, 1e-3, 500, betas=[0.9, 0.95], vae=vae, **_FAST, **_FALLS),
        "ldm": _recipe(100000, 256, 3e-4, 1000, ldm=ldm, **_FAST, **_FALLS),
        "cdm": _recipe(50000, 256, 2e-4, 1000, cdm=cdm, **_FAST, **_FALLS),
    }


_TISSUE = {
    "patch_px": 256,
    "scales": [0, 1, 2, 3, 4, 5, 6, 7],
    "tissue": [0.5, 0.4, 0.3, 0.2, 0.1],
    "patient": "^(TCGA-..-....)",
    "val_fraction": 0.02,
}
_GROUND = {"patch_px": 256, "mask": "all", "base_mpp": 1e6, "icc": False}


def brca() -> Overrides:
    """ZoomLDM on TCGA-BRCA (section 4.1): 8 scales, 3 GPUs x 200 samples, U-Net of 400.9 M.

    1,136 slides, about 16.6 million examples (12.5 million of scale 0), every scale as likely.
    Prepare with workers=64 on 8 GPUs: eight readers feed one encoder's card (ViT-L, 123 GFLOP a
    tile; benchmarks/results/data_2cores_202611.md). Published: lr 1e-4 after 10,000 steps of
    warm-up, noise predicted, condition dropped with p = 0.1, U-Net averaged, VQ-f4, UNI; the
    U-Net started from ImageNet's (ldm.init=FILE). CDM: DiT-B, lr 1e-4 constant, batch 256, no
    weight decay (S3.1 and its code). Steps, precision and two passes of 100 are ours.

    Cost: 63 hours of an H100 (21 on three), 157 dollars, 52 GiB a card; on cards of 48 GB give
    checkpointing=true. The CDM: 3 hours of one, 8 dollars. Published FID, scales 0-7: 6.77, 7.60,
    7.98, 10.73, 8.74, 7.99, 8.34, 13.42 (Table 1); with conditions drawn by the CDM: 9.04, 10.05,
    14.36, 19.68, 14.06, 13.46, 14.40, 26.09.
    """
    embed = {"encoder": "uni", "batch": 64, "dtype": "float16", "gpus": 0.125}
    ldm = {"prediction": "epsilon", "drop": 0.1}
    ours = {"workers": 3, "micro_batch": 100}
    return {
        "prepare": {"tile": _TISSUE, "embed": embed, "shard": {"quality": 95}},
        "ldm": _recipe(200000, 600, 1e-4, 10000, ldm=ldm, **ours, **_FAST),
        "cdm": _recipe(400000, 256, 1e-4, 0, weight_decay=0.0, workers=1, **_FAST),
    }


def brca_released() -> Overrides:
    """`brca` as its released configuration has it: lr 2e-5, warm-up 1,000, 420 samples a GPU.

    The paper and the code differ; this is the code (its BRCA batch stands in a comment). Cost:
    66 hours of an H100, 165 dollars. Of which of the two the published FIDs are, nobody says.
    """
    paper = brca()
    code = _recipe(100000, 1260, 2e-5, 1000, micro_batch=105)
    return {**paper, "ldm": {**paper["ldm"], **code}}


def naip() -> Overrides:
    """ZoomLDM on NAIP (S1): 1, 2, 4 and 8 m, DINOv2, the first three of four bands, no tissue.

    365,119, 94,263, 25,690 and 8,772 examples. Training "similar" to `brca`'s; the released
    configuration has lr 2e-5, warm-up 1,000 and 400 samples a GPU. Nothing is published of a
    CDM: it is `brca`'s here. Cost: 19 hours of an H100, 47 dollars, and one hour for the CDM.
    Published FID, scales 0-3: 10.93, 7.77, 7.34, 8.46 (Table S1).
    """
    paper = brca()
    tile = {**_GROUND, "scales": [0, 1, 2, 3], "val_fraction": 0.02}
    embed = {**paper["prepare"]["embed"], "encoder": "dinov2_vitl14_reg"}
    return {
        "prepare": {**paper["prepare"], "tile": tile, "embed": embed},
        "ldm": {**paper["ldm"], "steps": 60000},
        "cdm": {**paper["cdm"], "steps": 100000},
    }


def graikos_brca() -> Overrides:
    """Graikos et al. on TCGA-BRCA at 20x: one scale, one HIPT embedding a patch, mirrored.

    15 million patches. Released: AdamW in 8 bit, lr 1e-4, 100 samples a GPU, no average (ours
    keeps one), embeddings divided by their norm; the authors name six cards of 48 GB. Two
    tokens, patch (384) and region (768), with ldm.region=vectors-DIGEST; without it the patch's
    alone, which is what the released samplers amount to: they give zeros for the region.

    Cost: 94 hours of an H100 (16 on six), 234 dollars, 17 GiB a card. Published FID of patches:
    6.98 (Table 7).
    """
    tile = {"patch_px": 256, "scales": [0], "patient": "^(TCGA-..-....)"}
    return _graikos(tile, "hipt_vit256", 250000)


def graikos_crc() -> Overrides:
    """Graikos et al. on TCGA-CRC at 20x: iBOT ViT-B/16, one token.

    8 million patches; the rest as `graikos_brca`. Cost: 49 hours of an H100, 122 dollars.
    Published FID of patches: 6.78.
    """
    return _graikos({"patch_px": 256, "scales": [0]}, "ibot_vitb16", 130000)


def graikos_naip() -> Overrides:
    """Graikos et al. on NAIP at 1 m: ImageNet's ViT-B/16, one token, 256 samples a GPU.

    667,000 patches; the rest as `graikos_brca`. Cost: 8 hours of an H100, 20 dollars. Published
    FID of patches: 11.5.
    """
    tile = {**_GROUND, "scales": [0]}
    return _graikos(tile, "vit_b16_imagenet", 50000, batch=256, workers=1)


def _graikos(tile: dict[str, Any], encoder: str, steps: int, **more: Any) -> Overrides:
    ldm = {"summarizer": {"kind": "vector"}, "prediction": "epsilon", "drop": 0.1}
    ours = {"workers": 6, "checkpointing": True, **_FAST}
    released = {"strategy": "torch", "optimizer": "adamw8bit", "ldm": ldm}
    return {
        "prepare": {
            "tile": tile,
            "embed": {"encoder": encoder, "batch": 64, "gpus": 0.125},
            "shard": {"quality": 95},
            "encode": {"flips": True},
        },
        "ldm": {**_recipe(steps, 600, 1e-4, 1000, **ours, **released), **more},
    }


PRESETS: dict[str, Callable[[], Overrides]] = {
    made.__name__: made
    for made in (
        tiny,
        small,
        brca,
        brca_released,
        naip,
        graikos_brca,
        graikos_crc,
        graikos_naip,
    )
}

PREPARE: dict[str, dict[str, Any]] = {name: made()["prepare"] for name, made in PRESETS.items()}
"""By preset, for jobs/prepare.py."""

TRAIN: dict[str, dict[str, dict[str, Any]]] = {
    model: {name: made()[model] for name, made in PRESETS.items() if model in made()}
    for model in ("vae", "ldm", "cdm")
}
"""By model and preset, for jobs/train.py."""


def overrides(model: str, preset: str) -> dict[str, Any]:
    """What a preset says of training a model.

    Raises:
        UserError: no such preset, or one that has nothing to say of the model.
    """
    known = TRAIN.get(model, {})
    if preset in known:
        return known[preset]
    if preset not in PRESETS:
        near = difflib.get_close_matches(preset, PRESETS, n=1)
        meant = f"did you mean '{near[0]}'? They are" if near else "choose one of"
        raise UserError(f"there is no preset '{preset}'; {meant}: {', '.join(PRESETS)}.")
    if model == "vae":
        raise UserError(
            f"preset={preset} trains no autoencoder, it takes the published VQ-f4: python "
            f"jobs/import_weights.py checkpoint=weights.ckpt out=BUNDLE brings it with the "
            f"published model, whose other parts a training into out=BUNDLE replaces."
        )
    cure = f"those that do: {', '.join(known)}" if known else "leave preset= out, as none does"
    raise UserError(f"preset={preset} says nothing of model={model}; {cure}.")
