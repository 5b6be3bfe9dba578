"""The command line: parses, calls, prints."""

from __future__ import annotations

import sys
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from ds4jax.cli_bench import bench
from ds4jax.cli_chat import chat
from ds4jax.cli_draft_tokens import draft_tokens
from ds4jax.cli_load import load_engine, open_model, read_run
from ds4jax.cli_options import (
    Chunk,
    Config,
    Context,
    DraftTokens,
    MinP,
    Model,
    Mtp,
    NumericsChange,
    Prompt,
    PromptFile,
    Seed,
    Special,
    Speculative,
    Temperature,
    TopK,
    TopP,
)
from ds4jax.cli_serve import serve
from ds4jax.errors import Ds4Error, RequestError

if TYPE_CHECKING:
    from ds4jax.engine import Engine, Options
    from ds4jax.engine_run import Result
    from ds4jax.runconfig import RunConfig
    from ds4jax.tokenizer import Tokenizer

# jax, and with it everything but `errors` and `runconfig`, is imported where it is needed: `--help` must not wait.


class _Group(TyperGroup):
    """Shows an error that the user can mend as one line."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except Ds4Error as error:
            typer.echo(f"ds4jax: {error}", err=True)
            raise typer.Exit(2) from error


app = typer.Typer(
    cls=_Group,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="DeepSeek-V4-Flash inference in JAX, from GGUF files.",
)


def _version(wanted: bool) -> bool:
    if wanted:
        typer.echo(f"ds4jax {metadata.version('ds4jax')}")
        raise typer.Exit
    return wanted


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """DeepSeek-V4-Flash inference in JAX, from GGUF files."""


@app.command()
def generate(
    model: Model = None,
    mtp: Mtp = None,
    config: Config = "strict",
    numerics: NumericsChange = None,
    prompt: Prompt = None,
    prompt_file: PromptFile = None,
    special: Special = None,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    seed: Seed = None,
    max_new_tokens: Annotated[int | None, typer.Option("-n", "--max-new-tokens", help="Most tokens to add.")] = None,
    stop: Annotated[list[str] | None, typer.Option("--stop", help="Text that ends the answer; repeatable.")] = None,
    stop_ids: Annotated[
        list[int] | None, typer.Option("--stop-id", help="Token id that does so, instead of the model's; repeatable.")
    ] = None,
    context: Context = None,
    chunk: Chunk = None,
    speculative: Speculative = None,
    draft_tokens: DraftTokens = None,
    stats: Annotated[bool, typer.Option("--stats", help="Show times and counts at the end.")] = False,
) -> None:
    """Continues a text; prints the new text as it comes. Flags replace what a run file says."""
    run = read_run(config, numerics, model=model, mtp=mtp, prompt=prompt, prompt_file=prompt_file).override(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        seed=seed,
        max_new_tokens=max_new_tokens,
        stop=tuple(stop) if stop else None,
        stop_ids=tuple(stop_ids) if stop_ids else None,
        special=special,
        context=context,
        chunk=chunk,
        speculative=speculative,
        draft_tokens=draft_tokens,
    )
    text = _text(run)
    options = _options(run)
    engine = load_engine(run)
    if run.prompt is not None and sys.stderr.isatty():
        typer.secho(text, err=True, nl=False, dim=True)
    stream = engine.stream(text, **options)
    try:
        with stream:
            for piece in stream:
                typer.echo(piece, nl=False)
    finally:
        typer.echo()
        if stats:
            _show_stats(engine, stream.result())
    _say_if_clipped(stream.result(), options["max_new_tokens"])


app.command()(chat)
app.command()(draft_tokens)


@app.command()
def tokens(
    model: Model = None,
    prompt: Prompt = None,
    prompt_file: PromptFile = None,
    special: Special = None,
) -> None:
    """Shows the tokens of a text: id and piece, one a line."""
    from ds4jax.runconfig import RunConfig
    from ds4jax.tokenizer import Tokenizer

    text = _text(RunConfig(prompt=prompt, prompt_file=prompt_file))
    tokenizer = Tokenizer.from_gguf(open_model(model).metadata)
    for token in tokenizer.encode(text, parse_special=bool(special)):
        typer.echo(f"{token}\t{_piece(tokenizer, token)}")


@app.command()
def logprobs(
    model: Model = None,
    mtp: Mtp = None,
    config: Config = "strict",
    numerics: NumericsChange = None,
    prompt: Prompt = None,
    prompt_file: PromptFile = None,
    special: Special = None,
    context: Context = None,
    chunk: Chunk = None,
) -> None:
    """Shows what the model thinks of a text: id, log-probability and piece of every token, one a line."""
    import numpy as np

    run = read_run(config, numerics, model=model, mtp=mtp, prompt=prompt, prompt_file=prompt_file)
    run = run.override(special=special, context=context, chunk=chunk)
    text = _text(run)
    engine = load_engine(run)
    ids = engine.encode(text, parse_special=run.special)
    scores = engine.logprobs(ids)
    for token, score in zip(ids[1:], scores.tolist(), strict=True):
        typer.echo(f"{token}\t{score:.6f}\t{_piece(engine.tokenizer, token)}")
    mean = scores.mean(dtype=np.float64)
    typer.echo(f"{len(scores)} tokens, mean {mean:.4f}, perplexity {np.exp(-mean):.2f}", err=True)


@app.command()
def info(
    file: Annotated[Path | None, typer.Argument(help="GGUF file; default: the demonstration model.")] = None,
    model: Annotated[Path | None, typer.Option("-m", "--model", help="The same, as in other commands.")] = None,
    mtp: Mtp = None,
    config: Config = "strict",
    numerics: NumericsChange = None,
) -> None:
    """Shows what a model file holds: sizes, layers, tensors by type, and on which cards it fits."""
    from ds4jax.checkpoint import describe, open_gguf
    from ds4jax.cli_info import show
    from ds4jax.config import ModelConfig
    from ds4jax.engine import default_chunk
    from ds4jax.model.cache import cache_nbytes

    if file is not None and model is not None:
        raise RequestError(f"two model files given, {file} and {model}; name one")
    run = read_run(config, numerics, model=file or model, mtp=mtp)
    second = None if run.mtp is None else open_gguf(run.mtp)
    chunk = run.chunk or default_chunk(run.numerics)

    def cache(sizes: ModelConfig, context: int) -> int:
        return cache_nbytes(sizes, run.numerics, 1, context, min(chunk, context))

    show(describe(open_model(run.model), second, cache))


app.command()(serve)
app.add_typer(bench, name="bench")


def _text(run: RunConfig) -> str:
    """The run's prompt, or standard input; byte for byte."""
    text = run.prompt_text()
    if text is None:
        if sys.stdin.isatty():
            raise RequestError("no text given; use --prompt, --prompt-file or standard input")
        # What is not UTF-8 becomes lone surrogates, which the tokenizer refuses.
        text = sys.stdin.buffer.read().decode(errors="surrogateescape")
    return text


def _options(run: RunConfig) -> Options:
    """What the run asks of the engine; checked here, because loading takes long."""
    from ds4jax.decode.sampling import Sampling
    from ds4jax.engine import NEW_TOKENS

    sampling = Sampling(run.temperature or 0.0, run.top_k, run.top_p, run.min_p)
    sampling.broadcast(1)
    options: Options = {
        "sampling": sampling,
        "seed": run.seed,
        "max_new_tokens": NEW_TOKENS if run.max_new_tokens is None else run.max_new_tokens,
        "stop": run.stop,
        "parse_special": run.special,
    }
    if run.stop_ids is not None:
        options["stop_ids"] = run.stop_ids
    return options


def _piece(tokenizer: Tokenizer, token: int) -> str:
    """A token as a Python literal: a string, or bytes where it is not whole characters."""
    raw = tokenizer.token_bytes[token]
    try:
        return repr(raw.decode())
    except UnicodeDecodeError:
        return repr(raw)


def _say_if_clipped(result: Result, wanted: int) -> None:
    """Tells of an answer that ended because prompt and answer fill the context."""
    new = result.stats.new_tokens
    if result.finish == "length" and new < wanted:
        context = result.stats.prompt_tokens + new
        typer.echo(f"ds4jax: clipped after {new} of {wanted} new tokens: the context of {context} is full", err=True)


def _show_stats(engine: Engine, result: Result) -> None:
    s = result.stats
    rows = [
        f"load {engine.load_seconds:.2f} s, trace {s.trace_seconds:.2f} s, compile {s.compile_seconds:.2f} s",
        f"prompt {s.prompt_tokens} tokens in {s.prefill_seconds:.2f} s ({s.prefill_rate:.1f} tokens/s)",
        f"answer {s.new_tokens} tokens in {s.decode_seconds:.2f} s ({s.decode_rate:.1f} tokens/s), "
        f"{s.steps} steps, finish: {result.finish}",
    ]
    if s.drafted:
        depths = (f"{a}/{d} ({a / d:.0%})" if d else "0/0" for a, d in zip(s.accepted, s.drafted, strict=True))
        rows.append(f"drafts accepted by depth {', '.join(depths)}; {s.tokens_per_step:.2f} tokens per step")
    typer.echo("\n".join(rows), err=True)
