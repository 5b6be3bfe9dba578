"""What kernels are written in besides `jax.numpy`: PTX instructions, loads, sums in a fixed order, the launch.

This is the only module that names the Triton backend. Inline PTX cannot be interpreted, so every instruction has a
`jax.numpy` twin for that mode; a kernel gets one set or the other as an argument and never asks which.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

f32, i32 = jnp.float32, jnp.int32


class Instructions(abc.ABC):
    """Instructions without a `jax.numpy` spelling; all arguments of one call have equal shapes."""

    @abc.abstractmethod
    def dp4a(self, a: Array, b: Array, c: Array) -> Array:
        """`c` plus the products of the four signed bytes of `a` and `b`, i32."""

    @abc.abstractmethod
    def permute(self, low: int, high: int, selector: Array) -> Array:
        """Byte i of the result is byte `selector >> 4 i & 7` of the eight in `low`, `high`, i32 (PTX `prmt`).

        The fourth bit of each nibble that is used must be clear.
        """

    @abc.abstractmethod
    def rint(self, x: Array) -> Array:
        """The nearest integer, the even one on a tie, i32."""

    @abc.abstractmethod
    def add_neighbours(self, x: Array) -> Array:
        """`x[2 i] + x[2 i + 1]` along the last axis."""

    @abc.abstractmethod
    def fence(self) -> None:
        """No load moves over this: those before it are under way, although their values are used behind a branch."""

    def tree_sum(self, x: Array) -> Array:
        """Sum of the last axis, a power of two long: neighbours first, as in `ops.sums.ordered_sum`."""
        while x.shape[-1] > 1:
            x = self.add_neighbours(x)
        return jnp.sum(x, axis=-1)

    @abc.abstractmethod
    def divide(self, a: Array, b: Array) -> Array:
        """`a / b` as XLA's division of two arrays, f32 (approximate on a GPU, by at most 2 ulp)."""

    @abc.abstractmethod
    def reciprocal(self, x: Array) -> Array:
        """`1 / x` of normal numbers, f32, in one instruction (approximate on a GPU, by at most 1 ulp, as XLA's)."""


class Native(Instructions):
    """PTX."""

    def dp4a(self, a: Array, b: Array, c: Array) -> Array:
        return asm("dp4a.s32.s32 $0, $1, $2, $3;", "=r,r,r,r", (a, b, c), i32)

    def permute(self, low: int, high: int, selector: Array) -> Array:
        return asm(f"prmt.b32 $0, 0x{low:08X}, 0x{high:08X}, $1;", "=r,r", (selector,), i32)

    def rint(self, x: Array) -> Array:
        return asm("cvt.rni.s32.f32 $0, $1;", "=r,f", (x,), i32)

    def add_neighbours(self, x: Array) -> Array:
        # Two at a time, which leaves the compiler no order to choose.
        return jnp.sum(x.reshape(*x.shape[:-1], x.shape[-1] // 2, 2), axis=-1)

    def fence(self) -> None:
        plt.debug_barrier()

    def divide(self, a: Array, b: Array) -> Array:
        return a / b

    def reciprocal(self, x: Array) -> Array:
        return asm("rcp.approx.ftz.f32 $0, $1;", "=f,f", (x,), f32)


class Emulated(Instructions):
    """The same results in `jax.numpy`, for the interpreter."""

    def dp4a(self, a: Array, b: Array, c: Array) -> Array:
        def codes(word: Array) -> Array:
            return jax.lax.bitcast_convert_type(word, jnp.int8).astype(i32)

        return c + jnp.sum(codes(a) * codes(b), axis=-1)

    def permute(self, low: int, high: int, selector: Array) -> Array:
        result = jnp.zeros(selector.shape, jnp.uint32)
        for byte in range(4):
            index = (selector >> (4 * byte)) & 7
            for place in range(8):
                value = ((high << 32 | low) >> (8 * place)) & 255
                result = result | jnp.where(index == place, jnp.uint32(value << (8 * byte)), jnp.uint32(0))
        return jax.lax.bitcast_convert_type(result, i32)

    def rint(self, x: Array) -> Array:
        return jnp.rint(x).astype(i32)

    def add_neighbours(self, x: Array) -> Array:
        pairs = x.reshape(*x.shape[:-1], x.shape[-1] // 2, 2)
        return pairs[..., 0] + pairs[..., 1]  # XLA would merge the sums of one level with those of the next

    def fence(self) -> None:
        pass

    def divide(self, a: Array, b: Array) -> Array:
        # XLA turns a division by a constant into a product with its reciprocal.
        return a / jax.lax.optimization_barrier(b)

    def reciprocal(self, x: Array) -> Array:
        return 1.0 / x


def asm(code: str, constraints: str, args: Sequence[Array], dtype: Any) -> Array:
    """One PTX instruction on elements of arrays of one shape."""
    result = jax.ShapeDtypeStruct(args[0].shape, dtype)
    return plt.elementwise_inline_asm(
        code, args=list(args), constraints=constraints, pack=1, result_shape_dtypes=[result]
    )[0]


def next_power(size: int) -> int:
    """The smallest power of two >= size: the only sizes that a tile can have."""
    return 1 << max(size - 1, 0).bit_length()


def split_f16(a: Array) -> tuple[Array, Array]:
    """Two f16 parts, `high + low 2^-11`, of f32 values below 65504; the error is at most max(2^-22 |a|, 2^-36)."""
    high = a.astype(jnp.float16)
    return high, ((a - high.astype(f32)) * 2.0**11).astype(jnp.float16)


STACK = 8  # rows whose high parts stand together, and then their low parts: the 16 rows of a tensor core


def stacked(m: int) -> Array:
    """Which of m rows, a multiple of `STACK`, the `2 m` places of `stack_f16` belong to."""
    place = jnp.arange(2 * m, dtype=i32)
    return place // (2 * STACK) * STACK + place % STACK


def stack_f16(a: Array, dtype: Any) -> Array:
    """What `dot_stacked` takes of f32 `a [2 m, k]`, rows in the order of `stacked(m)`, for a product with `dtype`.

    With f16 one part of every value (`split_f16`), with f32 the value and in place of a low part zero.
    """
    high, low = split_f16(a) if dtype == jnp.float16 else (a, jnp.zeros_like(a))
    return jnp.where(jax.lax.broadcasted_iota(i32, a.shape, 0) % (2 * STACK) < STACK, high, low)


def dot_stacked(a: Array, b: Array) -> Array:
    """f32 `[m, n]`: product of m rows, of which `a [2 m, k]` holds the parts (`stack_f16`), and `b [k, n]`.

    Tensor cores take 16 rows at least; so 8 are enough, and all parts share one pass over `b`. Products are exact
    with f16 `b`, sums f32. On a GPU k and n are at least 16.
    """
    m, n = a.shape[0] // 2, b.shape[1]
    parts = jnp.dot(a, b, precision=jax.lax.Precision.HIGHEST, preferred_element_type=f32)
    parts = parts.reshape(m // STACK, 2, STACK, n)
    low = jax.lax.broadcasted_iota(i32, parts.shape, 1) == 1
    return jnp.sum(jnp.where(low, parts * 2.0**-11, parts), axis=1).reshape(m, n)


Index = Any
"""An index of one axis of a reference: a number, `pl.ds`, or an i32 array; arrays broadcast against each other."""


def _at(ref: Any, index: tuple[Index, ...]) -> Any:
    # The interpreter's rules for masked loads know arrays and slices only.
    return ref.at[tuple(jnp.int32(i) if isinstance(i, int) else i for i in index)]


def load(ref: Any, *index: Index, mask: Array | None = None, once: bool = False, early: bool = False) -> Array:
    """Loads `ref[index]`, zeros where `mask` is false.

    Args:
        once: a program reads it once; it is the first to leave the cache.
        early: issued where it stands, among others of its kind. The assembler otherwise delays loads until registers
            would do for as many warps as a processor holds, and a kernel that has few waits for memory over and over.
    """
    other = None if mask is None else jnp.zeros((), ref.dtype)
    policy = "evict_first" if once else None
    return plt.load(_at(ref, index), mask=mask, other=other, eviction_policy=policy, volatile=early)


def store(ref: Any, value: Array, *index: Index, mask: Array | None = None) -> None:
    """Stores to `ref[index]` where `mask` is true."""
    plt.store(_at(ref, index), value, mask=mask)


def launch(
    kernel: Callable[..., None],
    out_shape: Any,
    grid: tuple[int, ...],
    *args: Any,
    name: str,
    warps: int,
    interpret: bool,
    aliases: Mapping[int, int] | None = None,
) -> Any:
    """Runs `kernel(instructions, *argument refs, *result refs)` over a grid, whole arrays as references.

    Args:
        name: what profiles show.
        warps: warps of a program.
        aliases: flat argument number -> result number that shares its memory.
    """
    instructions: Instructions = Emulated() if interpret else Native()

    def body(*refs: Any) -> None:
        kernel(instructions, *refs)

    return pl.pallas_call(
        body,
        out_shape=out_shape,
        grid=grid,
        compiler_params=plt.CompilerParams(num_warps=warps, num_stages=1),
        interpret=interpret,
        name=name,
        input_output_aliases=dict(aliases or {}),
    )(*args)
