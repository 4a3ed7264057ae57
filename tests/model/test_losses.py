"""The alignment loss against the list of next items with repetition."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from antdist.model.losses import image_to_text_loss


def test_alignment_counts_repeats_and_leaves_out_count_0() -> None:
    """Each image against all texts, repeats not masked."""
    random = torch.Generator().manual_seed(4)
    images, texts = torch.randn(2, 5, 6, generator=random)
    counts, has_image = torch.tensor([3.0, 1.0, 0.0, 2.0, 1.0]), torch.tensor([True, True, True, True, False])
    listed = [item for item, count in enumerate(counts.tolist()) for _ in range(int(count))]
    logits = F.normalize(images[listed], dim=1) @ F.normalize(texts[listed], dim=1).T / 0.07
    terms = F.cross_entropy(logits, torch.arange(len(listed)), reduction="none")
    expected = terms[has_image[listed]].sum()
    ours = image_to_text_loss(images, texts, torch.arange(5), counts, counts * has_image, temperature=0.07, chunk=2)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
