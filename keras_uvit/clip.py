"""CLIP (Radford et al. 2021, arXiv 2103.00020): keras-hub's towers, from files; its tokenizer.

A folder is either Hugging Face's (config.json, model.safetensors, vocab.json, merges.txt) or
keras-hub's own preset (config.json, model.weights.h5, assets/tokenizer).
"""

import collections
import itertools
import json
import warnings
from pathlib import Path

import keras
import numpy as np

from keras_uvit import backend
from keras_uvit.convert import load_torch_weights, save_torch_weights
from keras_uvit.inference import DAMAGE, own_defaults

START, END = "<|startoftext|>", "<|endoftext|>"
WORD_END = "</w>"
# How CLIP cuts a lower-case text into words: contractions, letters, single digits, other signs.
WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"
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
MOST = 1_000_000  # of any size in a file's configuration
VISION_KEYS = [
    ("hidden_size", "hidden_dim", 768),
    ("num_hidden_layers", "num_layers", 12),
    ("num_attention_heads", "num_heads", 12),
    ("intermediate_size", "intermediate_dim", 3072),
    ("patch_size", "patch_size", 32),
]


def keras_hub():
    """The package, or ImportError that says how to install it."""
    backend.keep_tensorflow_off_accelerators()  # keras-hub imports it on every backend
    try:
        import keras_hub
    except ImportError as error:
        raise ImportError(
            f'CLIP comes with keras-hub: pip install "keras-uvit[text]". ({error})'
        ) from error
    return keras_hub


class Tokenizer:
    """CLIP's byte-pair encoding: captions to token ids, without TensorFlow.

    Lower case, whitespace joined, start token, end token; what is shorter than `length` is padded
    with the end token, which no mask hides: the published models have learned with that.

    Args:
        vocabulary: dict of token to id.
        merges: list of pairs of tokens, in order.
        length: int, tokens of every caption.

    Raises:
        ImportError: without the tokenizers library; `pip install "keras-uvit[text]"`.
        ValueError: if vocabulary and merges do not fit.
    """

    def __init__(self, vocabulary, merges, length=77):
        _check_vocabulary(vocabulary, merges)
        if length < 2:
            raise ValueError(
                f"length counts start and end, so it is at least 2. Received: {length}."
            )
        self.vocabulary, self.merges = dict(vocabulary), [tuple(pair) for pair in merges]
        self.length = length
        lib = tokenizers()
        bytes_to_text = lib.models.BPE(
            self.vocabulary,
            self.merges,
            unk_token=END,
            continuing_subword_prefix="",
            end_of_word_suffix=WORD_END,
        )
        self._tokenizer = _pipeline(bytes_to_text)
        ids = [(token, vocabulary[token]) for token in (START, END)]
        self._tokenizer.post_processor = lib.processors.TemplateProcessing(
            single=f"{START} $A {END}", special_tokens=ids
        )
        self._tokenizer.enable_truncation(length)
        self._tokenizer.enable_padding(length=length, pad_id=vocabulary[END], pad_token=END)

    def __call__(self, captions):
        """Token ids.

        Args:
            captions: str, or list of str.

        Returns:
            `(n, length)` int32.

        Raises:
            TypeError, ValueError: for what is no text.

        Warns once where captions are cut at `length` tokens, and names the first.
        """
        if not isinstance(captions, str | list | tuple):
            raise TypeError(f"Captions are strings. Received: {captions!r}.")
        captions = [captions] if isinstance(captions, str) else list(captions)
        for caption in captions:
            if not isinstance(caption, str):
                raise TypeError(f"Captions are strings. Received: {caption!r}.")
            try:
                caption.encode()
            except UnicodeEncodeError as error:
                raise ValueError(f"Half of a surrogate pair is no text: {caption!r}.") from error
        if not captions:
            return np.empty((0, self.length), "int32")
        encodings = self._tokenizer.encode_batch(captions)
        long = [text for text, encoding in zip(captions, encodings) if encoding.overflowing]
        if long:
            shown = long[0] if len(long[0]) < 200 else f"{long[0][:200]} ..."
            others = f" and {len(long) - 1} more" if len(long) > 1 else ""
            warnings.warn(
                f"Cut at {self.length} tokens, the rest is not seen by the model: {shown!r}"
                f"{others}.",
                stacklevel=2,
            )
        return np.array([encoding.ids for encoding in encodings], "int32")

    @classmethod
    def learned(cls, captions, size, length):
        """A tokenizer whose merges are learned from captions.

        Args:
            captions: list of str.
            size: int, tokens of the vocabulary at most; the 514 smallest are bytes alone.
            length: see the class.
        """
        if size < 514:
            raise ValueError(f"A vocabulary has at least 514 tokens. Received: {size}.")
        if isinstance(captions, str):
            raise TypeError("Captions are a list of strings.")
        lib = tokenizers()
        alphabet = sorted(lib.pre_tokenizers.ByteLevel.alphabet())
        pipeline, words = _pipeline(lib.models.BPE(unk_token=END)), collections.Counter()
        for caption in captions:
            text = pipeline.normalizer.normalize_str(caption)
            words.update(word for word, _ in pipeline.pre_tokenizer.pre_tokenize_str(text))
        merges = _learned_merges(words, size - 2 * len(alphabet) - 2)
        tokens = [*alphabet, *(sign + WORD_END for sign in alphabet), *map("".join, merges)]
        tokens = list(dict.fromkeys([*tokens, START, END]))
        return cls({token: k for k, token in enumerate(tokens)}, merges, length)


def _learned_merges(words, most):
    """Byte-pair encoding (Sennrich et al. 2016, arXiv 1508.07909): the commonest pair each time.

    Ties are broken by the text, so that equal captions give equal merges. (The library's own
    trainer breaks them anew in each process.)
    """
    parts = {word: (*word[:-1], word[-1] + WORD_END) for word in words}
    merges = []
    while len(merges) < most:
        pairs = collections.Counter()
        for word, tokens in parts.items():
            for pair in itertools.pairwise(tokens):
                pairs[pair] += words[word]
        if not pairs:
            break
        merges.append(min(pairs, key=lambda pair: (-pairs[pair], pair)))
        parts = {word: _merged(tokens, merges[-1]) for word, tokens in parts.items()}
    return merges


def _merged(tokens, pair):
    merged, k = [], 0
    while k < len(tokens):
        width = 2 if tokens[k : k + 2] == pair else 1
        merged.append("".join(tokens[k : k + width]))
        k += width
    return tuple(merged)


def _pipeline(model):
    """A tokenizer that cuts text as CLIP's does, over a byte-pair model."""
    lib = tokenizers()
    made = lib.Tokenizer(model)
    made.add_special_tokens([START, END])
    made.normalizer = lib.normalizers.Sequence(
        [
            lib.normalizers.NFC(),
            lib.normalizers.Replace(lib.Regex(r"\s+"), " "),
            lib.normalizers.Lowercase(),
        ]
    )
    made.pre_tokenizer = lib.pre_tokenizers.Sequence(
        [
            lib.pre_tokenizers.Split(lib.Regex(WORDS), "removed", invert=True),
            lib.pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    return made


def tokenizers():
    try:
        import tokenizers
    except ImportError as error:
        raise ImportError(
            'Prompts need the tokenizers library: pip install "keras-uvit[text]".'
        ) from error
    return tokenizers


def _check_vocabulary(vocabulary, merges):
    if not isinstance(vocabulary, dict) or not all(
        isinstance(token, str) and type(k) is int for token, k in vocabulary.items()
    ):
        raise ValueError("A vocabulary is a dict of token (str) to id (int).")
    missing = [token for token in (START, END) if token not in vocabulary]
    if missing or sorted(vocabulary.values()) != list(range(len(vocabulary))):
        raise ValueError(
            "Ids of a CLIP vocabulary count from 0 without a gap, "
            f"{START} and {END} among the tokens. Missing: {missing or 'some ids'}."
        )
    for pair in merges:
        if len(pair) != 2 or any(t not in vocabulary for t in (*pair, "".join(pair))):
            raise ValueError(f"The merge {' '.join(pair)!r} is not of tokens of the vocabulary.")
    signs = tokenizers().pre_tokenizers.ByteLevel.alphabet()
    made = {*signs, *(sign + WORD_END for sign in signs), *map("".join, merges), START, END}
    if missing := sorted({*vocabulary} - made):
        raise ValueError(
            f"{len(missing)} tokens of the vocabulary, such as {missing[0]!r}, are made by no "
            "merge: the merges are cut short, or of another vocabulary."
        )


# Towers -------------------------------------------------------------------------------------------


def text_tower(dtype="float32", **config):
    """keras-hub's `CLIPTextEncoder`: token ids `(B, L)` to the last hidden state `(B, L, D)`."""
    with own_defaults(dtype):
        tower = keras_hub().models.CLIPTextEncoder(
            **config, embedding_dim=config["hidden_dim"], dtype=dtype
        )
    return _as_published(tower)


def _as_published(tower):
    # keras-hub 0.32 has 1e-6 in the last norm alone; CLIP has 1e-5 in all.
    tower.layer_norm.epsilon = 1e-5
    return tower


def load(source, whole=False):
    """CLIP from a folder, or keras-hub's preset, downloaded.

    Args:
        source: path of a folder (see above), or the name of a preset such as
            "clip_vit_large_patch14".
        whole: bool. Both towers, `CLIPBackbone`; otherwise the text tower alone.

    Returns:
        (keras-hub model, `Tokenizer`, name).

    Raises:
        FileNotFoundError: if the folder or a file in it is missing.
        ImportError: without keras-hub or tokenizers.
        ValueError: if a file is damaged or of something else.
    """
    folder = _folder(source)
    config = _read_json(folder / "config.json")
    is_preset = "registered_name" in config
    model = _preset(folder, whole) if is_preset else _hugging_face(folder, config, whole)
    text = model.text_encoder if whole else model
    assets = folder / "assets" / "tokenizer" if is_preset else folder
    vocabulary = _read_json(assets / ("vocabulary.json" if is_preset else "vocab.json"))
    try:
        tokenizer = Tokenizer(
            vocabulary, _read_merges(assets / "merges.txt"), text.max_sequence_length
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

    return Path(kagglehub.model_download(known[source]["kaggle_handle"].partition("://")[2]))


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
    side = vision.get("image_size", 224)
    hub = keras_hub()
    with own_defaults("float32"):
        tower = hub.models.CLIPVisionEncoder(
            **_converted(vision, VISION_KEYS),
            image_shape=(side, side, 3),
            data_format="channels_last",
            dtype="float32",
        )
        model = hub.models.CLIPBackbone(
            tower, text, config.get("projection_dim", 512), dtype="float32"
        )
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
    bad = {k: n for k, n in sizes.items() if type(n) is not int or not 1 <= n <= MOST}
    if bad:
        raise ValueError(f"sizes must be positive ints, at most {MOST}. Received: {bad}.")
    return {**sizes, "intermediate_activation": activation}


def _read_json(path):
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing.")
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error}.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged: expected an object.")
    return content


def _read_merges(path):
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing.")
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}.") from error
    return [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]


def save(tower, tokenizer, folder):
    """Writes a text tower and its tokenizer as a Hugging Face folder, which `load` reads."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = {there: getattr(tower, here) for there, here, _ in TEXT_KEYS}
    config |= {"model_type": "clip_text_model", "hidden_act": tower.intermediate_activation}
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
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")


def random_weights(model, seed):
    """Weights from NumPy, the same on every backend.

    Normal of standard deviation 1 for tokens and positions, so that an untrained encoder tells
    them apart, 1 / sqrt(inputs) for matrices; norms and biases as Keras makes them.
    """
    random = np.random.default_rng(seed)
    for weight in model.weights:
        kind = weight.path.rsplit("/", 1)[-1]
        if kind == "embeddings" or kind == "position_embeddings":
            value = random.standard_normal(weight.shape)
        elif kind == "kernel":
            fan_in = np.prod(weight.shape) // weight.shape[-1]
            if len(weight.shape) == 3 and "attention_output" not in weight.path:
                fan_in = weight.shape[0]
            value = random.standard_normal(weight.shape) / np.sqrt(fan_in)
        else:
            continue
        weight.assign(keras.ops.cast(value, weight.dtype))
