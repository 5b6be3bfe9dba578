"""The tokens that drafts may be: a file of their ids, and the rows of the vocabulary head that rank them alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from ds4jax.errors import ConfigError

_DIGITS = 20  # more than an id has, and fewer than `int` refuses
_MAKE = "make the list with this model's tokenizer: ds4jax draft-tokens"


def read_draft_tokens(path: str | Path, vocab_size: int) -> Int[np.ndarray, " n"]:
    """The ids, rising, of a text file with one id a line in any order.

    Raises ConfigError if it cannot be read, is empty, or has a line that is not an id of the vocabulary or repeats one.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise ConfigError(f"{path}: expected a text file with one token id a line: {reason}; {_MAKE}") from error
    seen: set[int] = set()
    for number, line in enumerate(lines, 1):
        text = line.strip()
        digits = text.isascii() and text.isdecimal() and len(text) <= _DIGITS
        if not digits or int(text) >= vocab_size:
            expected = f"expected a token id from 0 to {vocab_size - 1}"
            raise ConfigError(f"{path}: line {number}: {expected}, found {text[:40]!r}; {_MAKE}")
        if int(text) in seen:
            raise ConfigError(f"{path}: line {number}: expected every id once, found {text} again; remove the line")
        seen.add(int(text))
    if not seen:
        raise ConfigError(f"{path}: expected at least one token id, found none; {_MAKE}")
    return np.array(sorted(seen), np.int32)


def with_draft_head(params: dict[str, Any], ids: Int[np.ndarray, " n"]) -> dict[str, Any]:
    """Parameters whose MTP block has a head of its own: the rows of the model's head for these tokens, as stored.

    `head` is [n, D] and `place` i32 [V]: the row of each token, n where it has none. There must be an MTP block.
    """
    return params | {"mtp": params["mtp"] | _draft_head(params["head"], ids)}


def draft_head_nbytes(head_nbytes: int, vocab_size: int, count: int) -> int:
    """Bytes that `with_draft_head` adds for `count` tokens."""
    return head_nbytes // vocab_size * count + 4 * vocab_size


@jax.jit
def _draft_head(head: Any, ids: jax.Array) -> dict[str, Any]:
    count = ids.shape[0]
    place = jnp.full(head.shape[0], count, jnp.int32).at[ids].set(jnp.arange(count, dtype=jnp.int32))
    return {"head": head[ids], "place": place}
