"""A loaded model: text in, text out, in one piece or as a stream."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, TypedDict, Unpack

import jax
import numpy as np

from ds4jax.checkpoint import (
    GGUF,
    Census,
    Progress,
    describe,
    load_params,
    open_gguf,
    read_config,
    read_draft_tokens,
)
from ds4jax.checkpoint_memory import check_device, take_share
from ds4jax.config import ModelConfig, Numerics, check_simulation
from ds4jax.decode.generate import Generate, Programs, build_generate
from ds4jax.decode.sampling import GREEDY, Sampling
from ds4jax.decode.score import build_score
from ds4jax.decode.speculation import MOST_DRAFTS, Speculation, draft_cost
from ds4jax.decode.state import Limits
from ds4jax.decode.steps import SHARED_ROWS
from ds4jax.engine_run import Answer, Result, Run
from ds4jax.errors import CheckpointError, ConfigError, RequestError
from ds4jax.model.cache import cache_nbytes
from ds4jax.ops import absent_rows_are_free
from ds4jax.runconfig import load_numerics
from ds4jax.tokenizer import Tokenizer

DEMO = "stories.gguf"
SMALLEST_CONTEXT = 2048  # requests up to this size share their programs
NEW_TOKENS = 256
CHUNK = 128  # prompt tokens per step, unless rows are evaluated one at a time
PATIENT_BURST = 16  # steps between two looks for a stop string when nobody waits for the text

Prompt = str | Sequence[int]
"""Text, to which the beginning-of-sentence token is added unless it starts with it, or ids, taken as they are."""


class Options(TypedDict, total=False):
    """What a request may set.

    sampling: see `Sampling`; greedy if not given. seed: from 0 to 2^64 - 1, default 0. In a batch both may be one for
        all or one per prompt; one for all gives each prompt what it would get alone.
    max_new_tokens: default 256; the context may end an answer earlier.
    stop: strings that end an answer; they are not part of it.
    stop_ids: ids that end an answer; default: the tokenizer's.
    logprobs: whether the result includes log-probabilities.
    parse_special: whether special tokens written out in a prompt's text become single tokens.
    """

    sampling: Sampling
    seed: int | Sequence[int]
    max_new_tokens: int
    stop: Sequence[str]
    stop_ids: Sequence[int]
    logprobs: bool
    parse_special: bool


class Stream:
    """The pieces of an answer as they come: an iterator.

    `close()`, or leaving a `with` block, cancels what has not come yet; the engine stays usable.
    """

    def __init__(self, run: Run, burst: int, logprobs: bool) -> None:
        self._run, self._logprobs = run, logprobs
        self._bursts = run.bursts(burst)

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        while True:
            (piece,) = next(self._bursts)
            if piece:
                return piece

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Cancels: the burst of steps under way is the last."""
        self._bursts.close()

    def result(self) -> Result:
        """The whole answer; ends the stream, so that what has not been read is cancelled."""
        self.close()
        return self._run.results(self._logprobs)[0]


class Engine:
    """A loaded model.

    config, numerics, params, tokenizer: its parts. census: what its files held. load_seconds: how long loading took.
    context: most tokens, prompt and answer together; None: as many as a request needs, up to what the model allows.
    chunk: prompt tokens per step. speculative: as for `build_generate`.
    """

    def __init__(
        self,
        config: ModelConfig,
        numerics: Numerics,
        params: dict[str, Any],
        tokenizer: Tokenizer,
        *,
        census: Census | None = None,
        context: int | None = None,
        chunk: int | None = None,
        speculative: str | int = "off",
        load_seconds: float = 0.0,
    ) -> None:
        self.config, self.numerics, self.params, self.tokenizer = config, numerics, params, tokenizer
        self.census, self.context, self.load_seconds = census, context, load_seconds
        self.chunk = chunk or default_chunk(numerics)
        self.speculative = speculative
        self._programs: dict[Limits, Programs] = {}

    def encode(self, prompt: Prompt, parse_special: bool = False) -> list[int]:
        """Ids of a prompt."""
        if not isinstance(prompt, str):
            return list(prompt)
        ids = self.tokenizer.encode(prompt, parse_special)
        return ids if ids[:1] == [self.tokenizer.bos_id] else [self.tokenizer.bos_id, *ids]

    def generate(self, prompt: Prompt, **options: Unpack[Options]) -> Result:
        """Continues a prompt.

        Raises:
            RequestError: the prompt leaves no room in the context, or an option is out of range.
        """
        return self.generate_batch([prompt], **options)[0]

    def generate_batch(self, prompts: Sequence[Prompt], **options: Unpack[Options]) -> list[Result]:
        """Continues several prompts at once, each as it would be continued alone. Raises as `generate` does."""
        run = self._start(prompts, options)
        steps = PATIENT_BURST if options.get("stop") else np.iinfo(np.int32).max
        for _ in run.bursts(int(steps)):
            pass
        return run.results(options.get("logprobs", False))

    def stream(self, prompt: Prompt, *, burst: int = 8, **options: Unpack[Options]) -> Stream:
        """Continues a prompt and gives its text as it comes, `burst` steps at a time. Raises as `generate` does."""
        if burst < 1:
            raise RequestError(f"burst = {burst}, expected at least 1")
        return Stream(self._start([prompt], options), burst, options.get("logprobs", False))

    def logprobs(self, text: Prompt, parse_special: bool = False) -> np.ndarray:
        """The model's log-probability of every token of a text but the first, float32 `[T - 1]`.

        Raises:
            RequestError: the text has fewer than two tokens or more than the context.
        """
        ids = self.encode(text, parse_special)
        size = self._context_for(len(ids))
        return build_score(self.config, self.numerics, size, min(self.chunk, size))(self.params, ids)

    def _start(self, prompts: Sequence[Prompt], options: Options) -> Run:
        if unknown := sorted(options.keys() - Options.__annotations__.keys()):
            raise RequestError(
                f"unknown options {', '.join(unknown)}, expected some of {', '.join(Options.__annotations__)}; "
                "temperature, top_k, top_p and min_p go into sampling=Sampling(...)"
            )
        ids = [self.encode(prompt, options.get("parse_special", False)) for prompt in prompts]
        if not ids or not all(ids):
            raise RequestError(f"{len(ids)} prompts of {[len(i) for i in ids]} tokens, expected at least 1 of each")
        stop, stop_ids = options.get("stop", ()), options.get("stop_ids", self.tokenizer.stop_ids)
        if isinstance(stop, str) or not all(stop):
            raise RequestError(f"stop = {stop!r}, expected a list of strings that are not empty")
        lengths = np.array([len(i) for i in ids])
        new = options.get("max_new_tokens", NEW_TOKENS)
        size = self._context_for(int(lengths.max()) + max(new, 0))
        if lengths.max() >= size:
            most = self.config.max_position_embeddings
            remedy = "shorten it" if size == most else f"shorten it or load with a larger context, up to {most}"
            raise RequestError(f"prompt of {lengths.max()} tokens, expected fewer than the context of {size}; {remedy}")
        limits = Limits(len(ids), size, size, min(self.chunk, size), context=size)
        padded = np.zeros((len(ids), lengths.max()), np.int32)
        for row, sequence in zip(padded, ids, strict=True):
            row[: len(sequence)] = sequence
        request = self._build(limits).prepare(
            padded,
            lengths,
            sampling=options.get("sampling", GREEDY),
            key=options.get("seed", 0),
            max_new_tokens=np.minimum(new, size - lengths),
            stop_ids=stop_ids,
        )
        programs, preparing = self._prepared(limits)
        answers = [Answer(self.tokenizer, stop, stop_ids) for _ in ids]
        return Run(programs, self.params, request, answers, preparing)

    def _context_for(self, tokens: int) -> int:
        """Context of the programs that serve a request of so many tokens: a power of two unless it is fixed."""
        if self.context is not None:
            return self.context
        return min(max(SMALLEST_CONTEXT, 1 << (tokens - 1).bit_length()), self.config.max_position_embeddings)

    def _build(self, limits: Limits) -> Generate:
        return build_generate(self.config, self.numerics, limits, self.speculative)

    def _prepared(self, limits: Limits) -> tuple[Programs, tuple[float, float]]:
        """Programs for the limits, and the seconds that tracing and compiling took now."""
        if limits in self._programs:
            return self._programs[limits], (0.0, 0.0)
        rows = max(limits.chunk, 1 + Speculation.of(self.speculative, draft_cost(self.numerics)).drafts)
        size = cache_nbytes(self.config, self.numerics, limits.batch, limits.context, rows)
        (device,) = jax.tree.leaves(self.params)[0].devices()
        check_device(device, 0, size)
        programs = self._build(limits).compile(self.params)
        self._programs[limits] = programs
        return programs, (programs.trace_seconds, programs.compile_seconds)


def load(
    path: str | Path | None = None,
    *,
    mtp: str | Path | None = None,
    numerics: str | Path | Numerics = "strict",
    context: int | None = None,
    default_context: int | None = None,
    sequences: int = 1,
    chunk: int | None = None,
    speculative: str | int = "off",
    draft_tokens: str | Path | None = None,
    progress: Progress | None = None,
    fit_card: bool = False,
) -> Engine:
    """Loads a model from a GGUF file; without a path, the demonstration model that comes with the package.

    Args:
        mtp: GGUF file of the MTP block, where it is separate.
        numerics: `Numerics`, a preset ("strict", "perf") or a TOML file.
        context: most tokens, prompt and answer together. If not given, it is `default_context`, or the model's longest
            if that is less; without either, each request gets what it needs.
        sequences: how many caches of this context there must be room for, which is checked before loading.
        chunk: prompt tokens per step; chosen by the numerics if not given.
        speculative: drafting with the model's MTP block, as for `build_generate`.
        draft_tokens: file of the ids of the tokens that drafts may be, one a line; all if not given. A draft then reads
            the head's rows for these alone, which get a copy. What is drafted never changes a `strict` answer.
        progress: called with bytes done, bytes in all, and a tensor's name.
        fit_card: whether JAX takes what this model needs of the GPU, no more and no less, unless it runs already or the
            environment says how much: for a program that does nothing else with JAX. It takes 75 % otherwise.

    Raises:
        CheckpointError: a file is missing, damaged or not such a model.
        CapacityError: weights and cache do not fit, found before anything is read.
        ConfigError: numerics, context, speculation or the list of tokens are not valid, or the model has no MTP block
            to draft with.
    """
    began = time.perf_counter()
    numerics = numerics if isinstance(numerics, Numerics) else load_numerics(numerics)
    main = open_demo() if path is None else open_gguf(path)
    second = None if mtp is None else open_gguf(mtp)
    config = read_config(main, second)
    check_simulation(config, numerics)
    tokenizer = Tokenizer.from_gguf(main.metadata)
    if tokenizer.vocab_size != config.vocab_size:
        raise CheckpointError(
            f"{main}: {tokenizer.vocab_size} tokens, expected one for each of {config.vocab_size} rows"
        )
    if context is None and default_context is not None:
        context = min(default_context, config.max_position_embeddings)
    if context is not None and not 2 <= context <= config.max_position_embeddings:
        raise ConfigError(f"context = {context}, expected from 2 to the model's {config.max_position_embeddings}")
    drafted = None if draft_tokens is None else read_draft_tokens(draft_tokens, config.vocab_size)
    if str(speculative) in ("off", "0"):
        drafted = None  # the list need only be valid
    longest = context or config.max_position_embeddings
    least = context or min(SMALLEST_CONTEXT, longest)
    if fit_card:  # before anything starts JAX, as the choice of a chunk does
        rows = max(chunk or CHUNK, 1 + MOST_DRAFTS)
        caches = (cache_nbytes(config, numerics, sequences, size, rows) for size in (least, longest))
        take_share(describe(main, second, draft_tokens=drafted).census.device_bytes, *caches)
    chunk = chunk if chunk is not None else default_chunk(numerics)
    if chunk < 1:
        raise ConfigError(f"chunk = {chunk}, expected at least 1")
    speculation = Speculation.of(speculative, draft_cost(numerics)).check(config)
    check_compiler_options(numerics)
    room = cache_nbytes(config, numerics, sequences, least, max(chunk, 1 + speculation.drafts))
    params, census = load_params(main, second, config, progress=progress, cache_bytes=room, draft_tokens=drafted)
    seconds = time.perf_counter() - began
    return Engine(
        config,
        numerics,
        params,
        tokenizer,
        census=census,
        context=context,
        chunk=chunk,
        speculative=speculative,
        load_seconds=seconds,
    )


def check_compiler_options(numerics: Numerics) -> None:
    """Compiles next to nothing, so that an option that XLA refuses is found before the model is loaded."""
    try:
        jax.jit(lambda x: x, compiler_options=numerics.compiler_options).lower(0).compile()
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).splitlines()[0].removeprefix("INVALID_ARGUMENT: ").rstrip(".")
        raise ConfigError(f"numerics: xla: {reason}; remove or correct it") from error


def default_chunk(numerics: Numerics) -> int:
    """Where rows are evaluated one at a time, a long chunk gains nothing and a short one saves compiling."""
    return SHARED_ROWS if absent_rows_are_free(numerics) else CHUNK


def open_demo() -> GGUF:
    """The demonstration model."""
    with resources.as_file(resources.files("ds4jax") / "demo" / DEMO) as path:
        if not path.is_file():
            raise CheckpointError("this installation has no demonstration model; name a model file")
        return open_gguf(path)
