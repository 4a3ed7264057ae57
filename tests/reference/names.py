"""Rename a recommender's parameters, or their gradients, to the names of the authors' checkpoints."""

from __future__ import annotations

import torch
from torch import Tensor

_MODALITIES = {"text": ("text", "text"), "image": ("img", "img"), "price": ("meta", "meta")}


def to_reference(ours: dict[str, Tensor]) -> dict[str, Tensor]:
    """`named_parameters()` of a `Recommender` (or their gradients) renamed, split and transposed."""
    theirs: dict[str, Tensor] = {}
    for name, value in ours.items():
        parts = name.split(".")
        if name == "positions.weight":
            theirs["position_embedding.weight"] = value
        elif name == "item_embeddings.weight":
            theirs["item_embedding.weight"] = torch.cat([torch.zeros_like(value[:1]), value])
        elif parts[0] == "tower":
            theirs |= _tower(parts[1], parts[2], value)
        elif parts[1] == "input_norm":
            theirs[f"LayerNorm.{parts[2]}"] = value
        else:
            theirs |= _layer(f"trm_encoder.layer.{parts[2]}", parts[3], parts[4], value)
    return theirs


def _tower(modality: str, kind: str, value: Tensor) -> dict[str, Tensor]:
    short = _MODALITIES[modality][0]
    if kind in ("gate", "noise"):
        return {f"{short}_pooling.pooling.w_{kind}": value}
    if (kind, value.dim()) in (("weight", 2), ("bias", 1)):
        return {f"{short}2proj.{kind}": value}
    name = {"weight": "lin.weight", "bias": "lin.bias", "shift": "bias"}[kind]
    experts = value.permute(1, 2, 0) if kind == "weight" else value
    return {f"{short}2rec.proj.{k}.{name}": expert for k, expert in enumerate(experts)}


def _layer(layer: str, part: str, kind: str, value: Tensor) -> dict[str, Tensor]:
    attention = f"{layer}.multi_head_attention"
    if part == "qkv":
        return {f"{attention}.{n}.{kind}": v for n, v in zip(("query", "key", "value"), value.chunk(3), strict=True)}
    place = {
        "output": f"{attention}.dense",
        "attention_norm": f"{attention}.LayerNorm",
        "expand": f"{layer}.feed_forward.dense_1",
        "contract": f"{layer}.feed_forward.dense_2",
        "forward_norm": f"{layer}.LayerNorm",
    }[part]
    return {f"{place}.{kind}": value}
