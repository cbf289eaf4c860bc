"""CLIP from files: token ids and hidden states against transformers, damaged files."""

import json
import shutil
import sys
import warnings
from pathlib import Path

import keras
import numpy as np
import pytest
import tokenizers
import torch
import transformers
from tiny import refused, uvit

from keras_uvit import DiffusionModel
from keras_uvit.convert.files import read_tensors, write_tensors
from keras_uvit.data import shapes
from keras_uvit.encoders import CLIPText, clip
from keras_uvit.evaluation import CLIPScore

pytestmark = pytest.mark.once

GOLDEN = Path(__file__).parents[1] / "golden"
CAPTIONS = [str(scene) for scene in shapes.scenes(200)]
WEIGHTS = "model.safetensors"
CLIPS_OWN = json.loads((GOLDEN / "clip_words.json").read_text(encoding="utf-8"))
AWKWARD = [
    *CLIPS_OWN["captions"],  # of many scripts, signs and accents
    "&quot;&copy;&quot;",
    "form\f nbsp\u00a0thin\u2009",
    "nul \x00 and \x1f control",
    "<|startoftext|> inside <|endoftext|> the text",
    "'n' rock'n'roll ''",
    "word " * 75,
    "a small red circle " * 30,
    "x" * 500,
]


def randomized(model):
    """Norms and biases too: one that is forgotten would not be seen at its initial 1 or 0."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if name.endswith("logit_scale"):
                continue
            is_matrix = weight.ndim > 1 and "embedding" not in name
            scale = weight.shape[-1] ** -0.5 if is_matrix else 0.3
            weight.copy_(noise * scale + (1.0 if "norm" in name and "weight" in name else 0.0))
    return model.eval()


@pytest.fixture(scope="module")
def tokenizer():
    return clip.Tokenizer.learned(CAPTIONS + AWKWARD[1:5], 640, 77)


def text_sizes(tokenizer):
    """The arguments that both configurations take."""
    size = len(tokenizer.vocabulary)
    ids = dict(bos_token_id=size - 2, eos_token_id=size - 1)
    return dict(
        vocab_size=size, hidden_size=64, intermediate_size=256, num_attention_heads=4, **ids
    )


@pytest.fixture(scope="module")
def text_model(tokenizer):
    config = transformers.CLIPTextConfig(
        **text_sizes(tokenizer), num_hidden_layers=3, hidden_act="quick_gelu"
    )
    return randomized(transformers.CLIPTextModel(config))


@pytest.fixture(scope="module")
def whole_model(tokenizer):
    text = dict(**text_sizes(tokenizer), num_hidden_layers=2)
    vision = dict(hidden_size=48, intermediate_size=96, num_hidden_layers=2)
    vision |= dict(num_attention_heads=3, image_size=28, patch_size=7)
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)
    return randomized(transformers.CLIPModel(config))


def write_words(tokenizer, path):
    (path / "vocab.json").write_text(json.dumps(tokenizer.vocabulary))
    merges = "\n".join(" ".join(pair) for pair in tokenizer.merges)
    (path / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")


def folder_of(model, tokenizer, path):
    model.save_pretrained(path)
    write_words(tokenizer, path)
    return path


@pytest.fixture(scope="module")
def folder(text_model, tokenizer, tmp_path_factory):
    return folder_of(text_model, tokenizer, tmp_path_factory.mktemp("clip") / "text")


@pytest.fixture(scope="module")
def whole_folder(whole_model, tokenizer, tmp_path_factory):
    return folder_of(whole_model, tokenizer, tmp_path_factory.mktemp("clip") / "whole")


@pytest.fixture(scope="module")
def text(folder):
    return CLIPText.from_preset(folder)


@pytest.fixture
def copy(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


def close(a, b, tolerance=1e-5):
    """Both sides round in float32, 3 layers deep: 7e-6 was seen."""
    assert a.shape == b.shape
    assert np.abs(a - b).max() <= tolerance * np.abs(b).max()


# Token ids ----------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Cut at")
def test_token_ids_are_those_of_transformers_one_by_one_and_in_a_list(tokenizer, folder):
    reference = transformers.CLIPTokenizer.from_pretrained(folder)
    expected = reference(AWKWARD, padding="max_length", truncation=True, max_length=77)["input_ids"]
    for caption, ids in zip(AWKWARD, expected, strict=True):
        np.testing.assert_array_equal(tokenizer(caption)[0], ids, err_msg=repr(caption))
    together = tokenizer(AWKWARD)
    assert together.dtype == np.int32
    np.testing.assert_array_equal(together, expected)


def test_token_ids_are_those_of_clips_own_program():
    # A tokenizer of the tokens that the golden captions need.
    signs = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    merges = [pair.split(" ") for pair in CLIPS_OWN["merges"]]
    tokens = [*signs, *(f"{sign}</w>" for sign in signs), *map("".join, merges)]
    tokens += [clip.START, clip.END]
    vocabulary = {token: k for k, token in enumerate(tokens)}
    tokenizer = clip.Tokenizer(vocabulary, merges, 100, clean=True)
    for caption, expected in CLIPS_OWN["captions"].items():
        found = [tokens[k] for k in tokenizer(caption)[0]]
        ids = [CLIPS_OWN["ids"][token] for token in found if token not in (clip.START, clip.END)]
        assert ids == expected, caption


@pytest.fixture(scope="module")
def typed(folder):
    return CLIPText.from_preset(folder, clean=False)


def test_prompts_are_cleaned_unless_told_and_what_was_told_is_kept(text, typed, tmp_path):
    curly, plain = "don\u2019t &amp; so", "don't & so"
    assert (text.clean, typed.clean) == (True, False)
    np.testing.assert_array_equal(text.tokenize(curly), text.tokenize(plain))
    assert not np.array_equal(typed.tokenize(curly), typed.tokenize(plain))
    np.testing.assert_array_equal(typed.tokenize(plain), text.tokenize(plain))
    assert text.fingerprint != typed.fingerprint
    typed.save(tmp_path / "typed")
    assert CLIPText.from_preset(tmp_path / "typed").fingerprint == typed.fingerprint


def test_a_model_remembers_whether_its_prompts_were_cleaned(text, typed, tmp_path):
    model = DiffusionModel(uvit(context_shape=typed.context_shape))
    model.set_encoders(text_encoder=typed)
    model.save(tmp_path / "m.keras")
    again = keras.saving.load_model(tmp_path / "m.keras")
    words = "read as they are typed", "clean=False"
    refused(ValueError, lambda: again.set_encoders(text_encoder=text), *words)
    again.set_encoders(text_encoder=typed)


def test_without_ftfy_the_extra_is_named(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "ftfy", None)
    words = "clean=False", '"keras-uvit[text]"'
    refused(ImportError, lambda: CLIPText.from_preset(folder), *words)
    assert CLIPText.from_preset(folder, clean=False).tokenize("a dog").shape == (1, 77)


def test_the_empty_prompt_is_start_and_end_tokens(text):
    start, end = (text.tokenizer.vocabulary[token] for token in (clip.START, clip.END))
    np.testing.assert_array_equal(text.tokenize("")[0], [start, *[end] * 76])
    assert end == len(text.tokenizer.vocabulary) - 1  # CLIP's pooling looks for the largest id


def test_long_captions_keep_75_tokens_and_the_end():
    tokenizer = clip.Tokenizer.learned(["dog"], 600, 77)
    with pytest.warns(UserWarning, match="Cut at 77 tokens.*'dog dog.*and 1 more") as caught:
        ids = tokenizer(["dog " * 76, "cat", "dog " * 100])
    assert len(caught) == 1
    end, dog = tokenizer.vocabulary[clip.END], tokenizer.vocabulary["dog</w>"]
    np.testing.assert_array_equal(ids[0, 1:], [dog] * 75 + [end])
    np.testing.assert_array_equal(ids[0], ids[2])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (tokenizer("dog " * 75) == ids[0]).all()  # just fits


def test_words_that_are_spelled_out_are_named():
    tokenizer = clip.Tokenizer.learned(["a dog", "a cat"], 600, 6)
    with pytest.warns(UserWarning, match="spells these words out in pieces: 'zebra', 'fox'"):
        tokenizer("a Zebra a dog a fox a zebra")
    with pytest.warns(UserWarning, match="Cut at 6 tokens") as caught:
        tokenizer("a dog a cat a dog")
    assert "spells" not in str(caught[0].message)


def test_learned_merges_are_the_commonest_pairs_and_ties_are_broken_by_the_text():
    """ "low low lower": lo is in all three words, then low; at last lower's own."""
    merges = [("l", "o"), ("lo", "w</w>"), ("e", "r</w>"), ("lo", "w"), ("low", "er</w>")]
    assert clip.Tokenizer.learned(["low low lower"], 600, 8).merges == merges
    captions = ["a man rides a wave", "the cat sat on a mat", "dogs run in tall grass"]
    forward, backward = (clip.Tokenizer.learned(c, 600, 8) for c in (captions, captions[::-1]))
    assert forward.merges == backward.merges  # most of these pairs are equally common
    assert len(clip.Tokenizer.learned(CAPTIONS, 560, 8).vocabulary) <= 560


# Hidden states ------------------------------------------------------------------------------------


def hidden(model, ids):
    with torch.no_grad():
        return model(torch.tensor(ids, dtype=torch.long)).last_hidden_state.numpy()


@pytest.mark.each_backend
@pytest.mark.filterwarnings("ignore:Cut at")
def test_contexts_are_those_of_transformers(text, text_model):
    contexts = text(AWKWARD, batch_size=4)
    assert contexts.shape == (len(AWKWARD), 77, 64)
    assert contexts.dtype == np.float32
    close(contexts, hidden(text_model, text.tokenize(AWKWARD)))


def test_the_padding_is_read_and_no_mask_hides_it(text, text_model):
    ids = text.tokenize("a dog")
    other = ids.copy()
    other[0, 10:] = 5
    ours, changed = text.encode(ids), text.encode(other)
    np.testing.assert_array_equal(ours[:, :10], changed[:, :10])  # causal
    assert np.abs(ours[:, 10:] - changed[:, 10:]).max() > 0.1
    close(changed, hidden(text_model, other))
    close(text.null_context[None], hidden(text_model, text.tokenize("")))


def test_a_context_does_not_depend_on_its_neighbours(text):
    alone = text("a red circle")
    close(text(["a blue square", "a red circle", "a dog"], batch_size=2)[1:2], alone, 1e-6)
    assert text([]).shape == (0, 77, 64)


@pytest.mark.parametrize("kind", ["with a prefix", "without", "pytorch"])
def test_every_file_of_hugging_face_gives_the_same_weights(folder, copy, text, kind):
    tensors = read_tensors(folder / WEIGHTS)
    (copy / WEIGHTS).unlink()
    prefix = "text_model." if kind == "with a prefix" else ""
    tensors = {prefix + name.removeprefix("text_model."): a for name, a in tensors.items()}
    tensors[f"{prefix}embeddings.position_ids"] = np.arange(77)[None]
    write_tensors(tensors, copy / ("pytorch_model.bin" if kind == "pytorch" else WEIGHTS))
    assert CLIPText.from_preset(copy).fingerprint == text.fingerprint


def test_the_text_tower_of_a_whole_clip(whole_folder, whole_model):
    text = CLIPText.from_preset(whole_folder)
    ids = text.tokenize(CAPTIONS[:3])
    with torch.no_grad():
        expected = whole_model.text_model(torch.tensor(ids, dtype=torch.long)).last_hidden_state
    close(text.encode(ids), expected.numpy())
    assert text.id == "whole"


def test_saved_and_loaded(text, tmp_path):
    text.save(tmp_path / "mine")
    again = CLIPText.from_preset(tmp_path / "mine")
    assert again.fingerprint == text.fingerprint
    np.testing.assert_array_equal(again("a dog"), text("a dog"))
    ours = transformers.CLIPTextModel.from_pretrained(tmp_path / "mine").eval()
    close(text("a dog"), hidden(ours, text.tokenize("a dog")))


def test_other_weights_or_words_have_another_fingerprint(text):
    tower, words = text.tower, text.tokenizer
    (a, b), *rest = words.merges
    other = CLIPText(tower, clip.Tokenizer(words.vocabulary, [*rest, (a, b)], 77))
    assert other.fingerprint != text.fingerprint
    a, b = (CLIPText.random(CAPTIONS, length=8, hidden_dim=8, seed=seed) for seed in (0, 1))
    assert a.fingerprint != b.fingerprint


@pytest.mark.each_backend
def test_random_weights_are_the_same_on_every_backend():
    text = CLIPText.random(CAPTIONS, length=16, hidden_dim=8, num_heads=2, vocabulary_size=560)
    # Computed once on JAX. Weights are float32 of one NumPy stream.
    assert text.fingerprint == "b060ba80516acca1"


def test_keras_settings_do_not_matter(folder, text):
    keras.config.set_dtype_policy("mixed_float16")
    try:
        other = CLIPText.from_preset(folder)
    finally:
        keras.config.set_dtype_policy("float32")
    np.testing.assert_array_equal(other("a dog"), text("a dog"))


# keras-hub presets --------------------------------------------------------------------------------


def write_preset(model, tokenizer, path):
    model.save_to_preset(str(path))
    assets = path / "assets" / "tokenizer"
    assets.mkdir(parents=True)
    write_words(tokenizer, assets)
    (assets / "vocab.json").rename(assets / "vocabulary.json")
    return path


def test_a_preset_folder_of_keras_hub(text, tmp_path):
    path = write_preset(text.tower, text.tokenizer, tmp_path / "preset")
    again = CLIPText.from_preset(path)
    assert again.fingerprint == text.fingerprint
    np.testing.assert_array_equal(again("a dog"), text("a dog"))  # the last norm's epsilon too


@pytest.fixture(scope="module")
def score(whole_folder):
    return CLIPScore.from_preset(whole_folder)


def test_a_preset_folder_of_the_whole_clip(score, tmp_path):
    path = write_preset(score.model, score.tokenizer, tmp_path / "preset")
    images = np.random.default_rng(0).integers(0, 256, (2, 40, 30, 3), "uint8")
    again = CLIPScore.from_preset(path, clean=False)
    np.testing.assert_array_equal(again(images, CAPTIONS[:2]), score(images, CAPTIONS[:2]))
    assert (score.tokenizer.clean, again.tokenizer.clean) == (True, False)
    assert CLIPText.from_preset(path).context_shape == (77, 64)


def test_a_download_that_fails_says_what_to_do_instead(monkeypatch):
    import kagglehub

    def refuse(handle):
        raise ConnectionError(f"no route to {handle}")

    monkeypatch.setattr(kagglehub, "model_download", refuse)
    with pytest.raises(OSError, match="no route to .*pass its path"):
        CLIPText.from_preset("clip_vit_large_patch14")


# CLIP score ---------------------------------------------------------------------------------------


def reference_scores(model, tokenizer, images, prompts):
    # The slow processor is Pillow's, as the original CLIP.
    processor = transformers.CLIPImageProcessorPil(
        size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}
    )
    pixels = processor(list(images), return_tensors="pt")["pixel_values"]
    ids = torch.tensor(tokenizer(prompts), dtype=torch.long)
    with torch.no_grad():
        out = model(input_ids=ids, pixel_values=pixels)
    cosine = (out.image_embeds * out.text_embeds).sum(-1).numpy()
    return 100 * np.maximum(cosine, 0)


@pytest.mark.parametrize("size", [(50, 31), (20, 20)])
def test_scores_are_those_of_transformers(score, whole_model, size):
    images = np.random.default_rng(1).integers(0, 256, (4, *size, 3), "uint8")
    ours = score(images, CAPTIONS[:4], batch_size=3)
    theirs = reference_scores(whole_model, score.tokenizer, images, CAPTIONS[:4])
    assert ours.shape == (4,)
    assert ours.max() > 1  # not all cut off at 0
    np.testing.assert_allclose(ours, theirs, atol=1e-3)  # of 100: float32 through two towers
    assert score.id == "whole"


# What is refused ----------------------------------------------------------------------------------


def without(token):
    """A tokenizer without a token of the vocabulary."""
    return lambda t: clip.Tokenizer({k: n for k, n in t.vocabulary.items() if k != token}, t.merges)


IMAGES = np.zeros((2, 28, 28, 3), "uint8")
# By the fixture that is called.
REFUSED = {
    "tokenizer": [
        (lambda t: t(None), TypeError, "Captions are strings"),
        (lambda t: t([b"dog"]), TypeError, "Captions are strings"),
        (lambda t: t(["ok", "x\udc36"]), ValueError, "surrogate"),
        (lambda t: t.learned("a dog", 600, 8), TypeError, "list of strings"),
        (lambda t: t.learned(["dog"], 513, 8), ValueError, "at least 514"),
        (lambda t: clip.Tokenizer(t.vocabulary, t.merges, 1), ValueError, "at least 2"),
        (without(clip.START), ValueError, "Missing: ['<|startoftext|>']"),
        (without(clip.END), ValueError, "Missing: ['<|endoftext|>']"),
    ],
    "text": [
        (lambda t: t.encode(np.zeros((2, 76), int)), ValueError, "Token ids have shape (n, 77)"),
        (lambda t: t.encode(np.zeros(77, int)), ValueError, "Token ids have shape (n, 77)"),
        (lambda t: t.encode(np.zeros((1, 77))), TypeError, "Token ids are integers"),
        (lambda t: t.encode(np.full((1, 77), -1)), ValueError, "Token ids are in [0, "),
        (lambda t: t.encode(np.full((1, 77), 10**6)), ValueError, "Token ids are in [0, "),
        (lambda t: t.from_preset("nowhere"), FileNotFoundError, "clip_vit_large_patch14"),
    ],
    "score": [
        (lambda s: s(IMAGES, ["a"]), ValueError, "2 images, 1 prompts"),
        (lambda s: s(IMAGES, "ab"), TypeError, "list of strings"),
        (lambda s: s(IMAGES.astype("float32"), ["a", "b"]), ValueError, "uint8"),
    ],
}


@pytest.mark.parametrize(
    ("fixture", "call", "error", "words"),
    [(fixture, *row) for fixture, rows in REFUSED.items() for row in rows],
)
def test_what_does_not_fit_is_refused(request, fixture, call, error, words):
    part = request.getfixturevalue(fixture)
    refused(error, lambda: call(part), words)


def test_a_text_encoder_alone_has_no_score(folder):
    refused(ValueError, lambda: CLIPScore.from_preset(folder), "text encoder alone")


# Damage -------------------------------------------------------------------------------------------


# What becomes of a file (None: it is deleted), and a word of the error beside its name or folder's.
DAMAGED = [
    ("config.json", None, "is missing"),
    ("config.json", b"", "damaged"),
    ("config.json", b"[]", "damaged"),
    ("config.json", b"\xff\xfe\x00", "damaged"),
    ("config.json", b"[" * 200_000, "damaged"),
    ("config.json", b'{"a": "b"}', "is not CLIP's"),
    ("vocab.json", None, "is missing"),
    ("vocab.json", b"{", "damaged"),
    ("vocab.json", b'{"a": "b"}', "dict of token (str) to id (int)"),
    ("merges.txt", None, "is missing"),
    ("merges.txt", b"a b c", "merge"),
    ("merges.txt", b"zz qq", "merge"),
    ("merges.txt", b"\xff\xfe", "damaged"),
    (WEIGHTS, None, "no weights"),
    (WEIGHTS, b"", "damaged"),
]


@pytest.mark.parametrize(("name", "content", "word"), DAMAGED)
def test_a_damaged_file_is_named(copy, name, content, word):
    (copy / name).unlink()
    if content is not None:
        (copy / name).write_bytes(content)
    error = FileNotFoundError if content is None else ValueError
    message = refused(error, lambda: CLIPText.from_preset(copy), word)
    assert name in message or copy.name in message


def test_merges_that_were_cut_short_are_refused(copy):
    lines = (copy / "merges.txt").read_text().splitlines()
    (copy / "merges.txt").write_text("\n".join(lines[:-3]))
    refused(ValueError, lambda: CLIPText.from_preset(copy), "made by no merge")


def test_windows_line_ends_and_marks_are_read(copy, text):
    for name in ("merges.txt", "vocab.json", "config.json"):
        content = (copy / name).read_text()
        (copy / name).write_bytes(b"\xef\xbb\xbf" + content.replace("\n", "\r\n").encode())
    assert CLIPText.from_preset(copy).fingerprint == text.fingerprint


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"hidden_size": "64"}, ("config.json", "hidden_dim")),
        ({"hidden_size": 10**12}, ("config.json is damaged", "positive ints")),
        ({"hidden_size": 60}, ("does not fit",)),
        ({"num_hidden_layers": 2}, ("does not fit this network", "extra: ")),
        ({"num_hidden_layers": 4}, ("does not fit this network", "missing: ")),
        ({"num_attention_heads": 5}, ("must be divisible",)),
        ({"hidden_act": "relu"}, ("quick_gelu or gelu", "relu")),
        ({"layer_norm_eps": 1e-6}, ("layer_norm_eps must be 1e-5",)),
        ({"model_type": "bert"}, ("is not CLIP's", "'bert'")),
        ({"text_config": None}, ("damaged or not CLIP's",)),
    ],
)
def test_a_config_of_something_else_is_refused(copy, values, words):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, **values}))
    refused(ValueError, lambda: CLIPText.from_preset(copy), *words)


def test_a_tokenizer_of_another_model_is_refused(copy):
    write_words(clip.Tokenizer.learned(["dog"], 520, 77), copy)
    refused(ValueError, lambda: CLIPText.from_preset(copy), "the tokenizer has", "the encoder")


def test_gelu_encoders_are_read(text_model, tokenizer, tmp_path):
    config = transformers.CLIPTextConfig(**{**text_model.config.to_dict(), "hidden_act": "gelu"})
    model = randomized(transformers.CLIPTextModel(config))
    text = CLIPText.from_preset(folder_of(model, tokenizer, tmp_path / "gelu"))
    ids = text.tokenize(["a dog", "a red circle"])
    close(text.encode(ids), hidden(model, ids))
