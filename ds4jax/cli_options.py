"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[Path | None, typer.Option("-m", "--model", help="GGUF file; default: the demonstration model.")]
Mtp = Annotated[Path | None, typer.Option("--mtp", help="GGUF file of the MTP block, where it is separate.")]
Config = Annotated[
    str,
    typer.Option("-c", "--config", metavar="strict|perf|FILE.toml", help="Numerics preset, numerics file or run file."),
]
NumericsChange = Annotated[
    list[str] | None,
    typer.Option(
        "-N", "--numerics", metavar="NAME|FILE|FIELD=VALUE", help="Other numerics, or one field of them; repeatable."
    ),
]
Prompt = Annotated[str | None, typer.Option("-p", "--prompt", help="The text; default: standard input.")]
PromptFile = Annotated[Path | None, typer.Option("--prompt-file", help="UTF-8 file that holds the text.")]
Special = Annotated[
    bool | None,
    typer.Option("--special/--no-special", help="Special tokens written out in the text become single tokens."),
]
Context = Annotated[int | None, typer.Option("--context", help="Most tokens, text and answer together.")]
Speculative = Annotated[
    str | None,
    typer.Option("--speculative", metavar="off|K|auto", help="Tokens to draft per step with the MTP block."),
]
DraftTokens = Annotated[
    Path | None,
    typer.Option("--draft-tokens", help="File of the ids that drafts may be, as draft-tokens writes it; default: all."),
]
Chunk = Annotated[int | None, typer.Option("--chunk", help="Prompt tokens per call of the model.")]
Temperature = Annotated[float | None, typer.Option("-t", "--temperature", help="0 is greedy.")]
TopK = Annotated[int | None, typer.Option("--top-k", help="Keep the k most probable tokens; 0 is off.")]
TopP = Annotated[float | None, typer.Option("--top-p", help="Keep the most probable mass p; 1 is off.")]
MinP = Annotated[float | None, typer.Option("--min-p", help="Keep tokens p times as probable as the best; 0 is off.")]
Seed = Annotated[int | None, typer.Option("--seed", help="The same seed gives the same text.")]
