"""Compiles kernels and a decode step for sm_90 on a machine without a GPU; prints one JSON object.

Run by `tests/test_aot.py` in its own process, with the CUDA plug-in's packages on the path: the plug-in disturbs
ordinary CPU runs.

Usage: compile_kernels.py DUMP CASE..., with names of cases in `ds4jax.bench.cases`. If PTX is written to the folder
DUMP, its fused multiply-adds are counted.
"""

import json
import os
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

from ds4jax import load_numerics, ops
from ds4jax.bench.cases import CASES
from ds4jax.checkpoint import load_params
from ds4jax.checkpoint_config import read_config
from ds4jax.engine import open_demo
from ds4jax.model.cache import init_cache
from ds4jax.model.transformer import DeepSeekV4
from ds4jax.ops.rows import Live

H100 = """gpu_device_info { threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: 3352320000000
l2_cache_size: 52428800 clock_rate_ghz: 1.98 device_memory_size: 84978434048 shared_memory_per_block_optin: 232448
cuda_compute_capability { major: 9 } registers_per_core_limit: 65536 registers_per_block_limit: 65536 }
platform_name: "CUDA" dnn_version_info { major: 9 minor: 8 } runtime_version { major: 13 }
device_description_str: "NVIDIA H100 80GB HBM3" """

topology = topologies.get_topology_desc(platform="cuda", topology_name="h100", topology="1x1x1", target_config=H100)
MESH = jax.sharding.Mesh(np.array([topology.devices[0]]), ("x",))
WHERE = NamedSharding(MESH, PartitionSpec())
NUMERICS = load_numerics("strict")
NUMERICS = NUMERICS.replace(impl=tuple((op, "pallas") for op, _ in NUMERICS.impl))
OPTIONS = NUMERICS.compiler_options


def shapes(tree):
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=WHERE), tree)


def build(function, *args, donate=()):
    """Compiles `function` for the H100 from shapes."""
    with jax.sharding.use_abstract_mesh(MESH.abstract_mesh):
        traced = jax.jit(function, donate_argnums=donate).trace(*shapes(args))
        return traced.lower(lowering_platforms=("cuda",)).compile(compiler_options=OPTIONS)


def build_case(name, rows):
    """Compiles an operation at a named shape."""
    case, key = CASES[name], jax.random.key(0)
    row_args, shared = jax.eval_shape(lambda key: (case.rows(key, rows), case.shared(key)), key)

    def call(mask, row_args, shared):
        return ops.call(case.op, NUMERICS, Live.of(mask), row_args, shared, **case.settings)

    return build(call, jax.ShapeDtypeStruct((rows,), jnp.bool_), row_args, shared)


def decode_step(rows):
    """What the compiled forward pass of the demonstration model is made of."""
    file = open_demo()
    config = read_config(file, None)
    params, _ = load_params(file, None, config, progress=None, cache_bytes=0)
    cache = jax.eval_shape(lambda: init_cache(config, NUMERICS, 1, 1024, rows))

    def step(params, tokens, cache, start, count):
        return DeepSeekV4(config, NUMERICS).apply({"params": params}, tokens, cache, start, count)

    one = jax.ShapeDtypeStruct((1,), jnp.int32)
    tokens = jax.ShapeDtypeStruct((1, rows), jnp.int32)
    program = build(step, params, tokens, cache, one, one, donate=2)
    text = program.as_text()
    cached = {",".join(map(str, leaf.shape)) for leaf in jax.tree.leaves(cache) if leaf.ndim == 3}
    copied = re.findall(r"\[([\d,]+)\]\S* copy\(", text)
    return {
        "layers": config.num_hidden_layers,
        "kernels": len(re.findall(r'custom_call_target="__gpu\$xla.gpu.triton"', text)),
        "loops": len(re.findall(r" while\(", text)),
        "cache_copies": sorted(set(copied) & cached),
        "temporary_bytes": program.memory_analysis().temp_size_in_bytes,
    }


def contractions(folder):
    """Fused multiply-adds of floats in every kernel that was dumped."""
    dumped = Path(folder).glob("*.ptx")
    return {path.name: len(re.findall(r"fma\.rn\S*\.f32", path.read_text())) for path in dumped}


def outside_graph(dump):
    """What the decode step runs outside of its command buffer (a CUDA graph): lines of the schedule's top level."""
    (schedule,) = Path(dump).glob("*.jit_step.thunk_sequence_after_thunk_passes.txt")
    top = [line for line in schedule.read_text().splitlines() if re.match(r"\d+:", line)]
    graphs = [line for line in top if "kCommandBuffer" in line]
    return [line for line in top if line not in graphs[:1]]


def main(dump, *names):
    found = {"bytes": {name: build_case(name, 3).memory_analysis().temp_size_in_bytes for name in names}}
    if "--xla_dump_emitter_re" in os.environ["XLA_FLAGS"]:
        found["contractions"] = contractions(dump)
    else:
        found["step"] = decode_step(2) | {"outside_graph": outside_graph(dump)}
    print(json.dumps(found))


main(*sys.argv[1:])
