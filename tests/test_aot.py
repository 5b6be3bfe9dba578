"""Kernels and a whole decode step compile for an H100 on a machine that has none."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ROOT / ".cuda"


def compiled(dump: Path, *cases: str, ptx: bool = False) -> dict:
    """What `compile_kernels.py` reports."""
    if not PACKAGES.exists():
        pytest.skip("no .cuda; bin/cuda-packages makes it")
    flags = [f"--xla_gpu_cuda_data_dir={PACKAGES / 'nvidia/cu13'}", f"--xla_dump_to={dump}"]
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",  # no cuDNN here
        "PYTHONPATH": os.pathsep.join(map(str, (PACKAGES, ROOT / "tests", ROOT))),
        "XLA_FLAGS": " ".join([*flags, *["--xla_dump_emitter_re=.*"] * ptx]),
    }
    command = [sys.executable, "-W", "ignore", str(ROOT / "tests/aot/compile_kernels.py"), str(dump), *cases]
    run = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert run.returncode == 0, run.stderr[-4000:]
    return json.loads(run.stdout.splitlines()[-1])


def test_kernels_and_decode_step(tmp_path):
    """At the full model's shapes; the step reads and writes its donated cache in place, in one graph of kernels."""
    names = [
        "compressor index",
        "wq_b+index",
        "wo_a",
        "head",
        "experts",
        "attention CSA 64k",
        "indexer 64k ties",
        "hyper_enter",
    ]
    found = compiled(tmp_path, *names)
    assert set(found["bytes"]) == set(names)
    step = found["step"]
    assert step["kernels"] > 20 * step["layers"]
    assert step["loops"] == 0, "a loop on the host's side of the step"
    assert step["cache_copies"] == []
    assert step["outside_graph"] == []


def test_strict_kernels_do_not_contract(tmp_path):
    """No product is fused with a sum where the reference has two roundings."""
    kernels = compiled(tmp_path, "norm", "kv_store", "q_norm_rope", "hyper_post", ptx=True)["contractions"]
    assert len(kernels) >= 4
    assert set(kernels.values()) == {0}, kernels
