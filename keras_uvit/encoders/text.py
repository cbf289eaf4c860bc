"""Captions to what a text-to-image network reads: the last hidden state of CLIP's text encoder."""

import functools
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import keras
import numpy as np

from keras_uvit.encoders import clip
from keras_uvit.encoders.tokenizer import Tokenizer
from keras_uvit.inference import Frozen, fingerprint
from keras_uvit.types import Array, PathLike


class CLIPText:
    """CLIP's text encoder (Radford et al. 2021, arXiv 2103.00020) with its tokenizer, frozen.

    All positions of the last hidden state after the final norm, without projection, as the paper
    and Stable Diffusion take them: a caption of any length becomes `length` tokens, padded with
    the end token, and no mask hides the padding.

    Args:
        tower: keras-hub's `CLIPTextEncoder`.
        tokenizer: `tokenizer.Tokenizer`.
        id: name of the weights, kept in caches.

    Attributes:
        context_shape: (length, width), the network's `context_shape`: (77, 768) for ViT-L/14.
        fingerprint: 16 hexadecimal digits of weights, vocabulary and `clean`.
        clean: bool, whether prompts are cleaned before they are read.
        null_context: `context_shape` float32, that of the empty prompt.

    Call arguments: captions, str or list of str. Returns `(n, length, width)` float32.

    Example:
        >>> text = CLIPText.random(["a red circle", "a blue square"], length=8, hidden_dim=16)
        >>> text("a red square").shape
        (1, 8, 16)
    """

    def __init__(self, tower: keras.Model, tokenizer: Tokenizer, id: str = "random") -> None:
        self.tower, self.tokenizer, self.id = tower, tokenizer, id
        self.clean = tokenizer.clean
        self.context_shape = (tokenizer.length, tower.hidden_dim)
        self._encode = Frozen(tower)

    @classmethod
    def from_preset(cls, source: PathLike, clean: bool | None = None) -> Self:
        """With published weights.

        Args:
            source: a Hugging Face folder (config.json, model.safetensors, vocab.json, merges.txt;
                of the text encoder or of the whole CLIP), a keras-hub preset folder, or
                "clip_vit_large_patch14" and other presets of keras-hub, which are downloaded.
            clean: bool. Whether prompts are cleaned as CLIP's own program does: curly quotes,
                ligatures, HTML's entities and wrong encodings become what CLIP learned from;
                `False` reads them as they are typed. `None` is what a folder that `save` wrote
                says, and `True` for published ones. Caches and models remember it by the
                fingerprint.

        Raises:
            FileNotFoundError, ImportError, ValueError: see `clip.load`.
        """
        return cls(*clip.load(source, clean=clean))

    @classmethod
    def random(
        cls,
        captions: Sequence[str],
        *,
        length: int = 77,
        hidden_dim: int = 64,
        num_layers: int = 2,
        num_heads: int = 4,
        vocabulary_size: int = 1024,
        seed: int = 0,
    ) -> Self:
        """Untrained, with a vocabulary learned from captions: small, and enough to tell them apart.

        Args:
            captions: list of str. Equal ones give an equal encoder.
            length: int, tokens of every caption, start and end included.
            hidden_dim, num_layers, num_heads: of the encoder.
            vocabulary_size: int, at most; at least 514.
            seed: int. The weights are the same on every backend.
        """
        tokenizer = Tokenizer.learned(captions, vocabulary_size, length)
        tower = clip.text_tower(
            vocabulary_size=len(tokenizer.vocabulary),
            hidden_dim=hidden_dim,
            num_layers=num_layers,
            num_heads=num_heads,
            intermediate_dim=4 * hidden_dim,
            max_sequence_length=length,
        )
        clip.random_weights(tower, seed)
        return cls(tower, tokenizer)

    def save(self, folder: PathLike) -> None:
        """Writes a Hugging Face folder, which `from_preset` and transformers read."""
        clip.save(self.tower, self.tokenizer, Path(folder))

    @functools.cached_property
    def fingerprint(self) -> str:
        return self.fingerprint_of(self.clean)

    def fingerprint_of(self, clean: bool) -> str:
        """That of the same encoder with this choice of `clean`."""
        words = [sorted(self.tokenizer.vocabulary.items()), self.tokenizer.merges]
        parts = [fingerprint(self.tower), words, self.context_shape, *(["clean"] * clean)]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]

    @functools.cached_property
    def null_context(self) -> np.ndarray:
        return self("")[0]

    def tokenize(self, captions: str | Sequence[str]) -> np.ndarray:
        """Token ids `(n, length)` int32 of captions; warns where one is cut."""
        return self.tokenizer(captions)

    def encode(self, tokens: Array, batch_size: int = 64, verbose: int = 0) -> np.ndarray:
        """Contexts of token ids.

        Args:
            tokens: `(n, length)` int, of `tokenize`.
            batch_size: int, captions at a time.
            verbose: 0 or 1. Progress bar.

        Returns:
            `(n, length, width)` float32.

        Raises:
            ValueError, TypeError: if the ids do not fit.
        """
        tokens = np.asarray(tokens)
        if tokens.ndim != 2 or tokens.shape[1] != self.context_shape[0]:
            raise ValueError(
                f"Token ids have shape (n, {self.context_shape[0]}). Received: {tokens.shape}."
            )
        if not np.issubdtype(tokens.dtype, np.integer):
            raise TypeError(f"Token ids are integers. Received: dtype {tokens.dtype}.")
        if not len(tokens):
            return np.empty((0, *self.context_shape), "float32")
        if tokens.min() < 0 or tokens.max() >= self.tower.vocabulary_size:
            raise ValueError(f"Token ids are in [0, {self.tower.vocabulary_size}).")
        return self._encode(
            tokens.astype("int32"),
            batch_size,
            lambda ids: {"token_ids": ids},
            verbose,
            unit_name="caption",
        )

    def __call__(
        self, captions: str | Sequence[str], batch_size: int = 64, verbose: int = 0
    ) -> np.ndarray:
        return self.encode(self.tokenize(captions), batch_size, verbose)
