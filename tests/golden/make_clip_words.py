"""Makes clip_words.json: how CLIP's own tokenizer reads captions as people write them.

    pip install ftfy==6.3.1 regex torch
    pip download --no-deps open-clip-torch==3.3.0 && unzip open_clip_torch-3.3.0-*.whl
    python tests/golden/make_clip_words.py open_clip/

The wheel (MIT) holds OpenAI's tokenizer and its vocabulary of 49,408 tokens. Stored are the ids of
each caption, and of the vocabulary the ids of those tokens and the merges that lead to them: the
others are never looked at. The script also compares the package's tokenizer with the whole
vocabulary.
"""

import importlib.util
import json
import sys
from pathlib import Path

TARGET = Path(__file__).with_name("clip_words.json")
CAPTIONS = [
    "",
    "a photo of a cat",
    "A Man riding a WAVE on top of a surfboard.",
    "the dog's bowl isn't what they've said it'll be, I'd say, I'm sure we're right",
    "don\u2019t, can\u2019t, she\u2018ll: \u201ccurly quotes\u201d as phones write them",
    "an office with \ufb01sh, a \ufb02ower and a \ufb03x",
    "salt &amp; pepper, 3 &lt; 4, caf&eacute;",
    "a &amp;lt;b&amp;gt; that was escaped twice, &#39;quoted&#39;",
    "  many   spaces,\ttabs\nand\r\nlines\u00a0\u3000  ",
    "wrongly decoded: caf\u00c3\u00a9 and \u00e2\u20ac\u0153quotes\u00e2\u20ac\u009d",
    "\uff46\uff55\uff4c\uff4c \uff37\uff29\uff24\uff34\uff28 \uff11\uff12\uff13",
    "a dash \u2013 or two \u2014 and dots \u2026",
    "cafe\u0301 and caf\u00e9, na\u00efve, \u00fcber, \u00c5ngstr\u00f6m, \u1e9eharp \u00df",
    "\u0130stanbul'da bir kedi, \u0131\u015f\u0131k",
    "\u039f\u03b4\u03c5\u03c3\u03c3\u03b5\u03cd\u03c2 \u03ba\u03b1\u03b9 \u0393\u03ac\u03c4\u03b1, "
    "\u039f\u0394\u03a5\u03a3\u03a3\u0395\u03a5\u03a3",
    "\u041a\u0440\u0430\u0441\u043d\u0430\u044f \u043f\u043b\u043e\u0449\u0430\u0434\u044c",
    "\u7ea2\u8272\u7684\u82b1\u3001\u84dd\u8272\u7684\u5929\u7a7a\u3002",
    "\u732b\u304c\u30bd\u30d5\u30a1\u3067\u5bdd\u3066\u3044\u308b\uff01\uff76\uff9e",
    "\ud55c\uad6d\uc758 \ud558\ub298",
    "\u0642\u0637\u0629 \u0639\u0644\u0649 \u0627\u0644\u0637\u0627\u0648\u0644\u0629 "
    "\u0661\u0662\u0663",
    "\u05db\u05dc\u05d1 \u05d1\u05d2\u05df",
    "\u092c\u093f\u0932\u094d\u0932\u0940 \u0914\u0930 \u0915\u0941\u0924\u094d\u0924\u093e "
    "\u0967\u0968",
    "\u0e41\u0e21\u0e27\u0e19\u0e2d\u0e19",
    "con m\u00e8o \u0111ang ng\u1ee7",
    "smile \U0001f600, family \U0001f468\u200d\U0001f469\u200d\U0001f467, "
    "flag \U0001f1eb\U0001f1f7",
    "a heart \u2764\ufe0f and a star \u2605",
    "3.14 x 10^23, 50% off, $9.99, 24/7, #1, @home, C++ & C#",
    "under_scores and-hyphens/slashes\\back (round) [square] {curly}",
    "zero\u200bwidth, soft\u00adhyphen, mark\ufeff",
    "terminal \x1b[31mcolours\x1b[0m and a bell\x07",
    "one \u00bd, two \u00b2, three \u2162, \u2460",
    "A\u030a ring of \u212b and \u2126",
    "\u2018\u2018twice\u2019\u2019 \u00abguillemets\u00bb \u201elow\u201c",
    "supercalifragilisticexpialidocious antidisestablishmentarianism xyzzyqwrt",
]


def theirs(folder):
    """OpenAI's tokenizer, without the rest of its package."""
    spec = importlib.util.spec_from_file_location("theirs", Path(folder) / "tokenizer.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.SimpleTokenizer()


def needed(tokenizer, token):
    """The merges that lead to a token, in order."""
    made = {"".join(pair): pair for pair in tokenizer.bpe_ranks}
    pairs, open_tokens = set(), [token]
    while open_tokens:
        pair = made.get(open_tokens.pop())
        if pair:
            pairs.add(pair)
            open_tokens += pair
    return pairs


def main(folder):
    tokenizer = theirs(folder)
    captions = {caption: tokenizer.encode(caption) for caption in CAPTIONS}
    tokens = {tokenizer.decoder[k] for ids in captions.values() for k in ids}
    pairs = set().union(*(needed(tokenizer, token) for token in tokens))
    merges = sorted(pairs, key=tokenizer.bpe_ranks.get)
    ids = {token: tokenizer.encoder[token] for token in sorted({*tokens, *map("".join, merges)})}
    content = {"captions": captions, "ids": ids, "merges": [" ".join(pair) for pair in merges]}
    TARGET.write_text(json.dumps(content, indent=0) + "\n", encoding="utf-8")
    compare(tokenizer, captions)


def compare(tokenizer, captions):
    """Raises where the package reads a caption otherwise with the whole vocabulary."""
    from keras_uvit.tokenizer import END, START, Tokenizer

    names = {"<start_of_text>": START, "<end_of_text>": END}
    vocabulary = {names.get(token, token): k for token, k in tokenizer.encoder.items()}
    ours = Tokenizer(vocabulary, list(tokenizer.bpe_ranks), 300, clean=True)
    for caption, ids in captions.items():
        read = [k for k in ours(caption)[0].tolist() if k < len(vocabulary) - 2]
        if read != ids:
            raise ValueError(f"{caption!r} is read as {read}, by CLIP as {ids}.")
    print(f"{len(captions)} captions are read as CLIP reads them.")


if __name__ == "__main__":
    main(sys.argv[1])
