"""Run files: everything a run needs, nothing unknown, and flags on top."""

import dataclasses
import re
from pathlib import Path

import pytest

from ds4jax.errors import ConfigError
from ds4jax.runconfig import RunConfig, change_numerics, configs, load_numerics, parse_assignment

STRICT, PERF = load_numerics("strict"), load_numerics("perf")

WHOLE = """
model = "models/trunk.gguf"
mtp = "/models/mtp.gguf"
prompt_file = "prompt.txt"
special = true
speculative = "auto"
draft_tokens = "list.txt"

[numerics]
preset = "perf"
act = "f32"
draft_cost = 1
impl.linear = "pallas"
xla.xla_gpu_autotune_level = 0

[sampling]
temperature = 1
top_k = 40
top_p = 0.9
min_p = 0.05
seed = 7

[limits]
context = 4096
max_new_tokens = 12
stop = ["\\n\\n", "The end"]
stop_ids = [1, 5]
chunk = 64

[server]
host = "::1"
port = 9000
api_key = "k"
cors = ["https://a.example"]
sessions = 2
queue = 5
prompt_profile = "0731"
think = true
effort = "max"
"""


def test_whole_run(tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_text("Es war einmal … ", encoding="utf-8")
    (tmp_path / "run.toml").write_text(WHOLE)
    run = RunConfig.read(str(tmp_path / "run.toml"))
    assert run == RunConfig(
        model=tmp_path / "models/trunk.gguf",
        mtp=Path("/models/mtp.gguf"),
        numerics=change_numerics(
            PERF, {"act": "f32", "draft_cost": 1, "impl": {"linear": "pallas"}, "xla": {"xla_gpu_autotune_level": 0}}
        ),
        prompt_file=tmp_path / "prompt.txt",
        special=True,
        temperature=1.0,
        top_k=40,
        top_p=0.9,
        min_p=0.05,
        seed=7,
        context=4096,
        max_new_tokens=12,
        stop=("\n\n", "The end"),
        stop_ids=(1, 5),
        chunk=64,
        speculative="auto",
        draft_tokens=tmp_path / "list.txt",
        host="::1",
        port=9000,
        api_key="k",
        cors=("https://a.example",),
        sessions=2,
        queue=5,
        prompt_profile="0731",
        think=True,
        effort="max",
    )
    assert type(run.temperature) is type(run.numerics.draft_cost) is float
    assert run.numerics.implementation("linear") == "pallas"
    assert run.numerics.implementation("router") == PERF.implementation("router")
    assert run.prompt_text() == "Es war einmal … "


def test_drafts_are_a_number_or_a_word() -> None:
    assert RunConfig.from_toml("speculative = 2", Path()).speculative == 2
    assert RunConfig.from_toml('speculative = "off"', Path()).speculative == "off"
    with pytest.raises(ConfigError, match="speculative = True, expected .off."):
        RunConfig.from_toml("speculative = true", Path())


def test_every_field_can_stand_in_a_file() -> None:
    named = {line.split(" = ")[0].split(".")[0] for line in WHOLE.splitlines()} | {"numerics", "prompt"}
    assert {field.name for field in dataclasses.fields(RunConfig)} <= named


def test_the_example_in_the_readme() -> None:
    example = (Path(__file__).parent.parent / "README.md").read_text().split("```toml\n")[1]
    run = RunConfig.from_toml(example.split("```")[0], Path())
    assert run == RunConfig(
        model=Path("MODEL.gguf"),
        prompt="The sea was calm",
        temperature=0.8,
        top_p=0.95,
        seed=1,
        context=4096,
        max_new_tokens=200,
        stop=("The end",),
    )


def test_defaults() -> None:
    assert RunConfig.read("strict") == RunConfig() == RunConfig.from_toml("", Path())
    assert RunConfig().numerics == STRICT
    assert RunConfig.read("perf") == RunConfig(numerics=PERF)
    assert RunConfig().prompt_text() is None


def test_numerics_of_a_file(tmp_path: Path) -> None:
    own = (configs() / "perf.toml").read_text().replace('act = "q8"', 'act = "f32"')
    (tmp_path / "own.toml").write_text(own)
    expected = PERF.replace(act="f32")
    assert RunConfig.from_toml('numerics = "own.toml"', tmp_path).numerics == expected
    assert RunConfig.from_toml('numerics = {preset = "own.toml"}', tmp_path).numerics == expected
    assert RunConfig.from_toml('numerics = "perf"', tmp_path).numerics == PERF
    assert RunConfig.from_toml("numerics.sim_kv = false", tmp_path).numerics == STRICT.replace(sim_kv=False)


def test_a_numerics_file_is_a_run_with_these_numerics(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text((configs() / "strict.toml").read_text().replace('act = "q8"', 'act = "f32"'))
    assert RunConfig.read(str(tmp_path / "mine.toml")) == RunConfig(numerics=STRICT.replace(act="f32"))


def test_errors_name_the_file(tmp_path: Path) -> None:
    path = tmp_path / "bad.toml"
    for text, message in (
        ("modle = 1", "unknown key 'modle'"),
        ("a b", "not a TOML document"),
        ("[limits]\nseed = 1", r"\[limits\]"),
    ):
        path.write_text(text)
        with pytest.raises(ConfigError, match=f"^{re.escape(str(path))}: {message}"):
            RunConfig.read(str(path))
    with pytest.raises(ConfigError, match=f"^{re.escape(str(path))}: numerics keys: "):
        load_numerics(path)


def test_override() -> None:
    run = RunConfig(prompt="a", seed=3)
    assert run.override(temperature=None, seed=4) == RunConfig(prompt="a", seed=4)
    assert run.override(seed=0).seed == 0
    assert run.override(prompt_file=Path("p")) == RunConfig(prompt_file=Path("p"), seed=3)
    assert run.override(prompt="") == RunConfig(prompt="", seed=3)
    with pytest.raises(ConfigError, match="prompt and prompt_file are both given"):
        run.override(prompt="b", prompt_file=Path("p"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("modle = 'x'", "^unknown key 'modle'; the nearest known key is 'model'"),
        ("temperature = 1.0", r"^unknown key 'temperature'; it belongs in \[sampling\]$"),
        ("temprature = 1.0", r"^unknown key 'temprature'; the nearest known key is 'temperature' in \[sampling\]$"),
        ("prompt = 'a'\nact = 'q8'", r"^unknown key 'act'; it belongs in \[numerics\]$"),
        ("[limits]\nseed = 1", r"^\[limits\]: unknown key 'seed'; it belongs in \[sampling\]$"),
        ("[sampling]\nprompt = 'a'", r"^\[sampling\]: unknown key 'prompt'; it belongs in the top level$"),
        ("[sampling]\nzzz = 1", r"unknown key 'zzz'; known keys are min_p, seed, temperature, top_k, top_p$"),
        ("act = 'f32'", r"^numerics keys: missing \['accept'"),
        ("[limits]\nstop = 'a'", "stop = 'a', expected a list of str"),
        ("[limits]\nstop = ['']", "stop = .*, expected strings that are not empty"),
        ("[limits]\nstop_ids = [true]", r"stop_ids = \[True\], expected a list of int"),
        ("[limits]\nstop_ids = [-1]", r"stop_ids = \[-1\], expected token ids"),
        ("[limits]\nmax_new_tokens = -1", "max_new_tokens = -1, expected at least 0"),
        ("[sampling]\nseed = -1", r"seed = -1, expected 0 to 2\^64 - 1"),
        ("special = 1", "special = 1, expected bool"),
        (
            "[sampling]\ntemprature = 1",
            r"\[sampling\]: unknown key 'temprature'; the nearest known key is 'temperature'",
        ),
        (
            "[limits]\nmax_tokens = 1",
            r"\[limits\]: unknown key 'max_tokens'; the nearest known key is 'max_new_tokens'",
        ),
        ("[numerics]\nrow = 'loop'", "numerics: unknown key 'row'; the nearest known key is 'rows'"),
        ("[numerics.impl]\nliner = 'xla'", "numerics.impl: unknown key 'liner'; the nearest known key is 'linear'"),
        ("[numerics]\nimpl = 'xla'", "impl = 'xla', expected a table"),
        ("[numerics]\nact = 'f16'", "act = 'f16', expected one of q8, f32"),
        ("[numerics]\ndraft_cost = true", "draft_cost = True, expected a number"),
        ("[numerics]\ndraft_cost = 0", "draft_cost = 0.0, expected above 0"),
        ("[numerics]\naccept = 'always'", "accept = 'always', expected one of coupled, rejection"),
        ("[numerics]\npreset = 1", "preset = 1, expected one of strict, perf or a path"),
        ("numerics = 1", "numerics = 1, expected a preset, a path or a table"),
        ("numerics = 'fast'", "fast: expected a numerics file or one of strict, perf: No such file"),
        ("sampling = 1", r"sampling = 1, expected a table \[sampling\]"),
        ("model = 1", "model = 1, expected str"),
        ("[sampling]\nseed = 1.0", "seed = 1.0, expected int"),
        ("[sampling]\nseed = true", "seed = True, expected int"),
        ("[sampling]\ntop_p = true", "top_p = True, expected float"),
        ("prompt = 'a'\nprompt_file = 'b'", "prompt and prompt_file are both given"),
        ("model = ", "not a TOML document"),
    ],
)
def test_bad_run_file(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RunConfig.from_toml(text, Path())


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected a run file or one of strict, perf: No such file"):
        RunConfig.read(str(tmp_path / "run.toml"))
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ConfigError, match="expected a text file: not UTF-8 text"):
        RunConfig(prompt_file=tmp_path / "latin.txt").prompt_text()
    with pytest.raises(ConfigError, match="Is a directory"):
        load_numerics(tmp_path)


@pytest.mark.parametrize(
    ("text", "table"),
    [
        ("act=f32", {"act": "f32"}),
        ("sim_kv = false", {"sim_kv": False}),
        ("impl.linear=pallas", {"impl": {"linear": "pallas"}}),
        ("xla.xla_gpu_autotune_level=0", {"xla": {"xla_gpu_autotune_level": 0}}),
    ],
)
def test_assignment(text: str, table: dict[str, object]) -> None:
    assert parse_assignment(text) == table
    assert change_numerics(STRICT, parse_assignment(text)) != STRICT


@pytest.mark.parametrize("text", ["strict", "=1", 'act="', "a b=1"])
def test_bad_assignment(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_assignment(text)
