"""Files in, parameters out: every variant of a DeepSeek-V4 GGUF loads to the same bits, other files say why not."""

import dataclasses
import re
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf import GGMLQuantizationType
from gguf_variants import (
    DS4_MTP,
    F32,
    F32_MTP,
    Q_MTP,
    TINY,
    Q,
    Tensors,
    combined,
    is_qtensor,
    leaf_bytes,
    load,
    metadata_of,
    nextn,
    same_params,
    tensors_of,
    with_metadata,
    without_tensors,
    write,
)

from ds4jax import checkpoint_table, checkpoint_upload
from ds4jax.checkpoint import describe, load_params, open_gguf, read_config
from ds4jax.checkpoint_table import make_plan
from ds4jax.config import ModelConfig
from ds4jax.errors import CheckpointError
from ds4jax.quants import block_size, unpack

# ------------------------------------------------------------------------------------------------- loading

PLACES = {
    "token_embd.weight": "embed",
    "output.weight": "head",
    "output_norm.weight": "norm",
    "output_hc_fn.weight": "hc_head fn",
    "output_hc_base.weight": "hc_head base",
    "output_hc_scale.weight": "hc_head scale",
    "blk.0.hc_attn_fn.weight": "layers_0 hc_attn fn",
    "blk.1.hc_ffn_base.weight": "layers_1 hc_ffn base",
    "blk.1.hc_ffn_scale.weight": "layers_1 hc_ffn scale",
    "blk.2.attn_norm.weight": "layers_2 attn_norm",
    "blk.2.ffn_norm.weight": "layers_2 ffn_norm",
    "blk.2.attn_q_a.weight": "layers_2 attn wq_a",
    "blk.2.attn_q_a_norm.weight": "layers_2 attn q_norm",
    "blk.2.attn_q_b.weight": "layers_2 attn wq_b",
    "blk.2.attn_kv.weight": "layers_2 attn wkv",
    "blk.2.attn_kv_a_norm.weight": "layers_2 attn kv_norm",
    "blk.2.attn_sinks.weight": "layers_2 attn sink",
    "blk.2.attn_output_a.weight": "layers_2 attn wo_a",
    "blk.2.attn_output_b.weight": "layers_2 attn wo_b",
    "blk.2.attn_compressor_kv.weight": "layers_2 attn compressor wkv",
    "blk.2.attn_compressor_gate.weight": "layers_2 attn compressor wgate",
    "blk.3.attn_compressor_ape.weight": "layers_3 attn compressor ape",
    "blk.3.attn_compressor_norm.weight": "layers_3 attn compressor norm",
    "blk.4.indexer.attn_q_b.weight": "layers_4 attn indexer wq_b",
    "blk.4.indexer.proj.weight": "layers_4 attn indexer w",
    "blk.4.indexer_compressor_kv.weight": "layers_4 attn indexer compressor wkv",
    "blk.4.indexer_compressor_gate.weight": "layers_4 attn indexer compressor wgate",
    "blk.4.indexer_compressor_ape.weight": "layers_4 attn indexer compressor ape",
    "blk.4.indexer_compressor_norm.weight": "layers_4 attn indexer compressor norm",
    "blk.2.ffn_gate_tid2eid.weight": "layers_2 moe tid2eid",
    "blk.3.exp_probs_b.bias": "layers_3 moe bias",
    "blk.3.ffn_gate_inp.weight": "layers_3 moe gate",
    "blk.6.ffn_gate_exps.weight": "layers_6 moe w1",
    "blk.6.ffn_up_exps.weight": "layers_6 moe w3",
    "blk.6.ffn_down_exps.weight": "layers_6 moe w2",
    "blk.6.ffn_gate_shexp.weight": "layers_6 moe shared w1",
    "blk.6.ffn_up_shexp.weight": "layers_6 moe shared w3",
    "blk.6.ffn_down_shexp.weight": "layers_6 moe shared w2",
}
MTP_PLACES = {
    "mtp.0.e_proj.weight": "mtp e_proj",
    "mtp.0.h_proj.weight": "mtp h_proj",
    "mtp.0.enorm.weight": "mtp enorm",
    "mtp.0.hnorm.weight": "mtp hnorm",
    "mtp.0.norm.weight": "mtp norm",
    "mtp.0.hc_head_fn.weight": "mtp hc_head fn",
    "mtp.0.attn_q_a.weight": "mtp layer attn wq_a",
    "mtp.0.exp_probs_b.bias": "mtp layer moe bias",
    "mtp.0.ffn_down_exps.weight": "mtp layer moe w2",
}


def at(params: dict[str, Any], path: str) -> Any:
    for name in path.split():
        params = params[name]
    return params


@pytest.mark.parametrize(("main", "mtp"), [(F32, DS4_MTP), (Q, Q_MTP)], ids=["f32", "q"])
def test_every_tensor_arrives_unchanged(main, mtp):
    files = open_gguf(main), open_gguf(mtp)
    params, census = load_params(*files, read_config(*files))
    for file, places in zip(files, (PLACES, MTP_PLACES), strict=True):
        for name, path in places.items():
            tensor, leaf = file.tensors[name], at(params, path)
            assert leaf.shape == tensor.shape, name
            assert (leaf.format if is_qtensor(leaf) else leaf.dtype.name) == {
                "F32": "float32",
                "F16": "float16",
                "I32": "int32",
            }.get(tensor.format, tensor.format), name
            assert leaf_bytes(leaf) == tensor.data.tobytes(), name
    leaves = jax.tree.leaves(params, is_leaf=is_qtensor)
    stored = [tensor.data.tobytes() for file in files for tensor in file.tensors.values()]
    assert sorted(leaf_bytes(leaf) for leaf in leaves) == sorted(stored)
    assert census.ignored == {}
    assert census.file_bytes == sum(map(len, stored))
    assert census.device_bytes == sum(leaf.nbytes for leaf in leaves)
    assert sum(count for count, _ in census.by_type.values()) == len(leaves)
    if main == Q:
        assert set(census.by_type) == {"IQ2_XXS", "Q8_0", "F16", "Q2_K", "Q4_K", "F32", "I32"}
        assert census.by_type["Q2_K"] == (7, 7 * 8 * 256 * 84)
        sizes = [size for _, size in census.by_type.values()]
        assert sizes == sorted(sizes, reverse=True) and sum(sizes) == census.file_bytes


def test_slabs_change_nothing_and_progress_ends_at_the_total(monkeypatch):
    whole = load(Q, Q_MTP)
    seen: list[tuple[int, int, str]] = []
    monkeypatch.setattr(checkpoint_upload, "SLAB_BYTES", 60_000)
    monkeypatch.setattr(checkpoint_upload, "WORKERS", 3)
    assert same_params(load(Q, Q_MTP, progress=lambda *step: seen.append(step)), whole)
    done = [step[0] for step in seen]
    total = open_gguf(Q).nbytes + open_gguf(Q_MTP).nbytes
    assert done == sorted(done) and done[-1] == total == seen[0][1]
    assert list(dict.fromkeys(step[2] for step in seen)) == [*open_gguf(Q).tensors, *open_gguf(Q_MTP).tensors]
    assert sum(step[2] == "blk.0.ffn_gate_exps.weight" for step in seen) == 3  # 8 experts, 3 a slab


@pytest.mark.parametrize(
    ("format", "shape", "parts"), [("Q4_K", (11, 512), 2), ("F32", (7, 5, 32), 1), ("BF16", (10, 64), 2)]
)
def test_slabs_of_a_tensor(monkeypatch, format, shape, parts):
    """Four slabs, the last of which overlaps; columns are divided among the paths."""
    values, size = block_size(format)
    raw = np.random.default_rng(0).integers(0, 128, (*shape[:-1], shape[-1] // values * size), np.uint8)  # no NaN
    tensor = checkpoint_table.TensorInfo("t", format, shape, raw.reshape(-1), Q)
    slot = checkpoint_table.Slot("t", tuple((str(part),) for part in range(parts)), "matrix", shape)
    monkeypatch.setattr(checkpoint_upload, "SLAB_BYTES", raw.nbytes // len(raw) * 3)
    assert [slab.start for slab in checkpoint_upload.slabs_of(tensor, slot)][-2:] == [3 * (shape[0] // 4), shape[0] - 3]
    leaves = dict(checkpoint_upload.upload([(tensor, slot)], jax.local_devices()[0]))
    assert [*leaves] == [*slot.paths]
    got = [leaf_bytes(leaf) for leaf in leaves.values()]
    assert got == [part.tobytes() for part in np.split(raw, parts, axis=-1)]


def test_few_slabs_are_in_memory_at_a_time(monkeypatch):
    monkeypatch.setattr(checkpoint_upload, "SLAB_BYTES", 60_000)
    monkeypatch.setattr(checkpoint_upload, "WORKERS", 2)
    file = open_gguf(Q)
    jobs = list(checkpoint_upload.jobs_of(make_plan(file, None, read_config(file)).assigned))
    assert all(len(job) == 1 or sum(slab.raw.size for slab in job) <= 60_000 for job in jobs)
    assert max(map(len, jobs)) > 3 and max(slab.raw.size for job in jobs for slab in job) <= 60_000
    assert [slab.tensor.name for job in jobs for slab in job if slab.done == slab.tensor.nbytes] == [*file.tensors]
    begun: list[int] = []

    def items():
        for number in range(20):
            begun.append(number)
            yield number

    with ThreadPoolExecutor(2) as pool:
        for taken, number in enumerate(checkpoint_upload.in_order(pool, lambda number: [number], items())):
            assert number == taken and len(begun) <= taken + 4
    assert number == 19


def test_mixed_and_unusual_types(tmp_path):
    rng = np.random.default_rng(0)
    tensors = tensors_of(Q)
    for name, kind, row_bytes in (
        ("blk.3.ffn_gate_exps.weight", "Q4_K", 144),
        ("blk.3.ffn_down_exps.weight", "MXFP4", 136),
        ("blk.4.attn_q_a.weight", "Q6_K", 210),
        ("token_embd.weight", "Q8_0", 272),
    ):
        rows = tensors[name][1].shape[:-1]
        tensors[name] = kind, rng.integers(0, 256, (*rows, row_bytes), np.uint8)
    half = {
        "blk.1.hc_attn_fn.weight",
        "blk.4.attn_compressor_ape.weight",
        "blk.5.attn_kv.weight",
        "blk.5.attn_norm.weight",
    }
    for name in half:
        shape = open_gguf(Q).tensors[name].shape
        values = rng.standard_normal(shape).astype(np.float32)
        tensors[name] = "BF16", gguf.quants.quantize(values, GGMLQuantizationType.BF16)
    tensors["blk.0.ffn_gate_inp.weight"] = "F32", tensors["blk.0.ffn_gate_inp.weight"][1].astype(np.float32)
    tensors["blk.0.ffn_norm.weight"] = "F16", tensors["blk.0.ffn_norm.weight"][1].astype(np.float16)
    path = write(tmp_path / "mixed.gguf", metadata_of(Q), tensors)
    params = load(path)
    assert at(params, "layers_3 moe w1").format == "Q4_K"
    assert at(params, "layers_3 moe w3").format == "IQ2_XXS"
    assert at(params, "layers_3 moe w2").format == "MXFP4"
    assert at(params, "layers_4 attn wq_a").format == "Q6_K"
    assert at(params, "embed").format == "Q8_0"
    for place in ("layers_1 hc_attn fn", "layers_4 attn compressor ape", "layers_5 attn wkv"):
        assert at(params, place).dtype == jnp.bfloat16
    assert leaf_bytes(at(params, "layers_5 attn wkv")) == tensors["blk.5.attn_kv.weight"][1].tobytes()
    assert at(params, "layers_0 moe gate").dtype == jnp.float32
    for place, name in (
        ("layers_5 attn_norm", "blk.5.attn_norm.weight"),
        ("layers_0 ffn_norm", "blk.0.ffn_norm.weight"),
    ):
        kind, data = tensors[name]
        assert at(params, place).dtype == jnp.float32
        want = gguf.quants.dequantize(data.view(np.uint8), GGMLQuantizationType[kind])
        np.testing.assert_array_equal(np.asarray(at(params, place)), want)


# ------------------------------------------------------------------------------------------------- MTP in all forms


def test_stand_alone_llama_cpp_file_is_the_ds4_file():
    """The block's own HyperHead is the file's `output_hc_*`; copies of embedding, head and norm are ignored."""
    main, mtp = open_gguf(F32), open_gguf(F32_MTP)
    params, census = load_params(main, mtp, read_config(main, mtp))
    assert same_params(params, load(F32, DS4_MTP))
    assert census.ignored == dict.fromkeys(
        [f"tiny-f32-mtp.gguf: {name}.weight" for name in ("token_embd", "output", "output_norm")],
        "a copy of the main model's",
    )


def test_stand_alone_file_without_head_norm_uses_its_output_norm():
    mtp = without_tensors(F32_MTP, "shared_head_norm")
    params = load(open_gguf(F32), mtp)
    assert leaf_bytes(params["mtp"]["norm"]) == mtp.tensors["output_norm.weight"].data.tobytes()


@pytest.mark.parametrize(("main", "mtp"), [(F32, DS4_MTP), (Q, Q_MTP)], ids=["f32", "q"])
def test_block_inside_the_main_file(tmp_path, main, mtp):
    want = load(main, mtp)
    merged = nextn(tensors_of(mtp))
    path = combined(tmp_path / "merged.gguf", main, merged)
    assert same_params(load(path), want)
    del merged["blk.7.nextn.eh_proj.weight"]
    for name in ("e_proj", "h_proj"):
        merged[f"blk.7.nextn.{name}.weight"] = tensors_of(mtp)[f"mtp.0.{name}.weight"]
    assert same_params(load(combined(tmp_path / "apart.gguf", main, merged)), want)
    same_file = write(tmp_path / "ds4.gguf", metadata_of(main), tensors_of(main) | tensors_of(mtp))
    assert same_params(load(same_file), want)


def test_block_inside_the_main_file_borrows_what_it_lacks(tmp_path):
    block = {name: tensor for name, tensor in nextn(tensors_of(DS4_MTP)).items() if "head" not in name}
    copies: Tensors = {
        f"blk.7.nextn.{name}.weight": ("F32", np.zeros((320, 64), np.float32))
        for name in ("embed_tokens", "shared_head_head")
    }
    file = open_gguf(combined(tmp_path / "bare.gguf", F32, block | copies))
    params, census = load_params(file, None, read_config(file))
    assert params["mtp"]["norm"] is params["norm"]
    assert params["mtp"]["hc_head"] is params["hc_head"]
    assert set(census.ignored) == {f"bare.gguf: {name}" for name in copies}


def test_a_separate_mtp_file_replaces_the_block_of_the_main_file(tmp_path):
    block = nextn(tensors_of(DS4_MTP))
    wrong = {name: (kind, np.zeros_like(data)) for name, (kind, data) in block.items()}
    main, mtp = open_gguf(combined(tmp_path / "both.gguf", F32, wrong)), open_gguf(DS4_MTP)
    params, census = load_params(main, mtp, read_config(main, mtp))
    assert same_params(params, load(F32, DS4_MTP))
    assert census.ignored == {f"both.gguf: {name}": f"the MTP block of {DS4_MTP.name} is used" for name in block}
    params, census = load_params(main, None, dataclasses.replace(read_config(main), has_mtp=False))
    assert same_params(params, load(F32))
    assert set(census.ignored.values()) == {"the MTP block is not used"}


def test_merged_projection_is_divided_by_columns_in_any_type(tmp_path):
    merged = nextn(tensors_of(Q_MTP))
    raw = np.random.default_rng(0).integers(0, 256, (256, 2 * 144), np.uint8)
    merged["blk.7.nextn.eh_proj.weight"] = "Q4_K", raw
    block = load(combined(tmp_path / "q4.gguf", Q, merged))["mtp"]
    assert block["e_proj"].shape == block["h_proj"].shape == (256, 256)
    assert unpack(block["e_proj"]).tobytes() == raw[:, :144].tobytes()
    assert unpack(block["h_proj"]).tobytes() == raw[:, 144:].tobytes()


def test_merged_projection_refuses_blocks_that_straddle_its_halves():
    stored = dataclasses.replace(open_gguf(Q).tensors["blk.0.ffn_down_exps.weight"], format="Q2_K", shape=(4, 256))
    slot = checkpoint_table.Slot("eh_proj", (("e_proj",), ("h_proj",)), "matrix", (4, 256))
    with pytest.raises(CheckpointError, match=r"blocks divide its 2 parts of 128 columns, file has Q2_K \[4, 256\]"):
        checkpoint_table._check(stored, slot)


@pytest.mark.parametrize("spoil", ["architecture", "tensors"])
def test_dspark_is_not_mtp(tmp_path, spoil):
    mtp = tensors_of(DS4_MTP)
    if spoil == "architecture":
        path = write(
            tmp_path / "drafter.gguf", {"general.architecture": "dflash"}, {"fc.weight": mtp["mtp.0.e_proj.weight"]}
        )
    else:
        mtp["mtp.0.main_proj.weight"] = mtp["mtp.0.e_proj.weight"]
        path = write(tmp_path / "drafter.gguf", {"general.architecture": "deepseek4_mtp_support"}, mtp)
    with pytest.raises(CheckpointError, match=r"drafter\.gguf: expected an MTP block, found a DSpark drafter"):
        read_config(open_gguf(F32), open_gguf(path))


# ------------------------------------------------------------------------------------------------- refusals


def test_wrong_files(tmp_path):
    main = open_gguf(F32)
    other = write(
        tmp_path / "llama.gguf", {"general.architecture": "llama"}, {"blk.0.x": ("F32", np.zeros(4, np.float32))}
    )
    with pytest.raises(CheckpointError, match="expected architecture deepseek4 .*, found 'llama'"):
        read_config(open_gguf(other))
    for mtp in (DS4_MTP, F32_MTP):
        with pytest.raises(CheckpointError, match="found an MTP block alone; give it as the MTP file"):
            read_config(open_gguf(mtp))
    with pytest.raises(CheckpointError, match="expected an MTP block .* found architecture 'deepseek4' without one"):
        read_config(main, main)
    with pytest.raises(
        CheckpointError, match=r"mtp\.0\.e_proj\.weight: expected Q8_0 \[64, 64\], file has Q8_0 \[256, 256\]"
    ):
        load(F32, Q_MTP)
    moved = dataclasses.replace(main, tensors={})
    with pytest.raises(CheckpointError, match="with layers blk"):
        read_config(moved)
    renamed = open_gguf(F32_MTP)
    tensors = {name.replace("blk.7", "blk.5"): tensor for name, tensor in renamed.tensors.items()}
    with pytest.raises(CheckpointError, match=r"expected the MTP block as blk\.7, found blk\.5"):
        read_config(main, dataclasses.replace(renamed, tensors=tensors))


def test_missing_tensors():
    for pattern, message in (
        (r"^output\.weight", r"output\.weight missing"),
        (r"^blk\.3\.attn_", r"blk\.3\.attn_norm\.weight, .* and 10 more missing"),
        (r"^blk\.6\.ffn_gate_exps", r"blk\.6\.ffn_gate_exps\.weight missing"),
        (r"^blk\.3\.exp_probs_b", r"blk\.3\.exp_probs_b\.bias missing"),
        (r"^blk\.0\.ffn_gate_tid2eid", r"blk\.0\.ffn_gate_tid2eid\.weight missing"),
    ):
        file = without_tensors(F32, pattern)
        with pytest.raises(CheckpointError, match=message):
            load(file)
    with pytest.raises(CheckpointError, match=r"all tensors of blk\.3 are missing"):
        read_config(without_tensors(F32, r"^blk\.3\."))
    with pytest.raises(CheckpointError, match="file says 7, but has blocks 0 to 5"):
        read_config(without_tensors(F32, r"^blk\.6\."))
    with pytest.raises(CheckpointError, match=r"tiny-f32-mtp-ds4\.gguf: mtp\.0\.enorm\.weight missing"):
        load(open_gguf(F32), without_tensors(DS4_MTP, "enorm"))


def test_surplus_tensors():
    file = open_gguf(F32)
    extra = {"blk.1.attn_rope_table.weight": file.tensors["blk.1.attn_norm.weight"]}
    with pytest.raises(CheckpointError, match=r"tiny-f32\.gguf: blk\.1\.attn_rope_table\.weight not expected"):
        load(dataclasses.replace(file, tensors=file.tensors | extra))
    bias = {"blk.0.exp_probs_b.bias": file.tensors["blk.3.exp_probs_b.bias"]}
    with_bias = dataclasses.replace(file, tensors=file.tensors | bias)
    plan = make_plan(with_bias, None, TINY)
    assert plan.ignored == {"tiny-f32.gguf: blk.0.exp_probs_b.bias": "hash layers have no bias"}
    early = {name.replace("attn_output_a", "attn_o_a"): tensor for name, tensor in file.tensors.items()}
    with pytest.raises(
        CheckpointError, match=r"attn_output_a\.weight, .* missing; found instead.* blk\.0\.attn_o_a\.weight"
    ):
        load(dataclasses.replace(file, tensors=early))


@pytest.mark.parametrize(
    ("name", "kind", "shape", "message"),
    [
        ("blk.1.attn_q_a.weight", "F16", (64, 48), "expected F16 [48, 64], file has F16 [64, 48]"),
        (
            "blk.1.attn_q_a.weight",
            "I32",
            (48, 64),
            "expected F32, F16, BF16 or a quantised type [48, 64], file has I32",
        ),
        ("blk.1.hc_attn_fn.weight", "Q8_0", (24, 256), "expected F32, F16, BF16 [24, 256], file has Q8_0 [24, 256]"),
        ("blk.1.attn_norm.weight", "F32", (65,), "expected F32 [64], file has F32 [65]"),
        ("blk.1.ffn_gate_tid2eid.weight", "F32", (320, 3), "expected I32 [320, 3], file has F32 [320, 3]"),
        ("blk.1.ffn_gate_tid2eid.weight", "I32", (3, 320), "expected I32 [320, 3], file has I32 [3, 320]"),
    ],
)
def test_wrong_shape_or_type(name, kind, shape, message):
    file = open_gguf(F32)
    tensors = dict(file.tensors)
    tensors[name] = dataclasses.replace(tensors[name], format=kind, shape=shape)
    with pytest.raises(CheckpointError, match=re.escape(f".gguf: {name}: {message}")):
        load(dataclasses.replace(file, tensors=tensors))


def test_expert_ids_of_hash_layers_are_checked(tmp_path):
    tensors = tensors_of(F32)
    kind, ids = tensors["blk.1.ffn_gate_tid2eid.weight"]
    ids[5, 1] = 8
    path = write(tmp_path / "ids.gguf", metadata_of(F32), tensors)
    with pytest.raises(CheckpointError, match=r"expected expert ids from 0 to 7, file has 0 to 8"):
        load(path)


# ------------------------------------------------------------------------------------------------- info


def test_describe():
    main, mtp = open_gguf(Q), open_gguf(Q_MTP)
    asked = []

    def cache_nbytes(config: ModelConfig, context: int) -> int:
        asked.append((config, context))
        return context << 20

    description = describe(main, mtp, cache_nbytes)
    params, census = load_params(main, mtp, description.config)
    assert description.census == census
    assert description.census.device_bytes == sum(leaf.nbytes for leaf in jax.tree.leaves(params, is_leaf=is_qtensor))
    assert description.config == read_config(main, mtp) and description.config.has_mtp
    assert description.name == "ds4jax oracle tiny q"
    assert description.paths == (Q, Q_MTP)
    assert [context for _, context in asked] == [1024]  # the longest that the model allows
    for longest, contexts in ((4096, [4096]), (5000, [4096, 5000]), (1048576, [4096, 65536, 1048576])):
        description = describe(with_metadata(Q, context_length=longest), mtp, cache_nbytes)
        assert sorted({fit.context for fit in description.fits}) == contexts
    fits = {(fit.card, fit.context): fit.left_bytes for fit in description.fits}
    assert len(fits) == 9
    assert fits[80, 4096] == (80 << 30) - (3 << 30) - census.device_bytes - (4096 << 20)
    assert fits[80, 65536] > 0 > fits[80, 1048576]
    assert describe(main).fits == ()
