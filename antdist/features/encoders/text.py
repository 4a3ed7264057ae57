"""Text encoders: transformers models, and hashed n-grams (docs/spec/ant.md, section 2)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
from numpy.typing import NDArray

from antdist.errors import UserError
from antdist.features.encoders.base import (
    Encoded,
    LoadedEncoder,
    find_minilm,
    find_pretrained,
    load_frozen,
    model_folder_digest,
)
from antdist.features.source import has_text
from antdist.io.files import file_sha256, write_atomically

if TYPE_CHECKING:
    from antdist.data.shards import ItemRecord

Pooling = Literal["cls", "mean"]
VOCABULARIES = ("tokenizer.json", "vocab.txt", "vocab.json", "*.model")

# ------------------------------------------------------------------------------------------------- transformers


@dataclass(frozen=True)
class TransformersText:
    """A transformers encoder, made by `find_text_encoder`."""

    name: str
    folder: Path
    digest: str
    pooling: Pooling
    max_length: int
    batch_size: int
    device: str

    def description(self) -> dict[str, str | int | float | None]:
        return {
            "name": self.name,
            "kind": "transformers",
            "digest": self.digest,
            "pooling": self.pooling,
            "max_length": self.max_length,
        }

    def load(self) -> LoadedEncoder:
        return _LoadedText(self)


def find_text_encoder(
    name: str, *, pooling: Pooling | None = None, max_length: int = 256, batch_size: int = 64, device: str = "auto"
) -> TransformersText:
    """Find a text encoder by folder or model hub's name, with its tokenizer.

    Args:
        name: `minilm` (the extra of that name), a folder, or a model hub's name.
        pooling: of the last hidden state: `cls`, the first token (the paper's), or `mean`, over all tokens but padding.
            None: `mean` for minilm, which was trained with it, otherwise `cls`.
        max_length: in tokens; longer texts are truncated.
        batch_size: texts a forward pass.
        device: `auto`, `cpu`, `cuda` or `cuda:0` ...

    Raises:
        UserError: the encoder does not exist or has no tokenizer, or the extra is not installed.
    """
    folder = find_minilm() if name == "minilm" else find_pretrained(name, "--text")
    if not any(path for pattern in VOCABULARIES for path in folder.glob(pattern)):
        # transformers would build a tokenizer with an empty vocabulary
        raise UserError(
            f"the model has no tokenizer ({', '.join(VOCABULARIES[:-1])} or a sentence-piece model)",
            where=f"--text {name}",
            remedy="save its tokenizer into the same folder",
        )
    chosen: Pooling = pooling or ("mean" if name == "minilm" else "cls")
    return TransformersText(name, folder, model_folder_digest(folder), chosen, max_length, batch_size, device)


class _LoadedText:
    def __init__(self, encoder: TransformersText) -> None:
        from transformers import AutoTokenizer

        self.encoder = encoder
        self.model, self.device, _ = load_frozen(encoder.folder, "--text", encoder.device)
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(
                str(encoder.folder), local_files_only=True, trust_remote_code=False
            )
        except (OSError, ValueError, KeyError) as error:
            reason = str(error).strip().splitlines()[0]
            what, where = f"its tokenizer cannot be loaded ({reason})", f"--text {encoder.folder}"
            raise UserError(what, where=where, remedy="save the tokenizer again with save_pretrained(FOLDER)") from None
        try:  # the longest possible text
            self.dim = int(self.encode(["a " * encoder.max_length]).shape[1])
        except (IndexError, RuntimeError) as error:
            raise UserError(
                f"the model cannot read {encoder.max_length} tokens ({str(error).partition(chr(10))[0]})",
                where=f"--text {encoder.folder}",
                remedy="lower --max-length",
            ) from None

    def __call__(self, items: Sequence[ItemRecord]) -> Encoded:
        present = np.array([has_text(item.text) for item in items], dtype=bool)
        values = np.zeros((len(items), self.dim), dtype=np.float32)
        if present.any():
            values[present] = self.encode([item.text for item in items if has_text(item.text)])  # type: ignore[misc]
        return Encoded(values, present)

    def encode(self, texts: list[str]) -> NDArray[np.float32]:
        """Encode texts as (n, dim); texts of similar length share a batch, to minimise padding."""
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        batches = [order[at : at + self.encoder.batch_size] for at in range(0, len(order), self.encoder.batch_size)]
        rows = np.concatenate([self._batch([texts[i] for i in batch]) for batch in batches])
        values = np.empty_like(rows)
        values[order] = rows
        return values

    def _batch(self, texts: list[str]) -> NDArray[np.float32]:
        import torch

        inputs = self.tokenizer(
            texts, padding=True, truncation=True, max_length=self.encoder.max_length, return_tensors="pt"
        ).to(self.device)
        with torch.inference_mode():
            hidden = self.model(**inputs).last_hidden_state.float()
            if self.encoder.pooling == "cls":
                pooled = hidden[:, 0]
            else:
                mask = inputs["attention_mask"].unsqueeze(-1).float()
                pooled = (hidden * mask).sum(1) / mask.sum(1)
        return cast("NDArray[np.float32]", pooled.cpu().numpy())


# ------------------------------------------------------------------------------------------------ hashed n-grams

BUCKETS = 1 << 15  # of words, and as many of characters
FIT_TEXTS = 200_000  # the projection is fitted on at most so many texts, evenly spread
SEED = 0


@dataclass(frozen=True)
class HashedText:
    """Hashed word and character n-grams, projected by a truncated SVD that was fitted once.

    Features are comparable only under the same projection, so the digest of its file is the encoder's identity: fit it on
    all domains together, or give the file of an earlier fit.
    """

    projection: Path
    digest: str

    def description(self) -> dict[str, str | int | float | None]:
        return {"name": "hashed", "kind": "hashed n-grams", "digest": self.digest}

    def load(self) -> LoadedEncoder:
        return _LoadedHashes(self)


def fit_projection(texts: Sequence[str], dim: int, path: Path, fitted_on: Sequence[str]) -> HashedText:
    """Fit the projection on texts of all domains that will use it, and write it beside its digest.

    The file (safetensors) holds `components` (dim, buckets), `mean` (dim,) and `scale` (1,): features are
    `(counts @ components.T - mean) / scale`, with mean 0 and, over all dimensions together, variance 1 on these texts.
    With fewer texts than dimensions the last dimensions are zero.

    Args:
        fitted_on: names of the domains, stored in the file.
    """
    from safetensors.numpy import save
    from sklearn.decomposition import TruncatedSVD

    texts = [text for text in texts if has_text(text)]
    if not texts:
        raise UserError("no item has text", where="--text hashed", remedy="leave out --text")
    counts = _count_ngrams(texts)
    rank = min(dim, len(texts))
    svd = TruncatedSVD(rank, random_state=SEED).fit(counts)
    components = np.zeros((dim, counts.shape[1]), dtype=np.float32)
    components[:rank] = np.nan_to_num(svd.components_)
    projected = counts @ components.T
    mean = projected.mean(0)
    scale = max(float(np.sqrt(np.square(projected - mean).mean())), 1e-12)
    arrays = {"components": components, "mean": mean.astype(np.float32), "scale": np.array([scale], dtype=np.float32)}
    path.parent.mkdir(parents=True, exist_ok=True)
    with write_atomically(path, sync="none") as partial:
        # A single metadata key: safetensors does not fix the order of several, and the digest must be reproducible.
        partial.write_bytes(save(arrays, metadata={"fitted_on": json.dumps(list(fitted_on))}))
        digest = file_sha256(partial)
    _digest_file(path).write_text(f"{digest}  {path.name}\n", encoding="utf-8")
    return HashedText(path.resolve(), digest)


def open_projection(path: Path) -> HashedText:
    """Open a projection that was fitted before.

    Raises:
        UserError: the file is missing, is not a projection, or does not match the digest beside it.
    """
    if not path.is_file():
        raise UserError("no such file", where=path, remedy="leave out --projection to fit one")
    digest, recorded = file_sha256(path), _digest_file(path)
    if recorded.is_file() and recorded.read_text(encoding="utf-8").split()[:1] != [digest]:
        raise UserError(
            f"the projection is damaged: its digest differs from the one in {recorded.name}",
            where=path,
            remedy="delete both files and run `antdist featurize` on all domains again",
        )
    _read_projection(path)
    return HashedText(path.resolve(), digest)


def _digest_file(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")


def _read_projection(path: Path) -> dict[str, NDArray[np.float32]]:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        arrays = load_file(str(path))
        if {name: array.ndim for name, array in arrays.items()} == {"components": 2, "mean": 1, "scale": 1}:
            return cast("dict[str, NDArray[np.float32]]", arrays)
    except SafetensorError:
        pass
    raise UserError("is not a projection of hashed n-grams", where=path, remedy="leave out --projection to fit one")


class _LoadedHashes:
    def __init__(self, encoder: HashedText) -> None:
        arrays = _read_projection(encoder.projection)
        self.components, self.mean, self.scale = arrays["components"], arrays["mean"], float(arrays["scale"][0])
        self.dim = len(self.components)

    def __call__(self, items: Sequence[ItemRecord]) -> Encoded:
        present = np.array([has_text(item.text) for item in items], dtype=bool)
        values = np.zeros((len(items), self.dim), dtype=np.float32)
        if present.any():
            counts = _count_ngrams([item.text for item in items if has_text(item.text)])  # type: ignore[misc]
            values[present] = (counts @ self.components.T - self.mean) / self.scale
        return Encoded(values, present)


def _count_ngrams(texts: Sequence[str]) -> Any:
    """Hash signed counts of words and word pairs, and of 3 to 5 characters within words; fixed seed.

    Returns:
        A sparse matrix (n, 2 * BUCKETS), each half of unit length.
    """
    from scipy.sparse import hstack
    from sklearn.feature_extraction.text import HashingVectorizer

    words = HashingVectorizer(n_features=BUCKETS, ngram_range=(1, 2), dtype=np.float32)
    characters = HashingVectorizer(n_features=BUCKETS, analyzer="char_wb", ngram_range=(3, 5), dtype=np.float32)
    return hstack([words.transform(texts), characters.transform(texts)], format="csr")
