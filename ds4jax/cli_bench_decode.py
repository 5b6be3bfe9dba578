"""`ds4jax bench decode`: tables of what decode steps, generation and the reading of prompts take."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ds4jax.cli_bench_table import Csv, Table, numbers, numerics_of, say, take_whole_card
from ds4jax.cli_load import open_model
from ds4jax.cli_options import Model, Mtp, NumericsChange
from ds4jax.errors import RequestError

if TYPE_CHECKING:
    from ds4jax.bench.measure import Line
    from ds4jax.bench.stages import Stages
    from ds4jax.config import ModelConfig, Numerics


def decode(
    synthetic: Annotated[
        str | None, typer.Option("--synthetic", metavar="flash[:LAYERS]", help="Random weights of these shapes.")
    ] = None,
    model: Model = None,
    mtp: Mtp = None,
    context: Annotated[
        str, typer.Option("--context", metavar="N,...", help="Positions in the cache, commas between.")
    ] = "2048",
    rows: Annotated[
        str | None,
        typer.Option("--rows", metavar="N,...", help="Rows of bare decode steps; 1,3 if nothing else is asked for."),
    ] = None,
    drafts: Annotated[
        str | None, typer.Option("--drafts", metavar="K,...", help="Drafts per step of whole generation; 0 is plain.")
    ] = None,
    accept: Annotated[
        str | None,
        typer.Option("--accept", metavar="P,...", help="Simulated chance of each draft, those before it being right."),
    ] = None,
    draft_rows: Annotated[
        str | None,
        typer.Option("--draft-rows", metavar="N,...", help="Tokens that drafts may be; default: the vocabulary."),
    ] = None,
    prefill: Annotated[
        str | None, typer.Option("--prefill", metavar="N,...", help="Lengths of prompts to read.")
    ] = None,
    steps: Annotated[int, typer.Option("--steps", help="Steps of a run.")] = 64,
    numerics: NumericsChange = None,
    seed: Annotated[int, typer.Option("--seed", help="Of random weights, tokens and acceptance.")] = 0,
    csv_file: Csv = None,
    profile: Annotated[
        Path | None, typer.Option("--profile", help="CSV file for the kernels of bare steps by kind of layer.")
    ] = None,
    plot_file: Annotated[
        Path | None, typer.Option("--plot", help="Picture of tokens/s against context: .png, .svg or .pdf.")
    ] = None,
) -> None:
    """Shows the time of decode steps with a filled cache, on the device, without the host's part.

    --rows: trunk, head and greedy choice alone; all rows are committed. --drafts: the whole step of generation, with
    sampling and the MTP block's drafts, which are accepted by lot at the rates of --accept; they read the head's rows
    for all tokens, or for as many as --draft-rows says. --prefill: reading a prompt in chunks. All contexts share a
    cache with room for the largest.
    """
    if synthetic is not None and (other := "--model" if model else "--mtp" if mtp else None):
        raise RequestError(f"--synthetic {synthetic} and {other} are both given; leave one out")
    contexts, prompts = numbers("--context", context), numbers("--prefill", prefill)
    depths, rates = sorted(set(numbers("--drafts", drafts))), numbers("--accept", accept, float)
    heads = sorted(set(numbers("--draft-rows", draft_rows)))
    counts = numbers("--rows", rows if rows or drafts or prefill else "1,3")
    take_whole_card()
    import jax

    from ds4jax.bench.decode import check_frontiers, rows_job
    from ds4jax.bench.generation import (
        check_acceptance,
        check_draft_rows,
        check_prompts,
        generation_job,
        prefill_job,
        with_draft_rows,
    )
    from ds4jax.bench.kernels import copy_bandwidth
    from ds4jax.bench.machine import Machine, config_hash, require_gpu
    from ds4jax.bench.measure import Subject, measure
    from ds4jax.bench.plot import check_plot, plot
    from ds4jax.bench.synthetic import nbytes
    from ds4jax.decode.speculation import Speculation

    check_acceptance(depths, rates)
    if profile is not None:
        if not counts:
            raise RequestError(f"--profile {profile}: expected --rows, whose steps it shows; add them")
        require_gpu("bench decode --profile")
    if plot_file is not None:
        check_plot(plot_file)
        if not counts and not depths:
            raise RequestError(f"--plot {plot_file}: expected --rows or --drafts, whose curves it shows; add one")
    name, settings = numerics_of(numerics)
    config, load = _model(synthetic, model, mtp, any(depths), seed)
    for depth in depths:
        Speculation(depth).check(config)
    widths = [*counts, *(1 + depth for depth in depths)]
    if widths:
        check_frontiers(config, contexts, widths, steps)
    check_prompts(config, prompts)
    check_draft_rows(config, depths, heads)

    with contextlib.ExitStack() as stack:
        table, stages = (stack.enter_context(Table(file)) for file in (csv_file, profile))
        machine = Machine.of(name, settings)
        gbps = copy_bandwidth() if jax.default_backend() == "gpu" else 0.0
        say(f"{machine}; copy {gbps:.0f} GB/s")
        source = f"{synthetic or model or 'demonstration model'} {config_hash(config)}"
        began = time.perf_counter()
        params = jax.block_until_ready(load(settings, max([*contexts, *prompts]), max([*widths, 1])))
        say(f"{source}: {nbytes(params) / 2**30:.2f} GiB of weights in {time.perf_counter() - began:.1f} s")
        subject = Subject(config, settings, params, gbps)
        always = {"model": source}, dataclasses.asdict(machine)

        def report(step: Stages) -> None:
            say(str(step))
            for stage in step.stages:
                row = {"rows": step.rows, "context": step.context} | dataclasses.asdict(stage)
                stages.write(always[0] | row | always[1])

        jobs = [rows_job(subject, count, contexts, steps, report if profile else None) for count in counts]
        drafting = [with_draft_rows(subject, count) for count in heads or [config.vocab_size]]
        jobs += [
            generation_job(one, depth, rates, contexts, steps, seed)
            for depth in depths
            for one in (drafting if depth else [subject])
        ]
        jobs += [prefill_job(subject, prompts, seed)] if prompts else []
        failed: list[str] = []

        def tell(line: str) -> None:
            say(line)
            failed.extend([line] if "failed" in line else [])

        lines: list[Line] = []
        for line in measure(jobs, tell):
            lines.append(line)
            plain = [a for a in lines if (a.measure, a.drafts, a.context) == ("generation", 0, line.context)]
            ratio = line.tokens_per_second / plain[0].tokens_per_second if plain and line.drafts else None
            say(_sentence(line, ratio))
            derived = {"tokens_per_second": line.tokens_per_second, "percent_of_copy": line.bandwidth_percent}
            table.write(always[0] | dataclasses.asdict(line) | derived | {"ratio_to_no_drafts": ratio} | always[1])
        curves = [line for line in lines if line.measure != "prefill"]
        if plot_file is not None and curves:
            plot(curves, f"{source}\n{machine}", plot_file)
    if failed:
        raise RequestError(f"{len(failed)} of {len(jobs)} measurements failed; see above")


def _sentence(line: Line, ratio: float | None) -> str:
    """A line of the table, to be read."""
    if line.measure == "prefill":
        return (
            f"prefill, {line.context} tokens in chunks of {line.rows}: {line.tokens_per_second:.1f} tokens/s, "
            f"{line.milliseconds:.3f} ms/chunk, peak {line.peak_bytes / 2**30:.2f} GiB"
        )
    drafts = f"drafts {line.drafts}" + (f" of {line.draft_rows} tokens" if line.drafts else "")
    what = f"rows {line.rows}" if line.measure == "rows" else drafts
    tokens = f"{line.tokens_per_step:.3f} tokens/step ({line.expected_tokens:.3f} expected)"
    yields = f", acceptance {line.acceptance}, {tokens}" if line.drafts else ""
    against = f" ({ratio:.3f} of no drafts)" if ratio else ""
    return (
        f"{what}, context {line.context}: {line.milliseconds:.3f} ms/step{yields}, "
        f"{line.tokens_per_second:.1f} tokens/s{against}, weights {line.weight_bytes / 1e9:.2f} GB/step, "
        f"{line.bandwidth_percent:.1f} % of copy, peak {line.peak_bytes / 2**30:.2f} GiB"
    )


def _model(
    synthetic: str | None, model: Path | None, mtp: Path | None, drafting: bool, seed: int
) -> tuple[ModelConfig, Callable[..., Any]]:
    """Sizes of the model, and the function of numerics, context and rows that makes or loads its parameters.

    A model of random weights has an MTP block if there is something to draft.
    """
    import jax

    from ds4jax.bench import synthetic as made
    from ds4jax.checkpoint import load_params, open_gguf, read_config
    from ds4jax.checkpoint_memory import check_device
    from ds4jax.model.cache import cache_nbytes

    if synthetic is not None:
        sizes = dataclasses.replace(made.parse(synthetic), has_mtp=drafting)

        def make(settings: Numerics, context: int, rows: int) -> Any:
            weights = made.params_nbytes(sizes)
            check_device(jax.local_devices()[0], weights, cache_nbytes(sizes, settings, 1, context, rows))
            return made.make_params(sizes, seed)

        return sizes, make
    file, block = open_model(model), None if mtp is None else open_gguf(mtp)
    config = read_config(file, block)

    def load(settings: Numerics, context: int, rows: int) -> Any:
        return load_params(file, block, config, cache_bytes=cache_nbytes(config, settings, 1, context, rows))[0]

    return config, load
