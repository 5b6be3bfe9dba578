"""`ds4jax draft-tokens`: a list of the tokens that drafts may be, from texts."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated

import typer

from ds4jax.cli_load import open_model
from ds4jax.cli_options import Model, Special


def draft_tokens(
    texts: Annotated[
        list[Path], typer.Argument(metavar="TEXT...", help="UTF-8 files, of text like the answers to come.")
    ],
    model: Model = None,
    size: Annotated[
        int | None, typer.Option("-n", "--size", help="Tokens to list; default: a quarter of the vocabulary.")
    ] = None,
    special: Special = None,
) -> None:
    """Lists the most frequent tokens of texts, for the option of this name: one id a line.

    Those that end an answer come first, then the others, the most frequent first: the beginning of a list is a list.
    """
    from ds4jax.runconfig import read_text
    from ds4jax.tokenizer import Tokenizer, frequent_tokens

    tokenizer = Tokenizer.from_gguf(open_model(model).metadata)
    counts: Counter[int] = Counter()
    for text in texts:
        counts.update(tokenizer.encode(read_text(text, "a text file"), parse_special=bool(special)))
    ids = frequent_tokens(tokenizer, counts, tokenizer.vocab_size // 4 if size is None else size)
    typer.echo("\n".join(map(str, ids)))
    total, listed = counts.total(), sum(counts[token] for token in ids)
    share = f", {listed / total:.2%} of the {total} tokens of the texts" if total else ""
    typer.echo(f"{len(ids)} of {tokenizer.vocab_size} tokens{share}", err=True)
