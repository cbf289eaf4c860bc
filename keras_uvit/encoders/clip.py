"""CLIP (Radford et al. 2021, arXiv 2103.00020): keras-hub's towers and their tokenizer, from files.

A folder is either Hugging Face's (config.json, model.safetensors, vocab.json, merges.txt) or
keras-hub's own preset (config.json, model.weights.h5, assets/tokenizer).
"""

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import keras
import numpy as np

from keras_uvit import backend, io
from keras_uvit.convert import load_torch_weights, save_torch_weights
from keras_uvit.encoders.tokenizer import END, START, Tokenizer
from keras_uvit.inference import DAMAGE, own_defaults
from keras_uvit.optional import optional
from keras_uvit.types import PathLike

CLEAN = "clean_text"  # in config.json: the choice of `save`, which is not Hugging Face's
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
# Hugging Face's defaults, which its files leave out: (name there, name here, default).
TEXT_KEYS = [
    ("vocab_size", "vocabulary_size", 49408),
    ("hidden_size", "hidden_dim", 512),
    ("num_hidden_layers", "num_layers", 12),
    ("num_attention_heads", "num_heads", 8),
    ("intermediate_size", "intermediate_dim", 2048),
    ("max_position_embeddings", "max_sequence_length", 77),
]
VISION_KEYS = [
    ("hidden_size", "hidden_dim", 768),
    ("num_hidden_layers", "num_layers", 12),
    ("num_attention_heads", "num_heads", 12),
    ("intermediate_size", "intermediate_dim", 3072),
    ("patch_size", "patch_size", 32),
]
MOST = 1_000_000  # of any size in a file's configuration


def keras_hub() -> ModuleType:
    """The package, or ImportError that says how to install it."""
    backend.keep_tensorflow_off_accelerators()  # keras-hub imports it on every backend
    return optional("keras_hub", "text", "CLIP comes with keras-hub")


def text_tower(**config: Any) -> keras.Model:
    """keras-hub's `CLIPTextEncoder`: token ids `(B, L)` to the last hidden state `(B, L, D)`."""
    with own_defaults("float32"):
        tower = keras_hub().models.CLIPTextEncoder(
            **config, embedding_dim=config["hidden_dim"], dtype="float32"
        )
    return _as_published(tower)


def _as_published(tower):
    # keras-hub 0.32 has 1e-6 in the last norm alone; CLIP has 1e-5 in all.
    tower.layer_norm.epsilon = 1e-5
    return tower


def load(
    source: PathLike, whole: bool = False, clean: bool | None = None
) -> tuple[keras.Model, Tokenizer, str]:
    """CLIP from a folder, or keras-hub's preset, downloaded.

    Args:
        source: path of a folder (see above), or the name of a preset such as
            "clip_vit_large_patch14".
        whole: bool. Both towers, `CLIPBackbone`; otherwise the text tower alone.
        clean: bool, whether captions are cleaned before they are read (`tokenizer.cleaned`);
            `None` is what a folder that `save` wrote says, and `True` for published ones.

    Returns:
        (keras-hub model, `Tokenizer`, name).

    Raises:
        FileNotFoundError: if the folder or a file in it is missing.
        ImportError: without keras-hub, tokenizers or ftfy.
        ValueError: if a file is damaged or of something else.
    """
    folder = _folder(source)
    config = _config(folder / "config.json")
    is_preset = "registered_name" in config
    model = _preset(folder, whole) if is_preset else _hugging_face(folder, config, whole)
    text = model.text_encoder if whole else model
    assets = folder / "assets" / "tokenizer" if is_preset else folder
    vocabulary = _config(assets / ("vocabulary.json" if is_preset else "vocab.json"))
    try:
        tokenizer = Tokenizer(
            vocabulary,
            _read_merges(assets / "merges.txt"),
            text.max_sequence_length,
            config.get(CLEAN, True) if clean is None else clean,
        )
    except ValueError as error:
        raise ValueError(f"{assets} holds no CLIP tokenizer: {error}") from error
    if len(vocabulary) != text.vocabulary_size:
        raise ValueError(
            f"{folder}: the tokenizer has {len(vocabulary)} tokens, the encoder "
            f"{text.vocabulary_size}. They are of different models."
        )
    return model, tokenizer, folder.name if Path(source).is_dir() else str(source)


def _folder(source):
    """The folder of a source, downloaded if it is a preset's name."""
    if Path(source).is_dir():
        return Path(source).resolve()
    known = keras_hub().models.CLIPBackbone.presets
    if source not in known:
        raise FileNotFoundError(
            f"No folder at {source}, and no CLIP preset of keras-hub. Expected a folder with "
            f"config.json, {WEIGHTS[0]}, vocab.json and merges.txt, or one of {sorted(known)}."
        )
    import kagglehub

    handle = known[source]["kaggle_handle"].partition("://")[2]
    try:
        return Path(kagglehub.model_download(handle))
    except Exception as error:  # of the network, of Kaggle's account, of the disk
        reason = " ".join(str(error).split())[:300]
        raise OSError(
            f"{source} could not be downloaded from kaggle.com/models/{handle}: {reason}. Download "
            f"a CLIP folder by hand ({WEIGHTS[0]}, config.json, vocab.json and merges.txt, such as "
            "huggingface.co/openai/clip-vit-large-patch14) and pass its path."
        ) from error


def _preset(folder, whole):
    """The towers of a keras-hub preset folder."""
    hub = keras_hub()
    try:
        with own_defaults("float32"):
            model = hub.models.Backbone.from_preset(str(folder), dtype="float32")
    except DAMAGE as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{folder} is damaged or no keras-hub preset: {reason}") from error
    is_whole = isinstance(model, hub.models.CLIPBackbone)
    if not is_whole and (whole or not isinstance(model, hub.models.CLIPTextEncoder)):
        expected = "CLIPBackbone" if whole else "CLIPBackbone or a CLIPTextEncoder"
        raise ValueError(f"{folder} holds a {type(model).__name__}; expected a {expected}.")
    _as_published(model.text_encoder if is_whole else model)
    return model if whole or not is_whole else model.text_encoder


def _hugging_face(folder, config, whole):
    """The towers of a Hugging Face folder."""
    kind = config.get("model_type")
    if kind not in ("clip", "clip_text_model"):
        raise ValueError(f"{folder / 'config.json'} is not CLIP's: its model_type is {kind!r}.")
    text = config.get("text_config", config)
    if whole and "vision_config" not in config:
        raise ValueError(f"{folder} holds a text encoder alone; here both towers are needed.")
    files = [folder / name for name in WEIGHTS if (folder / name).is_file()]
    if not files:
        raise FileNotFoundError(f"{folder} has no weights: expected {' or '.join(WEIGHTS)}.")
    try:
        model = text_tower(**_converted(text, TEXT_KEYS))
        if whole:
            model = _backbone(model, config)
    except (TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{folder / 'config.json'} is damaged or not CLIP's: {error}") from error
    load_torch_weights(model, files[0])
    return model


def _backbone(text, config):
    vision = config["vision_config"]
    side, width = vision.get("image_size", 224), config.get("projection_dim", 512)
    _check_sizes({"image_size": side, "projection_dim": width})
    hub = keras_hub()
    with own_defaults("float32"):
        tower = hub.models.CLIPVisionEncoder(
            **_converted(vision, VISION_KEYS),
            image_shape=(side, side, 3),
            data_format="channels_last",
            dtype="float32",
        )
        model = hub.models.CLIPBackbone(tower, text, width, dtype="float32")
    # A weight in keras-hub, which its presets bring; Hugging Face's files do not.
    ids = tower.embedding.position_ids
    ids.assign(np.arange(ids.shape[1])[None])
    return model


def _converted(config, keys):
    """keras-hub's arguments of a Hugging Face configuration."""
    epsilon, activation = config.get("layer_norm_eps", 1e-5), config.get("hidden_act", "quick_gelu")
    if epsilon != 1e-5 or activation not in ("quick_gelu", "gelu"):
        raise ValueError(
            "layer_norm_eps must be 1e-5 and hidden_act quick_gelu or gelu. Received: "
            f"{epsilon} and {activation}."
        )
    sizes = {here: config.get(there, default) for there, here, default in keys}
    _check_sizes(sizes)
    return {**sizes, "intermediate_activation": activation}


def _check_sizes(sizes):
    bad = {k: n for k, n in sizes.items() if type(n) is not int or not 1 <= n <= MOST}
    if bad:
        raise ValueError(f"sizes must be positive ints, at most {MOST}. Received: {bad}.")


def _config(path):
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing.")
    return io.read_json(path)


def _read_merges(path):
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing.")
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}.") from error
    return [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]


def save(tower: keras.Model, tokenizer: Tokenizer, folder: PathLike) -> None:
    """Writes a text tower and its tokenizer as a Hugging Face folder, which `load` reads."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = {there: getattr(tower, here) for there, here, _ in TEXT_KEYS}
    config |= {"model_type": "clip_text_model", "hidden_act": tower.intermediate_activation}
    config[CLEAN] = tokenizer.clean
    config |= {
        f"{name}_token_id": tokenizer.vocabulary[token]
        for name, token in (("bos", START), ("eos", END), ("pad", END))
    }
    (folder / "vocab.json").write_text(
        json.dumps(tokenizer.vocabulary, ensure_ascii=False), encoding="utf-8"
    )
    merges = ["#version: 0.2", *(" ".join(pair) for pair in tokenizer.merges)]
    (folder / "merges.txt").write_text("\n".join(merges) + "\n", encoding="utf-8")
    save_torch_weights(tower, folder / WEIGHTS[0])
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


def random_weights(model: keras.Model, seed: int) -> None:
    """Weights from NumPy, the same on every backend.

    Normal of standard deviation 1 for tokens and positions, so that an untrained encoder tells
    them apart, 1 / sqrt(inputs) for matrices; norms and biases as Keras makes them.
    """
    random = np.random.default_rng(seed)
    for weight in model.weights:
        kind = weight.path.rsplit("/", 1)[-1]
        if kind in ("embeddings", "position_embeddings"):
            value = random.standard_normal(weight.shape)
        elif kind == "kernel":
            fan_in = np.prod(weight.shape) // weight.shape[-1]
            if len(weight.shape) == 3 and "attention_output" not in weight.path:
                fan_in = weight.shape[0]
            value = random.standard_normal(weight.shape) / np.sqrt(fan_in)
        else:
            continue
        weight.assign(keras.ops.cast(value, weight.dtype))
