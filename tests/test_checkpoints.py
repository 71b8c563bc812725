import gc
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from alignprop_jax.checkpoints import Checkpoints, make_fingerprint
from alignprop_jax.errors import UserError


def make_lora(rank=2):
    layer = {"down": jnp.ones((6, rank)), "up": jnp.arange(4.0 * rank).reshape(rank, 4)}
    return {"mid_block": {"to_q": layer, "to_out.0": layer}}


def make_state(step=0, rank=2):
    lora = jax.tree.map(lambda x: x + step, make_lora(rank))
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    return {
        "step": jnp.int32(step),
        "lora": lora,
        "opt_state": optimizer.init(lora),
        "key": jax.random.key(step),
    }


def fingerprint(model="emoji", rank=2, weight=1.0, alpha=4.0):
    unet = {layer: {"kernel": jnp.full((3, 3, 4, 4), weight)} for layer in ("conv_in", "conv_out")}
    return make_fingerprint(model, "float32", unet, make_lora(rank), alpha)


def save(folder, *steps, keep=2, **kwargs):
    checkpoints = Checkpoints(folder, fingerprint(**kwargs), keep)
    for step in steps:
        checkpoints.save(step, make_state(step))
    checkpoints.close()


def test_the_newest_state_comes_back_bit_for_bit(tmp_path):
    save(tmp_path / "run", 3, 7)
    checkpoints = Checkpoints(tmp_path / "run", fingerprint(), 2)
    assert checkpoints.latest_step == 7
    restored = checkpoints.restore(make_state(0))
    expected = make_state(7)
    assert jax.tree.structure(restored) == jax.tree.structure(expected)
    assert jnp.issubdtype(restored["key"].dtype, jax.dtypes.prng_key)
    draws = [np.asarray(jax.random.normal(state["key"], (3,))) for state in (restored, expected)]
    np.testing.assert_array_equal(*draws)
    for got, want in zip(
        jax.tree.leaves((restored["step"], restored["lora"], restored["opt_state"])),
        jax.tree.leaves((expected["step"], expected["lora"], expected["opt_state"])),
        strict=True,
    ):
        assert got.dtype == want.dtype and got.sharding == want.sharding
        np.testing.assert_array_equal(got, want)
    checkpoints.close()


def test_a_donated_state_is_written_as_it_was(tmp_path):
    overwrite = jax.jit(lambda state: jax.tree.map(lambda x: x * 0, state), donate_argnums=0)
    state = {"lora": jnp.full((512, 512), 3.0)}
    checkpoints = Checkpoints(tmp_path / "run", fingerprint(), 2)
    checkpoints.save(1, state)
    jax.block_until_ready(overwrite(state))
    checkpoints.close()
    checkpoints = Checkpoints(tmp_path / "run", fingerprint(), 2)
    restored = checkpoints.restore({"lora": jnp.zeros((512, 512))})
    np.testing.assert_array_equal(restored["lora"], 3.0)
    checkpoints.close()


def test_only_the_newest_are_kept_and_a_step_is_written_once(tmp_path):
    save(tmp_path / "run", 1, 2, 2, 3, 4)
    steps = [path.name for path in (tmp_path / "run").iterdir() if path.name.isdigit()]
    assert sorted(steps) == ["3", "4"]


def test_a_half_written_checkpoint_is_not_picked(tmp_path):
    save(tmp_path / "run", 1)
    # What a kill leaves: Orbax renames this folder to "2" when everything is inside.
    shutil.copytree(tmp_path / "run" / "1", tmp_path / "run" / "2.orbax-checkpoint-tmp")
    checkpoints = Checkpoints(tmp_path / "run", fingerprint(), 2)
    assert checkpoints.latest_step == 1
    checkpoints.close()


# Orbax abandons the other arrays it was reading; collected here, they warn in no other test.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_damaged_checkpoint_is_named(tmp_path):
    save(tmp_path / "run", 1)
    (tmp_path / "run" / "1" / "state" / "manifest.ocdbt").unlink()
    checkpoints = Checkpoints(tmp_path / "run", fingerprint(), 2)
    with pytest.raises(UserError, match="run/1 cannot be read"):
        checkpoints.restore(make_state(0))
    checkpoints.close()
    gc.collect()


@pytest.mark.parametrize(
    "other, named",
    [
        ({"model": "other"}, "run/1 has model emoji, this run other; give .* another --workdir"),
        ({"weight": 2.0}, "has model weights"),
        ({"rank": 3}, r"has LoRA rank \[2\], this run \[3\]"),
        ({"alpha": 8.0}, "has LoRA alpha 4.0, this run 8.0"),
    ],
)
def test_a_checkpoint_of_something_else_is_refused_by_name(tmp_path, other, named):
    save(tmp_path / "run", 1)
    with pytest.raises(UserError, match=named):
        Checkpoints(tmp_path / "run", fingerprint(**other), 2)


def test_a_fingerprint_is_json():
    assert json.loads(json.dumps(fingerprint())) == fingerprint()
    assert fingerprint()["LoRA targets"] == ["to_out.0", "to_q"]
