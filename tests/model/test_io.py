"""Models on disk: the round trip, and incomplete or damaged folders, refused with a remedy."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from antdist.config.schema import ModelConfig
from antdist.errors import UserError
from antdist.model.io import FeatureSource, ModelCard, load_model, save_model
from antdist.model.recommender import build_recommender
from tests.reference.small_world import DIMS, SmallWorld, randomise

CONFIG = ModelConfig(dim=8, experts=3, inner=12, max_length=9, item_embeddings=True)
CARD = ModelCard(
    kind="pretrained",
    config=CONFIG,
    dims=DIMS,
    catalogue_size=15,
    features={"text": FeatureSource(identity="abc", encoder={"name": "hashed", "pooling": "mean"})},
    domains=["food", "films"],
    seed=3,
    made={"epoch": 4, "fingerprints": {"food": "00ff"}},
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_model(tmp_path / "model", randomise(build_recommender(CONFIG, DIMS, 15)), CARD)
    return tmp_path / "model"


def test_comes_back_as_it_was(folder: Path) -> None:
    model, card = load_model(folder)
    assert card == CARD
    assert not model.training
    original = randomise(build_recommender(CONFIG, DIMS, 15)).eval()
    rows = SmallWorld().rows(torch.arange(15))
    assert torch.equal(model.embed_items(rows).item, original.embed_items(rows).item)
    assert sorted(path.name for path in folder.iterdir()) == ["model.json", "weights.safetensors"]


def test_low_precision_weights_are_stored_in_float32(tmp_path: Path) -> None:
    model = build_recommender(CONFIG, DIMS, 15).bfloat16()
    save_model(tmp_path, model, CARD)
    assert {value.dtype for value in load_file(tmp_path / "weights.safetensors").values()} == {torch.float32}


def test_loads_without_the_training_stack(folder: Path) -> None:
    script = (
        "import sys; from antdist.model.io import load_model; load_model(sys.argv[1]);"
        "print([m for m in ('deepspeed', 'ray', 'mlflow', 'transformers', 'polars') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", script, folder], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"not a model: it has no model\.json\. Give the folder"):
        load_model(tmp_path)


def test_missing_weights_are_an_error(folder: Path) -> None:
    (folder / "weights.safetensors").unlink()
    with pytest.raises(UserError, match=r"weights\.safetensors: the model's weights are missing.*again"):
        load_model(folder)


def test_damaged_weights_are_an_error(folder: Path) -> None:
    path = folder / "weights.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"weights\.safetensors: the model's weights cannot be read .*again"):
        load_model(folder)


def test_another_models_weights_are_refused(folder: Path) -> None:
    path = folder / "weights.safetensors"
    weights = load_file(path)
    weights["positions.weight"] = torch.zeros(4, 8)
    save_file(weights, path)
    message = r"do not fit model\.json: positions\.weight is \(4, 8\), should be \(9, 8\)\. .*same model"
    with pytest.raises(UserError, match=message):
        load_model(folder)
    del weights["positions.weight"]
    save_file(weights, path)
    with pytest.raises(UserError, match=r"positions\.weight is absent, should be \(9, 8\)"):
        load_model(folder)


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"schema_version": 1}, "schema_version"),
        ({"kind": "stolen"}, "kind"),
        ({"surprise": 1}, "surprise"),
        ({"config": {"dim": "wide"}}, r"config\.dim"),
    ],
)
def test_invalid_card_is_refused(folder: Path, change: dict[str, object], key: str) -> None:
    card = json.loads((folder / "model.json").read_text())
    (folder / "model.json").write_text(json.dumps({**card, **change}))
    with pytest.raises(UserError, match=rf"model\.json: not a model card that this version reads: {key}: "):
        load_model(folder)


def test_truncated_card_is_refused(folder: Path) -> None:
    path = folder / "model.json"
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(UserError, match="not a model card that this version reads: the file: "):
        load_model(folder)
