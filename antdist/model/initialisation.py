"""Initial weights of a recommender (docs/spec/ant.md, sections 3 and 6)."""

from __future__ import annotations

import hashlib
from typing import Literal

import torch
from torch import Tensor, nn

from antdist.model.items.features import Experts, ItemTower, Projection
from antdist.model.sequence.sasrec import Norm

DEVIATION = 0.02  # of linear and embedding weights


def initialise(model: nn.Module, experts: Literal["normal", "xavier"], seed: int) -> None:
    """Set all weights in place.

    Norms become the identity, linear and embedding weights N(0, 0.02), all else zero. The weights are a function of `seed` and each parameter's name alone: configurations that add or remove a parameter
    leave the others unchanged. The global random state is not touched.

    Args:
        model: a recommender.
        experts: whether the experts' W_k are N(0, 0.02), too, or Xavier-normal.
        seed: of the draws.
    """
    for name, parameter in model.named_parameters():
        owner, _, kind = name.rpartition(".")
        module = model.get_submodule(owner)
        if kind != "weight":
            nn.init.zeros_(parameter)
        elif isinstance(module, Norm):
            nn.init.ones_(parameter)
        elif experts == "xavier" and isinstance(module, Experts | Projection):
            _draw(parameter, _xavier_deviation(parameter), seed, name)
        else:
            _draw(parameter, DEVIATION, seed, name)


def redraw_experts(model: nn.Module, seed: int) -> None:
    """Draw the weights W_k of all modalities again, in place, Xavier-normal.

    The reference does so in re-learning. Shifts, biases and routing stay.
    """
    for name, parameter in model.named_parameters():
        if name.startswith("tower.") and name.endswith(".weight"):
            _draw(parameter, _xavier_deviation(parameter), seed, name)


def centre_tower(tower: ItemTower, means: dict[str, Tensor]) -> None:
    """Make each modality's transform give zero for its mean feature, in place (`initial_shift` "mean").

    Whitening shifts b_k become the mean; a bias (price, or no experts) becomes minus the mean's image.

    Args:
        tower: the item tower.
        means: (d_m,) of each modality's present features.
    """
    with torch.no_grad():
        for modality in tower.modalities:
            transform, mean = tower.get_submodule(modality), means[modality].float()
            if isinstance(transform, Projection):
                transform.bias.copy_(-(transform.weight @ mean))
            elif isinstance(transform, Experts) and transform.whitening:
                transform.shift.copy_(mean.expand_as(transform.shift))
            elif isinstance(transform, Experts):
                transform.bias.copy_(-torch.einsum("m,mkd->kd", mean, transform.weight))


def _xavier_deviation(weight: Tensor) -> float:
    return float((2.0 / (weight.shape[0] + weight.shape[-1])) ** 0.5)


def _draw(parameter: nn.Parameter, deviation: float, seed: int, name: str) -> None:
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    with torch.no_grad():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * deviation)
