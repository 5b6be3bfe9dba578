"""`ds4jax chat`: a conversation in the terminal, or over pipes, one line a message."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

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
    Seed,
    Speculative,
    Temperature,
    TopK,
    TopP,
)


def chat(
    model: Model = None,
    mtp: Mtp = None,
    config: Config = "strict",
    numerics: NumericsChange = None,
    system: Annotated[str | None, typer.Option("--system", help="Text before the first turn.")] = None,
    think: Annotated[
        bool | None, typer.Option("--think/--no-think", help="Whether the model thinks before it answers.")
    ] = None,
    effort: Annotated[str, typer.Option("--effort", metavar="low|high|max", help="How hard it thinks.")] = "high",
    prompt_profile: Annotated[
        str | None,
        typer.Option("--prompt-profile", metavar="preview|0731", help="Prompts of the checkpoint; default: detected."),
    ] = None,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    seed: Seed = None,
    max_new_tokens: Annotated[int | None, typer.Option("-n", "--max-new-tokens", help="Most tokens an answer.")] = None,
    context: Context = None,
    chunk: Chunk = None,
    speculative: Speculative = None,
    draft_tokens: DraftTokens = None,
) -> None:
    """Talks with a chat model. Without a terminal, every line of standard input is a message."""
    run = read_run(config, numerics, model=model, mtp=mtp).override(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        seed=seed,
        max_new_tokens=max_new_tokens,
        context=context,
        chunk=chunk,
        speculative=speculative,
        draft_tokens=draft_tokens,
    )
    from ds4jax.chat_profile import Thinking, check_profile, detect_profile, effort_level
    from ds4jax.cli_talk import CONTEXT, Talk
    from ds4jax.cli_terminal import Piped, Terminal
    from ds4jax.decode.sampling import Sampling

    temperature = 1.0 if run.temperature is None else run.temperature
    sampling = Sampling(temperature, run.top_k, run.top_p, run.min_p)
    sampling.broadcast(1)  # checked here, because loading takes long
    is_demo = run.model is None
    metadata, file_name = open_model(run.model).metadata, "" if run.model is None else run.model.name
    profile = detect_profile(metadata, file_name) if prompt_profile is None else check_profile(prompt_profile)
    level = effort_level(effort, profile)
    # The demonstration model has never seen reasoning; it would not find its end.
    thinking = Thinking(level is not None and (not is_demo if think is None else think), level or "high")
    talk = Talk(
        load_engine(run, default_context=CONTEXT),
        profile=profile,
        thinking=thinking,
        sampling=sampling,
        seed=run.seed,
        max_new_tokens=run.max_new_tokens,
        system=system or "",
    )
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        Piped(talk).run()
        return
    if is_demo:
        about = "The demonstration model: it tells children's stories and was not trained to converse"
    else:
        about = f"{metadata.get('general.name', file_name)}, prompts of profile {profile}"
    Terminal(talk, about).run()
