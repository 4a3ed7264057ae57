"""`pretrain continue=MODEL`: a new run, on data that have grown or are others, that begins with the weights and the optimizer's
state of another run's last checkpoint. Its stream, its epochs and its learning rate begin anew."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from antdist.config.schema import PretrainConfig
from antdist.config.semantics import architecture
from antdist.errors import UserError
from antdist.runs.inputs import Inputs
from antdist.runs.parent import last_checkpoint
from antdist.tracking.registry import ResolvedModel
from antdist.tracking.run import clean_key

if TYPE_CHECKING:
    from antdist.data.domain import Domain


def check_continues(config: PretrainConfig, state: ResolvedModel, inputs: Inputs) -> list[str]:
    """That the model of a training state is the configured one and reads the features of the run's domains; gives what is worth
    knowing.

    Raises:
        UserError: another model, other features, a state that does not say what it is of.
    """
    from antdist.model.io import CARD, read_card

    assert config.parent is not None
    if not (state.folder / CARD).is_file():
        raise UserError(
            "its training state does not say which model and features it is of",
            where=config.parent,
            remedy="continue from a model that this version of antdist has pre-trained",
        )
    card = read_card(state.folder)
    was, due = card.config.model_dump(), config.model.model_dump()
    for key in architecture():
        if was[key] != due[key]:
            raise UserError(
                f"is {due[key]!r}, but {was[key]!r} of {config.parent}",
                where=f"model.{key}",
                remedy="continue with the model: section of that run, or start a run of its own without continue",
            )
    for modality, identity in inputs.catalogue.identities.items():
        learned = card.features[modality].identity
        if identity != learned:
            raise UserError(
                f"the {modality} features of the domains are of another encoder ({identity}) than those that {config.parent} has "
                f"learned ({learned})",
                where="features",
                remedy="featurize the domains with that encoder, in one call",
            )
    schedule = config.training.schedule
    warmup = f" after {schedule.warmup_steps} steps of warm-up" if schedule.warmup_steps else ""
    return [
        f"continues {config.parent} with its weights and optimizer state; epochs and learning rate begin anew, the latter at "
        f"{config.training.learning_rate}{warmup}; data: {', '.join(data_since(state, inputs.domains).values())}"
    ]


def data_since(state: ResolvedModel, domains: list[Domain]) -> dict[str, str]:
    """By domain what became of its data since the state, in words."""
    found = last_checkpoint(state.folder)
    then = dict(found.progress["stream"]["order"]["domains"])
    told = {}
    for domain in domains:
        before, now = then.get(domain.name), domain.fingerprint
        if before is None:
            told[domain.name] = f"{domain.name} {now[:12]} (new)"
        elif before == now:
            told[domain.name] = f"{domain.name} {now[:12]} (as before)"
        else:
            became = "grown" if before in domain.manifest.ancestors else "prepared anew"
            told[domain.name] = f"{domain.name} {before[:12]} -> {now[:12]} ({became})"
    return told | {name: f"{name} {then[name][:12]} (left out)" for name in then.keys() - told.keys()}


def grown_since(domains: list[Domain]) -> list[str]:
    """What is worth knowing of domains that a run goes on with as they were, though they have grown since it began."""
    from antdist.data.manifest import read_manifest

    return [
        f"domain {domain.name} has grown since this run began, which goes on with the data that it began with ({domain.fingerprint[:12]}); "
        "a run on the grown data: name=NEW continue=MODEL"
        for domain in domains
        if domain.fingerprint in read_manifest(domain.folder).ancestors
    ]


def origin_of(config: PretrainConfig, state: ResolvedModel, domains: list[Domain]) -> dict[str, Any]:
    """Where a run comes from, to be kept with it: the parent, and tags that say what became of the data."""
    if config.parent is None:  # resumed: the same run, whose parent is the same
        kept = {key: value for key, value in state.tags.items() if key.startswith("continued.")}
        return {"parent": state.tags.get("parent"), "tags": kept}
    since = data_since(state, domains)
    return {"parent": state.uri, "tags": {f"continued.{clean_key(name)}": told for name, told in since.items()}}
