"""Named overrides of the jobs' configurations; `preset=NAME` on the command line."""

from __future__ import annotations

from typing import Any

PREPARE: dict[str, dict[str, Any]] = {
    # Scales 0-3 of one small slide, on a laptop: the lowest band of rows is held out.
    "tiny": {
        "tile": {
            "patch_px": 64,
            "scales": [0, 1, 2, 3],
            "tissue": [0.5, 0.4, 0.3, 0.25],
            "crops": 700,
            "split": "band",
            "val_fraction": 0.2,
            "block_tiles": 256,
        },
        "embed": {"encoder": "efficientnet_lite0"},
    },
    # ZoomLDM, section 4: TCGA-BRCA, 1,136 slides, about 16.6 million examples at 8 scales, for
    # workers=64 on 8 GPUs: eight readers feed one encoder's card (ViT-L, 123 GFLOP a tile).
    # What it takes, on paper: benchmarks/results/data_2cores_202611.md.
    "brca": {
        "tile": {
            "patch_px": 256,
            "scales": [0, 1, 2, 3, 4, 5, 6, 7],
            "tissue": [0.5, 0.4, 0.3, 0.2, 0.1],
            "patient": "^(TCGA-..-....)",
            "val_fraction": 0.02,
        },
        "embed": {"encoder": "uni", "batch": 64, "dtype": "float16", "gpus": 0.125},
        "shard": {"quality": 95},
    },
    # ZoomLDM, section 4: NAIP at 1, 2, 4 and 8 m, the first three of four bands, no tissue.
    "naip": {
        "tile": {
            "patch_px": 256,
            "scales": [0, 1, 2, 3],
            "mask": "all",
            "base_mpp": 1e6,
            "icc": False,
            "val_fraction": 0.02,
        },
        "embed": {"encoder": "dinov2_vitl14_reg", "batch": 64, "dtype": "float16", "gpus": 0.125},
        "shard": {"quality": 95},
    },
    # Graikos et al., section 4: patches of one scale, each with its own embedding, mirrored.
    "graikos_brca": {
        "tile": {"patch_px": 256, "scales": [0], "patient": "^(TCGA-..-....)"},
        "embed": {"encoder": "hipt_vit256", "batch": 64, "gpus": 0.125},
        "shard": {"quality": 95},
        "encode": {"flips": True},
    },
    "graikos_crc": {
        "tile": {"patch_px": 256, "scales": [0]},
        "embed": {"encoder": "ibot_vitb16", "batch": 64, "gpus": 0.125},
        "shard": {"quality": 95},
        "encode": {"flips": True},
    },
    "graikos_naip": {
        "tile": {"patch_px": 256, "scales": [0], "mask": "all", "base_mpp": 1e6, "icc": False},
        "embed": {"encoder": "vit_b16_imagenet", "batch": 64, "gpus": 0.125},
        "shard": {"quality": 95},
        "encode": {"flips": True},
    },
}

TRAIN: dict[str, dict[str, dict[str, Any]]] = {
    # 64 px patches of scales 0-3 on two cores: minutes, a few million parameters, mud to
    # palette and coarse structure. The learning rate falls to 0 when the time is up.
    "vae": {
        "tiny": {
            "steps": 4000,
            "batch": 16,
            "lr": 2e-3,
            "betas": [0.9, 0.95],
            "warmup": 50,
            "schedule": "cosine",
            "vae": {"width": 64, "blocks": 3},
        },
    },
    "ldm": {
        "tiny": {
            "steps": 20000,
            "batch": 32,
            "lr": 1e-3,
            "warmup": 100,
            "schedule": "cosine",
            "ldm": {
                "unet": {
                    "channels": [32, 64, 128],
                    "attention": [False, False, True],
                    "layers": 1,
                    "heads": 4,
                    "groups": 16,
                },
                "summarizer": {"width": 128, "layers": 2, "heads": 4},
                "prediction": "v_prediction",
            },
        },
    },
    "cdm": {
        "tiny": {
            "steps": 20000,
            "batch": 32,
            "lr": 5e-4,
            "warmup": 100,
            "schedule": "cosine",
            "cdm": {"width": 128, "depth": 4, "heads": 4, "learn_sigma": False},
        },
    },
}
