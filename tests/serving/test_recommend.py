"""Top N for a history: order, exclusion, zero-shot items, unknown ids, names."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from antdist.batch import ItemInputs
from antdist.config.schema import ModelConfig
from antdist.data.domain import Domain, Sequences, open_domain
from antdist.data.shards import ItemRecord
from antdist.data.writing import write_domain
from antdist.errors import UserError
from antdist.evaluation.ranking import embed_catalogue
from antdist.model.recommender import Recommender, build_recommender
from antdist.serving.apply import find_model, load_history, load_names, parse_history
from antdist.serving.top_n import recommend

CONFIG = ModelConfig(modalities=["text"], dim=16, inner=16, experts=2, max_length=4)


@pytest.fixture(scope="module")
def model() -> Recommender:
    return build_recommender(CONFIG, {"text": 16}, seed=2)


@pytest.fixture
def domain(tmp_path: Path) -> Domain:
    items = [ItemRecord(i, f"B00{i:03d}", None if i == 3 else f"title {i}", None, []) for i in range(10)]
    sequences = Sequences(np.array([0, 3, 7]), np.array([0, 1, 2, 5, 4, 5, 3]), np.arange(7))
    write_domain(tmp_path / "toys", "toys", items, sequences, ["ann", "bob"], {}, items_per_shard=4)
    return open_domain(tmp_path / "toys")


def preference(model: Recommender, embeddings: torch.Tensor, history: list[int]) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model.encode_users(embeddings, torch.tensor(history), torch.tensor([0, len(history)]), len(history))[-1]


def test_best_first_by_cosine_without_the_history(model: Recommender) -> None:
    embeddings = torch.randn(30, 16, generator=torch.Generator().manual_seed(0))
    history = [9, 8, 7, 3, 4, 5]  # longer than max_length: the model reads the last four, all are excluded
    scores = torch.cosine_similarity(embeddings, preference(model, embeddings, history[-4:])[None], dim=1)
    order = [i for i in scores.argsort(descending=True).tolist() if i not in history]
    got = recommend(model, embeddings, history, 5)
    assert [index for index, _ in got] == order[:5]
    assert [score for _, score in got] == pytest.approx(scores[order[:5]].tolist(), abs=1e-6)
    assert len(recommend(model, embeddings, history, 100)) == 24
    assert len(recommend(model, embeddings, history, 100, exclude_history=False)) == 30


def test_zero_shot_item_can_rank_first(model: Recommender) -> None:
    """Zero-shot: item 20 is appended to a catalogue of 20 with the features that this user wants."""

    class Features:
        def __init__(self, values: torch.Tensor) -> None:
            self.values, self.size = values, len(values)

        def features(self, ids: np.ndarray) -> ItemInputs:
            present = {"text": torch.ones(len(ids), dtype=torch.bool)}
            return ItemInputs({"text": self.values[ids]}, present, torch.from_numpy(ids))

    known = torch.randn(20, 16, generator=torch.Generator().manual_seed(1))
    wanted = preference(model, embed_catalogue(model, Features(known)), [3, 5])
    with torch.no_grad():  # untrained experts, evenly routed, are one matrix: solve for the feature that gives `wanted`
        feature = torch.linalg.solve(model.tower.get_submodule("text").weight.mean(1).T, wanted)
    embeddings = embed_catalogue(model, Features(torch.cat([known, feature[None]])))
    (first, score), *_ = recommend(model, embeddings, [3, 5], 3)
    assert first == 20 and score == pytest.approx(1.0, abs=1e-4)


def test_empty_history_and_nan_model_are_refused(model: Recommender) -> None:
    with pytest.raises(UserError, match="history is empty"):
        recommend(model, torch.randn(5, 16), [], 3)
    with pytest.raises(UserError, match="NaN or Inf"):
        recommend(model, torch.full((5, 16), torch.nan), [1], 3)


def test_histories_by_id(domain: Domain) -> None:
    assert load_history(domain, "bob") == [5, 4, 5, 3]
    assert parse_history(domain, ["B00007", "B00001"]) == [7, 1]


def test_unknown_ids_suggest_the_nearest(domain: Domain) -> None:
    with pytest.raises(UserError, match=r"--user: toys has no user 'bop'\. Did you mean bob\?"):
        load_history(domain, "bop")
    with pytest.raises(UserError, match=r"--history: toys has no item 'B0007'\. Did you mean .*B00007"):
        parse_history(domain, ["B00001", "B0007"])
    with pytest.raises(UserError, match=r"has no item 'zzzz'\. Ids look like B00000, B00001, B00002\."):
        parse_history(domain, ["zzzz"])


def test_names_are_read_only_from_shards_that_hold_them(domain: Domain) -> None:
    others = domain.manifest.item_shards[1:]
    assert len(others) == 2
    (domain.folder / others[0].name).unlink()  # items 4 to 7: not requested, so not needed
    named = load_names(domain, [9, 0, 3])
    assert [n.item_id for n in named] == ["B00009", "B00000", "B00003"]
    assert [n.text for n in named] == ["title 9", "title 0", None]
    with pytest.raises(UserError, match=others[0].name):
        load_names(domain, [5])


def test_resolving_a_model_creates_no_registry(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"typo/mlflow\.db: no registry here. Name the folder of the runs"):
        find_model("models:/m/1", tmp_path / "typo")
    with pytest.raises(UserError, match="modls:/m/1: neither an existing folder nor a reference to a model"):
        find_model("modls:/m/1", tmp_path / "typo")
    assert not list(tmp_path.iterdir())
