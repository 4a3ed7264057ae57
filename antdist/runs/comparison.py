"""Compare a configuration with `config.yaml`: a start under an existing name must be of the same run."""

from __future__ import annotations

from collections.abc import Collection

import yaml

from antdist.config.load import dump_config
from antdist.config.schema import PretrainConfig, RelearnConfig, Resume
from antdist.config.semantics import resume_changes
from antdist.errors import UserError, redact
from antdist.io.files import write_atomically
from antdist.io.logs import get_logger
from antdist.runs.folder import RunFolder
from antdist.runs.locks import lock_files

logger = get_logger(__name__)


def record_config(folder: RunFolder, config: PretrainConfig | RelearnConfig, allowed: Collection[Resume] = ()) -> None:
    """Write `config.yaml`, here and to the copy of the folder, unless either holds another run.

    Args:
        allowed: what may differ besides keys that are free on a resume (`antdist.config.schema.Meaning`).

    Raises:
        UserError: the folder or its copy holds a run of another configuration, naming the keys that differ.
    """
    with lock_files(folder):
        refuse_other_config(folder, config, allowed)
        file, text = folder.config_file, redact(dump_config(config)).encode()
        with write_atomically(file) as partial:
            partial.write_bytes(text)
        if (remote := folder.open_copy()) is not None:
            remote.write(file.name, text)


def refuse_other_config(
    folder: RunFolder, config: PretrainConfig | RelearnConfig, allowed: Collection[Resume] = (), quiet: bool = False
) -> None:
    """Raise UserError if the folder or its copy holds a run of another configuration.

    If it holds this one, that is logged, unless `quiet`.
    """
    file, remote = folder.config_file, folder.open_copy()
    recorded = {str(folder): file.read_bytes()} if file.is_file() else {}
    if remote is not None and (text := remote.read(file.name)) is not None:
        recorded[remote.uri] = text
    given = yaml.safe_load(redact(dump_config(config)))
    for where, text in recorded.items():
        changed = resume_changes(type(config), yaml.safe_load(text), given)
        refused = [change for resume, change in changed.values() if resume not in allowed]
        if refused:
            raise UserError(
                f"a run of this name exists with another configuration: {'; '.join(refused[:5])}",
                where=where,
                remedy="choose another name=..., undo the change to continue that run, or remove its folder",
            )
        if where == next(iter(recorded)) and not quiet:
            logger.info(
                "; ".join([f"{where} exists: continuing that run", *(change for _, change in changed.values())])
            )
