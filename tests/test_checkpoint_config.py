"""ModelConfig from metadata: complete, incomplete, in other number types, contradictory."""

import re

import numpy as np
import pytest
from gguf_variants import (
    DS4_MTP,
    F32,
    F32_MTP,
    TINY,
    TINY_MTP,
    combined,
    metadata_of,
    nextn,
    tensors_of,
    with_metadata,
    write,
)

from ds4jax.checkpoint import open_gguf, read_config
from ds4jax.checkpoint_table import make_plan
from ds4jax.errors import CheckpointError


def test_config_of_a_complete_file():
    assert read_config(open_gguf(F32)) == TINY
    assert read_config(open_gguf(F32), open_gguf(DS4_MTP)) == TINY_MTP
    assert read_config(open_gguf(F32), open_gguf(F32_MTP)) == TINY_MTP


DERIVED = (
    "vocab_size",
    "embedding_length",
    "block_count",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "attention.q_lora_rank",
    "attention.output_lora_rank",
    "attention.output_group_count",
    "attention.indexer.head_count",
    "attention.indexer.key_length",
    "attention.compress_ratios",
    "expert_count",
    "expert_used_count",
    "expert_feed_forward_length",
    "expert_shared_count",
    "expert_group_count",
    "expert_group_used_count",
    "expert_weights_norm",
    "expert_gating_func",
    "hash_layer_count",
    "hyper_connection.count",
    "rope.freq_base",
    "rope.scaling.type",
    "rope.scaling.yarn_beta_fast",
    "rope.scaling.yarn_beta_slow",
    "nextn_predict_layers",
)
REQUIRED = (
    "context_length",
    "rope.dimension_count",
    "rope.scaling.factor",
    "rope.scaling.original_context_length",
    "attention.sliding_window",
    "attention.indexer.top_k",
    "attention.layer_norm_rms_epsilon",
    "attention.compress_rope_freq_base",
    "expert_weights_scale",
    "hyper_connection.sinkhorn_iterations",
    "hyper_connection.epsilon",
    "swiglu_clamp_exp",
)


def test_keys_are_derived_from_tensors():
    for key in DERIVED:
        assert read_config(with_metadata(F32, key)) == TINY, key
    assert read_config(with_metadata(F32, *DERIVED)) == TINY
    every = {key.removeprefix("deepseek4.") for key in metadata_of(F32) if key.startswith("deepseek4.")}
    assert every == {*DERIVED, *REQUIRED}


@pytest.mark.parametrize("key", REQUIRED)
def test_keys_that_tensors_do_not_show_are_named(key):
    with pytest.raises(CheckpointError, match=re.escape(f"tiny-f32.gguf: deepseek4.{key}: missing")):
        read_config(with_metadata(F32, key))


def test_number_types_of_other_converters(tmp_path):
    metadata = metadata_of(F32)
    wide = {int: [np.uint64, np.int32], float: [np.float64, np.float64]}
    for turn in range(2):
        changed = {
            key: wide[type(value)][turn](value) if type(value) in wide else value for key, value in metadata.items()
        }
        tensors = tensors_of(F32)
        path = write(
            tmp_path / f"wide{turn}.gguf", changed, {n: t for n, t in tensors.items() if not n.endswith("exps.weight")}
        )
        assert read_config(open_gguf(path)) == TINY


@pytest.mark.parametrize("length", [7, 8, 10])
def test_ratio_arrays_of_any_length(length):
    ratios = [0, 0, 4, 128, 4, 128, 4, 0, 0, 0][:length]
    file = with_metadata(F32, attention__compress_ratios=ratios)
    assert read_config(file) == TINY
    assert read_config(file, open_gguf(DS4_MTP)) == TINY_MTP


def test_schedule_comes_from_data_not_parity():
    file = with_metadata(F32, attention__compress_ratios=[0, 4, 0, 6, 6, 4, 4])
    assert read_config(file).compress_ratios == (0, 4, 0, 6, 6, 4, 4)
    with pytest.raises(CheckpointError, match=r"blk\.1\.attn_compressor_kv\.weight, .* missing"):
        make_plan(file, None, read_config(file))


def test_yarn_is_on_wherever_a_factor_is_given():
    assert read_config(with_metadata(F32, rope__scaling__type="linear")).rope_factor == 4.0
    plain = with_metadata(F32, "rope.scaling.type", "rope.scaling.factor", "rope.scaling.original_context_length")
    assert read_config(plain).rope_factor == 1.0


def test_clamps():
    file = with_metadata(F32, swiglu_clamp_exp=3.0, swiglu_clamp_shexp=[1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0])
    config = read_config(file, open_gguf(F32_MTP))
    assert config.swiglu_limit == (3.0,) * 8
    assert config.swiglu_limit_shared == (1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 7.0)
    mtp = with_metadata(F32_MTP, swiglu_clamp_shexp=[9.0] * 7 + [8.0])
    assert read_config(file, mtp).swiglu_limit_shared == (1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0)
    own = with_metadata(F32, swiglu_clamp_exp=[1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0])
    assert read_config(own).swiglu_limit_shared == (1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"expert_gating_func": 2}, "expert_gating_func: expected 4, file has 2"),
        ({"expert_group_count": 8}, "expert_group_count: expected 0 or 1, file has 8"),
        ({"expert_shared_count": 2}, "expert_shared_count: expected 1, file has 2"),
        ({"expert_weights_norm": False}, "expert_weights_norm: expected True, file has False"),
        ({"attention__value_length": 64}, "value_length: expected 96, file has 64"),
        ({"attention__head_count_kv": 2}, "head_count_kv: expected 1, file has 2"),
        ({"attention__sliding_window": "wide"}, "sliding_window: expected a whole number, file has 'wide'"),
        ({"attention__sliding_window": 8.5}, "sliding_window: expected a whole number, file has 8.5"),
        ({"rope__freq_base": "x"}, "freq_base: expected a number, file has 'x'"),
        ({"attention__compress_ratios": [0, 0, 4]}, "compress_ratios: expected at least 7 numbers"),
        ({"swiglu_clamp_exp": [1.0] * 3 + [2.0]}, "swiglu_clamp_exp: expected a number or at least 7"),
        ({"rope__dimension_count": 31}, "tiny-f32.gguf: rotary size 31 is odd; the metadata contradict each other"),
        (
            {"attention__output_group_count": 0},
            "tiny-f32.gguf: deepseek4.attention.output_group_count: expected at least 1",
        ),
        (
            {"attention__compress_ratios": "x"},
            "tiny-f32.gguf: deepseek4.attention.compress_ratios: expected at least 7",
        ),
        ({"block_count": 9}, "block_count: file says 9, but has blocks 0 to 6"),
    ],
)
def test_unsupported_or_wrong_keys(changes, message):
    with pytest.raises(CheckpointError, match=re.escape(message)):
        read_config(with_metadata(F32, **changes))


def test_mtp_entry_of_the_schedule_must_be_zero():
    file = with_metadata(F32, attention__compress_ratios=[0, 0, 4, 128, 4, 128, 4, 4])
    assert read_config(file) == TINY
    with pytest.raises(CheckpointError, match="expected 0 for the MTP block, file has 4"):
        read_config(file, open_gguf(DS4_MTP))


@pytest.mark.parametrize("nextn_layers", [0, 1, None])
def test_tensors_decide_about_mtp_not_the_key(tmp_path, nextn_layers):
    keys = {} if nextn_layers is None else {"nextn_predict_layers": nextn_layers}
    plain = with_metadata(F32, "nextn_predict_layers", **keys)
    assert read_config(plain) == TINY
    path = combined(tmp_path / "both.gguf", F32, nextn(tensors_of(DS4_MTP)))
    assert read_config(with_metadata(path, "nextn_predict_layers", **keys)) == TINY_MTP
