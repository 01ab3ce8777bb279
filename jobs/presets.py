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
}
