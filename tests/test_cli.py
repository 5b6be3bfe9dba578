"""The command line: what it passes on, what it prints, and how it fails."""

import dataclasses
import inspect
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from typer.testing import CliRunner, Result

import ds4jax
from ds4jax import cli, cli_load, cli_serve, engine
from ds4jax.decode.sampling import Sampling
from ds4jax.engine_run import Stats
from ds4jax.runconfig import RunConfig, load_numerics

ORACLE = Path(__file__).parent / "data" / "oracle"
MODEL = ORACLE / "tiny-f32.gguf"
SMALL = ("-c", "perf", "--context", "64", "--chunk", "16")  # one small program serves all runs of a command

PERF = load_numerics("perf")


def run(*arguments: object, stdin: bytes | None = None) -> Result:
    return CliRunner().invoke(cli.app, [str(a) for a in arguments], input=stdin)


def ok(*arguments: object, stdin: bytes | None = None) -> Result:
    result = run(*arguments, stdin=stdin)
    assert result.exit_code == 0, (result.stdout, result.stderr, result.exception)
    return result


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Replaces the engine by one that notes what it is asked for and answers at once."""
    seen = SimpleNamespace(finish="stop")
    stats = Stats(3, 2, 0.0, 0.0, 0.5, 0.5, steps=1, drafted=(4, 0), accepted=(3, 0))

    class Stream:
        def __enter__(self):
            return iter(["fresh ", "text"])

        def __exit__(self, *error: object) -> None:
            seen.closed = True

        def __iter__(self):
            return iter(["fresh ", "text"])

        def result(self):
            return SimpleNamespace(stats=stats, finish=seen.finish)

    class Engine:
        load_seconds = 0.25

        def stream(self, prompt: str, **options: object) -> Stream:
            seen.prompt, seen.options = prompt, options
            return Stream()

    def load(path: object = None, **options: object) -> Engine:
        seen.path, seen.load = path, options
        return Engine()

    monkeypatch.setattr(engine, "load", load)
    return seen


def test_generate_passes_every_field_of_a_run_file_on(tmp_path: Path, asked: SimpleNamespace) -> None:
    (tmp_path / "run.toml").write_text(
        """
        model = "m.gguf"
        mtp = "mtp.gguf"
        prompt = "Es war einmal"
        special = true
        speculative = 2
        draft_tokens = "list.txt"
        numerics.preset = "perf"
        numerics.act = "f32"
        numerics.draft_cost = 0.5
        sampling = {temperature = 0.5, top_k = 4, top_p = 0.75, min_p = 0.25, seed = 9}
        limits = {context = 99, max_new_tokens = 7, stop = ["\\n\\n", "The end"], stop_ids = [1, 5], chunk = 5}
        """
    )
    result = ok("generate", "--config", tmp_path / "run.toml")
    assert result.stdout == "fresh text\n"
    assert asked.closed
    assert asked.prompt == "Es war einmal"
    assert asked.path == tmp_path / "m.gguf"
    load = asked.load
    assert (load["mtp"], load["context"], load["chunk"]) == (tmp_path / "mtp.gguf", 99, 5)
    assert load["numerics"] == PERF.replace(act="f32", draft_cost=0.5)
    assert (load["speculative"], load["draft_tokens"]) == (2, tmp_path / "list.txt")
    assert asked.options == {
        "sampling": Sampling(0.5, 4, 0.75, 0.25),
        "seed": 9,
        "max_new_tokens": 7,
        "stop": ("\n\n", "The end"),
        "stop_ids": (1, 5),
        "parse_special": True,
    }


def test_flags_replace_every_field_of_a_run_file(tmp_path: Path, asked: SimpleNamespace) -> None:
    (tmp_path / "run.toml").write_text(
        'model = "m"\nmtp = "t"\nprompt = "p"\nspecial = true\n'
        'sampling = {temperature = 9, seed = 9}\nlimits = {context = 9, stop = ["a"], stop_ids = [9]}'
    )
    (tmp_path / "text").write_text("from a file")
    flags = (
        "-m",
        "x",
        "--mtp",
        "y",
        "--prompt-file",
        tmp_path / "text",
        "-N",
        "perf",
        "-N",
        "sim_kv=false",
        "-N",
        "accept=coupled",
    )
    numbers = ("-t", 0.5, "--top-k", 4, "--top-p", 0.75, "--min-p", 0.25, "--seed", 0, "-n", 7)
    stops = ("--stop", "x", "--stop", "y z", "--stop-id", 3, "--stop-id", 4)
    ok(
        "generate",
        "-c",
        tmp_path / "run.toml",
        *flags,
        *numbers,
        *stops,
        "--context",
        99,
        "--chunk",
        5,
        "--no-special",
        "--speculative",
        "auto",
        "--draft-tokens",
        "z",
    )
    assert asked.prompt == "from a file"
    assert asked.path == Path("x")
    load = asked.load
    assert (load["mtp"], load["context"], load["chunk"]) == (Path("y"), 99, 5)
    assert load["numerics"] == PERF.replace(sim_kv=False, accept="coupled")
    assert (load["speculative"], load["draft_tokens"]) == ("auto", Path("z"))
    assert asked.options == {
        "sampling": Sampling(0.5, 4, 0.75, 0.25),
        "seed": 0,
        "max_new_tokens": 7,
        "stop": ("x", "y z"),
        "stop_ids": (3, 4),
        "parse_special": False,
    }


def test_every_field_has_a_flag() -> None:
    flags = [set(inspect.signature(command).parameters) for command in (cli.generate, cli_serve.serve)]
    assert {field.name for field in dataclasses.fields(RunConfig)} <= set.union(*flags)


def test_generate_without_a_model_or_a_prompt(asked: SimpleNamespace) -> None:
    ok("generate", stdin="Grüße\n".encode())
    assert asked.path is None
    assert asked.prompt == "Grüße\n"
    assert asked.load["numerics"] == load_numerics("strict")


def test_stats_go_to_stderr(asked: SimpleNamespace) -> None:
    result = ok("generate", "-p", "a", "--stats")
    assert result.stdout == "fresh text\n"
    assert "load 0.25 s" in result.stderr
    assert "prompt 3 tokens in 0.50 s (6.0 tokens/s)" in result.stderr
    assert "drafts accepted by depth 3/4 (75%), 0/0; 4.00 tokens per step" in result.stderr
    assert ok("generate", "-p", "a").stderr == ""


def test_an_answer_that_the_context_clips(asked: SimpleNamespace) -> None:
    asked.finish = "length"
    assert ok("generate", "-p", "a", "-n", 2).stderr == ""
    clipped = ok("generate", "-p", "a", "-n", 3)
    assert clipped.stderr == "ds4jax: clipped after 2 of 3 new tokens: the context of 5 is full\n"
    asked.finish = "stop"
    assert ok("generate", "-p", "a", "-n", 3).stderr == ""


@pytest.mark.parametrize(
    "bad",
    [("-t", -1), ("--top-p", 2), ("-n", -1), ("--seed", -1), ("--stop", ""), ("--stop-id", -1)],
    ids=lambda bad: bad[0],
)
def test_bad_options_are_found_before_loading(bad: tuple[object, ...], asked: SimpleNamespace) -> None:
    assert run("generate", "-p", "a", *bad).exit_code == 2
    assert not hasattr(asked, "path")


def test_generate_with_a_real_model() -> None:
    arguments = ("-m", MODEL, *SMALL, "-n", 12, "--seed", 3, "-t", 0.8)
    whole = ok("generate", *arguments, "-p", "the cat", "--stats")
    assert re.search(r"prompt \d+ tokens in", whole.stderr)
    assert ok("generate", *arguments, stdin=b"the cat").stdout == whole.stdout
    assert ok("generate", *arguments[:-4], "--seed", 4, "-t", 0.8, "-p", "the cat").stdout != whole.stdout
    loaded = engine.load(MODEL, numerics="perf", context=64, chunk=16)
    answer = loaded.generate("the cat", sampling=Sampling(temperature=0.8), seed=3, max_new_tokens=12)
    assert whole.stdout == answer.text + "\n"
    stop, *_ = answer.text[3:]
    assert ok("generate", *arguments, "-p", "the cat", "--stop", stop).stdout == answer.text.split(stop)[0] + "\n"


def test_logprobs_with_a_real_model() -> None:
    result = ok("logprobs", "-m", MODEL, *SMALL, "-p", "the <｜User｜>hello", "--special")
    rows = [line.split("\t") for line in result.stdout.splitlines()]
    loaded = engine.load(MODEL, numerics="perf", context=64, chunk=16)
    ids = loaded.encode("the <｜User｜>hello", parse_special=True)
    assert [int(row[0]) for row in rows] == ids[1:]
    assert [row[2] for row in rows][-2:] == ["'<｜User｜>'", "'hello'"]
    np.testing.assert_allclose([float(row[1]) for row in rows], loaded.logprobs(ids), atol=1e-6)
    mean, perplexity = re.fullmatch(r"5 tokens, mean (-[\d.]+), perplexity ([\d.]+)\n", result.stderr).groups()
    assert float(mean) == pytest.approx(np.mean([float(row[1]) for row in rows]), abs=1e-4)
    assert float(perplexity) == pytest.approx(np.exp(-float(mean)), rel=1e-4)


def test_tokens() -> None:
    plain = ok("tokens", "-m", MODEL, "-p", "naïve hello<｜User｜>")
    rows = [line.split("\t") for line in plain.stdout.splitlines()]
    assert [row[1] for row in rows[:7]] == ["'n'", "'a'", r"b'\xc3'", r"b'\xaf'", "'v'", "'e'", "' '"]
    assert rows[7] == ["289", "'hello'"]
    special = ok("tokens", "-m", MODEL, "--special", stdin="<｜User｜>\n".encode())
    assert special.stdout == "298\t'<｜User｜>'\n13\t'\\n'\n"


def test_draft_tokens(tmp_path: Path) -> None:
    """Those that end an answer, then by frequency in both texts, of equals the lower id first."""
    (tmp_path / "a").write_text("hello hello naïve zz")
    (tmp_path / "b").write_text("zz<｜User｜> hello")
    ends, counted = [1, 0, 298, 299], [35, 125, 289, 100, 104, 113, 121, 178, 198]  # space, z, hello, bytes of naïve
    texts = ("-m", MODEL, "--special", tmp_path / "a", tmp_path / "b")
    result = ok("draft-tokens", *texts)
    ids = [int(line) for line in result.stdout.splitlines()]
    assert ids[:13] == ends + counted
    assert ids[13:] == [token for token in range(320) if token not in ends + counted][: 80 - 13]
    assert result.stderr == "80 of 320 tokens, 100.00% of the 18 tokens of the texts\n"
    few = ok("draft-tokens", *texts, "-n", 6)
    assert few.stdout.splitlines() == result.stdout.splitlines()[:6]
    assert few.stderr == "6 of 320 tokens, 50.00% of the 18 tokens of the texts\n"


def test_info() -> None:
    shown = ok("info", MODEL, "--mtp", ORACLE / "tiny-f32-mtp-ds4.gguf").stdout
    for row in (
        r"hidden_size +│ 64 ",
        r"hc_eps +│ 0.003 ",
        r"window +│ token table +│ 2.5 +│ 2.5 +│ 0 1 ",
        r"compressed sparse, 4 to 1 +│ router +│ 2.5 +│ 2.5 +│ 4 6 ",
        r"window +│ router +│ 2.5 +│ 2.5 +│ MTP ",
        r"I32 +│ 3 ",
        r"on the device +│ +│ \d",
        r"1024 +│ [\d.]+ \wiB +│ 7\d.\d GiB ",
    ):
        assert re.search(row, shown), (row, shown)
    assert "4096" not in shown  # the model's longest context is 1024
    plain = ok("info", MODEL, "--numerics", "perf")
    assert ok("info", "-m", MODEL, "--numerics", "perf").stdout == plain.stdout


@pytest.mark.parametrize("preset", ["strict", "perf"])
def test_info_counts_the_cache_that_loading_makes_room_for(preset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr("ds4jax.model.cache.cache_nbytes", lambda *arguments: asked.append(arguments) or 1 << 20)
    monkeypatch.setattr(engine, "cache_nbytes", lambda *arguments: asked.append(arguments) or 1 << 20)
    ok("info", MODEL, "-c", preset)
    engine.load(MODEL, numerics=preset, context=1024)
    assert len(asked) == 2
    assert asked[0] == asked[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("generate", "-m", "no.gguf", "-p", "a"), "no.gguf: no such file; check its name"),
        (("generate", "-m", Path(__file__), "-p", "a"), "test_cli.py: expected a GGUF file"),
        (("generate", "-c", "quick", "-p", "a"), "quick: expected a run file or one of strict, perf"),
        (("generate", "-N", "act", "-p", "a"), "act: expected a numerics file or one of strict, perf"),
        (("generate", "-N", "xla.foo=true", "-p", "a"), "xla: No such compile option: 'foo'; remove or correct it"),
        (("generate", "-N", "sim_kv=0", "-p", "a"), "sim_kv = 0, expected one of True, False"),
        (("info", ORACLE), "oracle: expected a GGUF file, found a directory"),
        (("info", MODEL, "-m", MODEL), "two model files given"),
        (("generate", "-N", "atc=f32", "-p", "a"), "unknown key 'atc'; the nearest known key is 'act'"),
        (("generate", "-p", "a", "-m", MODEL, "--speculative", "2"), "speculation needs the MTP block"),
        (("generate", "-p", "a", "--speculative", "5"), 'expected "off", "auto" or a number from 0 to 4'),
        (("generate", "-p", "a", "--draft-tokens", "no.txt"), "no.txt: expected a text file with one token id a line"),
        (("draft-tokens", "no.txt"), "no.txt: expected a text file"),
        (("draft-tokens", Path(__file__), "-n", 3), "3 tokens, expected 4, those that end an answer, to 4096"),
        (("generate", "-p", "a", "--prompt-file", "b"), "prompt and prompt_file are both given"),
        (("generate", "-m", MODEL, "-p", "a", *SMALL, "-t", "-1"), "temperature = -1.0, expected at least 0"),
        (("logprobs", "-m", MODEL, "-p", "", *SMALL), "text of 1 tokens, expected from 2 to 64"),
        (("tokens", "-m", ORACLE / "tiny-f32-mtp-ds4.gguf", "-p", "a"), "tokenizer.ggml.model is missing"),
        (("info", ORACLE / "tiny-f32-mtp-ds4.gguf"), "tiny-f32-mtp-ds4.gguf"),
    ],
)
def test_errors_are_one_line(arguments: tuple[object, ...], message: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert re.fullmatch(r"ds4jax: [^\n]*\n", result.stderr), result.stderr
    assert message in result.stderr


def test_text_that_is_not_utf8() -> None:
    result = run("tokens", "-m", MODEL, stdin=b"caf\xe9")
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert "text is not valid Unicode" in result.stderr


def test_compiled_programs_are_kept_in_the_users_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: jax.config.values[name] for name in names}
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    try:
        cli_load.keep_compiled_programs()
        assert jax.config.values[names[0]] == before[names[0]]  # another place was named already
        jax.config.update(names[0], None)
        cli_load.keep_compiled_programs()
        assert jax.config.values[names[0]] == str(tmp_path / "ds4jax" / "jax")
    finally:
        for name, value in before.items():
            jax.config.update(name, value)


def test_a_fresh_process() -> None:
    """Help and errors come without jax, and a user's error without a traceback."""
    watch = "import sys; from ds4jax.cli import app; sys.argv = ['ds4jax', *sys.argv[1:]]\ntry: app()\n"
    watch += "finally: print('jax' in sys.modules, file=sys.stderr)"
    shown = subprocess.run([sys.executable, "-c", watch, "--help"], capture_output=True, text=True)
    assert shown.returncode == 0
    assert all(command in shown.stdout for command in ("generate", "tokens", "logprobs", "info"))
    assert shown.stderr == "False\n"
    failed = subprocess.run([sys.executable, "-c", watch, "generate", "-c", "none"], capture_output=True, text=True)
    assert failed.returncode == 2
    assert failed.stderr.splitlines()[1:] == ["False"]
    assert failed.stderr.startswith("ds4jax: none: expected a run file")


def test_version() -> None:
    assert re.fullmatch(r"ds4jax \d+\.\d+\.\d+\n", ok("--version").stdout)


def test_public_names() -> None:
    source = inspect.getsource(ds4jax)
    for name in ds4jax.__all__:
        value = getattr(ds4jax, name)
        assert f"    from {value.__module__} import {name} as {name}\n" in source
    assert set(ds4jax.__all__) <= set(dir(ds4jax))
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        _ = ds4jax.lode


def test_setup_installs_once(tmp_path: Path) -> None:
    """With the package there, with whatever extras, nothing is installed again until `pyproject.toml` changes."""
    shutil.copytree(Path(__file__).parent.parent / "bin", tmp_path / "bin")
    venv = tmp_path / ".venv"
    (venv / "bin").mkdir(parents=True)
    for program in ("pip", "python"):
        (venv / "bin" / program).write_text('#!/bin/sh\necho "$@"\n')
        (venv / "bin" / program).chmod(0o755)

    def setup(*extras: str) -> str:
        done = subprocess.run([tmp_path / "bin" / "setup", *extras], capture_output=True, text=True, check=True)
        return done.stderr

    (tmp_path / "pyproject.toml").write_text("one")
    assert "--editable .[dev]\n" in setup("dev")
    assert setup("dev") == setup() == ""
    assert "--editable .[cuda12]\n" in setup("cuda12")
    (tmp_path / "pyproject.toml").write_text("two")
    assert "--editable .\n" in setup()
    assert setup() == ""
    assert "--editable .[dev]\n" in setup("dev")
