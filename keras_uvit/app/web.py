"""The page: its fields, a button and the picture, for each model."""

import contextlib
import html
import time
import warnings
from collections.abc import Iterator
from typing import Any

from keras_uvit.app.drawing import MOST, Abilities, abilities, draw
from keras_uvit.evaluation.files import image_grid
from keras_uvit.optional import optional

# What a person can do something about; of anything else the page says no more than that it failed.
REFUSALS = (ValueError, TypeError, OSError, ImportError, FloatingPointError)
SHOWN_PIXELS = 128  # height of an image on the page, about
KEPT_SECONDS = 3600  # for which the server keeps pictures
STYLE = "img {image-rendering: pixelated}"
SHAPES = [
    "a small red circle left of a large blue square",
    "a large yellow triangle above a small green circle",
    "a large green square below a large red triangle",
]
PROMPTS = {"uvit_tiny_shapes": SHAPES, "uvit_tiny_shapes_fast": SHAPES}

# What stands at each field.
WORDS = {
    "classes": dict(label="Classes", info="drawn in turn"),
    "prompts": dict(label="Prompt", info="one in each line, drawn in turn"),
    "negative_prompts": dict(label="Negative prompt", info="what guidance leads away from"),
    "number": dict(label="Images", info=f"at most {MOST['number']}"),
    "seed": dict(label="Seed", info="others, other images"),
    "sampler": dict(label="Sampler", info="turns noise into images"),
    "num_steps": dict(label="Steps", info="that the sampler takes"),
    "guidance_scale": dict(label="Guidance", info="1 is off"),
    "image": dict(label="Picture, cropped and resized to {} x {}"),
    "mask": dict(label="Mask, white is drawn again"),
    "strength": dict(label="Strength", info="0 keeps the picture, 1 does not look at it"),
    "resamples": dict(label="Resamples", info="with a mask: how often each step is made"),
}


def page(models: dict[str, Any]) -> Any:
    """The page as `gradio.Blocks`, such as for `launch()` in a notebook.

    Each model has the fields of what it can: classes or prompts, guidance where it can be guided, a
    picture and a mask to start from. All drawing goes through one queue, one person at a time.

    Args:
        models: dict of `DiffusionModel` by the name that the page shows; a tab for each.

    Raises:
        ValueError: without a model, or for one of latents without its autoencoder.
        ImportError: without gradio.
    """
    gr = optional("gradio", "app", "The page needs gradio")
    if not models:
        raise ValueError("The page needs at least one model.")
    for name, model in models.items():
        if model.latent_scale is not None and model.encoders.autoencoder is None:
            raise ValueError(
                f"{name} makes latents and has no autoencoder to decode them: call "
                "`model.set_encoders(autoencoder=...)`."
            )
    blocks = gr.Blocks(
        title="keras_uvit", analytics_enabled=False, delete_cache=(KEPT_SECONDS, KEPT_SECONDS)
    )
    with blocks:
        gr.Markdown("# keras_uvit")
        for index, (name, model) in enumerate(models.items()):
            with gr.Tab(name):
                _panel(gr, index, name, model)
    return blocks.queue(default_concurrency_limit=1)


def serve(models: dict[str, Any], host: str = "127.0.0.1", port: int = 7860) -> None:
    """Serves the page until Ctrl-C. Nothing is sent to anybody else, and nothing is fetched.

    Args:
        models: see `page`.
        host: address to listen at; "0.0.0.0" lets other machines in, which need no password.
        port: int.

    Raises:
        OSError: if the port is taken.
    """
    blocks = page(models)
    _, url, _ = blocks.launch(
        server_name=host,
        server_port=port,
        share=False,
        ssr_mode=False,
        quiet=True,
        footer_links=[],
        css=STYLE,
        prevent_thread_lock=True,
    )
    print(f"The page is at {url} until you press Ctrl-C.", flush=True)  # noqa: T201
    blocks.block_thread()


def _panel(gr, index, name, model):
    can = abilities(model)
    with gr.Row():
        with gr.Column():
            fields = _fields(gr, index, can, model, PROMPTS.get(name, []))
        with gr.Column():
            button = gr.Button("Draw", variant="primary", elem_id=f"draw-{index}")
            grid = gr.Image(
                label="Images",
                format="png",
                interactive=False,
                buttons=["download", "fullscreen"],
                elem_id=f"grid-{index}",
            )
            said = gr.Markdown(elem_id=f"said-{index}")
            images = gr.State()
            if can.picture_size:
                again = gr.Button("Start from the first image", elem_id=f"again-{index}")
                again.click(_first, images, fields["image"])
    button.click(
        _drawing(gr, model, can, fields),
        set(fields.values()),
        [grid, said, images],
        concurrency_id="draw",  # one at a time, whichever model it is
        concurrency_limit=1,
    )


def _fields(gr, index: int, can: Abilities, model: Any, prompts: list[str]) -> dict[str, Any]:
    """The components that say what is drawn, by the names that `arguments` has."""
    fields: dict[str, Any] = {}

    def made(kind, name, **options):
        own = {"elem_id": f"{name}-{index}", "min_width": 100}
        fields[name] = kind(**{**WORDS[name], **own, **options})

    if can.num_classes:
        every = [(str(k), k) for k in range(can.num_classes)]
        chosen = list(range(min(10, can.num_classes)))
        made(gr.Dropdown, "classes", choices=every, value=chosen, multiselect=True)
    if can.prompts:
        made(gr.Textbox, "prompts", value="".join(prompts[:1]), lines=2)
    if prompts:
        gr.Examples([[prompt] for prompt in prompts], fields["prompts"])
    if can.negative_prompts:
        made(gr.Textbox, "negative_prompts")
    with gr.Row():
        made(gr.Number, "number", value=min(10, can.num_classes) or 4)
        made(gr.Number, "seed", value=0)
        made(gr.Number, "num_steps", value=model.num_steps)
    with gr.Row():
        made(gr.Dropdown, "sampler", choices=list(can.samplers), value=model.sampler, scale=2)
        if can.guidance:
            scales = can.learned_scales
            own = {"info": f"from {scales[0]:g} to {scales[1]:g}"} if scales else {}
            made(gr.Number, "guidance_scale", value=float(model.guidance_scale), **own)
    if can.picture_size:
        _edit_fields(gr, made, WORDS["image"]["label"].format(*can.picture_size))
    return fields


def _edit_fields(gr, made, label):
    picture = dict(type="filepath", image_mode=None, format="png", sources=["upload", "clipboard"])
    with gr.Accordion("Start from a picture", open=False):
        with gr.Row():
            made(gr.Image, "image", **{**picture, "label": label})
            made(gr.Image, "mask", **picture)
        with gr.Row():
            made(gr.Slider, "strength", minimum=0, maximum=1, step=0.05, value=0.6)
            made(gr.Number, "resamples", value=1)


def _drawing(gr, model, can, fields):
    """What the button calls."""

    def drawing(values, progress=gr.Progress()):  # noqa: B008, that is how gradio knows it
        wishes = {name: values[field] for name, field in fields.items()}
        begun = time.perf_counter()
        with _telling(gr):
            images = draw(model, can, wishes, lambda share: progress(share, "Drawing"))
        seconds = time.perf_counter() - begun
        grid = image_grid(images, zoom=max(1, SHOWN_PIXELS // images.shape[1]))
        count = f"{len(images)} image{'s' * (len(images) > 1)}"
        return _plain(grid), f"{count} in {seconds:.1f} s", images

    return drawing


@contextlib.contextmanager
def _telling(gr) -> Iterator[None]:
    """Inside, errors and warnings of the library are shown on the page, in its words."""
    with warnings.catch_warnings(record=True) as caught:
        try:
            yield
        except REFUSALS as error:
            raise gr.Error(html.escape(str(error)), print_exception=False) from error
    for warning in caught:
        if issubclass(warning.category, UserWarning):
            gr.Warning(html.escape(str(warning.message)))


def _first(images):
    return None if images is None else _plain(images[0])


def _plain(image):
    """Without a last axis of one grey channel, as gradio takes it."""
    return image[..., 0] if image.shape[-1] == 1 else image
