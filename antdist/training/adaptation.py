"""Adaptation strategies as a table: what each takes from the pre-trained model, and what it learns (spec, section 6)."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from antdist.config.schema import ModelConfig, Strategy, Variant
from antdist.config.semantics import defining
from antdist.errors import UserError
from antdist.model.initialisation import centre_tower, redraw_experts
from antdist.model.recommender import Recommender, build_recommender, parameter_groups


@dataclass(frozen=True)
class Treatment:
    """Of one parameter group: whether its values come from the parent, and whether they are learned."""

    inherited: bool
    learned: bool


FRESH, KEPT, FROZEN = Treatment(False, True), Treatment(True, True), Treatment(True, False)

#                                    THETA (items)    P (positions)        PHI (transformer)
_TABLE: dict[Strategy, tuple[Treatment, Treatment, Treatment]] = {
    "scratch": (FRESH, FRESH, FRESH),
    "finetune": (KEPT, FROZEN, FROZEN),
    "finetune_all": (KEPT, KEPT, KEPT),
    "relearn": (FRESH, FRESH, FROZEN),
}


def treatments(strategy: Strategy, variants: Collection[Variant] = ()) -> dict[str, Treatment]:
    """Of each group of `parameter_groups`, under a strategy and the reference's variants of it.

    PHI holds the transformer and the input LayerNorm; price biases go with THETA; the items' own embeddings (ANT_t)
    are always fresh, as the parent knows other items. The variants: `learn_input_norm`: the input LayerNorm of a frozen
    transformer keeps learning; `keep_price_bias`: `relearn` keeps the parent's c_k; `redraw_positions`: `finetune`
    draws P afresh, and learns it.
    """
    theta, positions, phi = _TABLE[strategy]
    table = {
        "theta": theta,
        "price_bias": theta,
        "positions": positions,
        "phi": phi,
        "input_norm": phi,
        "item_embeddings": FRESH,
    }
    if "learn_input_norm" in variants and phi is FROZEN:
        table["input_norm"] = KEPT
    if "keep_price_bias" in variants and strategy == "relearn":
        table["price_bias"] = KEPT
    if "redraw_positions" in variants and strategy == "finetune":
        table["positions"] = FRESH
    return table


def needs_parent(strategy: Strategy) -> bool:
    """Whether anything is inherited."""
    return any(treatment.inherited for treatment in treatments(strategy).values())


def adapt(
    strategy: Strategy,
    config: ModelConfig,
    dims: dict[str, int],
    *,
    parent: Recommender | None,
    variants: Collection[Variant] = (),
    catalogue_size: int | None = None,
    means: dict[str, Tensor] | None = None,
    seed: int = 0,
) -> Recommender:
    """The model that a strategy starts from: fresh groups drawn by `seed`, others the parent's, frozen ones not learned.

    Dropout stays active in a frozen transformer, as in the reference.

    Args:
        dims: of the target's features; where THETA is inherited, the parent's.
        parent: the pre-trained model; not looked at by `scratch`.
        means: of the target's features, to centre a fresh item tower with; None leaves its shifts at zero.

    Raises:
        UserError: no parent where one is needed, or one that was built otherwise than the configuration asks for.
    """
    if needs_parent(strategy) and parent is None:
        raise UserError(
            f"strategy {strategy} starts from a pre-trained model",
            where="from",
            remedy="give one, e.g. from=models:/NAME/latest",
        )
    table = treatments(strategy, variants)
    if parent is not None:
        _check_same_build(config, parent.config, table)
    model = build_recommender(config, dims, catalogue_size, seed)
    if strategy == "relearn" and config.initialisation == "reference":
        redraw_experts(model, seed)
    if means is not None:
        centre_tower(model.tower, means)
    groups = parameter_groups(model)
    inherited = dict(parent.named_parameters()) if parent is not None else {}
    for group, treatment in table.items():
        for name in groups[group]:
            parameter = model.get_parameter(name)
            if treatment.inherited:
                _inherit(parameter, inherited.get(name), name)
            parameter.requires_grad_(treatment.learned)
    return model


def _check_same_build(config: ModelConfig, parent: ModelConfig, table: dict[str, Treatment]) -> None:
    for group, treatment in table.items():
        for key in defining(group) if treatment.inherited else ():
            there, here = getattr(parent, key), getattr(config, key)
            if there != here and (key != "experts" or config.mixture):
                raise UserError(
                    f"the parent's is {there}, the configuration asks for {here}",
                    where=f"model.{key}",
                    remedy=f"set model.{key}={str(there).lower()}, as in the parent's pre-training",
                )


def _inherit(parameter: torch.nn.Parameter, source: torch.Tensor | None, name: str) -> None:
    if source is None or source.shape != parameter.shape:
        there = "absent" if source is None else f"of shape {tuple(source.shape)}"
        raise UserError(
            f"the parent's {name} is {there}, the configuration asks for {tuple(parameter.shape)}",
            where="from",
            remedy="adapt a parent with the modalities and feature dimensions of the target",
        )
    with torch.no_grad():
        parameter.copy_(source)
