"""Models on the Hugging Face hub: their names, what is downloaded of them, and what can go wrong.

Downloads go through huggingface_hub, whose cache and settings (HF_HOME, HF_TOKEN, HF_HUB_OFFLINE)
hold here too.
"""

import contextlib
import dataclasses
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from alignprop_jax.errors import UserError
from alignprop_jax.loading import shapes_only
from alignprop_jax.loading.torch_file import has_pytorch
from alignprop_jax.loading.weights_files import PICKLES, SAFETENSORS, find_weights, weights_patterns

_TOKENIZER_PATTERNS = ("merges.txt", "tokenizer*.json", "tokenizer*/*", "vocab.json")
# Where a pipeline, or a model of its own, keeps configs and weights.
_FOLDERS = ("unet/", "vae/", "text_encoder/", "text_encoder_2/", "")
_CONFIG_PATTERNS = (
    *(f"{folder}config.json" for folder in _FOLDERS),
    "model_index.json",
    "preprocessor_config.json",
    "scheduler/scheduler_config.json",
    *_TOKENIZER_PATTERNS,
)
_NAME = re.compile(
    r"(?P<repo>[A-Za-z0-9_][\w.-]*/[A-Za-z0-9_][\w.-]*)(@(?P<revision>[^/:@]+))?"
    r"(:(?P<variant>\w+)|/(?P<file>.+))?"
)


@dataclasses.dataclass(frozen=True)
class HubName:
    """OWNER/NAME[@REVISION], then :VARIANT of its weights or the path /FILE in it."""

    repo: str
    revision: str | None = None
    variant: str | None = None
    file: str | None = None

    @classmethod
    def parse(cls, name: str) -> "HubName | None":
        """The parts of `name`, or None where it is no such name."""
        match = _NAME.fullmatch(name) if name.isprintable() else None
        return cls(**match.groupdict()) if match else None

    def __str__(self) -> str:
        return (
            self.repo
            + (f"@{self.revision}" if self.revision else "")
            + (f":{self.variant}" if self.variant else "")
            + (f"/{self.file}" if self.file else "")
        )


def download_model(name: HubName) -> Path:
    """Downloads (once) the configs, the tokenizers and the weights of a model.

    Of several kinds of weights the first that a part has is taken: safetensors before pickles,
    those of no variant before those of the variant fp16. Where the name has a variant, its weights
    come first, and a part without them has others if another part has them. Where shapes stand for
    weights, none is downloaded.

    Returns:
        The folder. It lacks weights where the model has none that can be read here.

    Raises:
        UserError: the model cannot be had; the message says why and what to do.
    """
    if shapes_only.active():
        return shapes_only.published_folder(name.repo) or _download_files(name, _CONFIG_PATTERNS)
    kinds = (SAFETENSORS, PICKLES) if has_pytorch() else (SAFETENSORS,)
    order = [(kind, variant) for kind in kinds for variant in (None, "fp16")]
    if name.variant:
        order = [(kind, name.variant) for kind in kinds] + order
    folder, parts, missing = Path(), _FOLDERS, _FOLDERS
    for kind, variant in order:
        if name.variant not in (None, variant) and len(missing) == len(parts):
            break  # no part has the variant that was asked for
        weights = weights_patterns(missing, kind, variant)
        folder = _download_files(name, [*_CONFIG_PATTERNS, *weights])
        parts = [part for part in _FOLDERS if (folder / part / "config.json").is_file()]
        # Beside a pipeline's folders a config.json belongs to no weights.
        parts = parts[:-1] if len(parts) > 1 and not parts[-1] else parts
        missing = [
            part for part in parts if part in missing and not find_weights(folder / part, variant)
        ]
        if not missing:
            break
    return folder


def download_tokenizer(name: HubName) -> Path:
    """Downloads (once) the tokenizers of a model; UserErrors as for `download_model`."""
    if shapes_only.active() and (folder := shapes_only.published_folder(name.repo)):
        return folder
    return _download_files(name, _TOKENIZER_PATTERNS)


def download_file(path: str) -> Path:
    """Downloads (once) OWNER/NAME[@REVISION]/FILE.

    Raises:
        UserError: it is no such path, or cannot be had; the message says why and what to do.
    """
    import huggingface_hub

    name = HubName.parse(path)
    if name is None or name.file is None:
        raise UserError(f"{path}: no such file; give one, or OWNER/NAME/FILE on the hub")
    with _explaining(name):
        return Path(huggingface_hub.hf_hub_download(name.repo, name.file, revision=name.revision))


def _download_files(name: HubName, patterns: Sequence[str]) -> Path:
    # The import costs a third of a second, which a local model need not pay.
    import huggingface_hub

    with _explaining(name):
        return Path(
            huggingface_hub.snapshot_download(
                name.repo, revision=name.revision, allow_patterns=list(patterns)
            )
        )


@contextlib.contextmanager
def _explaining(name: HubName) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:
        raise UserError(
            f"{name}: not found here, and cannot be downloaded from the hub: "
            f"{_explanation(name, error)}"
        ) from error


def _explanation(name: HubName, error: Exception) -> str:
    from huggingface_hub import errors

    # What could not be downloaded and is not in the cache has the reason as its cause.
    cause = error.__cause__ or error
    status = getattr(getattr(cause, "response", None), "status_code", None)
    if isinstance(cause, errors.GatedRepoError):
        return (
            f"its owner gives access on request; ask for it at https://huggingface.co/{name.repo}, "
            "then set HF_TOKEN to a token of yours"
        )
    if isinstance(cause, errors.RevisionNotFoundError):
        return f"it has no revision {name.revision}"
    if isinstance(cause, errors.RemoteEntryNotFoundError):
        return f"{name.repo} has no file {name.file}"
    if isinstance(cause, errors.RepositoryNotFoundError) or status in (401, 403):
        return (
            "there is no such model, or it is private and HF_TOKEN is not set to a token "
            f"that may read it (HTTP {status})"
        )
    if isinstance(cause, errors.OfflineModeIsEnabled):
        what = f"{name.repo} {name.file}" if name.file else name.repo
        revision = f" --revision {name.revision}" if name.revision else ""
        return (
            "HF_HUB_OFFLINE is set, and the cache has not all of it; unset it, or run "
            f"`hf download {what}{revision}` where there is a network"
        )
    return str(error).splitlines()[0] if str(error) else type(error).__name__
