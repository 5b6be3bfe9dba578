"""Numerics: both presets name everything, and their difference is spelled out here, line by line."""

import dataclasses
import tomllib

import pytest

from ds4jax.config import OPS, Numerics
from ds4jax.errors import ConfigError
from ds4jax.runconfig import configs, load_numerics

STRICT, PERF = load_numerics("strict"), load_numerics("perf")


def flat(numerics: Numerics) -> dict[str, object]:
    """Every field by name; entries of tables as `impl.linear`."""
    fields = {field.name: getattr(numerics, field.name) for field in dataclasses.fields(numerics)}
    tables = {f"{name}.{key}": value for name in ("impl", "xla") for key, value in fields.pop(name)}
    return fields | tables


def test_what_perf_relaxes() -> None:
    strict, perf = flat(STRICT), flat(PERF)
    assert strict.keys() == perf.keys()
    difference = {name: (strict[name], perf[name]) for name in strict if strict[name] != perf[name]}
    print("\n".join(f"{name}: strict {a!r}, perf {b!r}" for name, (a, b) in difference.items()))
    assert difference == {
        "rows": ("loop", "batch"),
        "accept": ("coupled", "rejection"),
        "xla.xla_cpu_enable_fast_math": (False, True),
        "xla.xla_gpu_deterministic_ops": (True, False),
        "xla.xla_gpu_enable_fast_min_max": (False, True),
        "xla.xla_gpu_ftz": (False, True),
    }


@pytest.mark.parametrize("preset", ["strict", "perf"])
def test_presets_name_every_operation_in_order(preset: str) -> None:
    table = tomllib.loads((configs() / f"{preset}.toml").read_text())
    assert tuple(table["impl"]) == OPS
    assert list(table) == [field.name for field in dataclasses.fields(Numerics)]


def test_hashable_and_equal_by_value() -> None:
    assert load_numerics("strict") == STRICT
    assert hash(load_numerics("strict")) == hash(STRICT)
    assert STRICT != PERF
    assert len({STRICT, PERF, STRICT.replace(act="f32"), STRICT.replace(act="q8")}) == 3


def test_lookup() -> None:
    chosen = STRICT.replace(impl=tuple((op, "pallas" if op == "linear" else "xla") for op in OPS))
    assert chosen.implementation("linear") == "pallas"
    assert chosen.implementation("router") == "xla"
    assert STRICT.compiler_options["xla_allow_excess_precision"] is False


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('rows = "loop"', 'rows = "one"', "rows = 'one', expected one of loop, batch"),
        ("sim_kv = true", "sim_kv = 1", "sim_kv = 1, expected one of True, False"),
        (
            "deterministic_ops = true",
            "deterministic_ops = [1]",
            r"xla_gpu_deterministic_ops = \[1\], expected true, false",
        ),
        ('act = "q8"', 'act = "int8"', "act = 'int8', expected one of q8, f32"),
        ('cache = "f16"', 'cache = "bf16"', "cache = 'bf16', expected one of f32, f16"),
        ('precision = "highest"', 'precision = "low"', "precision = 'low', expected one of highest, default"),
        ('linear = "auto"', 'linear = "triton"', "linear = 'triton', expected one of auto, xla, pallas, interpret"),
        ('router = "auto"\n', "", r"missing \['router'\]"),
        ('router = "auto"\n', 'router = "auto"\nroute = "auto"\n', r"unknown \['route'\]"),
        ("sim_kv = true", "", r"missing \['sim_kv'\]"),
        ("sim_kv = true", "sim_kv = true\nspeed = 9", r"unknown \['speed'\]"),
        ("act = ", "act act = ", "not a TOML document"),
    ],
)
def test_bad_document(old: str, new: str, message: str) -> None:
    text = (configs() / "strict.toml").read_text()
    assert old in text
    with pytest.raises(ConfigError, match=message):
        Numerics.from_toml(text.replace(old, new, 1))
