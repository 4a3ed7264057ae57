"""`antdist plan`: the costs of a run, from its configuration and data (arithmetic: `costs.py`)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from antdist.config.schema import RelearnConfig
from antdist.errors import UserError
from antdist.planning.calibration import DIMS, Calibration
from antdist.planning.costs import (
    CACHE_SHARE,
    GIB,
    MACHINES,
    QUANTILES,
    Config,
    FloatArray,
    Machine,
    Plan,
    Popularity,
    Workload,
    count_popularity,
    count_windows,
    estimate_lengths,
    make_plan,
    zipf,
)
from antdist.report import Report, count

if TYPE_CHECKING:
    from antdist.data.domain import Domain

EXPONENT = 0.8  # of popularity, where no data are known
INTERACTION, USER = 12, 24  # bytes in a shard: index and time; offset and id
# users, items, interactions of Food, Movies, Home and Clothing (spec, section 1)
PAPER = (2_293_714, 657_018, 21_420_242)
LARGE = (1_000_000_000, 100_000_000, 10_000_000_000)


@dataclass(frozen=True, repr=False)
class PlanReport(Report):
    """A plan per workload, and the assumptions."""

    table_key = "plans"

    title: str
    plans: list[Plan]
    machine: Machine
    assumptions: list[str]

    def lines(self) -> list[str]:
        lines = [self.title]
        for plan in self.plans:
            lines += ["", *_format_plan(plan, self.machine)]
        return [*lines, "", "assumptions:", *(f"  {line}" for line in self.assumptions)]

    def to_json(self) -> dict[str, Any]:
        return {
            "title": self.title,
            "machine": vars(self.machine) | {"peak": dict(self.machine.peak)},
            "plans": [_plan_document(plan) for plan in self.plans],
            "assumptions": self.assumptions,
        }


def plan_run(
    config: Config,
    *,
    gpus: int | None = None,
    workers: int | None = None,
    kind: str = "h100",
    calibration: Calibration | None = None,
) -> PlanReport:
    """Plan the configuration's data, if it names any.

    For a pre-training also the paper's data and ten billion interactions.

    Args:
        gpus: one per worker; 0: none; None: as configured.
        workers: without GPUs; None: `ray.workers`.
        kind: of GPU (`MACHINES`).
        calibration: measured figures in place of assumed ones.

    Raises:
        UserError: workers and GPUs differ in number; the calibration is of another kind of machine; data are missing; a batch
            has fewer windows than there are ranks.
    """
    if gpus is None:
        gpus = config.ray.workers if config.ray.gpus_per_worker else 0
    if gpus and workers not in (None, gpus):
        raise UserError(
            f"{workers} workers on {gpus} GPUs: each worker uses one",
            where="--workers",
            remedy="leave it out, or --gpus 0",
        )
    ranks = gpus or workers or config.ray.workers
    machine = MACHINES[kind if gpus else "cpu"]
    if calibration is not None:
        if (calibration.device == "gpu") != machine.gpu:
            wanted = "a machine with a GPU" if gpus else "one without a GPU"
            raise UserError(
                f"was taken on a {calibration.device}",
                where="--calibration",
                remedy=f"calibrate {wanted}, or change --gpus",
            )
        machine = calibration.apply_to(machine)
    if not machine.gpu:  # ranks of a node share its memory and, as assumed, its cores
        shared = min(ranks, machine.ranks_a_node)
        machine = replace(machine, memory=machine.memory / shared)
        if calibration is None:
            peak = {precision: rate / shared for precision, rate in machine.peak.items()}
            machine = replace(machine, peak=peak, bandwidth=machine.bandwidth / shared)
    plans = [make_plan(config, data, ranks, machine) for data in _workloads(config)]
    for plan in plans:
        if plan.step.windows < ranks:
            raise UserError(
                f"a micro-batch has {plan.step.windows:.0f} windows, fewer than the {ranks} ranks",
                where="stream.batch_size",
                remedy="raise it, or lower --gpus, --workers or training.accumulation",
            )
    stage = f"ZeRO {config.training.zero_stage}" if config.training.engine == "deepspeed" else "plain engine"
    title = (
        f"{config.name}: {ranks} rank{'s' if ranks > 1 else ''} on {machine.name}, {config.training.precision}, {stage}, "
        f"batch {config.stream.batch_size:,} ({config.stream.mode}), {config.loss.negatives} negatives"
    )
    return PlanReport(title, plans, machine, _assumptions(config, machine, calibration))


def _workloads(config: Config) -> list[Workload]:
    relearning = isinstance(config, RelearnConfig)
    names = ([config.target] if config.target else []) if isinstance(config, RelearnConfig) else config.data.domains
    if relearning and not names:
        raise UserError(
            "no target is named", where="target", remedy="give target=NAME, a prepared domain below data.root"
        )
    own = [_own_data(config, names)] if names else []
    if relearning:
        return own
    dims: dict[str, int] = dict(own[0].dims) if own else {m: DIMS[m] for m in config.model.modalities}
    width = 2 if config.data.feature_dtype == "float16" else 4
    row = float(width * sum(dims.values()))
    return [
        *own,
        workload_of_size("the paper's pre-training", *PAPER, dims, row),
        workload_of_size("ten billion interactions", *LARGE, dims, row),
    ]


def workload_of_size(
    name: str, users: int, items: int, interactions: int, dims: dict[str, int], row_bytes: float
) -> Workload:
    """Make a workload from its size alone."""
    return Workload(
        name,
        users,
        items,
        interactions,
        estimate_lengths(interactions / users),
        zipf(items, interactions - 2 * users, EXPONENT),
        float(INTERACTION * interactions + USER * users),
        row_bytes,
        dims,
    )


def _own_data(config: Config, names: list[str]) -> Workload:
    """Read the figures of prepared domains from manifests, first shards, popularity and tables.

    Raises UserError.
    """
    from antdist.data.stream.order import quotas
    from antdist.runs.inputs import open_domains

    domains = open_domains(config.data, names, "target" if isinstance(config, RelearnConfig) else "data.domains")
    manifests = [domain.manifest for domain in domains]
    prefix = config.stream.mode == "prefix"
    units = [max(m.interactions - 3 * m.users, 1) if prefix else m.users for m in manifests]
    taken = [quota / unit for quota, unit in zip(quotas(units, config.stream.mixing), units, strict=True)]
    parts = [count_popularity(domain.popularity()) for domain in domains]
    popularity = Popularity(
        np.concatenate([part.counts * share for part, share in zip(parts, taken, strict=True)]),
        np.concatenate([part.many for part in parts]),
    )
    users = sum(m.users * share for m, share in zip(manifests, taken, strict=True))
    interactions = sum(m.interactions * share for m, share in zip(manifests, taken, strict=True))
    shards = sum(
        share * sum(shard.bytes for shard in m.sequence_shards) for m, share in zip(manifests, taken, strict=True)
    )
    dims, row_bytes = _features(config, domains)
    return Workload(
        ", ".join(names),
        round(users),
        sum(m.items for m in manifests),
        round(interactions),
        _lengths(domains, [m.users * share for m, share in zip(manifests, taken, strict=True)]),
        popularity,
        float(shards),
        row_bytes,
        dims,
    )


def _lengths(domains: list[Domain], users: list[float]) -> FloatArray:
    """Sample users' lengths from the domains' first shards, in proportion to their users in an epoch."""
    chosen = []
    for domain, share in zip(domains, users, strict=True):
        first = next(number for number, shard in enumerate(domain.manifest.sequence_shards) if shard.users)
        lengths = np.sort(np.concatenate([np.diff(block.offsets) for block in domain.blocks(first)]))
        places = np.linspace(0, len(lengths) - 1, max(1, round(QUANTILES * share / sum(users))))
        chosen.append(lengths[places.round().astype(np.int64)].astype(np.float64))
    return np.concatenate(chosen)


def _features(config: Config, domains: list[Domain]) -> tuple[dict[str, int], float]:
    """Return the tables' widths (the paper's where there is none), and the bytes of a row on disk."""
    from antdist.features.catalogue import open_optional_table

    dims: dict[str, int] = {}
    row = 0.0
    for modality in config.model.modalities:
        tables = [table for domain in domains if (table := open_optional_table(domain, modality)) is not None]
        dims[modality] = tables[0].meta.dim if tables else DIMS[modality]
        row += dims[modality] * (2 if tables and tables[0].meta.dtype == "float16" else 4)
    return dims, row


def _format_plan(plan: Plan, machine: Machine) -> list[str]:
    data, step = plan.data, plan.step
    shown = sorted(plan.memory.device.items(), key=lambda entry: -entry[1])
    parts = ", ".join(f"{name} {_bytes(size)}" for name, size in shown[:4] if size)
    seconds = ", ".join(f"{name} {_seconds(value)}" for name, value in plan.seconds.items())
    host = sum(plan.memory.host.values())
    fits = "" if plan.memory.total <= machine.memory else f", MORE THAN THE {_bytes(machine.memory)} AVAILABLE"
    return [
        f"{data.name}: {count(data.interactions, 'interaction')}, {count(data.users, 'user')}, {count(data.items, 'item')}",
        f"  a step           {step.rank.predictions * plan.ranks:,.0f} predictions, {step.items:,.0f} distinct items, "
        f"{step.rank.candidates:,.0f} candidates",
        f"  memory a rank    {_bytes(plan.memory.total)} ({parts}){fits}"
        + (f"; of the host {_bytes(host)}" if host else ""),
        f"  step time        {_seconds(plan.step_seconds)} ({seconds})",
        f"  read             {_bytes(plan.read_a_second)}/s from storage, all nodes together",
        f"  checkpoint       {_bytes(plan.checkpoint)}, written in {_seconds(plan.checkpoint_seconds)}",
        f"  training         {plan.steps_an_epoch:,} steps an epoch, {_hours(plan.hours / plan.epochs)}; "
        f"{count(plan.epochs, 'epoch')} {_hours(plan.hours)}",
        f"  first bottleneck {plan.bottleneck}; to relieve it: {plan.setting}",
    ]


def _plan_document(plan: Plan) -> dict[str, Any]:
    data, step = plan.data, plan.step
    return {
        "name": data.name,
        "users": data.users,
        "items": data.items,
        "interactions": data.interactions,
        "distinct items a step": step.items,
        "a rank's part": vars(step.rank),
        "parameters": plan.parameters,
        "memory a rank": {"device": plan.memory.device, "host": plan.memory.host, "device in all": plan.memory.total},
        "seconds a step": {**plan.seconds, "in all": plan.step_seconds, "of compute": plan.compute},
        "bytes read a second": plan.read_a_second,
        "checkpoint bytes": plan.checkpoint,
        "checkpoint seconds": plan.checkpoint_seconds,
        "steps an epoch": plan.steps_an_epoch,
        "epochs": plan.epochs,
        "hours": plan.hours,
        "bottleneck": plan.bottleneck,
        "setting": plan.setting,
    }


def _assumptions(config: Config, machine: Machine, calibration: Calibration | None) -> list[str]:
    peak = machine.peak["fp32" if config.training.precision == "fp32" else "bf16"]
    measured = "measured" if calibration else "assumed, not measured (--calibration)"
    where = "" if calibration or not machine.gpu else "; the share is that of a CPU's run in benchmarks/RESULTS.md"
    mean = count_windows(estimate_lengths(PAPER[2] / PAPER[0]), config.model.max_length, config.stream.mode)
    return [
        f"{measured}: {_bytes(machine.memory)} a rank, products {peak / 1e12:.3g} TFLOP/s of which a step reaches "
        f"{100 * machine.efficiency:.0f} %, memory {_bytes(machine.bandwidth)}/s, {1000 * machine.fixed:.0f} ms a micro-batch{where}",
        f"assumed: {machine.ranks_a_node} ranks a node, {_bytes(machine.node_memory)} a node for the page cache, {_bytes(machine.link)}/s "
        f"between ranks of a node, {_bytes(machine.network)}/s a rank between nodes, features from the page cache "
        f"{_bytes(machine.lookup)}/s a rank, storage {_bytes(machine.storage)}/s a node",
        f"popularity where no data are known: (rank + 10) ** -{EXPONENT}; users' lengths log-normal above the shortest, "
        f"{mean.tokens / max(mean.predictions, 1e-9):.2f} tokens a prediction in the paper's data",
        f"features stay on a GPU where they take at most {100 * CACHE_SHARE:.0f} % of it; reading overlaps with computing, "
        "exchange between ranks does not; validations, start and failures are not counted",
    ]


def _bytes(size: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.3g} {unit}"
        size /= 1024
    return f"{size:,.1f} GiB" if size < 10_000 else f"{size * GIB / 2**40:,.1f} TiB"


def _seconds(value: float) -> str:
    return f"{1000 * value:.3g} ms" if value < 1 else f"{value:,.1f} s"


def _hours(value: float) -> str:
    return f"{value:,.1f} h" if value >= 1 else f"{60 * value:.3g} min"
