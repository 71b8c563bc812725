"""Models on the hub: what is asked of huggingface_hub, and what its refusals are called."""

import json
import shutil
import sys
import types

import huggingface_hub
import pytest
from huggingface_hub import errors
from huggingface_hub.utils import filter_repo_objects

from alignprop_jax.errors import UserError
from alignprop_jax.generators.stable_diffusion.load import open_model
from alignprop_jax.loading.hub import HubName, download_file
from alignprop_jax.loading.pretrained import resolve_model, resolve_tokenizer

CONFIGS = (
    "model_index.json",
    "unet/config.json",
    "vae/config.json",
    "text_encoder/config.json",
    "scheduler/scheduler_config.json",
    "tokenizer/merges.txt",
    "tokenizer/vocab.json",
)
NOT_NEEDED = (
    "config.json",
    "safety_checker/config.json",
    "safety_checker/model.safetensors",
    "unet/diffusion_pytorch_model.non_ema.safetensors",
    "unet/flax_model.msgpack",
    "v1-5-pruned.safetensors",
)
PLAIN = (
    "unet/diffusion_pytorch_model-00001-of-00002.safetensors",
    "unet/diffusion_pytorch_model-00002-of-00002.safetensors",
    "unet/diffusion_pytorch_model.safetensors.index.json",
    "vae/diffusion_pytorch_model.safetensors",
    "text_encoder/model.safetensors",
)
FP16 = (
    "unet/diffusion_pytorch_model.fp16-00001-of-00002.safetensors",
    "unet/diffusion_pytorch_model.fp16-00002-of-00002.safetensors",
    "unet/diffusion_pytorch_model.safetensors.index.fp16.json",
    "vae/diffusion_pytorch_model.fp16.safetensors",
    "text_encoder/model.fp16.safetensors",
)
PICKLES = (
    "unet/diffusion_pytorch_model.bin",
    "vae/diffusion_pytorch_model.bin",
    "text_encoder/pytorch_model.bin",
)


@pytest.fixture
def fake_hub(tmp_path, monkeypatch):
    """Serves `publish(files)` by the patterns of huggingface_hub; `asked` are the revisions."""
    remote, cache = tmp_path / "remote", tmp_path / "cache"
    cache.mkdir()
    asked = []

    def publish(*files):
        shutil.rmtree(remote, ignore_errors=True)
        for file in files:
            (remote / file).parent.mkdir(parents=True, exist_ok=True)
            (remote / file).write_text("{}")

    def snapshot_download(name, revision, allow_patterns):
        asked.append((name, revision))
        files = [str(path.relative_to(remote)) for path in remote.rglob("*.*")]
        for file in filter_repo_objects(files, allow_patterns=allow_patterns):
            (cache / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(remote / file, cache / file)
        return str(cache)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return types.SimpleNamespace(publish=publish, asked=asked, cache=cache)


def files_in(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*.*")}


@pytest.mark.parametrize(
    ("name", "published", "wanted"),
    [
        ("owner/name", (PLAIN, FP16, PICKLES), PLAIN),
        ("owner/name:fp16", (PLAIN, FP16, PICKLES), FP16),
        ("owner/name", (FP16, PICKLES), FP16),
        ("owner/name", (PICKLES,), PICKLES),
        # Of the variant what there is of it, the rest without.
        ("owner/name:fp16", (PLAIN[-2:], FP16[:3], PICKLES), (*FP16[:3], *PLAIN[-2:])),
        ("owner/name:fp16", (FP16[-1:], PICKLES), (FP16[-1], *PICKLES[:2])),
        ("owner/name", (PLAIN[-1:], PICKLES), (PLAIN[-1], *PICKLES[:2])),
        # No part has it: nothing is downloaded that was not asked for.
        ("owner/name:other", (PLAIN, FP16), ()),
    ],
)
def test_one_kind_of_weights_is_downloaded(fake_hub, name, published, wanted):
    fake_hub.publish(*CONFIGS, *NOT_NEEDED, *(file for kind in published for file in kind))
    assert resolve_model(name) == fake_hub.cache
    assert files_in(fake_hub.cache) == {*CONFIGS, "config.json", *wanted}


def test_pickles_are_not_downloaded_where_they_cannot_be_read(fake_hub, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    fake_hub.publish(*CONFIGS, *PICKLES)
    resolve_model("owner/name")
    assert files_in(fake_hub.cache) == set(CONFIGS)


def test_a_model_of_its_own_and_a_tokenizer_are_downloaded(fake_hub):
    clip = ("config.json", "preprocessor_config.json", "vocab.json", "merges.txt")
    fake_hub.publish(*clip, "model.safetensors", "pytorch_model.bin", "flax_model.msgpack")
    assert resolve_tokenizer("owner/clip") == fake_hub.cache
    assert files_in(fake_hub.cache) == {"vocab.json", "merges.txt"}
    resolve_model("owner/clip@v1.0")
    assert files_in(fake_hub.cache) == {*clip, "model.safetensors"}
    assert fake_hub.asked == [("owner/clip", None), ("owner/clip", "v1.0")]


def test_a_single_file_is_downloaded_of_a_revision(tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(b"{}").to_bytes(8, "little") + b"{}")
    asked = []

    def hf_hub_download(name, file, revision):
        asked.append((name, file, revision))
        return str(path)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hf_hub_download)
    assert download_file("owner/name/folder/head.pt") == path
    with pytest.raises(UserError, match="model.safetensors: has no tensors"):
        open_model("owner/name@abc/model.safetensors")
    assert asked == [
        ("owner/name", "folder/head.pt", None),
        ("owner/name", "model.safetensors", "abc"),
    ]
    for wrong in ("head.pt", "./owner/name/head.pt", "owner/name"):
        with pytest.raises(UserError, match=f"{wrong}: no such file; give one, or OWNER/NAME/FI"):
            download_file(wrong)


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("owner/name", ("owner/name", None, None, None)),
        ("o-1/sd.v1_5@v1.0:fp16", ("o-1/sd.v1_5", "v1.0", "fp16", None)),
        ("owner/name:non_ema", ("owner/name", None, "non_ema", None)),
        ("owner/name@f0/a/b.ckpt", ("owner/name", "f0", None, "a/b.ckpt")),
    ],
)
def test_names_are_read_and_written(name, parts):
    parsed = HubName.parse(name)
    assert (parsed.repo, parsed.revision, parsed.variant, parsed.file) == parts
    assert str(parsed) == name


@pytest.mark.parametrize(
    "name",
    ["name", "/owner/name", "../name", "owner/name@", "owner/na me", "a/b@v1\x0c", "a/b/\x1b.pt"],
)
def test_other_names_are_none(name):
    assert HubName.parse(name) is None


def http_error(kind, status):
    return kind(
        "said by\nthe hub",
        response=types.SimpleNamespace(headers={}, request=None, status_code=status),
    )


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            http_error(errors.GatedRepoError, 403),
            "gives access on request; ask for it at https://huggingface.co/owner/name, .* HF_TOKEN",
        ),
        (
            http_error(errors.RepositoryNotFoundError, 401),
            r"no such model, or it is private and HF_TOKEN is not set .* \(HTTP 401\)",
        ),
        (http_error(errors.HfHubHTTPError, 403), r"HF_TOKEN is not set .* \(HTTP 403\)"),
        (http_error(errors.RevisionNotFoundError, 404), "it has no revision v9"),
        (
            errors.OfflineModeIsEnabled("offline"),
            "HF_HUB_OFFLINE is set, .*unset it, or run `hf download owner/name --revision v9`",
        ),
        (http_error(errors.HfHubHTTPError, 500), "said by"),
    ],
)
def test_refusals_of_the_hub_are_explained(error, message, tmp_path, monkeypatch):
    """As they come out of huggingface_hub's own function, whose question to the hub fails."""

    def repo_info(self, **kwargs):
        raise error

    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", repo_info)
    monkeypatch.setenv("HF_TOKEN", "")
    with pytest.raises(UserError, match=f"owner/name@v9: not found here, .* hub: .*{message}"):
        resolve_model("owner/name@v9")


def test_a_file_that_a_model_lacks_is_named(monkeypatch):
    def hf_hub_download(name, file, revision):
        raise http_error(errors.RemoteEntryNotFoundError, 404)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hf_hub_download)
    with pytest.raises(UserError, match="owner/name/x.pt: .* owner/name has no file x.pt"):
        download_file("owner/name/x.pt")


def test_the_cache_serves_without_a_network(tmp_path, monkeypatch):
    """huggingface_hub's own cache; HF_HUB_OFFLINE is set in every test."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    repo = tmp_path / "models--owner--name"
    snapshot = repo / "snapshots" / ("0" * 40)
    for file in (*CONFIGS, *FP16):
        (snapshot / file).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / file).write_text(json.dumps({}))
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("0" * 40)
    assert resolve_model("owner/name") == snapshot
    assert resolve_model(f"owner/name@{'0' * 40}:fp16") == snapshot
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set, and the cache has not all of it"):
        resolve_model("owner/other")
