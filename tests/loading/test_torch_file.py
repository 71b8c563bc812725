"""State dicts written by torch.save."""

import pickle
import sys
import types
import zipfile

import numpy as np
import pytest

from alignprop_jax.errors import UserError
from alignprop_jax.loading.tensor_files import read_tensors
from tests.torch_pipeline import torch


def assert_holds(path, tensors):
    actual = dict(read_tensors(path))
    assert list(actual) == list(tensors)
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(actual[name], tensor.detach().float().numpy())


def test_a_module_and_a_training_script_are_read(tmp_path):
    module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2)).bfloat16()
    torch.save(module.state_dict(), tmp_path / "module.pth")
    assert_holds(tmp_path / "module.pth", module.state_dict())
    parameters = dict(module.named_parameters())
    torch.save({"epoch": 3, "state_dict": parameters}, tmp_path / "script.pt")
    assert_holds(tmp_path / "script.pt", parameters)


def test_what_pytorch_wrote_before_its_zip_files_is_read(tmp_path):
    tensors = {"weight": torch.arange(6.0).reshape(2, 3)}
    torch.save(tensors, tmp_path / "model.bin", _use_new_zipfile_serialization=False)
    assert_holds(tmp_path / "model.bin", tensors)


def test_the_trainer_of_stable_diffusion_left_a_class_that_is_not_needed(tmp_path, monkeypatch):
    name = "pytorch_lightning.callbacks.model_checkpoint"
    trainer = types.ModuleType(name)
    trainer.ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": name})
    tensors = {"weight": torch.ones(2)}
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "pytorch_lightning", types.ModuleType("pytorch_lightning"))
        patch.setitem(sys.modules, "pytorch_lightning.callbacks", types.ModuleType("callbacks"))
        patch.setitem(sys.modules, name, trainer)
        state = {"callbacks": {trainer.ModelCheckpoint: {"best": 1}}, "state_dict": tensors}
        torch.save(state, tmp_path / "model.ckpt")
    assert_holds(tmp_path / "model.ckpt", tensors)


def test_a_file_that_calls_something_is_refused(tmp_path):
    class Payload:
        def __reduce__(self):
            return (open, (str(tmp_path / "opened"), "w"))

    torch.save({"state_dict": Payload()}, tmp_path / "model.pt")
    with pytest.raises(UserError, match="model.pt: cannot be read as a checkpoint of PyTorch"):
        list(read_tensors(tmp_path / "model.pt"))
    assert not (tmp_path / "opened").exists()


@pytest.mark.parametrize("content", [{"state_dict": {"epoch": 3}}, [1, 2]])
def test_a_file_without_weights_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "model.pt")
    with pytest.raises(UserError, match="holds no state dict"):
        list(read_tensors(tmp_path / "model.pt"))


def test_a_file_that_is_absent_or_cut_is_named(tmp_path):
    with pytest.raises(UserError, match="model.pt: no such file"):
        list(read_tensors(tmp_path / "model.pt"))
    torch.save({"weight": torch.arange(1000.0)}, tmp_path / "model.pt")
    content = (tmp_path / "model.pt").read_bytes()
    (tmp_path / "model.pt").write_bytes(content[:2000])
    with pytest.raises(UserError, match="model.pt: cannot be read as a checkpoint of PyTorch"):
        list(read_tensors(tmp_path / "model.pt"))


def test_without_pytorch_the_cure_is_named(tmp_path, monkeypatch):
    torch.save({"weight": torch.ones(1)}, tmp_path / "model.pt")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(UserError, match=r"takes PyTorch to read: pip install 'alignprop_jax\[pic"):
        list(read_tensors(tmp_path / "model.pt"))


def expanded():
    return torch.ones(1).expand(2**40)


@pytest.mark.parametrize(
    "content, message",
    [
        ({0: torch.ones(2)}, "holds no state dict"),
        ({"a": expanded()}, "tensor a is no plain array"),
        ({"a": torch.ones(2).to_sparse()}, "tensor a is no plain array"),
        ({"a": torch.ones(2, device="meta")}, "tensor a is no plain array"),
        ({"a": torch.ones(2) + 1j}, "tensor a is no plain array"),
    ],
)
def test_tensors_that_are_no_arrays_in_the_file_are_refused(tmp_path, content, message):
    torch.save(content, tmp_path / "model.pt")
    with pytest.raises(UserError, match=f"model.pt: {message}"):
        list(read_tensors(tmp_path / "model.pt"))


def test_a_compressed_file_is_refused_before_it_is_unpacked(tmp_path):
    torch.save({"weight": torch.ones(2)}, tmp_path / "model.pt")
    with (
        zipfile.ZipFile(tmp_path / "model.pt") as whole,
        zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as bomb,
    ):
        for entry in whole.infolist():
            bomb.writestr(entry.filename, whole.read(entry) + bytes(10**7))
    with pytest.raises(
        UserError, match="bomb.pt: .* compressed, which PyTorch's own files are not"
    ):
        list(read_tensors(tmp_path / "bomb.pt"))


@pytest.mark.parametrize("zipped", [True, False])
def test_a_file_that_takes_memory_for_nothing_is_refused(tmp_path, zipped):
    bomb = b"\x80\x02cbuiltins\nbytearray\nJ\xff\xff\xff\x7f\x85R."
    path = tmp_path / "model.pt"
    path.write_bytes(bomb)
    if zipped:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", bomb)
    with pytest.raises(UserError, match="model.pt: .* creates arrays of bytes"):
        list(read_tensors(path))


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04", pickle.dumps({"a": [1]})])
def test_another_file_is_named(tmp_path, content):
    (tmp_path / "model.ckpt").write_bytes(content)
    with pytest.raises(UserError, match="model.ckpt: cannot be read as a checkpoint of PyTorch"):
        list(read_tensors(tmp_path / "model.ckpt"))
