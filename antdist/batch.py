"""What one training step reads: item ids on the wire (law 5), inputs by item, nothing padded.

Neutral ground between the rooms: the stream makes a `GlobalBatch`, `shard_batch` cuts each rank's `Batch` from it, the
feature tables give `ItemInputs`, the model reads both. The laws are listed in docs/architecture.md.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

MODALITIES = ("text", "image", "price")

IntArray = NDArray[np.int64]

# Matrices whose number of rows changes from step to step are padded to a multiple of this: libraries build a kernel for
# each new size, which takes as long as a small product, and GPUs compute in tiles of this size anyway.
ROWS = 128


@dataclass(frozen=True)
class GlobalBatch:
    """The predictions of one step over all ranks: a function of (fingerprint, seed, epoch, index).

    A *window* is a run of one user's items, oldest first, read in one causal pass; a *prediction* reads the state at one
    token and targets the item that came next. In `prefix` mode a window makes one prediction, at its last token; in
    `sequence` mode it makes one at each of its tokens (a longer user's later windows: at each new token).

    Shapes: W windows, T tokens, P predictions. Item ids are global: a domain's item index plus its offset.
    """

    epoch: int
    index: int
    items: IntArray  # (T,) item ids of all windows, one window after the other
    offsets: IntArray  # (W + 1,) where each window starts in `items`
    predict_at: IntArray  # (P,) increasing positions in `items`
    targets: IntArray  # (P,) item ids
    users: IntArray  # (W,) global user index of each window

    @property
    def predictions(self) -> int:
        return len(self.targets)


@dataclass(frozen=True)
class Batch:
    """One rank's share of a global (micro-)batch, and the items of all of it.

    `item_ids` is the same on every rank: the distinct items of the global batch, or the whole catalogue. This rank
    embeds rows `share[0]:share[1]` and receives the others from its peers, so each distinct item is embedded once a
    step over all ranks (law 5), and the candidates are the same for any number of ranks (law 2).

    Shapes: N distinct items, T tokens, W windows, P predictions of this rank, C candidates.
    """

    item_ids: Tensor  # (N,) int64, sorted, distinct, global item ids
    share: tuple[int, int]  # the rows of `item_ids` that this rank embeds
    tokens: Tensor  # (T,) int64, row in `item_ids` of each token
    offsets: Tensor  # (W + 1,) int64
    predict_at: Tensor  # (P,) int64, positions in `tokens`
    targets: Tensor  # (P,) int64, position in `candidates` of each prediction's next item
    candidates: Tensor  # (C,) int64, rows in `item_ids` of the softmax's candidates, increasing
    own: tuple[int, int]  # the candidates among the rows that this rank embeds
    counts: Tensor  # (C,) float32, how often each candidate is a next item in the global batch (0 if only sampled)
    bias: Tensor | None  # (C,) float32, added to each candidate's logit except where it is the target; None: zeros
    target_bias: Tensor | None  # (C,) float32, added to a candidate's logit where it is the target; None: zeros
    predictions: int  # of the global (micro-)batch over all ranks: the loss is divided by it
    longest: int  # tokens in the longest window of this share

    def to(self, device: torch.device | str) -> Batch:
        moved: dict[str, Any] = {
            name: value.to(device, non_blocking=True) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        return replace(self, **moved)


@dataclass(frozen=True)
class ItemInputs:
    """What the item tower reads of N items, in rows: their frozen features (docs/spec/ant.md, section 2).

    `values[m]` is (N, d_m) floating; `present[m]` is (N,) bool; a missing feature is a row of zeros with `present`
    False. `index` is (N,) int64, the items' ids; only the learned item embeddings of ANT_t read it.
    """

    values: dict[str, Tensor]
    present: dict[str, Tensor]
    index: Tensor

    def to(self, device: torch.device | str) -> ItemInputs:
        return ItemInputs(
            {m: v.to(device, non_blocking=True) for m, v in self.values.items()},
            {m: v.to(device, non_blocking=True) for m, v in self.present.items()},
            self.index.to(device, non_blocking=True),
        )
