"""The oracle: ANT written from docs/spec/ant.md alone, the slow way.

One item at a time, one example a prefix, histories padded to full length with masks, experts in a loop, all logits of an
example in one row. It takes its parameters under the names of the authors' checkpoints (section 9), the padding row
of `item_embedding.weight` included, and shares no code with `antdist`. Dropout and routing noise are off.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

NAMES = {"text": ("text2rec", "text"), "image": ("img2rec", "img"), "price": ("meta2rec", "meta")}
Example = tuple[list[int], int]  # a history, oldest first, and the item that came next


def prefixes(sequence: Sequence[int]) -> list[Example]:
    """Every prefix of a sequence predicts the next item (section 1)."""
    return [(list(sequence[:n]), sequence[n]) for n in range(1, len(sequence))]


class NaiveModel:
    """The model over all n items, numbered from 0: `features[m]` (n, d_m), `present[m]` (n,)."""

    def __init__(
        self,
        state: dict[str, Tensor],
        features: dict[str, Tensor],
        present: dict[str, Tensor],
        *,
        heads: int,
        beta: float,
        missing: str = "reference",
        fusion: bool = True,
        length: int = 50,
        temperature: float = 0.07,
    ) -> None:
        self.state, self.features, self.present = state, features, present
        self.heads, self.beta, self.missing, self.fusion = heads, beta, missing, fusion
        self.length, self.temperature = length, temperature
        self.layers = 1 + max(int(name.split(".")[2]) for name in state if name.startswith("trm_encoder.layer."))
        self.dim = state["LayerNorm.weight"].shape[0]

    # ---- items (section 3)

    def transformed(self, modality: str, item: int) -> Tensor | None:
        """One modality's transformed embedding of one item; None if the model has no such modality."""
        experts, pooling = NAMES[modality]
        plain = f"{experts.replace('2rec', '2proj')}.weight"
        if f"{experts}.proj.0.lin.weight" not in self.state and plain not in self.state:
            return None
        if self.missing == "mask" and not bool(self.present[modality][item]):
            return torch.zeros(self.dim)
        x = self.features[modality][item]
        if plain in self.state:
            return self.state[plain] @ x + self.state[plain.replace("weight", "bias")]
        logits = self.state[f"{pooling}_pooling.pooling.w_gate"].T @ x
        routing = torch.exp(logits - logits.max()) / torch.exp(logits - logits.max()).sum()
        total = torch.zeros(self.dim)
        for k in range(len(routing)):
            weight = self.state[f"{experts}.proj.{k}.lin.weight"]
            if modality == "price":
                output = weight @ x + self.state[f"{experts}.proj.{k}.lin.bias"]
            else:
                output = weight @ (x - self.state[f"{experts}.proj.{k}.bias"])
            total = total + routing[k] * output
        return total

    def item(self, item: int) -> Tensor:
        parts = {m: self.transformed(m, item) for m in NAMES}
        embedding = torch.zeros(self.dim)
        for part in parts.values():
            if part is not None:
                embedding = embedding + part
        if self.fusion and parts["text"] is not None and parts["image"] is not None:
            embedding = embedding + self.beta * parts["text"] * parts["image"]
        if "item_embedding.weight" in self.state:
            embedding = embedding + self.state["item_embedding.weight"][item + 1]
        return embedding

    # ---- users (section 4)

    def user(self, history: Sequence[int]) -> Tensor:
        history = history[-self.length :]
        rows = [self.item(item) for item in history]
        rows += [torch.zeros(self.dim)] * (self.length - len(history))
        x = torch.stack(rows) + self.state["position_embedding.weight"][: self.length]
        x = self._norm(x, "LayerNorm")
        visible = torch.tensor(
            [[key <= query and key < len(history) for key in range(self.length)] for query in range(self.length)]
        )
        for number in range(self.layers):
            layer = f"trm_encoder.layer.{number}"
            attention = f"{layer}.multi_head_attention"
            q, k, v = (self._linear(x, f"{attention}.{part}") for part in ("query", "key", "value"))
            width = self.dim // self.heads
            seen = []
            for head in range(self.heads):
                columns = slice(head * width, (head + 1) * width)
                scores = q[:, columns] @ k[:, columns].T / math.sqrt(width)
                scores = scores.masked_fill(~visible, -10000.0)
                seen.append(torch.softmax(scores, dim=-1) @ v[:, columns])
            h = self._norm(x + self._linear(torch.cat(seen, dim=1), f"{attention}.dense"), f"{attention}.LayerNorm")
            inner = self._linear(h, f"{layer}.feed_forward.dense_1")
            inner = inner * 0.5 * (1.0 + torch.erf(inner / math.sqrt(2.0)))
            x = self._norm(h + self._linear(inner, f"{layer}.feed_forward.dense_2"), f"{layer}.LayerNorm")
        return x[len(history) - 1]

    def _linear(self, x: Tensor, name: str) -> Tensor:
        return x @ self.state[f"{name}.weight"].T + self.state[f"{name}.bias"]

    def _norm(self, x: Tensor, name: str) -> Tensor:
        mean = x.mean(-1, keepdim=True)
        variance = ((x - mean) ** 2).mean(-1, keepdim=True)
        return (x - mean) / torch.sqrt(variance + 1e-8) * self.state[f"{name}.weight"] + self.state[f"{name}.bias"]

    # ---- losses (sections 5 and 6)

    def in_batch_loss(self, examples: Sequence[Example]) -> Tensor:
        """Mean over examples; negatives are the other examples' next items that are another item."""
        total = torch.zeros(())
        items = [self.item(target) for _, target in examples]
        for i, (history, target) in enumerate(examples):
            user = self.user(history)
            logits = [self._logit(user, items[i])]
            logits += [self._logit(user, items[j]) for j, (_, other) in enumerate(examples) if other != target]
            total = total - torch.log_softmax(torch.stack(logits), dim=0)[0]
        return total / len(examples)

    def catalogue_loss(self, examples: Sequence[Example], size: int) -> Tensor:
        items = [self.item(item) for item in range(size)]
        total = torch.zeros(())
        for history, target in examples:
            user = self.user(history)
            logits = torch.stack([self._logit(user, item) for item in items])
            total = total - torch.log_softmax(logits, dim=0)[target]
        return total / len(examples)

    def sampled_loss(self, examples: Sequence[Example], drawn: Sequence[int], expected: Tensor | None = None) -> Tensor:
        """Mean over examples; negatives are the drawn items (with repetition) that are not the next item.

        `expected[j]` is how often item j was expected among them: log-Q subtracts its logarithm, the target's too.
        """
        correction = torch.zeros(1 + max([*drawn, *(t for _, t in examples)])) if expected is None else expected.log()
        total = torch.zeros(())
        for history, target in examples:
            user = self.user(history)
            logits = [self._logit(user, self.item(target)) - correction[target]]
            logits += [self._logit(user, self.item(j)) - correction[j] for j in drawn if j != target]
            total = total - torch.log_softmax(torch.stack(logits), dim=0)[0]
        return total / len(examples)

    def alignment_loss(self, examples: Sequence[Example]) -> Tensor:
        """Each next item's image against all next items' texts, repeated items not masked.

        No image: no term, but a negative. Where missing features are masked, an item without text is left out.
        """
        items = [target for _, target in examples]
        if self.missing == "mask":
            items = [item for item in items if bool(self.present["text"][item])]
        images = {item: self.transformed("image", item) for item in set(items)}
        texts = {item: self.transformed("text", item) for item in set(items)}
        terms = []
        for i, item in enumerate(items):
            if bool(self.present["image"][item]):
                logits = torch.stack([self._logit(images[item], texts[other]) for other in items])
                terms.append(-torch.log_softmax(logits, dim=0)[i])
        return torch.stack(terms).mean() if terms else torch.zeros(())

    def _logit(self, user: Tensor, item: Tensor) -> Tensor:
        return self.score(user, item) / self.temperature

    @staticmethod
    def score(user: Tensor, item: Tensor) -> Tensor:
        """Cosine; 0 where either is zero."""
        product = user.norm() * item.norm()
        return user @ item / product if bool(product > 0) else user @ item
