"""The losses of pre-training and adaptation (docs/spec/ant.md, sections 5 and 6).

Each is this rank's part: the sum over ranks is the loss of the global batch. Items and texts come in the rows of
`batch.item_ids`, all of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from antdist.batch import Batch
from antdist.model.ops.softmax_loss import softmax_loss


def recommendation_loss(states: Tensor, items: Tensor, batch: Batch, *, temperature: float, chunk: int) -> Tensor:
    """Mean over predictions of -log softmax(cos(u, e_j) / temperature) at the next item.

    Args:
        states: (T, d), the user's preference after each token.
        items: (N, d) item embeddings.
        batch: says which states predict which items against which candidates.
        temperature: tau.
        chunk: candidates that are scored together; bounds memory.
    """
    # candidates are distinct and increasing: as many as there are items are all of them, in order
    everything = len(batch.candidates) == len(items)
    loss = softmax_loss(
        states.index_select(0, batch.predict_at),
        items if everything else items.index_select(0, batch.candidates),
        batch.targets,
        temperature=temperature,
        bias_C=batch.bias,
        target_bias_C=batch.target_bias,
        chunk=chunk,
    )
    return loss / batch.predictions


def alignment_loss(
    own_images: Tensor,
    texts: Tensor,
    has_text: Tensor,
    has_image: Tensor,
    batch: Batch,
    *,
    temperature: float,
    mask_missing: bool,
    chunk: int,
) -> Tensor:
    """Mean over next items of -log softmax_j(cos(image, text_j) / temperature) at the own text.

    An item without an image contributes no term, but its text is a negative. An item without text is left out with
    `mask_missing`: its transformed text is zero, which would be a negative as near to one image as to any other.

    Each rank takes the images that it embedded, so these need not be gathered.

    Args:
        own_images: (n, d) transformed images of rows `batch.share[0]` to `batch.share[1]`.
        texts: (N, d) transformed texts.
        has_text: (N,) 0 or 1, floating.
        has_image: (N,) 0 or 1, floating.
        batch: `counts` says how often each candidate is a next item.
        temperature: tau.
        mask_missing: whether missing features give zero transformed embeddings.
        chunk: texts that are scored together; bounds memory.
    """
    texts, has_text, has_image = (x.index_select(0, batch.candidates) for x in (texts, has_text, has_image))
    counts = batch.counts.float()
    if mask_missing:
        counts = counts * has_text
    weights = counts * has_image
    start, stop = batch.own
    loss = image_to_text_loss(
        own_images.index_select(0, batch.candidates[start:stop] - batch.share[0]),
        texts,
        torch.arange(start, stop, device=texts.device),
        counts,
        weights[start:stop],
        temperature=temperature,
        chunk=chunk,
    )
    return loss / weights.sum().clamp_min(1.0)


def image_to_text_loss(
    images: Tensor, texts: Tensor, targets: Tensor, counts: Tensor, weights: Tensor, *, temperature: float, chunk: int
) -> Tensor:
    """Sum over images of weight * -log softmax_j(cos(image, text_j) / temperature) at the own text.

    Text j stands `counts[j]` times in the softmax, as if the batch's next items were listed with repetition and repeats
    not masked: log(counts[j]) is added to its logit. One of the own text's copies is right, not all of them, which adds
    log(counts) of the own text to the term.

    Args:
        images: (R, d) transformed image embeddings.
        texts: (C, d) transformed text embeddings.
        targets: (R,) int64, rows of `texts`.
        counts: (C,) float32; 0 takes a text out.
        weights: (R,) float32; 0 takes an image out (its text may have count 0 then).
        temperature: tau.
        chunk: texts that are scored together.
    """
    bias = counts.log()
    own_bias = bias.clamp_min(0.0)
    loss = softmax_loss(
        images,
        texts,
        targets,
        temperature=temperature,
        bias_C=bias,
        target_bias_C=own_bias,
        weights_P=weights,
        chunk=chunk,
    )
    return loss + (weights * own_bias[targets]).sum()
