"""antdist: pre-training and re-learning of multi-modal sequential recommenders that transfer.

`antdist.api` documents what this package offers: `antdist.prepare`, `featurize`, `pretrain`, `adapt`, `load` and more. They
are imported on first use, so that the command line starts at once.
"""

import importlib
from typing import TYPE_CHECKING, Any

from antdist.version import __version__ as __version__

if TYPE_CHECKING:
    from antdist.api import *  # noqa: F403
    from antdist.config.schema import PretrainConfig as PretrainConfig
    from antdist.config.schema import RelearnConfig as RelearnConfig
    from antdist.serving.loaded import LoadedModel as LoadedModel

_CLASSES = {
    "LoadedModel": "antdist.serving.loaded",
    "PretrainConfig": "antdist.config.schema",
    "RelearnConfig": "antdist.config.schema",
}


def __getattr__(name: str) -> Any:
    # importlib, as `from antdist import api` would ask this function for `api`
    module = _CLASSES.get(name, "antdist.api")
    if name not in __dir__():
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(module), name)


def __dir__() -> list[str]:
    return ["__version__", *_CLASSES, *importlib.import_module("antdist.api").__all__]
