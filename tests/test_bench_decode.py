"""`bench decode`: steps are those of the model, drafts are accepted at the rates asked for, and failures are told."""

import csv
import dataclasses
import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import PERF, TINY
from typer.testing import CliRunner

from ds4jax import cli
from ds4jax.bench import decode, generation, synthetic
from ds4jax.bench.measure import Line
from ds4jax.bench.plot import plot
from ds4jax.decode.generate import Generate
from ds4jax.decode.speculation import Speculation
from ds4jax.decode.state import Limits
from ds4jax.decode.steps import Steps
from ds4jax.model.cache import Cache, init_cache
from ds4jax.model.transformer import DeepSeekV4

DRAFTING = dataclasses.replace(TINY, has_mtp=True)
QUICK = PERF.replace(xla=(("xla_backend_optimization_level", 0),))


class Stub(DeepSeekV4):
    """Chooses token + position + number of rows; its MTP block chooses the token that it is given."""

    def setup(self):
        pass

    def __call__(self, tokens, cache, start, count):
        position = start[:, None] + jnp.arange(tokens.shape[1], dtype=jnp.int32)
        return self.streams(tokens + position + count[:, None]), cache

    def logits(self, streams, live):
        return jnp.where(live[..., None], self.one_hot(streams), jnp.nan)

    def draft(self, tokens, streams, cache, start, count):
        streams = self.streams(tokens)
        return self.one_hot(streams), streams, cache

    def draft_prefill(self, tokens, streams, cache, start, count):
        return cache

    def streams(self, numbers):
        """Full of a number."""
        shape = (*numbers.shape, self.config.hc_mult, self.config.hidden_size)
        return jnp.broadcast_to(numbers[..., None, None].astype(jnp.float32), shape)

    def one_hot(self, streams):
        size = self.config.vocab_size
        return jax.nn.one_hot(streams[..., 0, 0].astype(jnp.int32) % size, size, dtype=jnp.float32)


def test_steps_feed_on_their_choices(monkeypatch):
    """Each step continues where the last ended, with its choices spread over the vocabulary."""
    monkeypatch.setattr(decode, "DeepSeekV4", Stub)
    cache, want = Cache(synthetic.at_length(30), (), None), np.array([5, 9])
    loop = jax.jit(decode.decode_loop(TINY, PERF, 2))
    got, after = loop({}, jnp.asarray(want[None], jnp.int32), cache, jnp.int32(3))
    for start in (30, 32, 34):
        position = start + np.arange(2)
        want = ((want + position + 2) % 64 + decode.SPREAD * (position + 1)) % 64
    assert got.tolist() == [want.tolist()]
    assert after.length.tolist() == [36]


def test_simulated_acceptance(monkeypatch):
    """A draft stays at its rate, those before it having stayed; otherwise a token follows that is not the draft."""
    batch, rates = 4000, (0.79, 0.58)
    drafted = jnp.tile(jnp.array([[7, 63]], jnp.int32), (batch, 1))
    truth = jnp.tile(jnp.array([[3, 63, 5]], jnp.int32), (batch, 1))  # one of them is the draft by chance
    monkeypatch.setattr(Steps, "_choose", lambda *_: (truth, jnp.zeros(truth.shape)))
    limits, speculation = Limits(batch, 1, 1), Speculation(2)
    steps = generation.SimulatedSteps(Stub(DRAFTING, PERF), limits, speculation, rates)
    request = Generate(Stub(DRAFTING, PERF), limits, speculation).prepare(np.zeros((batch, 1), np.int32))
    position = jnp.arange(batch, dtype=jnp.int32)[:, None] + jnp.arange(3, dtype=jnp.int32)
    streams, live = jnp.zeros((batch, 3, 1, 1)), jnp.ones((batch, 3), bool)
    chosen = np.asarray(steps._choose({}, streams, position, live, request, drafted, None)[0])
    first, second = (chosen[:, :2] == np.asarray(drafted)).T
    assert abs(first.mean() - 0.79) < 0.02 and abs(second[first].mean() - 0.58) < 0.03
    tokens = 1 + first + (first & second)
    assert abs(tokens.mean() - generation.expected_tokens(rates)) < 0.04
    assert set(chosen[~first, 0]) == {3} and set(chosen[~second, 1]) == {0} and set(chosen[:, 2]) == {5}
    alone = live.at[:, 1:].set(False)
    again = steps._choose({}, streams, position, alone, request, drafted, None)[0]
    np.testing.assert_array_equal(again, truth, "no drafts, nothing to simulate")


def test_no_drafts_are_plain_generation():
    """With nothing to simulate the program is that of generation."""

    def text(**kind):
        generate = Generate(Stub(TINY, PERF), Limits(1, 1, 8), Speculation(0), **kind)
        request, state = generate.prepare([1]), jax.eval_shape(generate.programs.start)
        return generate.programs.run.lower({}, request, state, jnp.int32(0), jnp.zeros(1, bool)).as_text()

    assert text(make_steps=functools.partial(generation.SimulatedSteps, accept=())) == text()


def test_block_of_random_weights_drafts():
    """The parameters of the synthetic MTP block are those that the model asks for."""
    params = jax.eval_shape(lambda: synthetic.make_params(DRAFTING, 0))
    tokens, count = jnp.zeros((1, 1), jnp.int32), jnp.ones(1, jnp.int32)

    def draft(params):
        cache = init_cache(DRAFTING, PERF, 1, 40, 1)
        streams = jnp.zeros((1, 1, DRAFTING.hc_mult, DRAFTING.hidden_size))
        return DeepSeekV4(DRAFTING, PERF).apply(
            {"params": params}, tokens, streams, cache, count, count, method="draft"
        )

    logits, _, _ = jax.eval_shape(draft, params)
    assert logits.shape == (1, 1, DRAFTING.vocab_size)


def test_time_of_a_step():
    assert decode.milliseconds(lambda count: 0.5 + 0.010 * count, 7) == pytest.approx(10)


def run(*arguments):
    return CliRunner().invoke(cli.app, ["bench", "decode", *map(str, arguments)])


@pytest.fixture
def small(monkeypatch):
    """Commands measure a tiny model, whose generation is a stub's; a step takes 2 ms at 40 positions, 3.2 at 64."""
    monkeypatch.setattr(generation, "DeepSeekV4", Stub)
    monkeypatch.setattr(synthetic, "parse", lambda text: TINY)
    monkeypatch.setattr("ds4jax.cli_bench_table.read_run", lambda *_: SimpleNamespace(numerics=QUICK))
    for module in (decode, generation):
        monkeypatch.setattr(module, "milliseconds", lambda run, steps: (run(1 + steps), run.args[0] / 20)[1])


def table(file):
    return list(csv.DictReader(file.read_text().splitlines()))


def test_rows(monkeypatch, small, tmp_path):
    """A line and a CSV row for every context; a number of rows that fails is told, and the others are measured."""
    loop = decode.decode_loop

    def some(config, numerics, rows):
        if rows == 1:
            return lambda *args: 1 / 0
        return loop(config, numerics, rows)

    monkeypatch.setattr(decode, "decode_loop", some)
    file = tmp_path / "steps.csv"
    arguments = ("--synthetic", "tiny", "--context", "40,64", "--rows", "1,2", "--steps", "3", "-N", "perf")
    result = run(*arguments, "--csv", file)
    assert result.exit_code == 2 and "1 of 2 measurements failed" in result.output
    assert "rows 1: failed: ZeroDivisionError" in result.output
    lines = table(file)
    assert [(line["rows"], line["context"], line["capacity"]) for line in lines] == [
        ("2", "40", "64"),
        ("2", "64", "64"),
    ]
    assert [line["tokens_per_second"] for line in lines] == ["1000.0", "625.0"]
    assert {line["card"] for line in lines} == {"cpu"} and lines[0]["numerics"].startswith("perf ")


def test_generation(monkeypatch, small, tmp_path):
    """Of two drafts the first is always right and the second never: two tokens a step."""
    ends = []  # after two steps, which would end at the context if all drafts were right
    monkeypatch.setattr(generation, "check_finite", lambda cache, context: ends.append(int(cache.length[0])))
    file = tmp_path / "drafts.csv"
    arguments = ("--synthetic", "tiny", "--context", "40,64", "--steps", "3", "--drafts", "2,0", "--accept", "1,0")
    result = run(*arguments, "--draft-rows", "16,16", "--prefill", "20,200", "--csv", file)
    assert result.exit_code == 0, result.output
    lines = table(file)
    columns = ("measure", "drafts", "draft_rows", "acceptance", "context", "tokens_per_step", "ratio_to_no_drafts")
    assert [tuple(line[name] for name in columns) for line in lines] == [
        ("generation", "0", "0", "no drafts", "40", "1.0", ""),
        ("generation", "0", "0", "no drafts", "64", "1.0", ""),
        ("generation", "2", "16", "simulated 1.0,0.0", "40", "2.0", "2.0"),
        ("generation", "2", "16", "simulated 1.0,0.0", "64", "2.0", "2.0"),
        ("prefill", "0", "0", "no drafts", "20", "20.0", ""),
        ("prefill", "0", "0", "no drafts", "200", "100.0", ""),  # in two chunks of 128
    ]
    assert [line["steps"] for line in lines] == ["3"] * 4 + ["1", "2"]
    assert ends == [40, 64, 38, 62]
    assert int(lines[2]["weight_bytes"]) > int(lines[0]["weight_bytes"])
    assert "drafts 2 of 16 tokens, context 40: " in result.output
    assert (
        "acceptance simulated 1.0,0.0, 2.000 tokens/step (2.000 expected), 1000.0 tokens/s (2.000 of no"
        in result.output
    )


DRAFTS = ("--drafts", "0,2", "--accept", "0.79,0.58")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--context", "20"), "context = 20: expected"),
        (("--synthetic", "flash", "-m", "file.gguf"), "--synthetic flash and --model are both given"),
        (("--synthetic", "flash", "--mtp", "file.gguf"), "--synthetic flash and --mtp are both given"),
        (("--synthetic", "flash", "--rows", "0"), "expected at least 1"),
        (("--drafts", "0,2"), "--accept: 0 rates and at most 2 drafts, expected a rate for every draft"),
        (("--accept", "0.5"), "--accept: 1 rates and at most 0 drafts"),
        (("--drafts", "1", "--accept", "79"), "expected rates from 0 to 1"),
        (("--drafts", "1", "--accept", "x"), "--accept x: expected numbers"),
        (("--drafts", "5", "--accept", "1,1,1,1,1"), "expected numbers from 0 to 4"),
        ((*DRAFTS, "--context", "200"), "expected 227 (a window and 65 steps of 3 rows)"),
        ((*DRAFTS, "--draft-rows", "5000"), "--draft-rows: [5000], expected numbers from 1 to 4096"),
        (("--draft-rows", "8"), "--draft-rows: [8] and no drafts, expected --drafts"),
        (("--prefill", "0"), "--prefill: [0], expected lengths from 1"),
        (("--rows", "1", "--profile", "p.csv"), "bench decode --profile: expected an NVIDIA GPU, found cpu"),
        ((*DRAFTS, "--profile", "p.csv"), "--profile p.csv: expected --rows"),
        (("--plot", "p.txt"), "expected a name that ends with one of .png"),
        (("--csv", "/nowhere/t.csv"), "/nowhere/t.csv: expected a file to write to"),
    ],
)
def test_errors_are_one_line(arguments, message):
    result = run(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr.splitlines()[-1] and len(result.stderr.splitlines()) == 1


def test_plot_needs_its_extra(monkeypatch):
    monkeypatch.setattr("ds4jax.bench.plot.find_spec", lambda name: None)
    result = run("--plot", "p.png")
    assert result.exit_code == 2 and "pip install 'ds4jax[plot]'" in result.stderr


def test_plot(tmp_path):
    pytest.importorskip("matplotlib")
    lines = [Line("rows", "all rows", 2, 1, 0, context, 4096, 3, 2.0, 1.0, 1.0, 10, 0.0) for context in (4096, 2048)]
    lines += [dataclasses.replace(line, measure="generation", acceptance="simulated 0.5") for line in lines]
    plot(lines, "card and versions", tmp_path / "p.svg")
    assert (tmp_path / "p.svg").read_text().startswith("<?xml")
