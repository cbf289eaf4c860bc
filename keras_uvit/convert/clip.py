"""CLIP's Hugging Face files: the text tower alone, or both towers."""

from collections.abc import Iterator

import keras

from keras_uvit.convert.layouts import CONV, LINEAR, SAME, Entry, Layout, Tensors, linear, norm

OTHERS = ("vision_model.", "visual_projection.", "text_projection.", "logit_scale")


def entries(model: keras.Model) -> Iterator[Entry]:
    """(published name, Keras variable, layout) of keras-hub's `CLIPTextEncoder` or `CLIPBackbone`.

    The vision tower's position ids are no weights there, and not among them.
    """
    is_whole = hasattr(model, "vision_encoder")
    text = model.text_encoder if is_whole else model
    embedding = text.embedding
    yield (
        "text_model.embeddings.token_embedding.weight",
        embedding.token_embedding.embeddings,
        SAME,
    )
    yield (
        "text_model.embeddings.position_embedding.weight",
        embedding.position_embedding.position_embeddings,
        SAME,
    )
    yield from _layers("text_model", text)
    yield from norm("text_model.final_layer_norm", text.layer_norm)
    if is_whole:
        yield from _vision(model.vision_encoder)
        yield from linear("visual_projection", model.vision_projection)
        yield from linear("text_projection", model.text_projection)
        yield "logit_scale", model.clip_head.logit_scale, SAME


def _vision(tower):
    embedding = tower.embedding
    yield "vision_model.embeddings.class_embedding", embedding.class_embedding, SAME
    yield "vision_model.embeddings.patch_embedding.weight", embedding.patch_embedding.kernel, CONV
    yield (
        "vision_model.embeddings.position_embedding.weight",
        embedding.position_embedding.embeddings,
        SAME,
    )
    yield from norm("vision_model.pre_layrnorm", tower.pre_layer_norm)  # spelt so there
    yield from _layers("vision_model", tower)
    yield from norm("vision_model.post_layernorm", tower.layer_norm)


def _layers(tower_name, tower):
    for i, layer in enumerate(tower.encoder_layers):
        name = f"{tower_name}.encoder.layers.{i}"
        yield from norm(f"{name}.layer_norm1", layer.layer_norm_1)
        attention = layer.attention
        for part in ("query", "key", "value"):
            dense = getattr(attention, f"{part}_dense")
            yield f"{name}.self_attn.{part[0]}_proj.weight", dense.kernel, _heads(dense)
            yield f"{name}.self_attn.{part[0]}_proj.bias", dense.bias, _flat(dense.bias)
        out = attention.output_dense
        yield f"{name}.self_attn.out_proj.weight", out.kernel, _joined(out)
        yield f"{name}.self_attn.out_proj.bias", out.bias, SAME
        yield from norm(f"{name}.layer_norm2", layer.layer_norm_2)
        yield from linear(f"{name}.mlp.fc1", layer.dense_1)
        yield from linear(f"{name}.mlp.fc2", layer.dense_2)


def _heads(dense):
    """(N K, D) to (D, N, K)."""
    shape = tuple(dense.kernel.shape)
    return Layout(
        lambda a: LINEAR.to_keras(a).reshape(shape),
        lambda a: LINEAR.to_torch(a.reshape(shape[0], -1)),
    )


def _joined(dense):
    """(D, N K) to (N, K, D)."""
    shape = tuple(dense.kernel.shape)
    return Layout(
        lambda a: LINEAR.to_keras(a).reshape(shape),
        lambda a: LINEAR.to_torch(a.reshape(-1, shape[-1])),
    )


def _flat(bias):
    shape = tuple(bias.shape)
    return Layout(lambda a: a.reshape(shape), lambda a: a.reshape(-1))


def normalized(tensors: Tensors, model: keras.Model) -> Tensors:
    """Names with "text_model." in front; for a text tower what belongs to the others is dropped."""
    if "embeddings.token_embedding.weight" in tensors:
        tensors = {f"text_model.{name}": a for name, a in tensors.items()}
    is_whole = hasattr(model, "vision_encoder")
    return {
        name: a
        for name, a in tensors.items()
        if not name.endswith("position_ids") and (is_whole or not name.startswith(OTHERS))
    }
