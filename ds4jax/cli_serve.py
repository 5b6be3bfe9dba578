"""`ds4jax serve`: the HTTP server."""

from __future__ import annotations

import logging
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
    Speculative,
    Temperature,
    TopK,
    TopP,
)


def serve(
    model: Model = None,
    mtp: Mtp = None,
    config: Config = "strict",
    numerics: NumericsChange = None,
    host: Annotated[str | None, typer.Option("--host", help="Address to listen on; default: 127.0.0.1.")] = None,
    port: Annotated[int | None, typer.Option("--port", help="Port to listen on; default: 8000.")] = None,
    api_key: Annotated[
        str | None, typer.Option("--api-key", help="What clients must send; needed to listen to other machines.")
    ] = None,
    cors: Annotated[
        list[str] | None,
        typer.Option("--cors", metavar="ORIGIN", help="Web site whose pages may use the server; repeatable."),
    ] = None,
    sessions: Annotated[
        int | None,
        typer.Option("--sessions", help="Requests answered at once, each with a cache of its own; default: 4."),
    ] = None,
    queue: Annotated[int | None, typer.Option("--queue", help="Requests that may wait; default: 256.")] = None,
    think: Annotated[
        bool | None,
        typer.Option("--think/--no-think", help="Whether the model thinks where a request says nothing."),
    ] = None,
    effort: Annotated[
        str | None,
        typer.Option("--effort", metavar="low|high|max", help="How hard it then thinks; default: high."),
    ] = None,
    prompt_profile: Annotated[
        str | None,
        typer.Option("--prompt-profile", metavar="preview|0731", help="Prompts of the checkpoint; default: detected."),
    ] = None,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    context: Context = None,
    chunk: Chunk = None,
    speculative: Speculative = None,
    draft_tokens: DraftTokens = None,
) -> None:
    """Serves a chat page and the APIs of OpenAI and Anthropic. Sampling flags hold where a request says nothing."""
    run = read_run(config, numerics, model=model, mtp=mtp).override(
        host=host,
        port=port,
        api_key=api_key,
        cors=tuple(cors) if cors else None,
        sessions=sessions,
        queue=queue,
        think=think,
        effort=effort,
        prompt_profile=prompt_profile,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        context=context,
        chunk=chunk,
        speculative=speculative,
        draft_tokens=draft_tokens,
    )
    from ds4jax.server.run import CONTEXT, build_server, build_service, open_socket, settings_of

    # Everything that can be wrong with the settings is found before loading, which takes long.
    settings = settings_of(run, open_model(run.model).metadata)
    listener = open_socket(settings)
    logging.basicConfig(format="ds4jax: %(message)s")
    engine = load_engine(run, sequences=settings.sessions, default_context=CONTEXT)
    service = build_service(engine, settings)
    server = build_server(service, settings)
    server.announce = lambda address: typer.echo(f"ds4jax: {settings.name} at {address}", err=True)
    server.run(sockets=[listener])
