"""Ranks against an oracle that sorts the masked scores; queries against a loop over users."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from antdist import ragged
from antdist.batch import ItemInputs
from antdist.config.schema import ModelConfig
from antdist.data.domain import Domain, Sequences, open_domain
from antdist.data.shards import ItemRecord
from antdist.data.writing import write_domain
from antdist.errors import UserError
from antdist.evaluation import ranking
from antdist.evaluation.ranking import (
    Queries,
    embed_catalogue,
    merge,
    rank_in_ranges,
    rank_targets,
    validation_queries,
)
from antdist.features.catalogue import Catalogue
from antdist.features.table import FeatureMeta, features_folder, write_meta, write_part
from antdist.model.recommender import build_recommender


class LastItem(nn.Module):
    """A model whose user is the last item's embedding through a table, so that scores are known."""

    item_embeddings = None

    def __init__(self, users: torch.Tensor) -> None:
        super().__init__()
        self.users = nn.Parameter(users)
        self.calls: list[int] = []

    def embed_items(self, features: ItemInputs) -> SimpleNamespace:
        assert not self.training and not torch.is_grad_enabled()
        self.calls.append(len(features.index))
        return SimpleNamespace(item=features.values["text"])

    def encode_users(self, item_rows: torch.Tensor, tokens: torch.Tensor, offsets: torch.Tensor, longest: int):
        assert not self.training and not torch.is_grad_enabled()
        assert longest == int(offsets.diff().max())
        return self.users[tokens]


class Features:
    """A catalogue whose text feature is the embedding."""

    def __init__(self, values: torch.Tensor) -> None:
        self.values, self.size = values, len(values)

    def features(self, ids: np.ndarray) -> ItemInputs:
        present = {"text": torch.ones(len(ids), dtype=torch.bool)}
        return ItemInputs({"text": self.values[ids]}, present, torch.from_numpy(ids))


def make_sequences(histories: list[list[int]]) -> Sequences:
    offsets = ragged.offsets([len(h) for h in histories])
    items = np.concatenate([np.asarray(h, np.int64) for h in histories])
    return Sequences(offsets, items, np.arange(len(items)))


def random_sequences(rng: np.random.Generator, users: int, items: int, longest: int = 12) -> Sequences:
    return make_sequences([rng.integers(0, items, rng.integers(3, longest + 1)).tolist() for _ in range(users)])


def unit(x: np.ndarray) -> np.ndarray:
    lengths = np.linalg.norm(x, axis=1, keepdims=True)
    return x / np.where(lengths == 0, 1, lengths)


def oracle(scores: np.ndarray, queries: Queries) -> np.ndarray:
    """Sort each user's masked scores, the target after all that tie with it."""
    ranks = []
    for user, row in enumerate(scores):
        history = queries.exclude_items[queries.exclude_offsets[user] : queries.exclude_offsets[user + 1]]
        target = queries.targets[user]
        if target in history:
            ranks.append(len(row) + 1)
            continue
        masked = row.astype(np.float64).copy()
        masked[history] = -np.inf
        is_target = np.arange(len(row)) == target
        order = np.lexsort((is_target, -masked))  # by falling score; of equals the target last
        ranks.append(1 + int(np.flatnonzero(order == target)[0]))
    return np.array(ranks)


def test_queries_split_by_position_and_cut_to_the_window() -> None:
    sequences = make_sequences([[5, 6, 7], [1, 2, 3, 4, 5, 6], [9, 8, 9, 7]])
    queries = validation_queries(sequences, 2)
    assert np.split(queries.items, queries.offsets[1:-1])[1].tolist() == [3, 4]
    assert queries.items.tolist() == [5, 3, 4, 9, 8]
    assert queries.targets.tolist() == [6, 5, 9]
    assert queries.exclude_items.tolist() == [5, 1, 2, 3, 4, 9, 8]
    assert queries.exclude_offsets.tolist() == [0, 1, 5, 7]
    assert queries.seen.tolist() == [False, False, True]
    queries = ranking.test_queries(sequences, 2)
    assert queries.items.tolist() == [5, 6, 4, 5, 8, 9]
    assert queries.targets.tolist() == [7, 6, 7]
    assert queries.exclude_items.tolist() == [5, 6, 1, 2, 3, 4, 5, 9, 8, 9]


def test_a_target_seen_before_the_window_is_a_miss() -> None:
    queries = ranking.test_queries(make_sequences([[3, 0, 1, 2, 3]]), 2)
    assert queries.items.tolist() == [1, 2]
    ranks = rank_targets(LastItem(torch.eye(4)), torch.eye(4), queries)
    assert ranks.seen.tolist() == [True] and ranks.ranks.tolist() == [5]


def test_limit_draws_users_by_seed() -> None:
    sequences = random_sequences(np.random.default_rng(0), 40, 30)
    whole = validation_queries(sequences, 5)
    some = validation_queries(sequences, 5, limit=10, seed=3)
    assert len(some) == 10 and (np.diff(some.users) > 0).all()
    assert some.users.tolist() == validation_queries(sequences, 5, limit=10, seed=3).users.tolist()
    assert some.users.tolist() != validation_queries(sequences, 5, limit=10, seed=4).users.tolist()
    assert vars(some).keys() == vars(whole).keys()
    for name, value in vars(whole.select(some.users)).items():
        assert np.array_equal(value, getattr(some, name)), name
    assert len(validation_queries(sequences, 5, limit=100)) == 40


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 25), st.integers(1, 40), st.integers(1, 9), st.integers(1, 13))
def test_ranks_equal_the_sorting_oracle(seed: int, users: int, items: int, chunk_users: int, chunk_items: int) -> None:
    """Vectors of few directions, so that exact ties abound; histories with repeats; any cut of the work."""
    rng = np.random.default_rng(seed)
    sequences = random_sequences(rng, users, items)
    embeddings = rng.integers(-1, 2, (items, 3)).astype(np.float64)
    tables = rng.integers(-1, 2, (items, 3)).astype(np.float64)
    queries = ranking.test_queries(sequences, 6)
    last = queries.items[queries.offsets[1:] - 1]
    scores = np.round(unit(tables[last]) @ unit(embeddings).T, 9)
    got = rank_targets(
        LastItem(torch.from_numpy(tables).float()),
        torch.from_numpy(embeddings).float(),
        queries,
        chunk_users=chunk_users,
        chunk_items=chunk_items,
    )
    assert got.ranks.tolist() == oracle(scores, queries).tolist()
    assert got.users.tolist() == list(range(users))
    assert got.seen.tolist() == queries.seen.tolist()


@pytest.mark.parametrize("chunk_items", [1, 7, 64, 1000])
def test_items_with_the_targets_features_tie_in_any_chunk(chunk_items: int) -> None:
    torch.manual_seed(0)
    embeddings = torch.randn(300, 64)
    embeddings[[0, 17, 150, 298]] = embeddings[299].clone()
    users = torch.randn(300, 64)
    users += 3 * embeddings[299]  # the tied five are the first five
    queries = validation_queries(make_sequences([[i, 299, 1] for i in range(20, 120)]), 5)
    ranks = rank_targets(LastItem(users), embeddings, queries, chunk_users=33, chunk_items=chunk_items).ranks
    assert (ranks == 5).all()


def test_a_collapsed_model_ranks_last_not_first() -> None:
    queries = ranking.test_queries(make_sequences([[0, 1, 2], [3, 4, 5, 6]]), 5)
    ranks = rank_targets(LastItem(torch.zeros(50, 8)), torch.ones(50, 8), queries)
    assert ranks.ranks.tolist() == [50 - 2, 50 - 3]


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_ranks_of_all_shares_merge_to_those_of_one_process(world_size: int) -> None:
    rng = np.random.default_rng(1)
    queries = ranking.test_queries(random_sequences(rng, 5, 30), 6)  # fewer users than the most ranks
    model, embeddings = LastItem(torch.randn(30, 8)), torch.randn(30, 8)
    whole = rank_targets(model, embeddings, queries)
    shares = [rank_targets(model, embeddings, queries.shard(r, world_size)) for r in range(world_size)]
    merged = merge(shares[::-1])
    for name, value in vars(whole).items():
        assert np.array_equal(getattr(merged, name), value)


def test_embed_catalogue_restores_each_modules_mode() -> None:
    values = torch.randn(10, 4)
    model = LastItem(values)
    model.frozen = nn.Dropout()
    model.train()
    model.frozen.eval()
    embedded = embed_catalogue(model, Features(values), chunk=4)
    assert torch.equal(embedded, values) and model.calls == [4, 4, 2]
    assert torch.equal(embed_catalogue(model, Features(values), np.array([7, 2])), values[[7, 2]])
    assert model.training and not model.frozen.training


def test_transductive_model_refuses_another_catalogue() -> None:
    model = build_recommender(ModelConfig(modalities=["text"], dim=8, item_embeddings=True), {"text": 4}, 10)
    assert embed_catalogue(model, Features(torch.randn(10, 4))).shape == (10, 8)
    with pytest.raises(UserError, match=r"learned embeddings for 10 items \(ANT_t\), the catalogue has 12"):
        embed_catalogue(model, Features(torch.randn(12, 4)))


@pytest.mark.parametrize("broken", ["items", "users"])
def test_nan_embeddings_are_an_error(broken: str) -> None:
    items, users = torch.randn(6, 4), torch.randn(6, 4)
    (items if broken == "items" else users)[2, 1] = torch.nan
    queries = ranking.test_queries(make_sequences([[0, 2, 3], [1, 2, 4]]), 5)
    with pytest.raises(UserError, match="NaN or Inf"):
        rank_targets(LastItem(users), items, queries)


def test_scores_stay_float32_under_autocast() -> None:
    torch.manual_seed(0)
    queries = ranking.test_queries(random_sequences(np.random.default_rng(2), 50, 400), 6)
    model, embeddings = LastItem(torch.randn(400, 32)), torch.randn(400, 32)
    exact = rank_targets(model, embeddings, queries).ranks
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert np.array_equal(rank_targets(model, embeddings, queries).ranks, exact)


def test_batched_ranks_equal_one_user_at_a_time() -> None:
    """Each user alone in a forward pass gives the same ranks; dropout is configured but off."""
    rng = np.random.default_rng(3)
    config = ModelConfig(modalities=["text"], dim=16, inner=16, experts=2, max_length=8)
    model = build_recommender(config, {"text": 6}, seed=1).train()
    catalogue = Features(torch.from_numpy(rng.normal(size=(60, 6))).float() * 20)
    queries = ranking.test_queries(random_sequences(rng, 30, 60, 20), config.max_length)
    embeddings = embed_catalogue(model, catalogue)
    ranks = rank_targets(model, embeddings, queries, chunk_users=7, chunk_items=11)
    model.eval()
    scores = []
    with torch.no_grad():
        for first, last in zip(queries.offsets[:-1], queries.offsets[1:], strict=True):
            tokens = torch.from_numpy(queries.items[first:last])
            states = model.encode_users(embeddings, tokens, torch.tensor([0, len(tokens)]), len(tokens))
            scores.append(unit(states[-1:].double().numpy())[0] @ unit(embeddings.double().numpy()).T)
    assert ranks.ranks.tolist() == oracle(np.round(scores, 6), queries).tolist()
    assert len(set(ranks.ranks.tolist())) > 10


@pytest.mark.parametrize("range_items", [1, 7, 20, 39, 40])
def test_ranks_in_ranges_equal_ranks_at_once(range_items: int) -> None:
    """For the second of two domains, with ties across ranges, repeats in histories, seen targets."""
    rng = np.random.default_rng(5)
    values = torch.from_numpy(rng.normal(size=(52, 6))).float() * 20
    values[[12, 13, 30, 51]] = values[44].clone()
    catalogue = Features(values)
    model = build_recommender(ModelConfig(modalities=["text"], dim=16, inner=16, experts=2, max_length=5), {"text": 6})
    embedded: list[int] = []
    model.tower.register_forward_hook(lambda module, given, made: embedded.append(len(made.item)))
    queries = ranking.test_queries(random_sequences(rng, 60, 40), 5)
    whole = rank_targets(model, embed_catalogue(model, catalogue, np.arange(12, 52)), queries)
    embedded.clear()
    got = rank_in_ranges(model, catalogue, 12, 40, queries, range_items=range_items, chunk_users=13, chunk_items=8)
    for name, value in vars(whole).items():
        assert getattr(got, name).tolist() == value.tolist()
    named = len(set(queries.items.tolist()) | set(queries.targets.tolist()))
    assert sum(embedded) == 40 + (named if range_items < 40 else 0)
    assert max(embedded) <= max(named, range_items)
    nobody = rank_in_ranges(model, catalogue, 12, 40, queries.select(np.zeros(0, np.int64)), range_items=range_items)
    assert len(nobody.ranks) == 0


def test_a_domain_ranks_the_same_in_a_catalogue_of_two(tmp_path: Path) -> None:
    """Real shards and tables: a domain ranks the same within a catalogue of two as in one of its own."""
    rng = np.random.default_rng(4)
    domains = []
    for name, items in (("books", 30), ("toys", 40)):
        records = [ItemRecord(i, f"{name}{i}", f"title {i}", None, []) for i in range(items)]
        users = [str(u) for u in range(12)]
        write_domain(tmp_path / name, name, records, random_sequences(rng, 12, items), users, {}, items_per_shard=16)
        domains.append(open_domain(tmp_path / name))
        write_text_table(domains[-1], rng.normal(size=(items, 6)).astype(np.float32))
    toys = domains[1]
    both, alone = Catalogue(domains, ["text"]), Catalogue([toys], ["text"])
    model = build_recommender(ModelConfig(modalities=["text"], dim=16, inner=16, experts=2), both.dims, seed=1)
    of_both = embed_catalogue(model, both, np.arange(both.offsets[1], both.offsets[2]), chunk=9)
    assert torch.allclose(of_both, embed_catalogue(model, alone), atol=1e-6)
    queries = validation_queries(toys.sequences(), 50)
    ranks = rank_targets(model, of_both, queries)
    assert ranks.ranks.tolist() == rank_targets(model, embed_catalogue(model, alone), queries).ranks.tolist()
    assert len(set(ranks.ranks.tolist())) > 5


def write_text_table(domain: Domain, values: np.ndarray) -> None:
    folder = features_folder(domain)
    folder.mkdir()
    parts = [
        write_part(
            folder,
            "text",
            number,
            first=shard.first,
            values=values[shard.first : shard.first + shard.items],
            present=np.ones(shard.items, bool),
        )
        for number, shard in enumerate(domain.manifest.item_shards)
    ]
    meta = FeatureMeta(
        modality="text",
        encoder={"name": "random"},
        dim=values.shape[1],
        dtype="float32",
        items=len(values),
        fingerprint=domain.fingerprint,
        present=len(values),
        parts=parts,
    )
    write_meta(folder, meta)
