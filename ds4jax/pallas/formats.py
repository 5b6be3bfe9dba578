"""Weights as kernels read them: what each lane loads of a row, and the term it adds for one activation row.

A row of a weight is a sequence of terms, one per lane and step (`ops.linear.terms`), the same for any number of
activation rows, so a row's result cannot depend on its neighbours.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental import pallas as pl

from ds4jax.errors import ConfigError
from ds4jax.pallas.ptx import Instructions, f32, i32, load, next_power
from ds4jax.pallas.rows import LANES
from ds4jax.quants import QTensor, iq2_xxs_levels

Term = Callable[[Any, Any], Callable[[], Array]]
"""Loads of one activation row, (activation references, row index), and then the term of every lane for it: f32 [lanes].

What is loaded only then: the table of IQ2_XXS, and floats in place of codes.

References named "x" are float activations in the order of the lanes: `ops.linear` defines them as a float dot, so there
kernel and reference agree within rounding, not bit for bit.
"""


@dataclasses.dataclass(frozen=True)
class Lanes:
    """One step along a row: `count` lanes from term `start` on; lanes at or beyond `total` add nothing."""

    start: int
    count: int
    total: int

    @property
    def index(self) -> Array:
        """Term numbers, i32 [count]."""
        return self.start + jnp.arange(self.count, dtype=i32)

    @property
    def mask(self) -> Array | None:
        """Which lanes have a term; None for all."""
        return None if self.start + self.count <= self.total else self.index < self.total

    def load(self, ref: Any, *lead: Any, per: int = 1, once: bool = False) -> Array:
        """One element per `per` lanes of the last axis of `ref`."""
        whole = per == 1 and self.mask is None
        place = pl.ds(self.start, self.count) if whole else self.index // per
        return load(ref, *lead, place, mask=self.mask, once=once)


def _signed_byte(word: Array, byte: int) -> Array:
    return ((word << (24 - 8 * byte)) >> 24).astype(f32)


def _group_term(ptx: Instructions, lanes: Lanes, decode: Callable[[], tuple[list[Array], Array]]) -> Term:
    """A lane is a group of 32 values: eight words of signed bytes and a scale, made of what is loaded.

    They are made once for all activation rows, whose terms must be finished in the same branch.
    """
    decoded = functools.cache(decode)

    def term(a: Any, m: Any) -> Callable[[], Array]:
        if "x" in a:
            return lambda: total_of(a["x"], m)
        codes, xs = [lanes.load(a["word"], m, j) for j in range(8)], lanes.load(a["scale"], m)

        def finish() -> Array:
            (words, scale), isum = decoded(), jnp.zeros(lanes.count, i32)
            for word, code in zip(words, codes, strict=True):
                isum = ptx.dp4a(word, code, isum)
            return isum.astype(f32) * (scale * xs)

        return finish

    def total_of(x: Any, m: Any) -> Array:
        (words, scale), total = decoded(), jnp.zeros(lanes.count, f32)
        for j, word in enumerate(words):
            for byte in range(4):
                total = total + (scale * _signed_byte(word, byte)) * lanes.load(x, m, 4 * j + byte)
        return total

    return term


def q8_0(ptx: Instructions, w: dict[str, Any], row: tuple[Any, ...], lanes: Lanes) -> Term:
    """Words of the file."""
    words = [lanes.load(w["word"], *row, j, once=True) for j in range(8)]
    scale = lanes.load(w["d"], *row, once=True)
    return _group_term(ptx, lanes, lambda: (words, scale.astype(f32)))


def iq2_xxs(ptx: Instructions, w: dict[str, Any], row: tuple[Any, ...], lanes: Lanes) -> Term:
    """Four grid entries of eight magnitudes, looked up as eight 4-bit codes each."""
    index, sign = lanes.load(w["idx"], *row, once=True), lanes.load(w["sign"], *row, once=True)
    nibbles, d = lanes.load(w["scale"], *row, per=8), lanes.load(w["d"], *row, per=8)

    def decode() -> tuple[list[Array], Array]:
        words = []
        for k in range(4):
            negative = sign << (2 - k) if k < 3 else sign >> 1
            code = load(w["table"], (index >> (8 * k)) & 255) ^ (negative & 0x44444444)
            words += [ptx.permute(0x002B1908, 0x00D5E7F8, code), ptx.permute(0x002B1908, 0x00D5E7F8, code >> 16)]
        nibble = (nibbles >> (4 * (lanes.index % 8))) & 15
        return words, (d.astype(f32) * (0.5 + nibble.astype(f32))) * 0.25

    return _group_term(ptx, lanes, decode)


def _byte(word: Array, byte: int, mask: int) -> Array:
    return ((word >> (8 * byte)) & mask).astype(f32)


def q2_k(ptx: Instructions, w: dict[str, Any], row: tuple[Any, ...], lanes: Lanes) -> Term:
    """A lane is a word of 16 values, four of each quarter of its half, and carries one minimum of its half."""
    word = lanes.load(w["q"], *row, once=True)
    s = lanes.load(w["s"], *row, per=4)
    d, dmin = (lanes.load(w[name], *row, per=16) for name in ("d", "dmin"))

    def term(a: Any, m: Any) -> Callable[[], Array]:
        if "x" in a:
            return lambda: total_of(a["x"], m)
        codes, sums = [lanes.load(a["word"], m, j) for j in range(4)], lanes.load(a["sums"], m)
        xs = lanes.load(a["scale"], m, per=16)

        def finish() -> Array:
            isum, zero = jnp.zeros(lanes.count, i32), jnp.zeros(lanes.count, i32)
            for j, code in enumerate(codes):
                isum = isum + ((s >> (8 * j)) & 15) * ptx.dp4a((word >> (2 * j)) & 0x03030303, code, zero)
            low = ((s >> (8 * (lanes.index % 4) + 4)) & 15) * sums
            return (d.astype(f32) * xs) * isum.astype(f32) - (dmin.astype(f32) * xs) * low.astype(f32)

        return finish

    def total_of(x: Any, m: Any) -> Array:
        total = jnp.zeros(lanes.count, f32)
        for j in range(4):
            scale, low = (((s >> (8 * j + shift)) & 15).astype(f32) for shift in (0, 4))
            for byte in range(4):
                value = (d.astype(f32) * scale) * _byte(word >> (2 * j), byte, 3) - dmin.astype(f32) * low
                total = total + value * lanes.load(x, m, 4 * j + byte)
        return total

    return term


def q4_k(ptx: Instructions, w: dict[str, Any], row: tuple[Any, ...], lanes: Lanes) -> Term:
    """A lane is a word of eight values, four of each sub-block of its chunk of 64."""
    word, lane = lanes.load(w["q"], *row, once=True), lanes.index
    block, chunk = lane // 32, (lane // 8) % 4
    d, dmin = (lanes.load(w[name], *row, per=32).astype(f32) for name in ("d", "dmin"))
    low, high, rest = (load(w["s"], *row, 3 * block + k, mask=lanes.mask) for k in range(3))
    scales, minima = [], []
    for j in range(2):
        shift = 8 * ((2 * chunk + j) % 4)
        lo, hi, more = ((part >> shift) & 255 for part in (low, high, rest))
        scales.append(jnp.where(chunk < 2, lo & 63, (more & 15) | ((lo >> 2) & 48)))
        minima.append(jnp.where(chunk < 2, hi & 63, (more >> 4) | ((hi >> 2) & 48)))

    place = 16 * block + 8 * (chunk // 2) + lane % 8

    def term(a: Any, m: Any) -> Callable[[], Array]:
        if "x" in a:
            return lambda: total_of(a["x"], m)
        codes = [load(a["word"], m, 2 * (chunk % 2) + j, place, mask=lanes.mask) for j in range(2)]
        xs = lanes.load(a["scale"], m, per=32)

        def finish() -> Array:
            isum, least, zero = (jnp.zeros(lanes.count, i32) for _ in range(3))
            for j, code in enumerate(codes):
                isum = isum + scales[j] * ptx.dp4a((word >> (4 * j)) & 0x0F0F0F0F, code, zero)
                least = least + minima[j] * ptx.dp4a(jnp.full(lanes.count, 0x01010101, i32), code, zero)
            return (d * xs) * isum.astype(f32) - (dmin * xs) * least.astype(f32)

        return finish

    def total_of(x: Any, m: Any) -> Array:
        total = jnp.zeros(lanes.count, f32)
        for j in range(2):
            scale, low, quarter = scales[j].astype(f32), minima[j].astype(f32), 2 * (chunk % 2) + j
            for byte in range(4):
                value = (d * scale) * _byte(word >> (4 * j), byte, 15) - dmin * low
                total = total + value * load(x, m, 4 * quarter + byte, place, mask=lanes.mask)
        return total

    return term


def floats(ptx: Instructions, w: dict[str, Any], row: tuple[Any, ...], lanes: Lanes) -> Term:
    """A lane is one value."""
    value = lanes.load(w["value"], *row, once=True)

    def term(a: Any, m: Any) -> Callable[[], Array]:
        x = lanes.load(a["x"], m)
        return lambda: value.astype(f32) * x

    return term


@dataclasses.dataclass(frozen=True)
class Format:
    """How kernels read a kind of weight.

    values: of a term. takes: form of activations, "q8", "q8k" or "x". registers: that a thread needs for what 128 lanes
    load of a weight's row, and of an activation's. lanes: of a step; part of the definition of the result.
    """

    read: Callable[..., Term]
    values: int
    takes: str
    registers: tuple[int, int]
    lanes: int = LANES


FORMATS = {
    "Q8_0": Format(q8_0, 32, "q8", (36, 36)),
    "IQ2_XXS": Format(iq2_xxs, 32, "q8", (10, 36)),
    "Q2_K": Format(q2_k, 16, "q8k", (7, 21)),
    "Q4_K": Format(q4_k, 8, "q8k", (9, 9)),
    "float": Format(floats, 1, "x", (4, 4), 256),
}


@functools.cache
def _iq2_table() -> np.ndarray:
    """Grid entry -> eight 4-bit level codes, i32 [256]."""
    levels = (iq2_xxs_levels()[:, None] >> np.arange(0, 16, 2)) & 3
    return (levels.astype(np.uint32) << np.arange(0, 32, 4, dtype=np.uint32)).sum(-1, dtype=np.uint32).view(np.int32)


def planes(w: Array | QTensor) -> tuple[str, dict[str, Array]]:
    """Name of a weight's format in `FORMATS`, and the arrays its reader takes.

    Raises:
        ConfigError: no kernel reads this format.
    """
    if not isinstance(w, QTensor):
        return "float", {"value": w}
    if w.format not in FORMATS:
        raise ConfigError(f"no kernel reads {w.format} weights; set impl of the operations that use them to xla")
    extra = {"table": jnp.asarray(_iq2_table())} if w.format == "IQ2_XXS" else {}
    return w.format, {**w.planes, **extra}


def steps(format: str, width: int) -> list[Lanes]:
    """The steps along a row of `width` values."""
    kind = FORMATS[format]
    terms = width // kind.values
    count = min(kind.lanes, next_power(terms))
    return [Lanes(start, count, terms) for start in range(0, terms, count)]
