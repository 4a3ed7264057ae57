"""`pretrain continue=MODEL`: a new run from the weights and optimizer state of another run.

Its data may be appended domains or others; its stream, epochs and learning rate begin anew.
"""

from __future__ import annotations

from collections.abc import Sequence

from antdist.config.schema import PretrainConfig
from antdist.config.semantics import architecture
from antdist.data.domain import Domain
from antdist.errors import UserError
from antdist.model.io import CARD, read_card
from antdist.runs.inputs import Inputs
from antdist.runs.parent import last_checkpoint
from antdist.runs.records import RunRecord
from antdist.tracking.resolve import ResolvedModel
from antdist.tracking.tags import clean_key


def check_continues(config: PretrainConfig, state: ResolvedModel, inputs: Inputs) -> list[str]:
    """Check that a training state fits the configured model and the domains' features; return notes.

    Raises:
        UserError: it is of another model or of other features, or does not record them.
    """
    assert config.parent is not None
    if not (state.folder / CARD).is_file():
        raise UserError(
            "its training state does not record its model and features",
            where=config.parent,
            remedy="continue from a model that this version of antdist has pre-trained",
        )
    card = read_card(state.folder)
    old, new = card.config.model_dump(), config.model.model_dump()
    for key in architecture():
        if old[key] != new[key]:
            raise UserError(
                f"is {new[key]!r}, but {old[key]!r} in {config.parent}",
                where=f"model.{key}",
                remedy="continue with the model: section of that run, or start a new run without continue",
            )
    for modality, identity in inputs.catalogue.identities.items():
        learned = card.features[modality].identity
        if identity != learned:
            raise UserError(
                f"the {modality} features of the domains are from another encoder ({identity}) than those that "
                f"{config.parent} learned from ({learned})",
                where="features",
                remedy="featurize the domains with that encoder, in one call",
            )
    schedule = config.training.schedule
    warmup = f" after {schedule.warmup_steps} steps of warm-up" if schedule.warmup_steps else ""
    return [
        f"continues {config.parent} with its weights and optimizer state; epochs and learning rate begin anew, the latter at "
        f"{config.training.learning_rate}{warmup}; data: {', '.join(compare_data(state, inputs.domains).values())}"
    ]


def compare_data(state: ResolvedModel, domains: Sequence[Domain]) -> dict[str, str]:
    """Describe for each domain how its data changed since the training state was saved."""
    found = last_checkpoint(state.folder)
    then = dict(found.document["stream"]["order"]["domains"])
    changes = {}
    for domain in domains:
        before, now = then.get(domain.name), domain.fingerprint
        if before is None:
            changes[domain.name] = f"{domain.name} {now[:12]} (new)"
        elif before == now:
            changes[domain.name] = f"{domain.name} {now[:12]} (as before)"
        else:
            how = "grown" if before in domain.manifest.ancestors else "prepared anew"
            changes[domain.name] = f"{domain.name} {before[:12]} -> {now[:12]} ({how})"
    return changes | {name: f"{name} {then[name][:12]} (left out)" for name in then.keys() - changes.keys()}


def appended_notes(domains: Sequence[Domain], appended: Sequence[str]) -> list[str]:
    """Notes on domains that were appended to since the run began, which goes on with the older data."""
    return [
        f"domain {domain.name} was appended to since this run began; the run goes on with the data it began with "
        f"({domain.fingerprint[:12]}). To train on all data: name=NEW continue=MODEL"
        for domain in domains
        if domain.name in appended
    ]


def with_origin(
    record: RunRecord, config: PretrainConfig, state: ResolvedModel, domains: Sequence[Domain]
) -> RunRecord:
    """Add the parent to a run's record, and tags that describe how the data changed since."""
    if config.parent is None:  # resumed: the same run, with the same parent
        tags = {key: value for key, value in state.tags.items() if key.startswith("continued.")}
        return record.model_copy(update={"parent": state.tags.get("parent"), "tags": tags})
    changes = compare_data(state, domains)
    tags = {f"continued.{clean_key(name)}": change for name, change in changes.items()}
    return record.model_copy(update={"parent": state.uri, "tags": tags})
