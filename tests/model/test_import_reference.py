"""Imported checkpoints: items, users and scores equal the oracle's, which reads their names itself."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest
import torch
from torch import Tensor

from antdist.errors import UserError
from antdist.model.import_reference import import_reference
from antdist.model.io import load_model
from tests.reference.naive import NaiveModel
from tests.reference.small_world import DIMS, SmallWorld

WIDTH, EXPERTS, LENGTH, INNER = 8, 3, 6, 10
MODALITIES = {"text": "text", "image": "img", "price": "meta"}


def checkpoint(
    *, mixture: bool = True, transductive: int = 0, modalities: tuple[str, ...] = tuple(DIMS)
) -> dict[str, Tensor]:
    """Random tensors under the names and shapes of docs/spec/ant.md, section 9."""
    random = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return 0.4 * torch.randn(*shape, generator=random)

    state = {"position_embedding.weight": draw(LENGTH, WIDTH), "indices": torch.arange(3)}
    linear = {"multi_head_attention.query": (WIDTH, WIDTH), "multi_head_attention.key": (WIDTH, WIDTH)}
    linear |= {"multi_head_attention.value": (WIDTH, WIDTH), "multi_head_attention.dense": (WIDTH, WIDTH)}
    linear |= {"feed_forward.dense_1": (INNER, WIDTH), "feed_forward.dense_2": (WIDTH, INNER)}
    norms = ["LayerNorm"]
    for layer in range(2):
        for name, (rows, columns) in linear.items():
            state[f"trm_encoder.layer.{layer}.{name}.weight"] = draw(rows, columns)
            state[f"trm_encoder.layer.{layer}.{name}.bias"] = draw(rows)
        norms += [f"trm_encoder.layer.{layer}.{name}" for name in ("multi_head_attention.LayerNorm", "LayerNorm")]
    for name in norms:
        state[f"{name}.weight"], state[f"{name}.bias"] = 1.0 + draw(WIDTH), draw(WIDTH)
    for modality in modalities:
        prefix, dim = MODALITIES[modality], DIMS[modality]
        if not mixture:
            state[f"{prefix}2proj.weight"], state[f"{prefix}2proj.bias"] = draw(WIDTH, dim), draw(WIDTH)
            continue
        for k in range(EXPERTS):
            state[f"{prefix}2rec.proj.{k}.lin.weight"] = draw(WIDTH, dim)
            if modality == "price":
                state[f"{prefix}2rec.proj.{k}.lin.bias"] = draw(WIDTH)
            else:
                state[f"{prefix}2rec.proj.{k}.bias"] = draw(dim)
        state[f"{prefix}_pooling.pooling.w_gate"] = draw(dim, EXPERTS)
        state[f"{prefix}_pooling.pooling.w_noise"] = draw(dim, EXPERTS)
    if transductive:
        state["item_embedding.weight"] = draw(transductive + 1, WIDTH)
        state["EmbeddingTable.text_embed.weight"] = draw(transductive + 1, DIMS["text"])
    return state


def write(path: Path, state: dict[str, Tensor]) -> Path:
    torch.save({"state_dict": state, "epoch": 7, "pytorch-lightning_version": "1.9"}, path)
    return path


@pytest.mark.parametrize(
    "kind",
    [{}, {"mixture": False}, {"transductive": 15}, {"modalities": ("text", "price")}],
    ids=str,
)
def test_same_items_users_and_scores(tmp_path: Path, kind: dict[str, object]) -> None:
    state, world = checkpoint(**kind), SmallWorld()  # type: ignore[arg-type]
    card = import_reference(write(tmp_path / "ant.ckpt", state), tmp_path / "out", heads=4, beta=0.3)
    model, loaded = load_model(tmp_path / "out")
    assert card == loaded and card.kind == "imported" and card.config.missing == "reference"
    naive = NaiveModel(state, world.values, world.present, heads=4, beta=0.3, length=LENGTH)
    items = model.embed_items(world.rows(torch.arange(world.size))).item
    expected = torch.stack([naive.item(item) for item in range(world.size)])
    torch.testing.assert_close(items, expected, rtol=1e-5, atol=1e-5)
    for history in ([4], [3, 3, 9], [1, 5, 2, 0, 7, 11]):
        with torch.no_grad():
            user = model.encode_users(items, torch.tensor(history), torch.tensor([0, len(history)]), len(history))[-1]
        theirs = naive.user(history)
        torch.testing.assert_close(user, theirs, rtol=1e-5, atol=1e-5)
        scores = torch.cosine_similarity(user[None], items)
        torch.testing.assert_close(
            scores, torch.stack([naive.score(theirs, e) for e in expected]), rtol=1e-5, atol=1e-5
        )


def test_feature_tables_are_listed_not_converted(tmp_path: Path) -> None:
    card = import_reference(write(tmp_path / "a.ckpt", checkpoint(transductive=15)), tmp_path / "out", 2, 0.1)
    assert card.made["feature_tables_left_in_the_checkpoint"] == {"EmbeddingTable.text_embed.weight": [16, 7]}
    assert card.catalogue_size == 15 and card.config.item_embeddings


def test_a_bare_state_dict_in_half_precision_is_imported(tmp_path: Path) -> None:
    torch.save({name: value.half() for name, value in checkpoint().items()}, tmp_path / "a.pt")
    card = import_reference(tmp_path / "a.pt", tmp_path / "out", 2, 0.1)
    assert (card.config.dim, card.config.experts, card.config.inner) == (WIDTH, EXPERTS, INNER)
    assert (card.config.layers, card.config.max_length, card.dims) == (2, LENGTH, DIMS)


class Hostile:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("how", ["torch", "pickle"])
def test_a_pickle_that_would_run_code_is_refused(tmp_path: Path, how: str) -> None:
    path, marker = tmp_path / "bad.ckpt", tmp_path / "ran"
    content = {"state_dict": checkpoint(), "callbacks": Hostile(marker)}
    if how == "torch":
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps({"state_dict": Hostile(marker)}, protocol=2))
    with pytest.raises(
        UserError, match=r"bad\.ckpt: contains more than tensors: it refers to posix\.system, and code .* never run"
    ):
        import_reference(path, tmp_path / "out", 2, 0.1)
    assert not marker.exists() and not (tmp_path / "out").exists()


def test_experts_in_the_transformer_are_refused(tmp_path: Path) -> None:
    state = checkpoint()
    state["trm_encoder.layer.0.feed_forward.3.dense_1.weight"] = torch.zeros(INNER, WIDTH)
    with pytest.raises(UserError, match=r"its transformer has experts .*scores could not be the same"):
        import_reference(write(tmp_path / "a.ckpt", state), tmp_path / "out", 2, 0.1)


def bad(name: str) -> dict[str, Tensor]:
    state = checkpoint()
    if name == "lacks":
        del state["img_pooling.pooling.w_gate"]
    elif name == "more":
        state["decoder.weight"] = torch.zeros(2)
    elif name == "uneven":
        del state["text2rec.proj.2.lin.weight"]
    elif name == "shape":
        state["LayerNorm.weight"] = torch.zeros(3)
    elif name == "flat":
        state["position_embedding.weight"] = torch.zeros(48)
    elif name == "scalar":
        state["text2rec.proj.0.lin.weight"] = torch.tensor(1.0)
    elif name == "empty":
        state["trm_encoder.layer.0.feed_forward.dense_1.weight"] = torch.zeros(0, WIDTH)
    elif name == "other":
        state = {"bert.weight": torch.zeros(3)}
    return state


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("lacks", r"it lacks img_pooling\.pooling\.w_gate"),
        ("more", r"it contains decoder\.weight, which the reference model does not have"),
        ("uneven", r"different numbers of experts: \[2, 3\]"),
        ("shape", r"tensors of the wrong shape: .*encoder\.input_norm\.weight"),
        ("flat", r"position_embedding\.weight has shape \(48,\)"),
        ("scalar", r"text2rec\.proj\.0\.lin\.weight has shape \(\)"),
        ("empty", r"dense_1\.weight has shape \(0, 8\)"),
        ("other", r"it lacks the item tower, position_embedding or trm_encoder"),
    ],
)
def test_checkpoints_of_other_models_are_refused(tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        import_reference(write(tmp_path / "a.ckpt", bad(name)), tmp_path / "out", 2, 0.1)


def test_files_that_are_no_checkpoint_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no\.ckpt: no such file"):
        import_reference(tmp_path / "no.ckpt", tmp_path / "out", 2, 0.1)
    (tmp_path / "text.ckpt").write_text("hello, this is not a checkpoint")
    with pytest.raises(UserError, match=r"torch\.load cannot read it as a file of tensors .*download is complete"):
        import_reference(tmp_path / "text.ckpt", tmp_path / "out", 2, 0.1)
    torch.save({"state_dict": {"a": 1}}, tmp_path / "numbers.ckpt")
    with pytest.raises(UserError, match="contains no state_dict of tensors"):
        import_reference(tmp_path / "numbers.ckpt", tmp_path / "out", 2, 0.1)


def test_heads_that_do_not_divide_the_width_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="heads: 3 heads do not divide the width 8"):
        import_reference(write(tmp_path / "a.ckpt", checkpoint()), tmp_path / "out", 3, 0.1)
