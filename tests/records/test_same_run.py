"""What may change in the config of a run that is resumed, and what is refused by its name."""

import json

import numpy as np
import pytest

from alignprop_jax.config import default_config
from alignprop_jax.errors import UserError
from alignprop_jax.records.workdir import Workdir
from alignprop_jax.runs import same_run
from alignprop_jax.runs.same_run import MAY_CHANGE, contents_of_files, refuse_another_run

OTHERS = {
    "algorithm": "draft",
    "model": "other",
    "prompts": "animals_unseen",
    "eval_prompts": "animals",
    "reward": {"aesthetic": 1.0},
    "loss.shape": "negative",
    "remat": "step",
    "attention": "plain",
    "dtype": "bfloat16",
    "gradient.reward_at": "prediction",
    "truncation.strategy": "full",
    "lora.targets": ("to_q",),
}


def leaves(section, prefix=""):
    for key, value in section.items():
        if hasattr(value, "items"):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


@pytest.fixture
def config(tmp_path):
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n")
    (tmp_path / "reward.py").write_text("def red(images, prompts): return images[..., 0]\n")
    config = default_config()
    config.prompts = str(tmp_path / "prompts.txt")
    config.reward = f"{tmp_path}/reward.py:red"
    return config


@pytest.fixture
def workdir(config, tmp_path):
    workdir = Workdir(tmp_path / "run")
    workdir.save_config(config, contents_of_files(config))
    (tmp_path / "run" / "checkpoints" / "2").mkdir(parents=True)
    return workdir


def check(workdir, config):
    refuse_another_run(workdir, config, contents_of_files(config))


def test_every_key_may_change_or_is_refused_by_name(config, workdir):
    check(workdir, config)
    keys = dict(leaves(config))
    assert set(MAY_CHANGE) <= keys.keys()
    for key, value in keys.items():
        other = OTHERS.get(key)
        if other is None:
            other = not value if isinstance(value, bool) else value * 2 + type(value)(1)
        changed = default_config()
        changed.prompts, changed.reward = config.prompts, config.reward
        if key == "reward":
            changed.reward = other
        else:
            changed.update_from_flattened_dict({key: other})
        if key in MAY_CHANGE:
            check(workdir, changed)
        else:
            with pytest.raises(UserError, match=f"config.{key} was .*, is now .*; give it another"):
                check(workdir, changed)


def test_all_that_changed_is_said_at_once(config, workdir):
    config.train.seed, config.loss.target = 1, 3.0
    with pytest.raises(UserError, match=r"loss.target was 10.0, is now 3.0; config.train.seed was"):
        check(workdir, config)


def test_another_name_for_the_same_content_is_no_change(config, workdir, tmp_path):
    (tmp_path / "prompts.txt").rename(tmp_path / "moved.txt")
    (tmp_path / "reward.py").rename(tmp_path / "moved.py")
    config.prompts, config.reward = f"{tmp_path}/moved.txt", f"{tmp_path}/moved.py:red"
    check(workdir, config)


@pytest.mark.parametrize("key, file", [("prompts", "prompts.txt"), ("reward", "reward.py")])
def test_a_file_that_was_edited_is_refused(config, workdir, tmp_path, key, file):
    text = (tmp_path / file).read_text()
    (tmp_path / file).write_text(text + "a fox = 3\n")
    with pytest.raises(
        UserError, match=f"what config.{key}=.*{file}.* names has changed since it began"
    ):
        check(workdir, config)
    (tmp_path / file).write_text(text)
    check(workdir, config)


def test_a_run_of_an_earlier_release_is_compared_by_names(config, workdir, tmp_path):
    (tmp_path / "run" / "contents.json").unlink()
    (tmp_path / "prompts.txt").write_text("a cow\n")
    check(workdir, config)
    config.prompts = "animals"
    with pytest.raises(UserError, match="config.prompts was .*prompts.txt', is now 'animals'"):
        check(workdir, config)


def test_what_cannot_be_read_is_not_compared_and_said(config, workdir, tmp_path, capsys):
    (tmp_path / "run" / "config.json").write_text("")
    (tmp_path / "run" / "contents.json").write_text('{"prompts": ')
    config.train.seed = 1
    check(workdir, config)
    printed = capsys.readouterr().out
    assert printed.count("cannot be read and counts for nothing") == 2


def test_a_folder_without_a_checkpoint_takes_any_config(config, workdir, tmp_path):
    (tmp_path / "run" / "checkpoints" / "2").rmdir()
    config.train.seed = 1
    check(workdir, config)


def test_weights_are_compared_by_their_small_arrays(workdir, config):
    class Experiment:
        params = {"vae": {"bias": [1.0]}}
        reward = type("Reward", (), {"params": {}})

    def contents(bias, head):
        Experiment.params = {"vae": {"bias": np.full(3, bias)}, "big": np.zeros((300, 300))}
        Experiment.reward.params = {"head": np.full(2, head)}
        return same_run.contents_of_weights(Experiment)

    first = contents(1.0, 1.0)
    workdir.save_config(config, first)
    refuse_another_run(workdir, config, first)
    with pytest.raises(UserError, match="config.model='emoji' names has changed since it began"):
        refuse_another_run(workdir, config, contents(2.0, 1.0))
    with pytest.raises(UserError, match="the network of the reward has changed since it began"):
        refuse_another_run(workdir, config, contents(1.0, 2.0))


def test_a_scale_is_the_runs_where_its_rewards_are(config, workdir, tmp_path):
    name = config.reward
    assert not same_run.has_scale_of(workdir, config, name)  # a reward of one part has none
    config.reward = {name: 1.0}
    workdir.save_config(config, contents_of_files(config))
    assert same_run.has_scale_of(workdir, config, name)
    assert not same_run.has_scale_of(workdir, config, "jpeg_compress")
    config.prompts = "animals"
    assert same_run.has_scale_of(workdir, config, name)
    config.aesthetic.head = "other"
    assert not same_run.has_scale_of(workdir, config, name)
    config.aesthetic.head = ""
    (tmp_path / "reward.py").write_text("def red(images, prompts): return 2 * images[..., 0]\n")
    assert not same_run.has_scale_of(workdir, config, name)
    contents = json.loads((tmp_path / "run" / "contents.json").read_text())
    assert contents.keys() == {"prompts", "eval_prompts", "reward"}
