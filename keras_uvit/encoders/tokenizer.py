"""Captions to token ids: CLIP's byte-pair encoding, by the tokenizers library."""

import collections
import html
import itertools
import warnings
from collections.abc import Sequence
from types import ModuleType
from typing import Self

import numpy as np

from keras_uvit.optional import optional

START, END = "<|startoftext|>", "<|endoftext|>"
WORD_END = "</w>"
# How CLIP cuts a lower-case text into words: contractions, letters, single digits, other signs.
WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"


class Tokenizer:
    """CLIP's byte-pair encoding: captions to token ids, without TensorFlow.

    Lower case, whitespace joined, start token, end token; what is shorter than `length` is padded
    with the end token, which no mask hides: the published models have learned with that.

    Args:
        vocabulary: dict of token to id.
        merges: list of pairs of tokens, in order.
        length: int, tokens of every caption.
        clean: bool. Whether captions are `cleaned` first, as CLIP's were that it learned from.

    Raises:
        ImportError: without the tokenizers library, or ftfy, which cleans;
            `pip install "keras-uvit[text]"`.
        ValueError: if vocabulary and merges do not fit.
    """

    def __init__(
        self,
        vocabulary: dict[str, int],
        merges: Sequence[tuple[str, str]],
        length: int = 77,
        clean: bool = False,
    ) -> None:
        if clean:
            ftfy()  # a missing library is found before anything is read
        _check_vocabulary(vocabulary, merges)
        if length < 2:
            raise ValueError(
                f"length counts start and end, so it is at least 2. Received: {length}."
            )
        self.vocabulary, self.merges = dict(vocabulary), [tuple(pair) for pair in merges]
        self.length, self.clean = length, clean
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

    def __call__(self, captions: str | Sequence[str]) -> np.ndarray:
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
        texts = [cleaned(caption) for caption in captions] if self.clean else captions
        encodings = self._tokenizer.encode_batch(texts)
        long = [text for text, encoding in zip(captions, encodings) if encoding.overflowing]
        if long:
            shown = long[0] if len(long[0]) < 200 else f"{long[0][:200]} ..."
            others = f" and {len(long) - 1} more" if len(long) > 1 else ""
            spelled = ", ".join(map(repr, self._spelled(long[0])))
            cause = (
                f" The vocabulary spells these words out in pieces: {spelled}." if spelled else ""
            )
            warnings.warn(
                f"Cut at {self.length} tokens, the rest is not seen by the model: {shown!r}"
                f"{others}.{cause}",
                stacklevel=2,
            )
        return np.array([encoding.ids for encoding in encodings], "int32")

    def _spelled(self, text):
        """The words of a text that are no token of their own."""
        text = self._tokenizer.normalizer.normalize_str(text)
        words = self._tokenizer.pre_tokenizer.pre_tokenize_str(text)
        spelled = [
            text[slice(*place)] for word, place in words if word + WORD_END not in self.vocabulary
        ]
        return list(dict.fromkeys(spelled))

    @classmethod
    def learned(cls, captions: Sequence[str], size: int, length: int) -> Self:
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
        pipeline = _pipeline(lib.models.BPE(unk_token=END))
        words: collections.Counter[str] = collections.Counter()
        for caption in captions:
            text = pipeline.normalizer.normalize_str(caption)
            words.update(word for word, _ in pipeline.pre_tokenizer.pre_tokenize_str(text))
        merges = _learned_merges(words, size - 2 * len(alphabet) - 2)
        tokens = [*alphabet, *(sign + WORD_END for sign in alphabet), *map("".join, merges)]
        tokens = list(dict.fromkeys([*tokens, START, END]))
        return cls({token: k for k, token in enumerate(tokens)}, merges, length)


def cleaned(text: str) -> str:
    """A caption as CLIP's own program cleans it, so that what keyboards write is what it learned.

    ftfy straightens quotes, takes ligatures apart and repairs wrong encodings; HTML's entities are
    resolved twice; whitespace is joined; all in lower case. (`simple_tokenizer.py` of
    https://github.com/openai/CLIP)

    >>> cleaned("Don\u2019t  \ufb01sh &amp; chips")
    "don't fish & chips"
    """
    text = html.unescape(html.unescape(ftfy().fix_text(text)))
    return " ".join(text.split()).lower()


def _learned_merges(words, most):
    """Byte-pair encoding (Sennrich et al. 2016, arXiv 1508.07909): the commonest pair each time.

    Ties are broken by the text, so that equal captions give equal merges. (The library's own
    trainer breaks them differently in each process.)
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


def tokenizers() -> ModuleType:
    return optional("tokenizers", "text", "Prompts need the tokenizers library")


def ftfy() -> ModuleType:
    """What cleans prompts as CLIP's own program does."""
    purpose = "CLIP's prompts are cleaned by ftfy (clean=False reads them as they are typed)"
    return optional("ftfy", "text", purpose)


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
            "merge: the merges are cut short, or belong to a different vocabulary."
        )
