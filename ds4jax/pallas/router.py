"""Router: partial sums of the scores of all experts, then the choice of a row by one program."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

from ds4jax.activation import Activation
from ds4jax.pallas.dots import partial_dots
from ds4jax.pallas.ptx import Instructions, f32, i32, launch, load, next_power
from ds4jax.pallas.rows import LOWEST, add_in_tree, ordered, pick, when_live

MIN_WEIGHT_SUM = 2.0**-14  # `ops.moe.MIN_WEIGHT_SUM`


def best(ranked: Array, experts: int, top_k: int) -> list[Array]:
    """The experts of the largest values, best first, the lower one on a tie."""
    lane, places = jnp.arange(ranked.shape[0], dtype=i32), []
    key = jnp.where(lane < experts, ordered(ranked), LOWEST)
    for _ in range(top_k):
        # What is not a number may share the key of lanes without an expert.
        place = jnp.min(jnp.where((key == jnp.max(key)) & (lane < experts), lane, experts - 1))
        key = jnp.where(lane == place, LOWEST, key)
        places.append(place)
    return places


def route(
    live: Array,
    a: Activation,
    ids: Array | None,
    gate: Array,
    bias: Array | None,
    *,
    top_k: int,
    scale: float,
    interpret: bool,
) -> tuple[Array, Array]:
    """Kernel of `ops.moe.route`."""
    rows, experts = a.x.shape[0], gate.shape[0]
    parts = partial_dots(live, a.x, gate, name="router_scores", interpret=interpret)
    lanes = next_power(experts)

    def kernel(ptx: Instructions, live: Any, parts: Any, ids: Any, bias: Any, weights: Any, *chosen: Any) -> None:
        row = pl.program_id(0)

        @when_live(live, row)
        def _() -> None:
            lane = jnp.arange(lanes, dtype=i32)
            mask = None if lanes == experts else lane < experts
            x = add_in_tree([load(parts, row, part, lane, mask=mask) for part in range(parts.shape[1])])
            scores = jnp.sqrt(jnp.maximum(x, 0.0) + jnp.log1p(jnp.exp(-jnp.abs(x))))
            if ids is None:
                ranked = scores if bias is None else scores + load(bias, lane, mask=mask)
                places = best(ranked, experts, top_k)
                for k, place in enumerate(places):
                    chosen[0][row, k] = place
            else:
                places = [ids[row, k] for k in range(top_k)]
            shares = [pick(scores, place) for place in places]
            factor = jnp.float32(scale) / jnp.maximum(add_in_tree(shares), MIN_WEIGHT_SUM)
            for k, share in enumerate(shares):
                weights[row, k] = share * factor

    shapes = [((rows, top_k), f32)] + ([((rows, top_k), i32)] if ids is None else [])
    weights, *chosen = launch(
        kernel,
        tuple(jax.ShapeDtypeStruct(*shape) for shape in shapes),
        (rows,),
        live.astype(i32),
        parts,
        ids,
        bias,
        name="router",
        warps=1,
        interpret=interpret,
    )
    return (chosen[0] if ids is None else ids), weights
