"""Whether pictures show their prompts: the cosine of CLIP's two embeddings."""

from collections.abc import Sequence
from typing import Self

import keras
import numpy as np
from PIL import Image

from keras_uvit.encoders import clip
from keras_uvit.encoders.tokenizer import Tokenizer
from keras_uvit.inference import Frozen, own_defaults
from keras_uvit.types import PathLike

# Of the images that CLIP was trained on, per channel, in [0, 1] (Radford et al. 2021).
MEAN = np.array([0.48145466, 0.4578275, 0.40821073], "float32")
STD = np.array([0.26862954, 0.26130258, 0.27577711], "float32")


class CLIPScore:
    """100 max(cos(image, text), 0) of CLIP's embeddings (Hessel et al. 2021, arXiv 2104.08718).

    Without that paper's factor 2.5, as usually reported for text-to-image models. Numbers of
    different CLIPs cannot be compared: say which one.

    Args:
        model: keras-hub's `CLIPBackbone`.
        tokenizer: `tokenizer.Tokenizer`.
        id: name of the weights, kept in records.

    Call arguments: images `(n, H, W, 3)` uint8 and n prompts. Returns `(n,)` float32.
    """

    def __init__(self, model: keras.Model, tokenizer: Tokenizer, id: str = "random") -> None:
        self.model, self.tokenizer, self.id = model, tokenizer, id
        self.image_size = model.vision_encoder.image_shape[0]
        with own_defaults("float32"):
            images = keras.Input(model.vision_encoder.image_shape, name="images")
            tokens = keras.Input((tokenizer.length,), dtype="int32", name="token_ids")
            look = keras.Model(images, model.get_vision_embeddings(images))
            read = keras.Model(tokens, model.get_text_embeddings(tokens))
        self._look, self._read = Frozen(look), Frozen(read)

    @classmethod
    def from_preset(cls, source: PathLike, clean: bool | None = None) -> Self:
        """With published weights.

        Args:
            source: a Hugging Face folder or a keras-hub preset folder of the whole CLIP, or a
                preset's name, such as "clip_vit_large_patch14", which is downloaded.
            clean: bool, whether prompts are cleaned first; see `encoders.CLIPText.from_preset`.

        Raises:
            FileNotFoundError, ImportError, ValueError: see `clip.load`.
        """
        return cls(*clip.load(source, whole=True, clean=clean))

    def __call__(
        self, images: np.ndarray, prompts: Sequence[str], batch_size: int = 32, verbose: int = 0
    ) -> np.ndarray:
        if isinstance(prompts, str):
            raise TypeError("prompts are a list of strings, one an image.")
        if len(images) != len(prompts) or not len(prompts):
            raise ValueError(
                f"Expected a prompt an image. Received: {len(images)} images, {len(prompts)} "
                "prompts."
            )
        seen = self._look(self._prepared(images), batch_size, verbose=verbose)
        read = self._read(self.tokenizer(prompts), batch_size, verbose=verbose)
        cosines = (_unit(seen) * _unit(read)).sum(axis=-1)
        return 100 * np.maximum(cosines, 0)

    def _prepared(self, images):
        """Shorter side to the tower's size by Pillow's bicubic, centre, CLIP's mean and deviation.

        (`n, side, side, 3)` float32.
        """
        if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8:
            raise ValueError(
                f"Images are (n, H, W, 3) uint8. Received: {images.shape} {images.dtype}."
            )
        side = self.image_size
        scale = side / min(images.shape[1:3])
        height, width = (max(side, int(n * scale)) for n in images.shape[1:3])
        top, left = (height - side) // 2, (width - side) // 2
        fitted = [
            np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))
            for image in images
        ]
        cut = np.stack(fitted)[:, top : top + side, left : left + side].astype("float32")
        return (cut / 255 - MEAN) / STD


def _unit(vectors):
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)
