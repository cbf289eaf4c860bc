"""The loss of a flow map against what must hold for it, and models that are trained with it."""

import keras
import numpy as np
import pytest
from keras import ops
from tiny import (
    DATA,
    assert_equal,
    diffusion_model,
    fit,
    normal,
    numpy,
    randomize,
    refused,
    weights,
)

from keras_uvit import UNet, UViT
from keras_uvit.diffusion import FlowMap, samplers
from keras_uvit.diffusion.loop import advance, begin
from keras_uvit.diffusion.schedules import LinearPath
from keras_uvit.sampling import APG
from keras_uvit.sampling.generate import noise_of

SD = 0.7
PATH = dict(schedule=LinearPath(), prediction="velocity")
FAST = dict(takes_span=True)
SPANS = ((0.5, 0.9), (0.1, 0.4))  # from the first image of a batch to the last: t, and t - r


def column(values):
    return ops.reshape(values, (-1, 1, 1, 1))


def model_of(network=None, flow_map=None, **options):
    flow_map = flow_map or FlowMap(10)
    return diffusion_model({**FAST, **(network or {})}, flow_map=flow_map, **PATH, **options)


def of_a_batch(flow_map, u, alpha, count=64, shape=(3,), scale=1.0, seed=0):
    """The loss of Gaussian images at times that a run could draw, float32."""
    x0, noise = SD * normal(count, *shape, seed=seed), normal(count, *shape, seed=seed + 1)
    t = 1 / (1 + np.exp(-normal(count, seed=seed + 2)))
    t, span = flow_map.times(ops.convert_to_tensor(t), normal(count, 2, seed=seed + 3))
    given = [ops.convert_to_tensor(a) for a in (x0, noise)]
    scales = ops.full((count,), scale)
    return flow_map.loss(u, *given, t, span, ops.convert_to_tensor(alpha, "float32"), scales)


# The loss -----------------------------------------------------------------------------------------


def deviation(t):
    """That of z_t for data of standard deviation SD."""
    return ops.sqrt(ops.square(1 - t) * SD**2 + ops.square(t))


def exact_map(z, t, span, *_, bend=0.0, **__):
    """u of Gaussian data, whose flow is z_r = z_t s(r) / s(t); `bend` turns it away from it."""
    safe = ops.maximum(span, 1e-3)  # at r = t a difference quotient, to first order the slope
    ratio = deviation(t - safe) / deviation(t)
    return z * ((1 - ratio + bend * span * t) / safe)[:, None]


def slope_at_the_exact_map(alpha, every=1):
    """d loss / d bend at bend = 0, over many images, by a difference."""
    flow_map = FlowMap(1, every=every)

    def loss(stopped, moved):
        calls = []

        def u(*args, **kwargs):  # the last call of a loss is the one that has a gradient
            calls.append(1)
            return exact_map(*args, bend=moved if len(calls) == 2 else stopped)

        return float(numpy(of_a_batch(flow_map, u, alpha, count=200_000)))

    return (loss(0.0, 0.05) - loss(0.0, -0.05)) / 0.1, loss(0.0, 0.0)


@pytest.mark.once
def test_the_map_of_gaussian_data_is_stationary_as_alpha_tends_to_zero():
    slopes = [slope_at_the_exact_map(alpha)[0] for alpha in (1.0, 0.5, 0.25, 0.125)]
    # At alpha = 1 the target of a step is the velocity at its beginning, which is another map.
    assert abs(slopes[0]) > 0.05
    # First order in alpha: each half of it halves the slope. 25%: higher orders, and the noise
    # of 200,000 images.
    for larger, smaller in zip(slopes, slopes[1:]):
        assert smaller == pytest.approx(larger / 2, rel=0.25)


def tiny_net(takes_guidance=False, **changes):
    config = dict(image_shape=(4, 4, 1), patch_size=2, hidden_dim=16, num_layers=1, num_heads=2)
    keras.utils.set_random_seed(0)
    return UViT(**{**config, **FAST, "takes_guidance": takes_guidance, **changes})


def velocity_of(network):
    def u(z, t, span, *_, **__):
        return network({"image": z, "timestep": 20.0 * t, "span": span})

    return u


@pytest.mark.skipif(not hasattr(ops, "jvp"), reason="this Keras has no ops.jvp")
@pytest.mark.eager
def test_the_residual_tends_to_that_of_meanflow_as_alpha_tends_to_zero():
    u = velocity_of(randomize(tiny_net()))
    x0, noise, probe = (ops.convert_to_tensor(normal(8, 4, 4, 1, seed=k)) for k in range(3))
    t, span = (ops.convert_to_tensor(np.linspace(*ends, 8).astype("float32")) for ends in SPANS)
    z, v = column(1 - t) * x0 + column(t) * noise, noise - x0
    value, along = ops.jvp(u, (z, t, span), (v, ops.ones_like(t), ops.ones_like(span)))
    meanflow = value - v + column(span) * along  # d/dt of t - r is 1

    def residual(alpha):
        """<e / a, probe>, from the loss, which is quadratic in the network's last answer."""

        def loss(h):
            calls = []

            def moved(*args, **kwargs):
                calls.append(1)
                return u(*args) + (h * probe if len(calls) == 2 else 0.0)

            given = ops.convert_to_tensor(alpha, "float32"), ops.ones_like(t)
            return float(numpy(FlowMap(1, every=1).loss(moved, x0, noise, t, span, *given)))

        return (loss(0.1) - loss(-0.1)) / 0.4

    expected = float(numpy(ops.mean(meanflow * probe)))
    errors = [abs(residual(alpha) - expected) for alpha in (0.4, 0.2, 0.1)]
    # First order in alpha; float32 leaves 1e-7 / (0.1 0.4) of a loss near one.
    assert errors[2] < 0.05 * abs(expected)
    for larger, smaller in zip(errors, errors[1:]):
        assert smaller == pytest.approx(larger / 2, rel=0.2)


@pytest.mark.once
@pytest.mark.skipif(keras.config.backend() != "torch", reason="float64 needs PyTorch's tensors")
@pytest.mark.parametrize("options", [{}, {"guidance": (1.0, 4.0)}], ids=str)
def test_the_gradient_is_the_numerical_one_with_targets_held(options, monkeypatch):
    import torch

    monkeypatch.setattr(ops, "mean", torch.mean)  # Keras' own sums in float32
    draw = np.random.default_rng(0)
    x0, noise, normals = (torch.tensor(draw.normal(size=(8, n))) for n in (3, 3, 2))
    start = torch.tensor(draw.normal(size=(5, 3)))
    flow_map = FlowMap(10, **options)
    t, span = flow_map.times(torch.tensor(draw.uniform(size=8)), normals)
    scale = flow_map.scales(torch.tensor(draw.uniform(size=8)))

    def loss(held, moved):
        last = 2 + bool(flow_map.guidance)  # the call whose answer has a gradient

        def u(z, t, span, scale, rows, conditional=True):
            u.calls += 1
            weight = moved if u.calls == last else held
            more = torch.stack([t, span + torch.log(scale) + conditional], dim=1)
            return torch.tanh(torch.cat([z, more], dim=1) @ weight)

        u.calls = 0
        value = flow_map.loss(u, x0, noise, t, span, torch.tensor(0.3), scale)
        assert u.calls == last
        return value

    weight = start.clone().requires_grad_()
    value = loss(weight, weight)
    assert value.dtype == torch.float64
    (gradient,) = torch.autograd.grad(value, weight)
    for direction in torch.tensor(draw.normal(size=(3, 5, 3))):
        h = 1e-4 * direction
        numerical = (loss(start, start + h) - loss(start, start - h)) / 2e-4
        # A central difference of h = 1e-4 is right to 1e-8 of the third derivative.
        assert float((gradient * direction).sum()) == pytest.approx(float(numerical), rel=1e-6)


@pytest.mark.once
def test_the_adaptive_weight_divides_by_a_power_of_the_size():
    zero, c = ops.zeros((8, 4)), 3.0
    for power in (0.0, 0.5, 1.0):
        flow_map = FlowMap(1, every=1, power=power)
        t, span, scale = (ops.full((8,), value) for value in (0.8, 0.5, 1.0))
        alpha = ops.convert_to_tensor(0.25)
        loss = flow_map.loss(lambda z, *_: zero[: len(z)] + c, zero, zero, t, span, alpha, scale)
        # v = 0, so e = c - (1 - a) c = a c, the size c^2, and the loss a c^2 over its power.
        assert float(numpy(loss)) == pytest.approx(0.25 * c**2 / (c**2 + 1e-2) ** power, rel=1e-6)


def test_at_alpha_one_a_fresh_network_has_the_loss_of_flow_matching():
    model = model_of(compiled=False)
    x0, noise = (ops.convert_to_tensor(normal(8, 4, 4, 1, seed=k)) for k in range(2))
    label = ops.convert_to_tensor(np.arange(8, dtype="int32") % 3)
    t, span = model.flow_map.times(ops.convert_to_tensor(normal(8) ** 2 / 9), normal(8, 2))
    one = ops.convert_to_tensor(1.0)

    def u(z, t, span, scale, rows):
        inputs = {**model.inputs(z, t, span, scale), "label": label[rows]}
        return model.network(inputs)

    loss = model.flow_map.loss(u, x0, noise, t, span, one, ops.ones_like(t))
    z = model.objective.add_noise(x0, t, noise)
    output = model.network({**model.inputs(z, t), "label": label})
    # The span's embedding starts at zero: bit for bit.
    assert float(numpy(loss)) == float(numpy(model.objective.loss(output, x0, t, noise)))


@pytest.mark.once
def test_every_fourth_image_trains_a_step_and_every_second_is_guided():
    flow_map = FlowMap(100, alpha=(1.0, 0.01), guidance=(1.0, 4.0))
    first, normals = np.linspace(0.1, 0.9, 4000).astype("float32"), normal(4000, 2)
    t, span = (numpy(a) for a in flow_map.times(ops.convert_to_tensor(first), normals))
    is_step = np.arange(4000) % 4 == 0
    np.testing.assert_array_equal(t[~is_step], first[~is_step])
    assert not span[~is_step].any()
    assert ((span > 0) & (span < t) & (t < 1))[is_step].all()
    draws = 1 / (1 + np.exp(-(normals * [0.8, 0.8] + [0.2, -1.0])))
    np.testing.assert_allclose(t[is_step], draws.max(axis=1)[is_step], rtol=1e-5)
    np.testing.assert_allclose((t - span)[is_step], draws.min(axis=1)[is_step], atol=1e-6)
    scales = numpy(flow_map.scales(ops.convert_to_tensor(np.linspace(0, 1, 4000, dtype="float32"))))
    assert (scales[1::2] == 1).all()
    np.testing.assert_allclose(
        np.log(scales[::2]), np.log(4) * np.linspace(0, 1, 4000)[::2], atol=1e-5
    )
    alphas = [float(numpy(flow_map.alpha_at(k))) for k in (0, 50, 100, 1000)]
    np.testing.assert_allclose(alphas, [1.0, 0.1, 0.01, 0.01], rtol=1e-5)


# Networks -----------------------------------------------------------------------------------------

KINDS = {
    "token": (UViT, {"num_layers": 3}),
    "adaln": (UViT, {"num_layers": 1, "time": "adaln", "time_mlp": True}),
    "unet": (
        UNet,
        dict(base_dim=16, multipliers=(1,), num_blocks=1, attention_levels=(), head_dim=8),
    ),
}


@pytest.mark.once
@pytest.mark.parametrize("kind", KINDS)
def test_weights_of_one_time_give_the_same_answers_in_a_network_of_two(kind):
    architecture, config = KINDS[kind]
    if architecture is UViT:
        config = dict(patch_size=2, hidden_dim=16, num_heads=2, **config)
    shared = dict(image_shape=(4, 4, 1), num_classes=3, name="net", **config)
    old = randomize(architecture(**shared))
    new = architecture(**shared, **FAST, takes_guidance=True)
    values = {weight.path: weight for weight in old.weights}
    for weight in new.weights:
        if weight.path in values:
            weight.assign(values.pop(weight.path))
    assert not values
    inputs = {
        "image": normal(2, 4, 4, 1),
        "timestep": np.array([900.0, 30.0], "float32"),
        "label": np.array([0, 3]),
    }
    more = {"span": np.array([0.0, 0.5], "float32"), "guidance": np.array([0.0, 1.0], "float32")}
    np.testing.assert_array_equal(numpy(old(inputs)), numpy(new({**inputs, **more})))
    # Once the new weights have moved, both inputs matter.
    randomize(new)
    answers = [numpy(new({**inputs, **more, key: np.ones(2, "float32")})) for key in more]
    assert np.abs(answers[0] - answers[1]).max() > 1e-3


# Models -------------------------------------------------------------------------------------------

GUIDED = dict(network={"takes_guidance": True}, flow_map=FlowMap(10, guidance=(1.0, 4.0)))


@pytest.mark.parametrize("options", [{}, GUIDED], ids=["plain", "guided"])
def test_a_model_trains_and_goes_on_from_its_file_as_if_uninterrupted(tmp_path, options):
    model = model_of(**options)
    first, before = fit(model)["loss"][0], weights(model.network)
    model.save(tmp_path / "model.keras")
    history = fit(model)
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert loaded.flow_map == model.flow_map
    assert loaded.get_config() == model.get_config()
    assert fit(loaded) == history
    assert_equal(weights(loaded), weights(model))
    assert np.isfinite(first)
    moved = [
        w.path
        for w, a, b in zip(model.network.weights, before, weights(model.network))
        if (a != b).any()
    ]
    assert any("span_mlp_in" in path for path in moved)
    assert any("guidance_mlp_in" in path for path in moved) == bool(options)


@pytest.mark.parametrize("steps", [1, 3])
def test_generate_follows_the_learned_map_with_one_evaluation_a_step(steps):
    model = model_of(**GUIDED, compiled=False)
    randomize(model.ema_network)
    drawn = model.generate(
        labels=[0, 2],
        sampler="flow_map",
        num_steps=steps,
        guidance_scale=3.0,
        decode=False,
        verbose=0,
    )
    ((key, _),) = model.sampling_loops.items()
    assert key[0] == ((False, steps),)  # no row is asked twice
    z, _ = noise_of(0, np.arange(2), (4, 4, 1))
    times = np.linspace(1, 0, steps + 1, dtype="float32")
    for t, r in zip(times, times[1:]):
        inputs = model.inputs(z, *(np.full(2, value, "float32") for value in (t, t - r, 3.0)))
        u = model.ema_network({**inputs, "label": ops.convert_to_tensor([0, 2])})
        z = z - (t - r) * numpy(u)
    # 1e-5 of images of size one: D = z - t u and its weights round in another order.
    np.testing.assert_allclose(drawn, z, atol=1e-5 * np.abs(z).max())


@pytest.mark.once
def test_pictures_are_edited_by_a_flow_map_as_by_any_sampler():
    model = model_of(**GUIDED, compiled=False)
    randomize(model.ema_network)
    given = dict(labels=[0, 2], sampler="flow_map", num_steps=3, guidance_scale=2.0, verbose=0)
    pictures, mask = DATA["image"][:2], np.arange(16).reshape(4, 4) < 8
    plain = model.generate(**given)
    np.testing.assert_array_equal(model.generate(**given, image=pictures, strength=1.0), plain)
    for resamples in (1, 2):
        drawn = model.generate(**given, image=pictures, mask=mask, resamples=resamples)
        np.testing.assert_array_equal(drawn[:, ~mask], pictures[:, ~mask])
        assert (drawn[:, mask] != pictures[:, mask]).any()
    halfway = model.generate(**given, guidance_interval=(0.0, 0.5))
    assert (halfway != plain).any()


@pytest.mark.once
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_any_number_of_steps_of_the_exact_map_ends_where_the_flow_does(steps):
    z = normal(64, 3)

    def denoise(x, row):
        t, span = row["t"], row["span"]
        column = ops.ones_like(x[:, 0])
        u = x * ((1 - deviation(t - span) / deviation(t)) / span)
        return x - t * u * column[:, None]

    table = samplers.named("flow_map", LinearPath(), steps).packed()
    x0 = numpy(advance([(steps, denoise)], begin(z), table)[0])
    np.testing.assert_allclose(x0, SD * z, atol=1e-6)  # float32 rounding of numbers up to 3


LINEAR = dict(schedule=LinearPath(), prediction="velocity")


@pytest.mark.once
@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: FlowMap(0), ("FlowMap.steps", "0")),
        (lambda: FlowMap(10, alpha=(0.1, 0.5)), ("alpha", "(0.1, 0.5)")),
        (lambda: FlowMap(10, alpha=(1.0, 0.0)), ("alpha", "0 < last")),
        (lambda: FlowMap(10, alpha=0.5), ("FlowMap.alpha", "0.5")),
        (lambda: FlowMap(10, guidance=3.0), ("FlowMap.guidance", "3.0")),
        (lambda: FlowMap(10, every=0), ("FlowMap.every", "0")),
        (lambda: FlowMap(10, power=2), ("FlowMap.power", "2")),
        (lambda: FlowMap(10, guidance=(4.0, 1.0)), ("FlowMap.guidance", "(4.0, 1.0)")),
        (lambda: model_of({"takes_span": False}), ("takes_span=True", "takes_span=False")),
        (
            lambda: diffusion_model(FAST, flow_map=FlowMap(10), compiled=False),
            ("LinearPath()", "VPLinear"),
        ),
        (
            lambda: diffusion_model(FAST, flow_map=FlowMap(10), schedule=LinearPath()),
            ("velocity", "epsilon"),
        ),
        (lambda: model_of({"takes_guidance": True}), ("takes_guidance", "need each other")),
        (lambda: model_of(flow_map=FlowMap(10, guidance=(1.0, 4.0))), ("need each other",)),
        (
            lambda: model_of(GUIDED["network"] | {"null_label": False}, GUIDED["flow_map"]),
            ("no label",),
        ),
        (
            lambda: diffusion_model(FAST, **LINEAR).generate(labels=[0], sampler="flow_map"),
            ("trained with a flow map", "heun"),
        ),
        (
            lambda: model_of(**GUIDED).generate(labels=[0], guidance_scale=9.0),
            ("1.0 to 4.0", "9.0"),
        ),
        (
            lambda: model_of(**GUIDED).generate(labels=[0], guidance=APG(), guidance_scale=2.0),
            ("asked once a step", "APG"),
        ),
    ],
)
def test_what_cannot_be_is_refused(call, words):
    refused(ValueError, call, *words)


@pytest.mark.once
def test_a_flow_map_is_an_object_and_chooses_the_sampler():
    refused(TypeError, lambda: model_of(flow_map=True), "FlowMap(steps=4000)", "True")
    assert (model_of().sampler, diffusion_model().sampler) == ("flow_map", "dpm_solver_pp_2m")
