import sys
import types

import pytest
from PIL import Image

from alignprop_jax.errors import UserError
from alignprop_jax.records.dashboards import open_dashboards


def test_tensorboard_gets_scalars_and_pictures(tmp_path):
    (board,) = open_dashboards(tmp_path, {}, 1, tensorboard=True, wandb=False)
    board.scalars(1, {"training/loss": 0.5})
    board.image(1, "preview", Image.new("RGB", (4, 4)))
    board.close()
    (events,) = (tmp_path / "tensorboard").iterdir()
    content = events.read_bytes()
    assert b"training/loss" in content and b"preview" in content and b"PNG" in content


def test_everything_can_be_off(tmp_path):
    assert open_dashboards(tmp_path, {}, 1, tensorboard=False, wandb=False) == []
    assert list(tmp_path.iterdir()) == []


def test_wandb_that_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="config.logging.wandb=True needs wandb: pip install wandb"):
        open_dashboards(tmp_path, {}, 1, tensorboard=False, wandb=True)


def test_a_resumed_run_continues_the_same_wandb_run(tmp_path, monkeypatch):
    started, logged = [], []
    run = types.SimpleNamespace(
        log=lambda values, step: logged.append((step, values)), finish=lambda: None
    )

    def init(**arguments):
        started.append(arguments)
        return run

    wandb = types.SimpleNamespace(init=init, Image=lambda image: image.size)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    for first_step in (1, 5):
        (board,) = open_dashboards(
            tmp_path, {"model": "emoji"}, first_step, tensorboard=False, wandb=True
        )
        board.scalars(first_step, {"loss": 0.5})
        board.image(first_step, "preview", Image.new("RGB", (4, 6)))
        board.close()
    assert started[0] == started[1]
    assert started[0]["resume"] == "allow" and started[0]["config"] == {"model": "emoji"}
    assert logged[:2] == [(1, {"loss": 0.5}), (1, {"preview": (4, 6)})]
