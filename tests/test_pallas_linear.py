"""Kernels of projections and experts, interpreted: bit for bit the reference wherever activations are int8 codes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absent import spoiled
from quantised_numpy import packed, quantised_dot_numpy, random_blocks

from ds4jax.activation import Activation
from ds4jax.errors import ConfigError
from ds4jax.ops import linear as reference
from ds4jax.ops import moe
from ds4jax.ops.quantise import act_q8, act_q8k, quantise
from ds4jax.ops.rows import Live
from ds4jax.ops.store import linear_store
from ds4jax.pallas import KERNELS, experts
from ds4jax.pallas import linear as kernels
from ds4jax.pallas import quantise as quantise_kernels
from ds4jax.pallas.ptx import Emulated
from ds4jax.quants import QTensor

FORMATS = ["Q8_0", "IQ2_XXS", "Q2_K", "Q4_K"]


def rows(count: int, width: int, seed: int = 0) -> jax.Array:
    """Rows of very different magnitude, the first with a zero block and a negative peak."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((count, width)) * 10.0 ** rng.uniform(-3, 3, (count, 1))
    x[0, :32] = 0
    x[0, 40] = -2 * np.abs(x[0]).max()
    return jnp.asarray(x.astype(np.float32))


def stored(name: str, *shape: int, seed: int = 0) -> QTensor:
    *lead, width = shape
    blocks = width // (32 if name == "Q8_0" else 256)
    raw = random_blocks(name, int(np.prod(lead)), blocks, seed)
    return packed(name, raw.reshape(*lead, -1), shape)


def everyone(count: int) -> jax.Array:
    return jnp.ones(count, bool)


def assert_equal(got, want):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


# ----------------------------------------------------------------------------------------------- instructions


def test_emulated_instructions():
    rng = np.random.default_rng(0)
    a, b, c = (rng.integers(-(2**31), 2**31, 40).astype(np.int32) for _ in range(3))
    ptx = Emulated()
    signed = [word.view(np.int8).reshape(40, 4).astype(np.int64) for word in (a, b)]
    want = (c + (signed[0] * signed[1]).sum(1)).astype(np.int32)
    np.testing.assert_array_equal(np.asarray(ptx.dp4a(jnp.asarray(a), jnp.asarray(b), jnp.asarray(c))), want)
    low, high = 0x002B1908, 0x00D5E7F8
    pool = np.frombuffer(np.array([low, high], np.uint32).tobytes(), np.uint8)
    picked = np.stack([pool[(a >> (4 * byte)) & 7] for byte in range(4)], 1)
    got = np.asarray(ptx.permute(low, high, jnp.asarray(a)))
    np.testing.assert_array_equal(got, np.ascontiguousarray(picked).view(np.int32)[:, 0])
    halves = jnp.asarray([0.5, 1.5, 2.5, -0.5, -1.5, 126.7], jnp.float32)
    np.testing.assert_array_equal(np.asarray(ptx.rint(halves)), [0, 2, 2, 0, -2, 127])
    values = rng.standard_normal((3, 8)).astype(np.float32)
    tree = [((v[0] + v[1]) + (v[2] + v[3])) + ((v[4] + v[5]) + (v[6] + v[7])) for v in values]
    np.testing.assert_array_equal(np.asarray(jax.jit(ptx.tree_sum)(jnp.asarray(values))), np.array(tree))


# --------------------------------------------------------------------------------------------------- activations


@pytest.mark.parametrize("shape", [(2, 96), (2, 2048), (2, 3, 64)])
def test_quantise(shape):
    x = rows(int(np.prod(shape[:-1])), shape[-1]).reshape(shape)
    got = quantise_kernels.quantise(everyone(2), x, act="q8", interpret=True)
    assert_equal(got, jax.jit(functools.partial(quantise, act="q8"))(x))


def test_codes_of_several_arrays_in_one_launch():
    """Each in its form; 18 rows beside nine belong two to each, and those of an absent one are left out."""
    one, two = rows(9, 512), rows(18, 96)
    # Equal peaks: the first counts.
    one = one.at[0, 300].set(-jnp.max(jnp.abs(one[0, 256:]))).at[0, 400].set(-one[0, 300])
    live = jnp.arange(9) != 1
    q8k, q8 = quantise_kernels.act_codes(live, [(one, "q8k"), (two, "q8")], interpret=True)
    assert_equal(*(jax.tree.map(lambda v: v[live], codes) for codes in (q8k, jax.jit(act_q8k)(one))))
    there = jnp.repeat(live, 2)
    assert_equal(*(jax.tree.map(lambda v: v[there], codes) for codes in (q8, jax.jit(act_q8)(two))))


def test_float_activations_stay_as_they_are():
    x = rows(2, 64)
    got = quantise_kernels.quantise(everyone(2), x, act="f32", interpret=True)
    assert got.q8 is None and got.x is x


# --------------------------------------------------------------------------------------------------- projections


@pytest.mark.parametrize("name", FORMATS)
def test_linear_equals_reference_and_numpy(name):
    """Six weight rows of one format; K-quants with more terms than lanes, the others with lanes beyond the terms."""
    width = {"Q8_0": 96, "IQ2_XXS": 5 * 256, "Q2_K": 9 * 256, "Q4_K": 5 * 256}[name]
    raw = random_blocks(name, 6, width // (32 if name == "Q8_0" else 256), seed=3)
    weight, x = packed(name, raw, (6, width)), rows(2, width, seed=4)
    a = jax.jit(functools.partial(quantise, act="q8"))(x)
    got = jax.jit(functools.partial(kernels.linear, interpret=True))(everyone(2), a, (), weight)[0]
    want = jax.jit(functools.partial(reference.linear, precision="highest"))(a, (), weight)[0]
    assert_equal(got, want)
    assert_equal(got, quantised_dot_numpy(name, np.asarray(x), raw))


def test_several_weights_in_one_launch_and_more_rows_than_a_program():
    """Eleven rows are two programs of six, the last of which repeats row 10. Returned results, and results written
    to the end and the beginning of rings of two sequences; absent rows have places too, and leave them, also if they
    are all that a program has."""
    rng = np.random.default_rng(3)
    x, w = (jnp.asarray(rng.integers(-8, 9, shape).astype(np.float32)) for shape in ((11, 64), (2, 64)))  # exact dots
    a, live = quantise(x, act="q8"), everyone(11).at[jnp.array([2, 8])].set(False)
    sequence, place = jnp.arange(11) // 6, (jnp.arange(11) + 4) % 7
    rings = tuple(jnp.asarray(rng.standard_normal((2, 7, n), np.float32)) for n in (3, 2))
    shared = ((stored("Q8_0", 5, 64),), (stored("Q8_0", 3, 64, seed=1), w.astype(jnp.float16)), rings)

    @jax.jit
    def want(*args):
        return linear_store(Live.of(live), lambda function, *rows: function(*rows), *args, precision="highest")

    run = jax.jit(functools.partial(kernels.linear_store, interpret=True))
    got = run(live, a, sequence, place, *shared)
    assert_equal(got, want(a, sequence, place, *shared))
    results, written = run(everyone(1), *jax.tree.map(lambda v: v[10:], (a, sequence, place)), *shared)
    assert_equal(results, [v[10:] for v in got[0]])
    assert_equal([ring[1, 0] for ring in written], [ring[1, 0] for ring in got[1]])
    _, written = run(live & (sequence == 0), a, sequence, place, *shared)
    assert_equal([ring[0] for ring in written], [ring[0] for ring in got[1]])
    assert_equal([ring[1] for ring in written], [ring[1] for ring in rings])
    for ring, before in zip(got[1], rings, strict=True):
        changed = (np.asarray(ring) != np.asarray(before)).any(axis=2)
        assert [np.nonzero(places)[0].tolist() for places in changed] == [[0, 1, 2, 4, 5], [0, 3, 4, 6]]


def test_wanted_products():
    """Nine rows are two programs of five. The first weight's products of one of them are wanted, so they are computed
    beside their program's, and the others, which the interpreter fills with NaN, are left alone."""
    a, ws = quantise(rows(9, 64), act="q8"), (stored("Q8_0", 1, 64), stored("Q8_0", 1, 64, seed=1))
    run = jax.jit(functools.partial(kernels.linear, interpret=True))
    got = run(everyone(9), a, (jnp.arange(9) == 7,), *ws)
    want = jax.jit(functools.partial(reference.linear, precision="highest"))(a, (), *ws)
    assert_equal((got[0][5:], got[1]), (want[0][5:], want[1]))
    assert np.isnan(got[0][:5]).all()
    first = jnp.arange(9) < 5  # none of the other program's rows exist: it ends as well
    got = run(first, a, (jnp.arange(9) == 3,), *ws)
    assert_equal([y[:5] for y in got], [y[:5] for y in want])
    assert np.isnan(jnp.stack(got)[:, 5:]).all()


def test_long_rows_of_weights():
    """Two steps of lanes: for one activation row both are loaded before the first is used, for two they are not."""
    weight, a = stored("Q8_0", 2, 8192), jax.jit(functools.partial(quantise, act="q8"))(rows(2, 8192))
    run = jax.jit(functools.partial(kernels.linear, interpret=True))
    (got,), (alone,) = (run(everyone(len(one.x)), one, (), weight) for one in (a, jax.tree.map(lambda v: v[1:], a)))
    assert_equal(got, jax.jit(functools.partial(reference.linear, precision="highest"))(a, (), weight)[0])
    assert_equal(alone, got[1:])


def test_grouped_linear():
    weight, x = stored("Q8_0", 2 * 3, 96, seed=5), rows(2 * 2, 96).reshape(2, 2, 96)
    a = quantise(x, act="q8")
    got = jax.jit(functools.partial(kernels.grouped_linear, interpret=True))(everyone(2), a, weight)
    assert_equal(got, jax.jit(functools.partial(reference.grouped_linear, precision="highest"))(a, weight))


@pytest.mark.parametrize("name", FORMATS)
def test_float_activations(name):
    weight, x = stored(name, 4, 512, seed=6), rows(2, 512)
    a = Activation(x, None)
    got = jax.jit(functools.partial(kernels.linear, interpret=True))(everyone(2), a, (), weight)[0]
    want = np.asarray(x, np.float64) @ np.asarray(reference.dense(weight), np.float64).T
    size = np.abs(np.asarray(x, np.float64)) @ np.abs(np.asarray(reference.dense(weight), np.float64)).T
    # 512 products, each rounded once, and as many sums: far below the worst case of 512 units in the last place.
    np.testing.assert_array_less(np.abs(np.asarray(got) - want), 16 * 2.0**-24 * size + 1e-30)


def test_a_format_without_a_kernel_is_an_error():
    weight = QTensor({"raw": jnp.zeros((2, 1, 210), jnp.uint8)}, "Q6_K", (2, 256))
    with pytest.raises(ConfigError, match="no kernel reads Q6_K weights"):
        KERNELS["linear"](everyone(1), quantise(rows(1, 256), act="q8"), (), weight, interpret=True)


# ------------------------------------------------------------------------------------------------------ experts


ROUTED = {"limit": 1.5, "shared_limit": 0.5}


def moe_weights(routed, shared, inner, outer, wide):
    """Gate, up and down of three experts and of the shared one, in two formats each: of gate and up, and of down."""
    kinds = [(*routed[:1], *routed), (*shared[:1], *shared)]
    shapes = ((wide, inner), (wide, inner), (outer, wide))
    return [
        stored(kind, *lead, *shape, seed=seed)
        for lead, formats in zip(((3,), ()), kinds, strict=True)
        for seed, (kind, shape) in enumerate(zip(formats, shapes, strict=True))
    ]


def moe_rows(count, width, act="q8"):
    rng = np.random.default_rng(7)
    x = jnp.asarray(rng.standard_normal((count, width)).astype(np.float32))
    ids = jnp.asarray([rng.permutation(3)[:2] for _ in range(count)], jnp.int32)
    weights = jnp.asarray(rng.uniform(0.1, 1, (count, 2)).astype(np.float32))
    return jax.jit(functools.partial(quantise, act=act))(x), ids, weights


def both(**settings):
    """The kernel, and its reference with all rows given."""
    kernel = jax.jit(functools.partial(experts.experts, **settings, interpret=True))
    return kernel, jax.jit(functools.partial(moe.experts, **settings, precision="highest"))


@pytest.mark.parametrize(
    ("routed", "shared"),
    [
        (("IQ2_XXS", "Q2_K"), ("Q8_0", "Q8_0")),
        (("Q8_0", "Q8_0"), ("Q8_0", "Q8_0")),
        (("Q4_K", "Q4_K"), ("Q8_0", "Q2_K")),
    ],
)
def test_experts(routed, shared):
    """Equal to the reference; an absent row changes nothing, and a row alone gives what it gives among others."""
    ws, args = moe_weights(routed, shared, 256, 4, 256), moe_rows(3, 256)
    run, wanted = both(**ROUTED, act="q8")
    got = np.asarray(run(everyone(3), *args, *ws))
    assert_equal(got, wanted(*args, *ws))
    only = jnp.asarray([False, True, False])
    assert_equal(np.asarray(run(only, *spoiled(args, only), *ws))[1], got[1])


def test_experts_of_many_rows():
    """The shared expert of nine rows is the work of several programs, with the same results."""
    ws, args = moe_weights(("Q8_0", "Q8_0"), ("Q8_0", "Q8_0"), 32, 3, 64), moe_rows(9, 32)
    run, wanted = both(**ROUTED, act="q8")
    assert_equal(np.asarray(run(everyone(9), *args, *ws)), wanted(*args, *ws))


def test_experts_without_codes():
    """Float activations, and float weights beside quantised ones; sums in another order than the reference's."""
    ws, args = moe_weights(("Q8_0", "Q8_0"), ("Q8_0", "Q8_0"), 32, 2, 32), moe_rows(1, 32, act="f32")
    ws[1], ws[5] = (reference.dense(w).astype(jnp.float16) for w in (ws[1], ws[5]))
    run, wanted = both(**ROUTED, act="f32")
    np.testing.assert_allclose(run(everyone(1), *args, *ws), wanted(*args, *ws), rtol=1e-5, atol=1e-4)
