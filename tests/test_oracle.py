"""GGUF in, logits out, against llama.cpp: stored weights dequantised, activations in float32."""

from __future__ import annotations

import golden
import numpy as np
import pytest
from golden import EXACT
from runs import chunks, run

FILES = pytest.mark.parametrize("name", ["tiny-f32", "tiny-q"])
RECORDED = {
    name: golden.read(f"oracle/logits_{file}.npz")
    for name, file in (("tiny-f32", "tiny-f32"), ("tiny-q", "tiny-q-deq"))
}
CONTEXT = 704


def check(name: str, rows: str, length: int, pieces: list[int], width: int) -> None:
    config, params = golden.oracle(name)
    ids, want = RECORDED[name][f"tokens_{length}"], RECORDED[name][f"logits_{length}"]
    got = run(config, EXACT.replace(rows=rows), params, ids, pieces, rows=width, context=CONTEXT).logits
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-3 if length > 200 else 1e-3)
    np.testing.assert_array_equal(got.argmax(1), want.argmax(1))


@FILES
@pytest.mark.parametrize("length", [1, 5, 40])
def test_one_shot(name, length):
    check(name, "loop", length, [length], 40)


@FILES
def test_odd_chunks(name):
    """Chunks that end anywhere in a compression window and run past the raw window."""
    check(name, "loop", 200, chunks(200, (40, 7, 1, 33, 2)), 40)


@FILES
def test_token_by_token(name):
    check(name, "loop", 40, [1] * 40, 40)


@FILES
def test_long(name):
    """Past every mechanism's first use: many windows, a selection among many rows, several HCA rows."""
    check(name, "loop", 700, chunks(700, (40, 39)), 40)


@pytest.mark.parametrize("length", [200, 700])
def test_all_rows_at_once(length):
    """Wide calls; the last of 700 has one row that exists and absent ones beyond the end of the context."""
    check("tiny-f32", "batch", length, chunks(length, (233,)), 233)
