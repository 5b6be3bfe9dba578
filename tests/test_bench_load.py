"""The bench of loading: its file is a model like the real one, and its stages read all of it."""

import csv
import dataclasses
import math
import os
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from test_bench import TINY
from typer.testing import CliRunner

from ds4jax import checkpoint_upload, cli
from ds4jax.bench import load, synthetic
from ds4jax.checkpoint import load_params, open_gguf, read_config
from ds4jax.checkpoint_write import metadata_of
from ds4jax.errors import ConfigError


@pytest.fixture
def written(tmp_path, monkeypatch):
    """A file of the shapes of a tiny model, which is loaded in slabs."""
    monkeypatch.setattr(load, "POOL_BYTES", 1 << 16)
    monkeypatch.setattr(checkpoint_upload, "SLAB_BYTES", 1 << 17)
    load.write_model(tmp_path / "tiny.gguf", TINY)
    return tmp_path / "tiny.gguf"


def test_the_written_file_is_a_model(written):
    file = open_gguf(written)
    config = read_config(file)
    params, _ = load_params(file, None, config)
    as_stored = {name: float(np.float32(getattr(TINY, name))) for name in ("hc_eps", "rms_norm_eps")}
    assert config == dataclasses.replace(TINY, **as_stored)
    want = jax.eval_shape(lambda: synthetic.make_params(TINY, 0))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), params) == jax.tree.map(lambda x: (x.shape, x.dtype), want)
    for leaf in map(np.asarray, jax.tree.leaves(params)):
        assert leaf.dtype == np.int32 or (np.isfinite(leaf).all() and leaf.any())
    assert file.nbytes == load.file_nbytes(TINY)


def test_metadata_names_the_block_too():
    with_block = metadata_of(dataclasses.replace(TINY, has_mtp=True))
    assert with_block["deepseek4.block_count"] == 3 and with_block["deepseek4.attention.compress_ratios"] == [4, 8, 0]


@pytest.mark.parametrize(("gib", "layers", "experts"), [(81.0, 43, 256), (40.0, 20, 256), (4.0, 4, 72)])
def test_as_many_layers_as_fit(gib, layers, experts):
    config = load.sized(gib)
    assert (config.num_hidden_layers, config.n_routed_experts) == (layers, experts)
    assert 0.85 * gib < load.file_nbytes(config) / 2**30 <= gib


def test_the_full_file_has_its_published_size():
    assert round(load.file_nbytes(synthetic.FLASH) / 2**30, 2) == 80.76
    with pytest.raises(ConfigError, match="--gib 1: expected at least 3"):
        load.sized(1.0)


@pytest.mark.parametrize("cold", [False, True])
def test_stages(written, cold):
    device = jax.local_devices()[0]
    stages = [stage for stage in load.measure(written, device, cold) if stage.stage != "upload"]  # not on a CPU
    assert [stage.stage for stage in stages] == ["read", "repack", "load, compiling", "load"]
    whole = open_gguf(written).nbytes
    assert [stage.nbytes for stage in stages if stage.stage != "repack"] == [whole] * 3
    assert 0 < stages[1].nbytes < 1.5 * whole
    assert all(stage.seconds > 0 for stage in stages)
    assert all(0 <= stage.resident <= 1 for stage in stages)
    assert cold or {stage.resident for stage in stages} == {1.0}


def test_files_are_forgotten_and_read(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(os.urandom(1 << 22))
    load.warm(path)
    assert load.resident(path) == 1
    load.forget(path)
    if load.resident(path) == 1:
        pytest.skip("this folder is in memory")
    load.warm(path)
    assert load.resident(path) == 1


def test_command(tmp_path, monkeypatch):
    monkeypatch.setattr(load, "POOL_BYTES", 1 << 16)
    monkeypatch.setattr(load, "sized", lambda gib: TINY)
    table = tmp_path / "table.csv"
    monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", "0.5")
    result = CliRunner().invoke(cli.app, ["bench", "load", "--folder", str(tmp_path), "--csv", str(table)])
    assert result.exit_code == 0, result.output
    assert "2 layers, 8 experts" in result.stdout
    assert "81 GiB would take" in result.stdout.splitlines()[-1] and "(extrapolated)" in result.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["table.csv"], "the file is removed"
    with table.open() as lines:
        rows = list(csv.DictReader(lines))
    stages = [row["stage"] for row in rows if row["stage"] != "upload"]
    assert stages == ["read", "load, compiling", "load"], "too small for slabs"
    for row in rows:
        assert math.isclose(float(row["gbps"]), int(row["nbytes"]) / float(row["seconds"]) / 1e9, abs_tol=1e-3)
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=1))
    result = CliRunner().invoke(cli.app, ["bench", "load", "--folder", str(tmp_path)])
    assert result.exit_code == 2 and "GiB free" in result.stderr
