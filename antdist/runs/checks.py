"""Checks before a run takes a cluster's time, cheap ones first; they result in the run's context.

`antdist validate` prints the report of these checks.
"""

from __future__ import annotations

import math
from pathlib import Path

from antdist.config.schema import PretrainConfig, RelearnConfig
from antdist.data.cache import CACHE_KEY, GB, open_cache
from antdist.data.places import PARALLEL_FETCHES
from antdist.distributed.ray_session import is_inside_job
from antdist.errors import UserError, redact
from antdist.features.table import FeatureTable, TablePart
from antdist.io.storage import is_uri
from antdist.model.recommender import Recommender
from antdist.report import count
from antdist.runs.context import AdaptContext, CheckReport, PretrainContext
from antdist.runs.continuing import appended_notes, check_continues
from antdist.runs.folder import absolute, run_folder, storage
from antdist.runs.inputs import Inputs, Target, open_pretrain_inputs, open_target
from antdist.runs.parent import load_parent, parent_notes, resolve_parent, resolve_state
from antdist.runs.trials import strategies_of
from antdist.tracking.registry import check_model_name
from antdist.tracking.store import check_reachable, tracking_uri
from antdist.training.adaptation import adapt, needs_parent
from antdist.training.checkpoints.remote import Remote
from antdist.training.engines.deepspeed import check_with_deepspeed, deepspeed_config

MIB = 1024 * 1024


def check_pretrain(config: PretrainConfig) -> PretrainContext:
    """Check and resolve a pre-training. Raises UserError at the first thing that would stop it."""
    report = CheckReport()
    store = _check_common(config, report)
    folder = run_folder(config)
    record = folder.read_record() or folder.read_copied_record()
    recorded = record.data if record else None
    inputs, appended = open_pretrain_inputs(config, recorded or {})
    _check_inputs(inputs, config, report)
    report.notes += appended_notes(inputs.domains, appended)
    start = resolve_state(config, store, folder, report.notes.append)
    if start is not None:
        report.checked.append(f"training state of {config.resume or config.parent}")
        if config.parent is not None:
            report.notes += check_continues(config, start, inputs)
    return PretrainContext(config, store, folder, start, report, inputs.domains, recorded)


def check_relearn(config: RelearnConfig) -> AdaptContext:
    """Check and resolve an adaptation. Raises UserError at the first thing that would stop it."""
    report = CheckReport()
    store = _check_common(config, report)
    folder = run_folder(config)
    start = resolve_parent(config, store, folder, report.notes.append)
    parent = load_parent(start)
    target = Target(config, open_target(config), parent)
    inputs = check_strategies(target, report)
    _check_inputs(inputs, config, report)
    if parent is not None:
        report.notes += parent_notes(config, parent)
    absent = [modality for modality in config.model.modalities if modality not in target.modalities]
    if absent:
        report.notes.append(f"no item of {config.target} has {' or '.join(absent)}: models do not read it")
    return AdaptContext(config, store, folder, start, report, target.domain)


def resolve_trained(config: RelearnConfig) -> AdaptContext:
    """Resolve an adaptation to judge its trials: without its parent, features and shards."""
    check_settings(config)
    store = tracking_uri(config.tracking, storage(config.ray))
    return AdaptContext(config, store, run_folder(config), None, CheckReport(), open_target(config))


def check_strategies(target: Target, report: CheckReport) -> Inputs:
    """Check that each strategy can start; return the last one's inputs. Raises UserError."""
    config, parent = target.config, target.parent
    for strategy in strategies_of(config):
        inputs = target.inputs(strategy, config.seeds[0])
        inherited = parent if needs_parent(strategy) else None
        adapt(
            strategy,
            config.model,
            inputs.catalogue.dims,
            parent=inherited.model if inherited else None,
            variants=config.variants,
            catalogue_size=inputs.catalogue.size if config.model.item_embeddings else None,
        )
        report.checked.append(f"strategy {strategy}" + (f" from {inherited.uri}" if inherited else ""))
    return inputs


def check_settings(config: PretrainConfig | RelearnConfig) -> None:
    """Check the configuration alone, without its data, cluster or stores. Raises UserError."""
    if isinstance(config, RelearnConfig) and config.target is None:
        raise UserError(
            "no target is named", where="target", remedy="give target=NAME, a prepared domain below data.root"
        )
    if isinstance(config, PretrainConfig) and config.model.item_embeddings:
        _contradiction(
            "model.item_embeddings", "they belong to the items of a target", "set it to false, or run relearn"
        )
    if config.tracking.registered_model is not None:
        check_model_name(config.tracking.registered_model)
    deepspeed_config(config.training)
    if config.training.precision == "fp16" and config.ray.gpus_per_worker == 0:
        _contradiction("training.precision", "fp16 needs a GPU", "set fp32, or ray.gpus_per_worker=1")
    if config.training.engine == "plain" and config.training.deepspeed:
        _contradiction(
            "training.deepspeed", "the plain engine does not read it", "remove it, or set training.engine=deepspeed"
        )
    if config.training.schedule.kind == "cosine" and config.training.schedule.milestones:
        _contradiction("training.schedule.milestones", "the cosine schedule does not read them", "remove them")
    check_with_deepspeed(config.training)
    if config.loss.log_q and config.loss.negatives == "catalogue":
        _contradiction(
            "loss.log_q", "the full catalogue is not a sample, so there is nothing to correct", "set it to false"
        )


def _check_common(config: PretrainConfig | RelearnConfig, report: CheckReport) -> str:
    """Check settings and stores; return the tracking store's URI. Raises UserError."""
    if is_inside_job() and not Path(config.ray.storage).is_absolute():
        raise UserError(
            f"{config.ray.storage!r} would lie in the job's copy of the working folder, which Ray removes",
            where="ray.storage",
            remedy="give an absolute path, to a folder that all nodes share",
        )
    remote = config.ray.remote_storage
    if remote and is_inside_job() and "://" not in remote and not Path(remote).is_absolute():
        raise UserError(
            f"{remote!r} would lie in the job's copy of the working folder, which Ray removes",
            where="ray.remote_storage",
            remedy="give a URI or an absolute path",
        )
    if config.data.root.startswith("memory:"):
        raise UserError(
            "only one process can read it, and it ends with that process", where="data.root", remedy="give another"
        )
    check_settings(config)
    report.checked.append("configuration")
    if config.ray.remote_storage is not None:
        Remote(absolute(config.ray.remote_storage)).check()
        report.checked.append(f"remote storage {redact(config.ray.remote_storage)}")
    store = tracking_uri(config.tracking, storage(config.ray))
    try:
        check_reachable(store)
        report.checked.append(f"tracking store {redact(store)}")
    except UserError as error:
        if not config.tracking.offline_ok:
            raise
        report.notes.append(f"offline, since tracking.offline_ok is set: records wait on disk ({error})")
    return store


def _contradiction(key: str, what: str, remedy: str) -> None:
    raise UserError(what, where=key, remedy=remedy)


def _check_inputs(inputs: Inputs, config: PretrainConfig | RelearnConfig, report: CheckReport) -> None:
    for domain in inputs.domains:
        m = domain.manifest
        report.checked.append(
            f"domain {domain.name}: {count(m.users, 'user')}, {count(m.items, 'item')}, {count(m.interactions, 'interaction')}, "
            f"fingerprint {domain.fingerprint[:12]}"
        )
    for modality, identity in inputs.catalogue.identities.items():
        report.checked.append(f"features: {identity}")
        assert modality in inputs.catalogue.dims
    size = inputs.catalogue.verify() + sum(domain.verify_sequences() for domain in inputs.domains)
    if is_uri(config.data.root):
        report.checked.append(
            f"all shards and features have their recorded sizes ({size / MIB:,.1f} MiB); each is verified when fetched"
        )
        _check_cache(inputs, config, report)
    else:
        report.checked.append(f"every byte of shards and features that training reads ({size / MIB:,.1f} MiB)")
    report.figures["steps an epoch"] = inputs.stream.steps_per_epoch
    report.figures["predictions an epoch"] = inputs.stream.predictions_per_epoch
    report.figures["estimated memory a worker (MiB)"] = round(estimate_memory(config, inputs) / MIB)


def _check_cache(inputs: Inputs, config: PretrainConfig | RelearnConfig, report: CheckReport) -> None:
    """Check that the cache can hold what is in use together, on a disk like this machine's.

    Raises:
        UserError: it cannot, with the size that would be enough.
    """
    cache = open_cache(config.data.cache, config.data.cache_gb)
    tables = inputs.catalogue.remote_tables()
    shards, features = inputs.stream.working_set_bytes(), sum(table.bytes for table in tables)
    largest = max((part.bytes for part in _parts(tables)), default=0)
    # of tables that do not fit, a rank has a part in use and some on their way
    least = shards + min(features, 2 * config.ray.workers * (1 + PARALLEL_FETCHES) * largest)
    room, all_of_it = cache.usable_bytes(), shards + features

    def enough(size: int) -> str:
        return f"{math.ceil(size / GB * 1000) / 1000:g}"

    if room < least:
        full = room < cache.bound
        raise UserError(
            f"the cache has room for {room / GB:.3g} GB, and {enough(least)} GB are in use together: shards that are shuffled "
            f"together, and read ahead, {shards / GB:.3g} GB; features {(least - shards) / GB:.3g} GB at least",
            where=f"{CACHE_KEY} {cache.folder}" if full else "data.cache_gb",
            remedy=(
                f"free its disk, or name a larger one with {CACHE_KEY}"
                if full
                else f"set data.cache_gb={enough(least)}"
            )
            + ", or lower stream.streams or stream.window_shards",
        )
    report.checked.append(f"cache {cache.folder}: room for {room / GB:.3g} GB, {least / GB:.3g} GB needed")
    if room < all_of_it:
        again = "are fetched at the start, and again for each validation"
        if config.loss.negatives != "catalogue":
            micro = config.stream.batch_size / config.training.accumulation
            items = min(inputs.catalogue.size, 2 * micro + config.loss.samples)
            step = sum(part.bytes * min(1.0, items * part.items / inputs.catalogue.size) for part in _parts(tables))
            again = f"are fetched again as steps ask for their items, up to {step / GB:.3g} GB a step"
        report.notes.append(
            f"of the features, {features / GB:.3g} GB, the cache holds {(room - shards) / GB:.3g} GB: they {again}. "
            f"data.cache_gb={enough(all_of_it)} would hold them all"
        )


def _parts(tables: list[FeatureTable]) -> list[TablePart]:
    return [part for table in tables for part in table.meta.parts]


def estimate_memory(config: PretrainConfig | RelearnConfig, inputs: Inputs) -> int:
    """Estimate the bytes of one worker's step at its peak: weights, optimizer, tower, transformer, softmax.

    The tower keeps each distinct item's K expert outputs, the transformer about 16 d-wide and 2 inner-wide tensors a
    token and layer plus attention weights, the softmax three chunks of logits.
    """
    m, catalogue = config.model, inputs.catalogue
    size = catalogue.size if m.item_embeddings else None
    parameters = sum(p.numel() for p in Recommender(m, catalogue.dims, size).parameters())
    workers = config.ray.fewest  # each has the more to hold
    shared = workers if config.training.zero_stage >= 1 and config.training.engine == "deepspeed" else 1
    state = parameters * (8 + 8 / shared)
    micro = config.stream.batch_size / config.training.accumulation
    full = config.loss.negatives == "catalogue"
    distinct = catalogue.size if full else min(catalogue.size, 2 * micro + config.loss.samples)
    features = sum(catalogue.dims.values())
    tower = distinct / workers * 4 * (2 * features + len(catalogue.dims) * 2 * m.experts * m.dim) + distinct * 8 * m.dim
    tokens = micro / workers * (m.max_length / 2 if config.stream.mode == "prefix" else 1.2)
    layer = 16 * m.dim + 2 * m.inner + 3 * m.heads * min(m.max_length, 50)
    transformer = tokens * 4 * layer * (1 if m.activation_checkpointing else m.layers)
    candidates = catalogue.size if full else min(catalogue.size, micro)
    softmax = 3 * 4 * micro / workers * min(config.loss.chunk, candidates)
    return int(state + tower + transformer + softmax)
