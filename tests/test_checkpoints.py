import json
import logging
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file

from alignprop_jax.errors import UserError
from alignprop_jax.records import checkpoints
from alignprop_jax.records.checkpoints import Checkpoints, make_fingerprint, restore


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
    weights = [jnp.full((3, 3, 4, 4), weight)] * 2
    return make_fingerprint(model, "float32", weights, make_lora(rank), alpha)


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
    assert steps_in(tmp_path / "run") == [3, 4]


def steps_in(folder):
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit())


def test_the_best_are_kept_beside_the_newest(tmp_path):
    rewards = {1: 0.5, 2: 0.9, 3: None, 4: float("nan"), 5: 0.7, 6: None, 7: 0.6}
    for step, reward in rewards.items():
        # Opened anew each time, as by a run that is killed after every step.
        checkpoints = Checkpoints(tmp_path / "run", fingerprint(), keep=2, keep_best=1)
        checkpoints.save(step, make_state(step), reward)
        checkpoints.close()
    assert steps_in(tmp_path / "run") == [2, 6, 7]


ON_ANOTHER_MESH = """
import sys
import jax
from alignprop_jax.devices import sharding
from tests.test_checkpoints import Checkpoints, fingerprint, make_state

def laid_out(state, devices):
    mesh = sharding.make_mesh(1, jax.devices()[:devices])
    # The moments are split, though runs do not do so: the harder case.
    over, everywhere = sharding.over_batch(mesh), sharding.replicated(mesh)
    split = lambda x: over if x.ndim == 2 and x.shape[0] % devices == 0 else everywhere
    return sharding.put(state, jax.tree.map(split, state))

def state():
    return {"many": jax.numpy.arange(80.0).reshape(16, 5), **make_state(3)}

checkpoints = Checkpoints(sys.argv[1], fingerprint(), 2)
checkpoints.save(3, laid_out(state(), 4))
checkpoints.close()
for devices in (2, 8):
    checkpoints = Checkpoints(sys.argv[1], fingerprint(), 2)
    like = laid_out(jax.tree.map(jax.numpy.zeros_like, state()), devices)
    restored = checkpoints.restore(like)
    checkpoints.close()
    for got, wanted, place in zip(*map(jax.tree.leaves, (restored, state(), like)), strict=True):
        assert got.sharding == place.sharding and len(got.devices()) == devices
        assert (got == wanted).all()
"""


def test_another_number_of_devices_reads_the_same(tmp_path):
    flags = "--xla_force_host_platform_device_count=8"
    subprocess.run(
        [sys.executable, "-c", ON_ANOTHER_MESH, tmp_path / "run"],
        env={**os.environ, "XLA_FLAGS": flags},
        check=True,
    )
    # This process has one device and no model.
    np.testing.assert_array_equal(restore(tmp_path / "run")["many"].ravel(), np.arange(80.0))


def test_restore_gives_numpy_arrays_of_any_step(tmp_path):
    save(tmp_path / "run", 3, 7)
    newest, earlier = restore(tmp_path / "run"), restore(tmp_path / "run", step=3)
    assert (newest["step"], earlier["step"]) == (7, 3)
    got, wanted = (state["lora"]["mid_block"]["to_q"]["up"] for state in (earlier, make_state(3)))
    assert isinstance(got, np.ndarray) and got.dtype == wanted.dtype
    np.testing.assert_array_equal(got, wanted)
    with pytest.raises(UserError, match="no checkpoint 5 in .*run; there are 3, 7"):
        restore(tmp_path / "run", step=5)
    with pytest.raises(UserError, match="no checkpoint .*absent"):
        restore(tmp_path / "absent")


def test_the_documented_lines_restore_a_run(finished_run, tmp_path, monkeypatch, capsys):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "aesthetic").symlink_to(finished_run[0])
    page = Path(__file__).parents[1] / "docs" / "checkpoints.md"
    snippets = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec("\n".join(snippets), {})
    assert capsys.readouterr().out.startswith("8 dict_keys(['down_blocks.0'")
    trained = load_file(finished_run[0] / "lora" / "pytorch_lora_weights.safetensors")
    restored = load_file("earlier.safetensors")
    assert restored.keys() == trained.keys()
    for name, array in restored.items():
        np.testing.assert_array_equal(array, trained[name], name)


def test_a_half_written_checkpoint_is_not_picked(tmp_path):
    save(tmp_path / "run", 1)
    # What a kill leaves: Orbax renames this folder to "2" when everything is inside.
    shutil.copytree(tmp_path / "run" / "1", tmp_path / "run" / "2.orbax-checkpoint-tmp")
    checkpoints = Checkpoints(tmp_path / "run", fingerprint(), 2)
    assert checkpoints.latest_step == 1
    checkpoints.close()


def test_a_damaged_checkpoint_is_named(tmp_path):
    # One array: Orbax abandons the others it was reading, and they warn in whatever test is next.
    state = {"step": jnp.int32(1)}
    checkpoints = Checkpoints(tmp_path / "run", fingerprint(), 2)
    checkpoints.save(1, state)
    checkpoints.close()
    (tmp_path / "run" / "1" / "state" / "manifest.ocdbt").unlink()
    checkpoints = Checkpoints(tmp_path / "run", fingerprint(), 2)
    with pytest.raises(UserError, match="run/1 cannot be read"):
        checkpoints.restore(state)
    checkpoints.close()


def empty(folder):
    shutil.rmtree(folder)
    folder.mkdir()


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: os.truncate(folder / "_CHECKPOINT_METADATA", 50),
        lambda folder: os.truncate(folder / "_CHECKPOINT_METADATA", 0),
        lambda folder: (folder / "_CHECKPOINT_METADATA").unlink(),
        lambda folder: (folder / "_CHECKPOINT_METADATA").write_bytes(b"\0" * 500),
        lambda folder: (folder / "_CHECKPOINT_METADATA").write_text("[1]"),
        lambda folder: (folder / "_CHECKPOINT_METADATA").write_text('{"custom_metadata": [1]}'),
        lambda folder: (folder / "_CHECKPOINT_METADATA").write_text(
            '{"custom_metadata": {"fingerprint": "x"}}'
        ),
        lambda folder: shutil.rmtree(folder / "state"),
        empty,
    ],
)
def test_a_checkpoint_of_the_wrong_kind_is_named(tmp_path, damage):
    save(tmp_path / "run", 1, 2)
    damage(tmp_path / "run" / "2")
    with pytest.raises(UserError, match="run/2 cannot be read.* resume from the one before it"):
        Checkpoints(tmp_path / "run", fingerprint(), 2)
    shutil.rmtree(tmp_path / "run" / "2")
    checkpoints = Checkpoints(tmp_path / "run", fingerprint(), 2)
    assert checkpoints.latest_step == 1
    checkpoints.close()
    empty(tmp_path / "run" / "1")
    with pytest.raises(UserError, match="run/1 cannot be read.* remove that folder to begin anew"):
        Checkpoints(tmp_path / "run", fingerprint(), 2)


def test_what_is_no_checkpoint_is_left_alone(tmp_path):
    save(tmp_path / "run", 1)
    (tmp_path / "run" / "9").touch()
    (tmp_path / "run" / "notes").mkdir()
    checkpoints = Checkpoints(tmp_path / "run", fingerprint(), 2)
    assert checkpoints.latest_step == 1
    checkpoints.close()
    assert restore(tmp_path / "run")["step"] == 1
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file is no folder; remove it, or give another"):
        Checkpoints(tmp_path / "file", fingerprint(), 2)


def test_what_a_kill_kept_from_being_removed_goes_at_the_next_start(tmp_path):
    save(tmp_path / "run", 1, 2, 3, keep=3)
    checkpoints = Checkpoints(tmp_path / "run", fingerprint(), keep=2)
    checkpoints.restore(make_state())
    assert steps_in(tmp_path / "run") == [1, 2, 3]
    checkpoints.remove_old()
    checkpoints.close()
    assert steps_in(tmp_path / "run") == [2, 3]


def test_a_checkpoint_is_on_disk_before_it_has_its_name(tmp_path, monkeypatch):
    synced, fsync = set(), os.fsync

    def note_what(file):
        path = Path(os.readlink(f"/proc/self/fd/{file}"))
        synced.add(path.relative_to(tmp_path / "run").as_posix().replace(TEMPORARY, ""))
        assert path.parts[len(tmp_path.parts) + 1] == "2" + TEMPORARY
        fsync(file)

    save(tmp_path / "run", 1, keep=1)
    monkeypatch.setattr(os, "fsync", note_what)
    save(tmp_path / "run", 2, keep=1)
    assert steps_in(tmp_path / "run") == [2]
    whole = {
        path.relative_to(tmp_path / "run").as_posix() for path in (tmp_path / "run").rglob("*")
    }
    # Orbax adds a mark when it gives the name.
    assert synced == whole - {"2/commit_success.txt"}


TEMPORARY = ".orbax-checkpoint-tmp"

FULL = """
import resource, sys
from tests.test_checkpoints import Checkpoints, fingerprint, make_state
from alignprop_jax.records import exhaustion
from alignprop_jax.errors import UserError
checkpoints = Checkpoints(sys.argv[1], fingerprint(), 2)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
try:
    with exhaustion.named(sys.argv[1], "x=1"):
        checkpoints.save(3, make_state(3))
        checkpoints.close()
except UserError as error:
    print(error)
"""


@pytest.mark.parametrize("limit", [0, 150, 700])
def test_a_disk_that_is_full_is_one_line_and_loses_nothing(tmp_path, limit):
    """A limit on the size of files stands for it."""
    save(tmp_path / "run", 1, 2)
    process = subprocess.run(
        [sys.executable, "-c", FULL, tmp_path / "run", str(limit)], capture_output=True, text=True
    )
    said = f"{tmp_path / 'run'} cannot be written to (File too large); nothing that it holds is"
    assert process.stdout.startswith(said) and process.stdout.count("\n") == 1
    assert process.stderr == ""
    save(tmp_path / "run", 3)
    assert steps_in(tmp_path / "run") == [2, 3]


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


@pytest.mark.parametrize(
    "message, is_left_out",
    [
        ("Task exception was never retrieved: <coro at .../orbax/checkpoint/a.py:3>", True),
        ("Future exception was never retrieved: ValueError('[tensorstore_spec={}]')", True),
        ("Future exception was never retrieved: ValueError('of the program')", False),
    ],
)
def test_traces_of_orbax_are_left_out(message, is_left_out):
    record = logging.LogRecord("asyncio", logging.ERROR, "base_events.py", 1, message, (), None)
    assert checkpoints._is_not_of_orbax(record) is not is_left_out


def test_a_fingerprint_is_json():
    assert json.loads(json.dumps(fingerprint())) == fingerprint()
    assert fingerprint()["LoRA targets"] == ["to_out.0", "to_q"]
