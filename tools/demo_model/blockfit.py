"""Least-squares fits of GGML weight blocks, written once for NumPy and jax.numpy.

`encoders` packs the results into file bytes, `fakequant` returns the represented values; both run the same search, so a
weight that training has seen quantised is the weight the file holds. `xp` is the array module and `f16` rounds float32
to the float16 grid (XLA may drop a plain narrowing cast). Layouts: GGML block formats, ggml-quants.c.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from gguf import quants
from jax import lax

Array = Any
SUPER_BLOCK = 256

IQ2_FIRST_SCALES = np.array(
    [*(np.geomspace(0.6, 1.3, 9) / 43), 1 / 25, 1 / 8], np.float32
)  # shares of the largest magnitude
IQ2_TOP_CODES = np.arange(15, 3, -1, dtype=np.float32)  # scale codes tried for the group of largest scale


class Codebook(NamedTuple):
    """IQ2_XXS grid sorted by squared length. Equal lengths form classes: a scale search needs one maximum per class."""

    entries: np.ndarray  # f32 [256, 8], sorted
    file_index: np.ndarray  # u8 [256], position of a sorted entry in the GGML table
    bounds: tuple[tuple[int, int], ...]  # class c = entries[lo:hi]
    square: np.ndarray  # f32 [C]


@functools.cache
def iq2_xxs_codebook() -> Codebook:
    """The 256 x 8 magnitude table of GGML's IQ2_XXS."""
    quants.IQ2_XXS.init_grid()
    grid = np.asarray(quants.IQ2_XXS.grid, np.float32).reshape(256, 8)
    square = (grid**2).sum(-1)
    order = np.argsort(square, kind="stable")
    values, first = np.unique(square[order], return_index=True)
    bounds = tuple(zip(first.tolist(), [*first[1:].tolist(), 256], strict=True))
    return Codebook(grid[order], order.astype(np.uint8), bounds, values)


class Iq2Fit(NamedTuple):
    """x = d * (2 * scale + 1) / 8 * entry * sign, for 8 groups of 4 sub-blocks of 8 values."""

    d: Array  # f32 [B], on the float16 grid
    scale: Array  # f32 [B, 8], 0..15
    entry: Array  # int [B, 8, 4], row of the sorted codebook
    negative: Array  # bool [B, 8, 4, 8], an even number of True per sub-block


def fit_iq2_xxs(x: Array, xp: Any, f16: Callable[[Array], Array]) -> Iq2Fit:
    """Fits IQ2_XXS super-blocks to x [B, 256] float32 by squared error.

    The eight signs of a sub-block share seven bits, so an odd number of minus signs costs a flip of the smallest value.
    With magnitudes a and an entry g the error at scale t falls by t * (2 a.g - t |g|^2); a.g is maximised per length
    class once, after which any scale is judged exactly from the class maxima.
    """
    book = iq2_xxs_codebook()
    blocks = x.shape[0]
    v = x.reshape(blocks, 8, 4, 8)
    magnitude = xp.abs(v)
    negative = v < 0
    odd = negative.sum(-1, keepdims=True) % 2 == 1
    smallest = xp.arange(8) == xp.argmin(magnitude, -1)[..., None]
    flip = odd & smallest
    negative = negative ^ flip
    a = xp.where(flip, -magnitude, magnitude)

    dots = xp.asarray(book.entries) @ a.reshape(-1, 8).T  # [256, n], n = B * 8 * 4
    peak = xp.stack([dots[lo:hi].max(0) for lo, hi in book.bounds])  # [C, n]
    square = xp.asarray(book.square)[:, None]

    def spread(t: Array) -> Array:
        return xp.repeat(t.reshape(-1), 4)

    def gain(t: Array) -> Array:
        """Fall of the squared error of each group [B, 8] at scales t [B, 8], with the best entries."""
        each = (2 * peak - spread(t) * square).max(0)
        return t * each.reshape(blocks, 8, 4).sum(-1)

    def refit(t: Array) -> tuple[Array, Array]:
        """Sums of a.g and |g|^2 over each group for the best entries at scales t."""
        chosen = xp.argmax(2 * peak - spread(t) * square, 0)
        dot = xp.take_along_axis(peak, chosen[None], 0)[0]
        return dot.reshape(blocks, 8, 4).sum(-1), square[chosen, 0].reshape(blocks, 8, 4).sum(-1)

    amax = magnitude.max((-1, -2))

    def try_first_scale(i: Any, state: tuple[Array, Array]) -> tuple[Array, Array]:
        best, free = state
        dot, norm = refit(amax * xp.asarray(IQ2_FIRST_SCALES)[i])
        dot = xp.maximum(dot, 0)
        better = dot**2 / norm > best
        return xp.where(better, dot**2 / norm, best), xp.where(better, dot / norm, free)

    zero = xp.zeros_like(amax)
    _, free = _repeat(xp, len(IQ2_FIRST_SCALES), try_first_scale, (zero, zero))

    def quantise(d: Array) -> tuple[Array, Array]:
        """Scale codes [B, 8] next to the free scales, and the total gain [B]."""
        step = xp.where(d > 0, d, 1)[:, None]
        near = xp.round(free / step * 4 - 0.5)
        total, scale = xp.full_like(free, -np.inf), xp.zeros_like(free)
        for offset in (-1, 0, 1):
            code = xp.clip(near + offset, 0, 15)
            value = gain(d[:, None] * (2 * code + 1) / 8)
            scale, total = xp.where(value > total, code, scale), xp.maximum(value, total)
        return scale, total.sum(-1)

    def keep_better(guess: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        d, scale, total = state
        new_scale, new_total = quantise(guess)
        better = new_total > total
        return (
            xp.where(better, guess, d),
            xp.where(better[:, None], new_scale, scale),
            xp.where(better, new_total, total),
        )

    def try_top_code(i: Any, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        return keep_better(f16(8 * free.max(-1) / (2 * xp.asarray(IQ2_TOP_CODES)[i] + 1)), state)

    def try_solved_step(_: Any, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        weight = (2 * state[1] + 1) / 8
        dot, norm = refit(state[0][:, None] * weight)
        return keep_better(f16(xp.maximum((weight * dot).sum(-1), 0) / (weight**2 * norm).sum(-1)), state)

    state = (xp.zeros_like(zero[:, 0]), zero, xp.zeros_like(zero[:, 0]))
    state = _repeat(xp, len(IQ2_TOP_CODES), try_top_code, state)
    d, scale, _ = _repeat(xp, 2, try_solved_step, state)

    t = spread(d[:, None] * (2 * scale + 1) / 8)
    lengths = np.concatenate([np.full(hi - lo, sq) for (lo, hi), sq in zip(book.bounds, book.square, strict=True)])
    entry = xp.argmax(2 * dots - t * xp.asarray(lengths)[:, None], 0).reshape(blocks, 8, 4)
    return Iq2Fit(d, scale, entry, negative)


def iq2_xxs_values(fit: Iq2Fit, xp: Any) -> Array:
    """The represented weights f32 [B, 256], in the order of operations of the GGML decoder."""
    step = fit.d[:, None] * (0.5 + fit.scale) * 0.25
    entries = xp.asarray(iq2_xxs_codebook().entries)[fit.entry]
    return (step[:, :, None, None] * entries * xp.where(fit.negative, -1.0, 1.0).astype(np.float32)).reshape(
        -1, SUPER_BLOCK
    )


class AffineFit(NamedTuple):
    """x = (d * scale) * code - dmin * low, for S sub-blocks of 256 / S values."""

    d: Array  # f32 [B], on the float16 grid
    dmin: Array  # f32 [B], on the float16 grid
    scale: Array  # f32 [B, S], whole numbers
    low: Array  # f32 [B, S], whole numbers
    code: Array  # f32 [B, S, 256 / S], whole numbers


class AffineFormat(NamedTuple):
    """Sizes of a K-quant with minima, and the span of inverse scales tried, as in ggml's make_qkx2_quants."""

    sub_blocks: int
    levels: int  # largest code
    top: int  # largest scale and minimum
    stretch: np.ndarray


Q2_K = AffineFormat(16, 3, 15, np.arange(-0.9, 1.01, 0.1, dtype=np.float32))
Q4_K = AffineFormat(8, 15, 63, np.arange(-1.5, 1.01, 0.125, dtype=np.float32))
NEIGHBOURS = np.array([(up, down) for up in (-1, 0, 1) for down in (-1, 0, 1)], np.float32)


def fit_affine(x: Array, form: AffineFormat, xp: Any, f16: Callable[[Array], Array]) -> AffineFit:
    """Fits Q2_K or Q4_K super-blocks to x [B, 256] float32 by squared error."""
    v = x.reshape(x.shape[0], form.sub_blocks, -1)
    scale, low = _free_affine(v, form, xp)
    d = f16(_best_step(scale, form.top, xp))
    dmin = f16(_best_step(low, form.top, xp))
    scale = xp.clip(xp.round(scale / _nonzero(d, xp)[:, None]), 0, form.top)
    low = xp.clip(xp.round(low / _nonzero(dmin, xp)[:, None]), 0, form.top)

    def codes(d: Array, dmin: Array, scale: Array, low: Array) -> tuple[Array, Array]:
        """Nearest codes and the squared error of each sub-block."""
        step, floor = d[:, None, None] * scale[..., None], dmin[:, None, None] * low[..., None]
        code = xp.clip(xp.round((v + floor) / _nonzero(step, xp)), 0, form.levels)
        return code, ((v + floor - step * code) ** 2).sum(-1)

    def improve(_: Any, state: tuple[AffineFit, Array, AffineFit]) -> tuple[AffineFit, Array, AffineFit]:
        """Moves scales and minima by at most one code each, then solves for the steps; remembers the best fit met."""
        (d, dmin, scale, low, _), best_error, best = state

        def try_neighbour(i: Any, inner: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            error, new_scale, new_low = inner
            up, down = xp.asarray(NEIGHBOURS)[i]
            trial_scale, trial_low = xp.clip(scale + up, 0, form.top), xp.clip(low + down, 0, form.top)
            trial = codes(d, dmin, trial_scale, trial_low)[1]
            better = trial < error
            return (
                xp.where(better, trial, error),
                xp.where(better, trial_scale, new_scale),
                xp.where(better, trial_low, new_low),
            )

        _, scale, low = _repeat(xp, len(NEIGHBOURS), try_neighbour, (xp.full_like(scale, np.inf), scale, low))
        code, error = codes(d, dmin, scale, low)
        total = error.sum(-1)
        better = total < best_error
        fields = zip(best, (d, dmin, scale, low, code), strict=True)
        best = AffineFit(*(xp.where(better.reshape((-1,) + (1,) * (new.ndim - 1)), new, old) for old, new in fields))
        d, dmin = (f16(step) for step in _solve_steps(v, scale, low, code, d, dmin, xp))
        return AffineFit(d, dmin, scale, low, code), xp.where(better, total, best_error), best

    first = AffineFit(d, dmin, scale, low, xp.zeros_like(v))
    return _repeat(xp, 4, improve, (first, xp.full_like(d, np.inf), first))[2]


def affine_values(fit: AffineFit) -> Array:
    """The represented weights f32 [B, 256], in the order of operations of the GGML decoder."""
    values = (fit.d[:, None] * fit.scale)[..., None] * fit.code - (fit.dmin[:, None] * fit.low)[..., None]
    return values.reshape(-1, SUPER_BLOCK)


def _free_affine(v: Array, form: AffineFormat, xp: Any) -> tuple[Array, Array]:
    """Scales and minima [B, S] of each sub-block before they are quantised; both are at least 0."""
    n = v.shape[-1]
    floor = xp.minimum(v.min(-1), 0)
    width = v.max(-1) - floor
    total = v.sum(-1)

    def try_stretch(i: Any, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        best, scale, low = state
        inverse = (form.levels + xp.asarray(form.stretch)[i]) / _nonzero(width, xp)
        code = xp.clip(xp.round((v - floor[..., None]) * inverse[..., None]), 0, form.levels)
        c1, c2, vc = code.sum(-1), (code**2).sum(-1), (v * code).sum(-1)
        det = n * c2 - c1**2
        base = xp.where(det > 0, (c1 * vc - c2 * total) / _nonzero(det, xp), 0)
        at_zero = (base < 0) | (det <= 0)
        slope = xp.where(at_zero, vc / _nonzero(c2, xp), (n * vc - c1 * total) / _nonzero(det, xp))
        base, slope = xp.where(at_zero, 0, base), xp.maximum(slope, 0)
        error = ((v + base[..., None] - slope[..., None] * code) ** 2).sum(-1)
        better = error < best
        return xp.where(better, error, best), xp.where(better, slope, scale), xp.where(better, base, low)

    flat = xp.maximum(-total / n, 0)  # one value for all
    first = (((v + flat[..., None]) ** 2).sum(-1), xp.zeros_like(total), flat)
    return _repeat(xp, len(form.stretch), try_stretch, first)[1:]


def _best_step(values: Array, top: int, xp: Any) -> Array:
    """Step [B] whose multiples 0..top lie closest to values [B, S] >= 0; the largest value is itself a multiple."""
    peak = values.max(-1)
    counts = np.arange(top, top // 2, -1, dtype=np.float32)

    def try_count(i: Any, state: tuple[Array, Array]) -> tuple[Array, Array]:
        best, step = state
        trial = peak / xp.asarray(counts)[i]
        error = ((values - trial[:, None] * xp.round(values / _nonzero(trial, xp)[:, None])) ** 2).sum(-1)
        return xp.where(error < best, error, best), xp.where(error < best, trial, step)

    return _repeat(xp, len(counts), try_count, (xp.full_like(peak, np.inf), peak))[1]


def _solve_steps(
    v: Array, scale: Array, low: Array, code: Array, d: Array, dmin: Array, xp: Any
) -> tuple[Array, Array]:
    """Least-squares d and dmin [B] for fixed codes; the old pair where the system is singular or a step negative."""
    p, q = scale[..., None] * code, xp.broadcast_to(-low[..., None], code.shape)
    pp, qq, pq = ((left * right).sum((-1, -2)) for left, right in ((p, p), (q, q), (p, q)))
    vp, vq = (v * p).sum((-1, -2)), (v * q).sum((-1, -2))
    det = pp * qq - pq**2
    new_d, new_dmin = (qq * vp - pq * vq) / _nonzero(det, xp), (pp * vq - pq * vp) / _nonzero(det, xp)
    sound = (det > 1e-6 * pp * qq) & (new_d > 0) & (new_dmin >= 0)
    return xp.where(sound, new_d, d), xp.where(sound, new_dmin, dmin)


def _nonzero(x: Array, xp: Any) -> Array:
    return xp.where(x == 0, 1, x)


def _repeat(xp: Any, count: int, step: Callable[[Any, Any], Any], state: Any) -> Any:
    """A Python loop for NumPy; a compiled loop for jax.numpy, where unrolling would take minutes to compile."""
    if xp is not np:
        return lax.fori_loop(0, count, step, state)
    for i in range(count):
        state = step(i, state)
    return state
