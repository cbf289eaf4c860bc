"""What is kept between the steps of sampling: exact where nothing changes, and its plan."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_uvit import DiffusionModel, UViT
from keras_uvit.networks import halves
from keras_uvit.process import samplers
from keras_uvit.training.evaluations import Kind, Plan, work

pytestmark = [pytest.mark.eager, pytest.mark.once]

TINY = dict(image_shape=(4, 4, 1), patch_size=2, hidden_dim=16, num_layers=5, num_heads=2)
WHOLE, OUTER = True, False


def make(**arguments):
    keras.utils.set_random_seed(0)
    model = DiffusionModel(UViT(**{**TINY, "num_classes": 3, **arguments}), num_steps=6)
    for weight in model.network.weights:
        weight.assign(4.0 * weight)  # fresh weights are so small that blocks hardly matter
    model.copy_weights_to_ema()
    return model


@pytest.fixture(scope="module")
def model():
    return make()


def draw(model, **options):
    options = dict(labels=[0, 1, 2, 0, 1], guidance_scale=2.0, decode=False, verbose=0) | options
    return model.generate(**options)


def plan(scale=2.0, interval=(0.0, 1.0), guidance_every=1, middle_every=1, outer_blocks=1):
    return Plan(scale, interval, guidance_every, middle_every, outer_blocks)


def kinds(times=6, **choices):
    return plan(**choices).kinds(np.linspace(1.0, 0.5, times))


# The plan -----------------------------------------------------------------------------------------


def test_by_default_everything_is_evaluated():
    assert set(kinds()) == {Kind("new", WHOLE)}
    assert set(kinds(scale=1.0)) == {Kind("off", WHOLE)}


def test_guidance_every_other_step():
    assert [kind.guidance for kind in kinds(guidance_every=2)] == ["new", "kept"] * 3
    assert [kind.guidance for kind in kinds(guidance_every=4)] == [
        "new",
        *["kept"] * 3,
        "new",
        "kept",
    ]


def test_guidance_is_new_where_the_interval_begins():
    seen = [kind.guidance for kind in kinds(interval=(0.55, 0.95), guidance_every=3)]
    assert seen == ["off", "new", "kept", "kept", "new", "off"]


def test_the_middle_runs_at_the_first_of_so_many_steps():
    assert [kind.whole for kind in kinds(middle_every=3)] == [WHOLE, OUTER, OUTER] * 2


def test_no_half_reads_an_older_middle_than_asked():
    """A doubled row needs the middle of both halves, which single rows do not refresh."""
    for times, interval, guidance, middle in [
        (12, (0.0, 1.0), 2, 3),
        (12, (0.0, 1.0), 3, 2),
        (12, (0.6, 0.9), 1, 5),
        (30, (0.55, 0.8), 4, 7),
    ]:
        ages = {"conditional": np.inf, "unconditional": np.inf}
        for kind in kinds(times, interval=interval, guidance_every=guidance, middle_every=middle):
            read = list(ages)[: 1 + (kind.guidance == "new")]
            for half in ages:
                ages[half] = 0 if kind.whole and half in read else ages[half] + 1
            assert all(ages[half] < middle for half in read)


def test_work_counts_blocks():
    t = np.linspace(1.0, 0.5, 6)
    assert work(plan(), t, 5) == 2
    assert work(plan(scale=1.0), t, 5) == 1
    assert work(plan(guidance_every=2), t, 5) == 1.5
    # Half of the rows run 2 blocks of 5.
    assert work(plan(middle_every=2), t, 5) == pytest.approx(2 * (1 + 0.4) / 2)
    assert work(plan(middle_every=2, outer_blocks=2), t, 5) == pytest.approx(2 * (1 + 0.8) / 2)


# The two parts of the network ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        dict(num_classes=3),
        dict(context_shape=(3, 5)),
        dict(time="adaln", num_classes=2, dtype="mixed_bfloat16"),
        dict(skip="add", skip_norm=True),
        dict(position="rotary", norm="rms", mlp="swiglu"),
    ],
    ids=["label", "context", "adaln", "add", "rotary"],
)
@pytest.mark.parametrize("outer_blocks", [1, 2])
def test_the_outer_blocks_end_as_the_whole_network_does(arguments, outer_blocks):
    network = UViT(**TINY, **arguments)
    whole, outer = halves.with_middle(network, outer_blocks)
    rng = np.random.default_rng(0)
    inputs = {
        "image": rng.standard_normal((2, 4, 4, 1)).astype("float32"),
        "timestep": np.array([1.0, 999.0], "float32"),
        "label": np.array([0, 1], "int32"),
        "context": rng.standard_normal((2, 3, 5)).astype("float32"),
    }
    inputs = {key: ops.convert_to_tensor(inputs[key]) for key in network.input}
    expected = ops.convert_to_numpy(network(inputs))
    out, middle = whole(inputs)
    # The same layers in the same order, on the same numbers.
    np.testing.assert_array_equal(ops.convert_to_numpy(out), expected)
    np.testing.assert_array_equal(ops.convert_to_numpy(outer((inputs, middle))), expected)
    other = ops.convert_to_numpy(outer((inputs, -middle)))
    assert np.abs(other - expected).max() > 1e-3  # the middle is heard
    inputs["image"] = inputs["image"] + 1.0
    other = ops.convert_to_numpy(outer((inputs, middle)))
    assert np.abs(other - expected).max() > 1e-3  # and the outer blocks
    names = {layer.name for layer in outer.layers}
    assert "mid_block" not in names
    assert f"in_block_{outer_blocks - 1}" in names


def test_a_global_policy_rounds_no_timestep():
    """bfloat16 would make 1000 of 999, for a Keras model made under such a policy."""
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        network = UViT(**TINY)
        whole, outer = halves.with_middle(network, 1)
    finally:
        keras.config.set_dtype_policy("float32")
    inputs = {"image": ops.zeros((1, 4, 4, 1)), "timestep": ops.convert_to_tensor([999.0])}
    expected = ops.convert_to_numpy(network(inputs))
    rounded = {**inputs, "timestep": ops.convert_to_tensor([1000.0])}
    assert np.abs(ops.convert_to_numpy(network(rounded)) - expected).max() > 1e-4
    out, middle = whole(inputs)
    np.testing.assert_array_equal(ops.convert_to_numpy(out), expected)
    np.testing.assert_array_equal(ops.convert_to_numpy(outer((inputs, middle))), expected)


# Sampling -----------------------------------------------------------------------------------------


def still(model):
    """A sampler whose rows all ask the same of the network: t and x never change."""
    rows = samplers.ddim(model.schedule, np.array([0.8, 0.5]))
    fields = {key: np.repeat(getattr(rows, key), 4, axis=0) for key in ("t", "denoised", "noise")}
    fields["denoised"][:-1] = 0.0
    anchor = np.array([1.0, 1.0, 1.0, rows.anchor[0]])
    return samplers.Steps(anchor=anchor, commit=np.array([0, 0, 0, 1]), **fields)


@pytest.mark.parametrize(
    "choices",
    [
        dict(guidance_every=2),
        dict(guidance_every=4),
        dict(middle_every=2),
        dict(middle_every=4, outer_blocks=2),
        dict(guidance_every=2, middle_every=2),
        dict(guidance_every=2, middle_every=3),
        dict(guidance_every=3, middle_every=2, guidance_interval=(0.1, 0.9)),
    ],
)
def test_what_is_kept_is_exact_where_nothing_changes(model, choices):
    sampler = still(model)
    expected = draw(model, sampler=sampler)
    kept = draw(model, sampler=sampler, **choices)
    # D_c + (w - 1)(D_c - D_u) for D_u + w (D_c - D_u): two float32 roundings of values up to 40.
    np.testing.assert_allclose(kept, expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("choice", ["guidance_every", "middle_every"])
def test_what_is_kept_is_off_by_one_step(model, choice):
    """Half the step, half the error: an order of convergence."""
    errors = []
    for num_steps in (4, 8):
        # From 0.5 to 0.4 timesteps of 999 earlier: longer ways turn the sinusoids by radians.
        sampler = samplers.ddim(model.schedule, np.linspace(0.5, 0.4996, num_steps + 1))
        exact = draw(model, sampler=sampler)
        errors.append(np.abs(draw(model, sampler=sampler, **{choice: 2}) - exact).mean())
    # Higher orders of the step, and float32 rounding of what is left, move the ratio from 2.
    np.testing.assert_allclose(errors[0] / errors[1], 2, rtol=0.2)


@pytest.mark.compiled
def test_unconditional_models_keep_the_middle():
    model = make(num_classes=None)
    options = dict(num_images=3, decode=False, verbose=0, sampler=still(model))
    expected = model.generate(**options)
    np.testing.assert_allclose(
        model.generate(**options, middle_every=2), expected, atol=1e-5 * np.abs(expected).max()
    )


@pytest.mark.compiled
def test_image_k_is_the_same_in_any_batch(model):
    choices = dict(guidance_every=2, middle_every=2, num_steps=8)
    all_at_once, in_pieces = draw(model, **choices), draw(model, batch_size=2, **choices)
    # The same arithmetic in batches of another size: rounding only.
    np.testing.assert_allclose(all_at_once, in_pieces, atol=1e-5 * np.abs(all_at_once).max())


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ({}, dict(guidance_every=0), "guidance_every must be an int >= 1.*0"),
        ({}, dict(middle_every=1.5), "middle_every must be an int.*1.5"),
        ({}, dict(middle_every=2, outer_blocks=3), "1 to 2 here. Received: 3"),
        ({}, dict(middle_every=2, outer_blocks=0), "1 to 2 here. Received: 0"),
        (dict(skip=None), dict(middle_every=2), "long skips"),
        (dict(num_layers=1), dict(middle_every=2), "long skips"),
    ],
)
def test_choices_that_do_not_fit_are_refused(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        draw(make(**arguments), **options)
