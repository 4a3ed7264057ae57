"""`make demo`: the main job from nothing to recommendations for all, on one machine, on generated data.

Each stage is what a verb of the command line does; the command is shown before it runs.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from antdist import api
from antdist.data.domain import open_domain
from antdist.errors import UserError
from antdist.io.logs import setup_logging
from antdist.report import Report

OUT = Path("demo-out")
CONFIGS = Path("configs")
USERS_SHOWN = 3


def main(arguments: Sequence[str] = ()) -> None:
    """Run it all below `demo-out/`, replacing what an earlier demo left there. `arguments` are `key=value` overrides of
    both configurations' `ray` and `training` sections (tests make it small)."""
    start = time.monotonic()
    if not CONFIGS.is_dir():
        raise UserError("no folder configs here", remedy="run `make demo` in the project's folder")
    shutil.rmtree(OUT, ignore_errors=True)
    target, names = _make_world()
    # resolved before hours of work
    pretrain_config = api.pretrain_config(CONFIGS / "demo.yaml", arguments)
    adapt_config = api.adapt_config(CONFIGS / "demo-relearn.yaml", [f"target={target}", *arguments])

    from antdist.distributed.ray_session import ray_session
    from antdist.tracking.store import ui_command

    domains = [OUT / "data" / name for name in names]
    storage, target_data = OUT / "runs", OUT / "data" / target
    with ray_session(pretrain_config.ray):
        _stage("prepare features", f"antdist featurize {OUT}/data/* --text hashed --image histogram --price quantile")
        _print(api.featurize(domains, text="hashed", image="histogram", price="quantile", workers=2))
        _stage("pre-train", f"antdist pretrain --config {CONFIGS}/demo.yaml")
        _print(api.pretrain(pretrain_config))
        _stage("re-learn", f"antdist relearn --config {CONFIGS}/demo-relearn.yaml target={target}")
        adapted = api.adapt(adapt_config)
    model = adapted.model
    _stage("recommend", f"antdist recommend {model} {target_data} --user ... --storage {storage}")
    for user in open_domain(target_data).user_ids()[:USERS_SHOWN]:
        found = api.recommend(model, target_data, user=user, n=3, storage=storage)
        print(f"{user} last took: {'; '.join(item.title for item in found.history[-2:])}")
        for item in found.items:
            print(f"    next: {item.title}  ({item.score:.2f})")
    out = f"{OUT}/scores/{target}"
    _stage("score", f"antdist score {model} {target_data} --out {out} --storage {storage} --workers 0")
    _print(api.score(model, target_data, out, storage=storage, workers=0))
    _stage("result")
    _print(adapted)
    print(f"data in {OUT}/data, runs and models in {storage}")
    print(f"MLflow's pages: {ui_command(adapted.tracking_uri)}")
    print(f"{time.monotonic() - start:.0f} s in all")


def _make_world() -> tuple[str, list[str]]:
    _stage("generate a world", f"antdist synth {OUT}/source")
    world = api.synth(OUT / "source")
    _print(world)
    names = [domain.name for domain in world.domains]
    _stage("prepare", f"antdist prepare {OUT}/source/NAME --domain NAME --out {OUT}/data")
    for name in names:
        # small blocks, so that several workers have some each
        _print(api.prepare(OUT / "source" / name, domain=name, out=OUT / "data", block_users=256))
    return world.target, names


def _stage(name: str, command: str | None = None) -> None:
    print(f"\n== {name}" + (f"\n   $ {command}" if command else ""), flush=True)


def _print(report: Report) -> None:
    print(report, flush=True)


if __name__ == "__main__":
    setup_logging()
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(f"error: {error}")
