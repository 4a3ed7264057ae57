"""Costs of a run by arithmetic: what a step computes, moves, keeps and reads, and what limits it.

    workload (users, items, popularity) + configuration ─▶ `Work` of a rank, by expectation
    work + `Machine` ─▶ memory, seconds of each resource a step, hours ─▶ the first bottleneck

No data are opened, nothing is measured (`calibration.py` does that), and torch is not imported.
Sizes are bytes, times seconds, rates a second.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

from antdist.batch import IntArray
from antdist.config.schema import LossConfig, ModelConfig, PretrainConfig, RelearnConfig

FloatArray = NDArray[np.float64]
Config = PretrainConfig | RelearnConfig

FLOAT = 4
MIN_INTERACTIONS = 3  # interactions of a user in a prepared domain, of which two are held out
READ_AHEAD = 4  # steps whose inputs are in host memory: two waiting, one in use, one being made
CACHE_SHARE = 0.2  # of a GPU's memory, for features (antdist.training.feed)
BUCKET = 500_000_000  # gradients in DeepSpeed's buffer of stages 1 and 2, if `reduce_bucket_size` is not set
PAGE = 4096
RANKS = 20_000  # places at which a law of popularity is evaluated
QUANTILES = 2_000  # of users' lengths


# -- data in figures ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Popularity:
    """Item frequencies in an epoch's training parts: `many[i]` items occur `counts[i]` times each."""

    counts: FloatArray
    many: FloatArray

    @property
    def interactions(self) -> float:
        return float(self.counts @ self.many)


def zipf(items: int, interactions: float, exponent: float, shift: float = 10.0) -> Popularity:
    """Return popularity proportional to (rank + shift) ** -exponent.

    Rare items share one frequency per range of ranks.
    """
    edges = np.unique(np.geomspace(1, items + 1, RANKS).astype(np.int64))
    edges[-1] = items + 1
    many = np.diff(edges).astype(np.float64)
    middle = (edges[:-1] + edges[1:] - 1) / 2
    law = (middle + shift) ** -exponent
    return Popularity(law * (interactions / float(law @ many)), many)


def count_popularity(counts: IntArray) -> Popularity:
    """Return the popularity of prepared domains from their counts per item."""
    found, many = np.unique(counts, return_counts=True)
    return Popularity(found.astype(np.float64), many.astype(np.float64))


def expected_distinct(draws: float, popularity: Popularity, uniform: float = 0.0) -> float:
    """Estimate the distinct items in `draws` interactions and `uniform` draws from all items.

    Each interaction is equally likely to be drawn, so an item that occurs c times is absent with probability
    (1 - draws / all) ** c.
    """
    share = min(draws / popularity.interactions, 1 - 1e-12)
    items = float(popularity.many.sum())
    absent = popularity.counts * math.log1p(-share) + (uniform * math.log1p(-1 / items) if items > 1 else 0.0)
    return float(popularity.many @ -np.expm1(absent))


def estimate_lengths(mean: float, least: int = 5, deviation: float = 1.0) -> FloatArray:
    """Return interactions per user at evenly spaced quantiles: log-normal above `least`, with this mean."""
    if mean <= least:
        return np.full(1, mean)
    places = (np.arange(QUANTILES) + 0.5) / QUANTILES
    above = np.exp(deviation * np.array([NormalDist().inv_cdf(place) for place in places]))
    return least + np.floor(above * (mean - least + 0.5) / above.mean())


@dataclass(frozen=True)
class Workload:
    """Figures of a run's data.

    `lengths` are the interactions, held-out ones included, of a sample of users.
    """

    name: str
    users: int
    items: int
    interactions: int
    lengths: FloatArray
    popularity: Popularity
    sequence_bytes: float  # of the shards that an epoch reads
    row_bytes: float  # of an item's features on disk
    dims: Mapping[str, int]

    @property
    def predictions(self) -> int:
        """Predictions per epoch: all interactions of a user except the first and the two held out."""
        return max(self.interactions - 3 * self.users, 1)


@dataclass(frozen=True)
class Windows:
    """The average user's share of an epoch."""

    windows: float
    tokens: float
    pairs: float  # of tokens that attend to each other, themselves included
    predictions: float


def count_windows(lengths: FloatArray, max_length: int, mode: str) -> Windows:
    """Return what `antdist.data.stream.windows` makes of the average user."""
    inputs = np.maximum(np.round(lengths) - MIN_INTERACTIONS, 0).astype(np.int64)
    if mode == "prefix":
        short = np.minimum(inputs, max_length)
        full = inputs - short
        tokens = short * (short + 1) / 2 + full * max_length
        pairs = short * (short + 1) * (short + 2) / 6 + full * max_length * (max_length + 1) / 2
        return Windows(*(float(part.mean()) for part in (inputs, tokens, pairs, inputs)))
    stride = max(1, max_length // 2)
    later = -(-np.maximum(inputs - max_length, 0) // stride)
    first = np.minimum(inputs, max_length)
    # later windows are full except the last
    last = np.where(later > 0, inputs - later * stride, 0)
    full = np.maximum(later - 1, 0)
    tokens = first + full * max_length + last
    pairs = (first * (first + 1) + full * max_length * (max_length + 1) + last * (last + 1)) / 2
    return Windows(*(float(part.mean()) for part in ((inputs > 0) + later, tokens, pairs, inputs)))


# -- what a rank does in a micro-batch -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Work:
    """A rank's share of a micro-batch.

    `aligned` counts the images that it compares with all candidates' texts.
    """

    items: float  # distinct items that it embeds
    tokens: float
    pairs: float
    predictions: float
    candidates: float
    aligned: float


@dataclass(frozen=True)
class Step:
    """A micro-batch over all ranks, and a rank's share of it."""

    rank: Work
    items: float  # distinct items over all ranks
    windows: float  # over all ranks
    width: float  # of an attention block: the longest window


def expected_step(config: Config, data: Workload, ranks: int) -> Step:
    """Estimate a step from popularity and lengths."""
    model, loss, stream = config.model, config.loss, config.stream
    user = count_windows(data.lengths, model.max_length, stream.mode)
    predictions = min(stream.batch_size, data.predictions) / config.training.accumulation
    users = predictions / max(user.predictions, 1e-9)
    tokens, windows = users * user.tokens, users * user.windows
    # a window contains its tokens and its last target; later windows of a user add only new ones
    named = predictions + (tokens if stream.mode == "prefix" else users)
    uniform = loss.samples if loss.negatives == "sampled" else 0
    if loss.negatives == "catalogue":
        items = candidates = float(data.items)
    else:
        items = expected_distinct(named, data.popularity, uniform)
        candidates = expected_distinct(predictions, data.popularity, uniform)
    aligned = candidates if is_aligned(loss, model, data.dims) else 0.0
    longest = min(float(np.max(data.lengths)) - MIN_INTERACTIONS, model.max_length) if windows else 1.0
    rank = Work(
        items / ranks, tokens / ranks, users * user.pairs / ranks, predictions / ranks, candidates, aligned / ranks
    )
    return Step(rank, items, windows, max(8.0, 8 * math.ceil(longest / 8)))


def is_aligned(loss: LossConfig, model: ModelConfig, dims: Mapping[str, int]) -> bool:
    """Return whether a step compares images with texts."""
    return loss.alignment > 0 and {"text", "image"} <= set(model.modalities) & set(dims)


def useful_operations(work: Work, model: ModelConfig, dims: Mapping[str, int]) -> float:
    """Count the operations of a rank's matrix products, forward and backward, without recomputation.

    Counts each distinct item that the rank embeds once through the experts and gates (their input needs no gradient: twice
    the forward pass), each real token through the linear maps, each pair of tokens that may see each other, each prediction
    against each candidate, and each aligned image against each candidate's text (all three times the forward).
    """
    d = model.dim
    tower = sum(work.items * width * (model.experts * d + 2 * model.experts) * 2 for width in dims.values())
    linear = work.tokens * model.layers * (4 * d * d + 2 * d * model.inner) * 2
    attention = work.pairs * model.layers * d * 4
    logits = (work.predictions + work.aligned) * work.candidates * d * 2
    return 2 * tower + 3 * (linear + attention + logits)


def moved_bytes(step: Step, model: ModelConfig, dims: Mapping[str, int]) -> float:
    """Count the bytes that everything except matrix products reads and writes.

    These are dropout, mixing, norms and softmax.

    Passes over each tensor, forward and backward: 6 over features and 6 over the experts' outputs, 60 d and 12 inner per
    token and layer, 16 over attention weights, 8 over logits.
    """
    work = step.rank
    tower = sum(work.items * (6 * width + 6 * _experts(model) * model.dim) for width in dims.values())
    layer = 60 * model.dim + 12 * model.inner + 16 * model.heads * 2 * step.width
    logits = 8 * (work.predictions + work.aligned) * work.candidates
    return FLOAT * (tower + work.tokens * model.layers * layer + logits)


def update_bytes(parameters: float) -> float:
    """Count the bytes that Adam reads and writes: weight, gradient, two moments.

    All but the gradient are written back.
    """
    return 7.0 * FLOAT * parameters


def _experts(model: ModelConfig) -> int:
    return model.experts if model.mixture else 1


def count_parameters(model: ModelConfig, dims: Mapping[str, int], catalogue_size: int) -> int:
    """Count the parameters of `antdist.model.recommender.Recommender`."""
    d, experts = model.dim, model.experts
    count = 0
    for modality, width in dims.items():
        if model.mixture:
            added = experts * (d if modality == "price" else width)
            count += width * experts * d + added + 2 * width * experts
        else:
            count += width * d + d
    layer = 4 * (d * d + d) + (d * model.inner + model.inner) + (model.inner * d + d) + 4 * d
    count += model.max_length * d + 2 * d + model.layers * layer
    return count + (catalogue_size * d if model.item_embeddings else 0)


def checkpoint_bytes(parameters: int) -> int:
    """Return the size of weights and two moments in float32; headers add a few kilobytes."""
    return 3 * FLOAT * parameters


# -- the machine ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Machine:
    """One rank's share of a machine, and its nodes. What no calibration has measured is assumed."""

    name: str
    gpu: bool
    memory: float  # of the device (a CPU's is that of the host)
    overhead: float  # bytes of it that a process uses before it trains: libraries and their caches
    slack: float  # bytes that the allocator reserves per byte of activations
    peak: Mapping[str, float]  # operations per second of a matrix product, by precision
    bandwidth: float  # of the device's memory
    efficiency: float  # share of the peak that the products of a step reach
    fixed: float  # seconds of a micro-batch of any size
    ranks_a_node: int
    node_memory: float  # for the page cache
    link: float  # to ranks of the same node
    network: float  # to other nodes, of one rank
    lookup: float  # of features in the page cache, by one rank
    storage: float  # of one node

    def between(self, ranks: int) -> float:
        """Return the bytes per second that a rank exchanges with its peers."""
        return self.link if ranks <= self.ranks_a_node else self.network


GIB = float(1 << 30)
_NODE: dict[str, Any] = {"ranks_a_node": 8, "node_memory": 1024 * GIB, "network": 25e9, "lookup": 4e9, "storage": 2e9}
_GPU: dict[str, Any] = {"gpu": True, "overhead": 1e9, "slack": 1.2, "efficiency": 0.4, "fixed": 0.015, **_NODE}
# Vendors' figures: dense products (float32 without TF32), memory, its bandwidth, NVLink or PCIe one way
MACHINES = {
    "h100": Machine("h100", memory=80e9, peak={"bf16": 989e12, "fp32": 67e12}, bandwidth=3.35e12, link=450e9, **_GPU),
    "h200": Machine("h200", memory=141e9, peak={"bf16": 989e12, "fp32": 67e12}, bandwidth=4.8e12, link=450e9, **_GPU),
    "a100": Machine("a100", memory=80e9, peak={"bf16": 312e12, "fp32": 19.5e12}, bandwidth=2.0e12, link=300e9, **_GPU),
    "l4": Machine("l4", memory=24e9, peak={"bf16": 121e12, "fp32": 30e12}, bandwidth=0.3e12, link=25e9, **_GPU),
    # the machine of benchmarks/RESULTS.md, with four cores and passive waiting
    "cpu": Machine(
        "cpu",
        gpu=False,
        memory=24 * GIB,
        overhead=170e6,
        slack=1.4,
        peak={"bf16": 840e9, "fp32": 840e9},
        bandwidth=20e9,
        efficiency=0.6,
        fixed=0.02,
        ranks_a_node=4,
        node_memory=24 * GIB,
        link=1e9,
        network=1e9,
        lookup=2e9,
        storage=0.5e9,
    ),
}


# -- memory --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank at the peak of a step, by purpose: on its device, and beside it in host memory."""

    device: dict[str, float]
    host: dict[str, float]

    @property
    def total(self) -> float:
        return sum(self.device.values())


def state_memory(config: Config, parameters: int, ranks: int) -> dict[str, float]:
    """Return the bytes of weights, gradients and moments under the ZeRO stage, and of buffers.

    Stages 1 and 2 keep a second copy of each rank's share of the weights, and a buffer for gradients in transit.
    """
    training = config.training
    stage = training.zero_stage if training.engine == "deepspeed" else 0
    whole = float(FLOAT * parameters)
    state = {
        "weights": whole / (ranks if stage >= 3 else 1),
        "gradients": whole / (ranks if stage >= 2 else 1),
        "moments": 2 * whole / (ranks if stage >= 1 else 1),
    }
    if stage in (1, 2):
        zero = training.deepspeed.get("zero_optimization", {})
        buffers = 2 if zero.get("overlap_comm") else 1
        state["second weights"] = whole / ranks
        state["DeepSpeed's buffer"] = float(buffers * FLOAT * int(zero.get("reduce_bucket_size", BUCKET)))
    return state


def activations(
    step: Step, model: ModelConfig, loss: LossConfig, dims: Mapping[str, int], ranks: int, precision: str
) -> dict[str, float]:
    """Return the bytes that a forward pass keeps for the backward one, and the loss's largest block.

    Per distinct item its features before and after dropout, and the outputs of all experts; the items of all ranks; per
    token and layer 16 d-wide and 3 inner-wide tensors and two copies of the attention weights; 1.5 blocks of logits. In
    mixed precision the inputs of products take two bytes, everything else four.
    """
    work, low, d = step.rank, FLOAT if precision == "fp32" else FLOAT // 2, model.dim
    tower = sum(
        work.items * (2 * FLOAT * width + low * (_experts(model) + 1) * d + 8 * FLOAT * _experts(model))
        for width in dims.values()
    )
    gathered = step.items * low * gathered_width(work, model) * (2 if ranks > 1 else 1)
    layer = 8 * d * (FLOAT + low) + 3 * model.inner * low + 4 * model.heads * step.width * low
    # with recomputation one layer is complete at a time; the others keep only their inputs
    kept = layer + (model.layers - 1) * d * FLOAT if model.activation_checkpointing else model.layers * layer
    block = 1.5 * max(work.predictions, work.aligned) * min(work.candidates, loss.chunk)
    return {
        "item tower": tower + gathered,
        "transformer": work.tokens * (5 * d * FLOAT + kept),
        "softmax": FLOAT * (block + 3 * d * (work.predictions + work.candidates)),
    }


def gathered_width(work: Work, model: ModelConfig) -> int:
    """Return the numbers per item that ranks exchange.

    These are its embedding, and its text where images are aligned with texts.
    """
    return 2 * model.dim + 2 if work.aligned else model.dim


def cached_feature_bytes(data: Workload, loss: LossConfig, ranks: int, machine: Machine) -> float:
    """Return the bytes of features cached between steps (`antdist.training.feed.Feed.cached_features`).

    It is 0 if none are.
    """
    row = sum(FLOAT * width + 1 for width in data.dims.values()) + 8
    same_items = loss.negatives == "catalogue"
    held = row * (data.items / ranks if same_items else data.items)
    fits = machine.gpu and held <= CACHE_SHARE * machine.memory
    return held if same_items or fits else 0.0


def estimate_memory(config: Config, data: Workload, step: Step, ranks: int, machine: Machine) -> Memory:
    """Estimate the memory of one rank at the peak of a step."""
    parameters = count_parameters(config.model, data.dims, data.items)
    held = cached_feature_bytes(data, config.loss, ranks, machine)
    on_device = machine.gpu and held <= CACHE_SHARE * machine.memory
    device = {"process": machine.overhead, **state_memory(config, parameters, ranks)}
    if "DeepSpeed's buffer" in device and not machine.gpu:  # on a CPU only memory that is written counts
        device["DeepSpeed's buffer"] = min(device["DeepSpeed's buffer"], device["weights"])
    kept = activations(step, config.model, config.loss, data.dims, ranks, config.training.precision)
    device |= {name: machine.slack * size for name, size in kept.items()}
    step_features = step.rank.items * FLOAT * sum(data.dims.values()) * config.training.accumulation
    host = {
        "features read ahead": 0.0 if held else READ_AHEAD * step_features * (1 if machine.gpu else machine.slack),
        "popularity": 8.0 * data.items,
        "pending checkpoint": float(checkpoint_bytes(parameters)),
    }
    (device if on_device else host)["cached features"] = held
    return Memory(device, host) if machine.gpu else Memory(device | host, {})


# -- time ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """The costs of a run.

    `seconds` are those of a step by resource. Compute and interconnect alternate, reading overlaps.
    """

    data: Workload
    ranks: int
    step: Step
    memory: Memory
    seconds: dict[str, float]
    compute: dict[str, float]  # the parts of it
    steps_an_epoch: int
    epochs: int
    parameters: int
    read_a_second: float  # from storage, all nodes together
    checkpoint: int
    checkpoint_seconds: float
    bottleneck: str
    setting: str  # that relieves it

    @property
    def step_seconds(self) -> float:
        return step_seconds(self.seconds)

    @property
    def hours(self) -> float:
        """Hours of all epochs, without validations."""
        return self.step_seconds * self.steps_an_epoch * self.epochs / 3600


def step_seconds(seconds: Mapping[str, float]) -> float:
    return max(seconds["compute"] + seconds["interconnect"], seconds["feature look-up"], seconds["storage"])


def compute_seconds(config: Config, data: Workload, step: Step, ranks: int, machine: Machine) -> dict[str, float]:
    """Return the seconds of a step for products, other memory passes, the update, and its fixed cost."""
    training, model, times = config.training, config.model, config.training.accumulation
    parameters = count_parameters(model, data.dims, data.items)
    sharded = ranks if training.engine == "deepspeed" and training.zero_stage else 1
    peak = machine.peak["fp32" if training.precision == "fp32" else "bf16"]
    return {
        "products": times * useful_operations(step.rank, model, data.dims) / (peak * machine.efficiency),
        "passes over memory": times * moved_bytes(step, model, data.dims) / machine.bandwidth,
        "update": update_bytes(parameters / sharded) / machine.bandwidth,
        "fixed": times * machine.fixed,
    }


def exchanged_bytes(config: Config, step: Step, parameters: int, ranks: int) -> dict[str, float]:
    """Return the bytes that a rank sends in a step.

    It sends items' rows and their gradients, and gradients of the weights.
    """
    model, training = config.model, config.training
    low = FLOAT if training.precision == "fp32" else FLOAT // 2
    others = (ranks - 1) / ranks
    rows = 2 * others * step.items * gathered_width(step.rank, model) * low * training.accumulation
    # an all-reduce sends twice; stage 3 also gathers the weights in both passes
    passes = 4 if training.engine == "deepspeed" and training.zero_stage == 3 else 2
    return {"rows": rows, "gradients": passes * others * FLOAT * parameters}


def make_plan(config: Config, data: Workload, ranks: int, machine: Machine) -> Plan:
    """Compute all figures of a run on `ranks` ranks."""
    step = expected_step(config, data, ranks)
    parameters = count_parameters(config.model, data.dims, data.items)
    memory = estimate_memory(config, data, step, ranks, machine)
    compute = compute_seconds(config, data, step, ranks, machine)
    exchanged = exchanged_bytes(config, step, parameters, ranks)
    steps = max(1, math.ceil(data.predictions / config.stream.batch_size))
    nodes = math.ceil(ranks / machine.ranks_a_node)
    times = (
        0
        if memory.device.get("cached features") or memory.host.get("cached features")
        else config.training.accumulation
    )
    rows = times * step.rank.items
    missing = max(0.0, 1 - machine.node_memory / max(data.items * data.row_bytes, 1.0))
    pages = sum(math.ceil(data.row_bytes * width / sum(data.dims.values()) / PAGE) + 1 for width in data.dims.values())
    # each rank reads all sequences; the ranks of a node share its page cache
    read = data.sequence_bytes / steps + min(ranks, machine.ranks_a_node) * rows * missing * pages * PAGE
    seconds = {
        "compute": sum(compute.values()),
        "interconnect": sum(exchanged.values()) / machine.between(ranks),
        "feature look-up": rows * data.row_bytes / machine.lookup,
        "storage": read / machine.storage,
    }
    size = checkpoint_bytes(parameters)
    bottleneck = "memory" if memory.total > machine.memory else max(seconds, key=lambda name: seconds[name])
    return Plan(
        data=data,
        ranks=ranks,
        step=step,
        memory=memory,
        seconds=seconds,
        compute=compute,
        steps_an_epoch=steps,
        epochs=config.training.epochs,
        parameters=parameters,
        read_a_second=read * nodes / step_seconds(seconds),
        checkpoint=size,
        checkpoint_seconds=size / machine.storage,
        bottleneck=bottleneck,
        setting=_advise(bottleneck, config, memory, compute, exchanged, missing),
    )


def _advise(
    bottleneck: str,
    config: Config,
    memory: Memory,
    compute: Mapping[str, float],
    exchanged: Mapping[str, float],
    missing: float,
) -> str:
    """Name the setting that relieves the bottleneck."""
    training = config.training
    if bottleneck == "memory":
        largest = max(memory.device, key=lambda name: memory.device[name])
        return f"mostly {largest}: {_advise_memory(largest, config)}"
    if bottleneck == "compute":
        if config.stream.mode == "prefix":
            return "stream.mode=sequence: one pass predicts at every position"
        if compute["fixed"] + compute["update"] > 0.5 * sum(compute.values()):
            return "stream.batch_size: most of a step's cost does not depend on its size"
        if training.precision == "fp32":
            return "training.precision=bf16 on GPUs, then more of them (--gpus)"
        return "more GPUs (--gpus)"
    if bottleneck == "interconnect":
        if exchanged["rows"] > exchanged["gradients"]:
            return "loss.alignment=0 halves what is exchanged of items; training.precision=bf16 halves the bytes"
        if training.zero_stage == 3:
            return "training.zero_stage=1: weights stay on every rank"
        return "stream.batch_size: more predictions for each exchange of gradients"
    if bottleneck == "feature look-up":
        return "two-byte tables (featurize --dtype float16), more ranks to share the items (--gpus)"
    if missing:
        return "two-byte tables (featurize --dtype float16), more memory a node for the page cache"
    return "fewer nodes, since each reads all sequences; a larger stream.batch_size; or data.root on faster storage"


def _advise_memory(largest: str, config: Config) -> str:
    """Name the setting that shrinks the largest part of the memory."""
    training = config.training
    if largest in ("weights", "gradients", "moments", "second weights"):
        return f"training.zero_stage={min(training.zero_stage + 1, 3)}, or more ranks"
    if largest == "DeepSpeed's buffer":
        return "training.deepspeed.zero_optimization.reduce_bucket_size"
    if largest == "transformer" and not config.model.activation_checkpointing:
        return "model.activation_checkpointing=true, or training.accumulation"
    if largest == "softmax" and config.loss.chunk > 1024:
        return "loss.chunk=1024, or training.accumulation"
    if config.loss.negatives == "catalogue" and largest in ("item tower", "cached features", "softmax"):
        return "loss.negatives=sampled: a step embeds some items, not all"
    return f"training.accumulation={2 * training.accumulation}, a smaller stream.batch_size, or more ranks"
