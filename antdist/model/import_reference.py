"""Convert checkpoints of the authors' implementation (docs/spec/ant.md, section 9)."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from antdist.config.schema import Modality, ModelConfig
from antdist.errors import UserError
from antdist.io.files import file_sha256
from antdist.model.io import ModelCard, save_model

if TYPE_CHECKING:
    from torch import Tensor

# the reference's prefix for each modality
PREFIXES: dict[Modality, str] = {"text": "text", "image": "img", "price": "meta"}
LAYER_PARTS = {
    "output": "multi_head_attention.dense",
    "attention_norm": "multi_head_attention.LayerNorm",
    "expand": "feed_forward.dense_1",
    "contract": "feed_forward.dense_2",
    "forward_norm": "LayerNorm",
}
TRANSFORMER_EXPERTS = re.compile(r"trm_encoder\.layer\.\d+\.(feed_forward\.\d+\.|(.*\.)?pooling\.w_)")
ONLY_REFERENCE = "only checkpoints of the authors' published model can be imported"


def import_reference(checkpoint: str | Path, out: str | Path, heads: int, beta: float) -> ModelCard:
    """Convert a checkpoint and save the model in folder `out`.

    The model passes missing features through the tower (`missing="reference"`) and numbers items from 0: the
    reference's item i is our item i - 1, its padding row is dropped. Feature tables inside the checkpoint are not
    converted; `made` lists them. The encoders of the features are not known, so the card names none.

    Args:
        checkpoint: file with a `state_dict`, or the state dict itself.
        out: folder for the model.
        heads: attention heads, which the checkpoint does not record; the authors use 2.
        beta: weight of the text-image synergy, not recorded either; the authors use 0.1.

    Raises:
        UserError: the file is missing, unreadable, unsafe or of another model, its transformer has experts, or `heads`
            does not divide the width.
    """
    from antdist.model.recommender import blank_recommender

    path = Path(checkpoint)
    state = _load_state_dict(path)
    tables = {name: list(state[name].shape) for name in state if name.startswith("EmbeddingTable.")}
    rest = {name: value.float() for name, value in state.items() if name != "indices" and name not in tables}
    try:
        config, dims = _infer_config(rest, heads, beta)
        weights = _convert(rest, config)
        if rest:
            raise _Misfit(f"it contains {_list_names(rest)}, which the reference model does not have")
        size = len(weights["item_embeddings.weight"]) if config.item_embeddings else None
        model = blank_recommender(config, dims, size)
        model.load_state_dict(weights, assign=True)
    except _Misfit as error:
        raise UserError(f"not a checkpoint that can be imported: {error}", where=path, remedy=ONLY_REFERENCE) from None
    except RuntimeError as error:  # tensors of inconsistent shapes
        what = " ".join(str(error).split())
        raise UserError(f"tensors of the wrong shape: {what}", where=path, remedy=ONLY_REFERENCE) from error
    card = ModelCard(
        kind="imported",
        config=config,
        dims=dims,
        catalogue_size=size,
        made={
            "from": "a checkpoint of the reference implementation (ninglab/ANT)",
            "file": path.name,
            "sha256": file_sha256(path),
            "feature_tables_left_in_the_checkpoint": tables,
        },
    )
    save_model(out, model, card)
    return card


class _Misfit(Exception):
    """The reason why a state dict is not one of the reference model."""


def _load_state_dict(path: Path) -> dict[str, Tensor]:
    """Read the checkpoint's tensors by name. Unpickles tensors and plain containers only, never code."""
    import torch

    if not path.is_file():
        raise UserError("no such file", where=path, remedy="give the path of the checkpoint file")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a broken or hostile pickle can raise anything
        refused = re.search(r"GLOBAL ([\w.]+)", str(error))
        if refused:
            raise UserError(
                f"contains more than tensors: it refers to {refused[1]}, and code from a checkpoint is never run",
                where=path,
                remedy="if you trust the file, save its state_dict alone with torch.save, and import that",
            ) from error
        raise UserError(
            f"torch.load cannot read it as a file of tensors ({type(error).__name__})",
            where=path,
            remedy="check that the download is complete",
        ) from error
    state = content.get("state_dict", content) if isinstance(content, dict) else None
    if not isinstance(state, dict) or not state or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise UserError("contains no state_dict of tensors", where=path, remedy=ONLY_REFERENCE)
    return state


def _infer_config(rest: dict[str, Tensor], heads: int, beta: float) -> tuple[ModelConfig, dict[str, int]]:
    """Infer the configuration and the features' widths from the tensors' names and shapes."""
    experts_inside = sorted(filter(TRANSFORMER_EXPERTS.match, rest))
    if experts_inside:
        raise _Misfit(
            f"its transformer has experts ({experts_inside[0]}), a variant outside the published method; ours has one "
            "feed-forward network per layer, so the scores could not be the same"
        )
    for name, value in rest.items():
        if value.dim() not in (1, 2) or not value.numel() or (name == "position_embedding.weight" and value.dim() == 1):
            raise _Misfit(f"{name} has shape {tuple(value.shape)}")
    dims: dict[str, int] = {}
    counts = set()
    for modality, prefix in PREFIXES.items():
        plain, first = rest.get(f"{prefix}2proj.weight"), rest.get(f"{prefix}2rec.proj.0.lin.weight")
        weight = first if plain is None else plain
        if weight is not None:
            dims[modality] = weight.shape[-1]
            numbers = re.compile(rf"{prefix}2rec\.proj\.(\d+)\.lin\.weight")
            counts.add(0 if plain is not None else sum(bool(numbers.fullmatch(name)) for name in rest))
    layers = {int(name.split(".")[2]) for name in rest if re.match(r"trm_encoder\.layer\.\d+\.", name)}
    positions = rest.get("position_embedding.weight")
    inner = rest.get("trm_encoder.layer.0.feed_forward.dense_1.weight")
    if not dims or not layers or positions is None or inner is None:
        raise _Misfit("it lacks the item tower, position_embedding or trm_encoder")
    if len(counts) > 1:
        raise _Misfit(f"its modalities have different numbers of experts: {sorted(counts)}")
    length, dim = positions.shape
    if heads < 1 or dim % heads:
        raise UserError(
            f"{heads} heads do not divide the width {dim}", where="heads", remedy="choose a divisor; the authors use 2"
        )
    count = counts.pop()
    config = ModelConfig(
        modalities=[m for m in PREFIXES if m in dims],
        dim=dim,
        experts=count or 1,
        mixture=count > 0,
        beta=beta,
        missing="reference",
        layers=len(layers),
        heads=heads,
        inner=len(inner),
        max_length=length,
        initialisation="reference",
        item_embeddings="item_embedding.weight" in rest,
    )
    return config, dims


def _convert(rest: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Rename, split and transpose the tensors to our parameters; removes from `rest` what it uses."""
    import torch

    def take(name: str) -> Tensor:
        if name not in rest:
            raise _Misfit(f"it lacks {name}")
        return rest.pop(name)

    ours = {"positions.weight": take("position_embedding.weight")}
    if config.item_embeddings:
        ours["item_embeddings.weight"] = take("item_embedding.weight")[1:]
    for modality in config.modalities:
        prefix = PREFIXES[modality]
        if not config.mixture:
            for kind in ("weight", "bias"):
                ours[f"tower.{modality}.{kind}"] = take(f"{prefix}2proj.{kind}")
            continue
        experts = [f"{prefix}2rec.proj.{k}" for k in range(config.experts)]
        ours[f"tower.{modality}.weight"] = torch.stack([take(f"{expert}.lin.weight").T for expert in experts], dim=1)
        added, place = ("bias", "lin.bias") if modality == "price" else ("shift", "bias")
        ours[f"tower.{modality}.{added}"] = torch.stack([take(f"{expert}.{place}") for expert in experts])
        for kind in ("gate", "noise"):
            ours[f"tower.{modality}.{kind}"] = take(f"{prefix}_pooling.pooling.w_{kind}")
    for kind in ("weight", "bias"):
        ours[f"encoder.input_norm.{kind}"] = take(f"LayerNorm.{kind}")
        for layer in range(config.layers):
            source, goal = f"trm_encoder.layer.{layer}", f"encoder.layers.{layer}"
            attention = [take(f"{source}.multi_head_attention.{part}.{kind}") for part in ("query", "key", "value")]
            ours[f"{goal}.qkv.{kind}"] = torch.cat(attention)
            for part, place in LAYER_PARTS.items():
                ours[f"{goal}.{part}.{kind}"] = take(f"{source}.{place}.{kind}")
    return ours


def _list_names(rest: dict[str, Tensor]) -> str:
    names = sorted(rest)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
