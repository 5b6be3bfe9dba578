"""Lists of the tokens that drafts may be: what they do to a draft, and which are refused."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf_variants import DS4_MTP, F32, Q_MTP, Q, is_qtensor
from golden import EXACT
from tiny import PERF

from ds4jax import load
from ds4jax.bench.synthetic import nbytes, weight_bytes
from ds4jax.checkpoint import load_params, open_gguf, read_config, read_draft_tokens
from ds4jax.errors import ConfigError
from ds4jax.model.transformer import DeepSeekV4


@pytest.mark.parametrize(
    ("files", "ids", "tolerance"),
    [((F32, DS4_MTP), [7], 1e-6), ((Q, Q_MTP), [0, 3, 200, 319], 0)],
    ids=["floats", "quantised"],
)
def test_other_tokens_are_never_drafted(files, ids, tolerance):
    """Those of the list keep their logits; the head's rows for them count as weights, and are read in its place.

    XLA's order of a float sum may depend on the number of rows, so only quantised weights give the same bits.
    """
    main, mtp = map(open_gguf, files)
    config, numerics = read_config(main, mtp), EXACT.replace(act="q8")
    chance = np.random.default_rng(0)
    streams = jnp.asarray(chance.standard_normal((1, 3, config.hc_mult, config.hidden_size), np.float32))

    def logits(params):
        model = DeepSeekV4(config, numerics)
        run = jax.jit(lambda params: model.apply({"params": params}, streams, method="draft_logits"))
        return np.asarray(run(params))[0]

    whole, census = load_params(main, mtp, config)
    few, more = load_params(main, mtp, config, draft_tokens=np.array(ids, np.int32))
    want = np.full((3, config.vocab_size), -np.inf, np.float32)
    want[:, ids] = logits(whole)[:, ids]
    np.testing.assert_allclose(logits(few), want, rtol=0, atol=tolerance)
    assert more.device_bytes == sum(leaf.nbytes for leaf in jax.tree.leaves(few, is_leaf=is_qtensor))
    saved = weight_bytes(whole, config, 1, 1) - weight_bytes(few, config, 1, 1)
    assert saved == nbytes(whole["head"]) - (more.device_bytes - census.device_bytes)


def test_a_list_is_read_in_any_order(tmp_path):
    (tmp_path / "list.txt").write_text("9\n0\n 7 \r\n")
    ids = read_draft_tokens(tmp_path / "list.txt", 10)
    assert ids.tolist() == [0, 7, 9] and ids.dtype == np.int32


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected at least one token id, found none; make the list with this model's tokenizer: ds4jax draft-tok"),
        ("1\nx\n", "line 2: expected a token id from 0 to 319, found 'x'; make the list"),
        ("1\n\n2", "line 2: expected a token id from 0 to 319, found ''; make the list"),
        ("-1", "line 1: expected a token id from 0 to 319, found '-1'; make the list"),
        ("1.5", "line 1: expected a token id from 0 to 319, found '1.5'; make the list"),
        ("9" * 5000, f"line 1: expected a token id from 0 to 319, found '{'9' * 40}'; make the list"),
        ("319\n320", "line 2: expected a token id from 0 to 319, found '320'; make the list"),
        ("4\n5\n04", "line 3: expected every id once, found 04 again; remove the line"),
        (b"\xff", "expected a text file with one token id a line: not UTF-8 text; make the list"),
        (None, "expected a text file with one token id a line: No such file or directory; make the list"),
    ],
)
def test_wrong_lists_are_refused_before_loading(tmp_path, text, message):
    file = tmp_path / "list.txt"
    if text is not None:
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError, match=f"^{re.escape(f'{file}: {message}')}"):
        load(F32, draft_tokens=file, progress=pytest.fail)


def test_a_list_without_drafts_costs_nothing(tmp_path):
    (tmp_path / "list.txt").write_text("5")
    engine = load(F32, mtp=DS4_MTP, numerics=PERF, context=64, draft_tokens=tmp_path / "list.txt")
    assert "head" not in engine.params["mtp"]
