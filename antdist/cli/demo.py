"""`make demo`: the main job from nothing to recommendations for all, on one machine, on generated data.

Each stage is what a verb of the command line does; the command is shown before it runs.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from antdist.config.load import load_config
from antdist.config.schema import PretrainConfig, RelearnConfig
from antdist.errors import UserError

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
    pretrain_config = load_config(PretrainConfig, CONFIGS / "demo.yaml", arguments)
    relearn_config = load_config(RelearnConfig, CONFIGS / "demo-relearn.yaml", [f"target={target}", *arguments])

    from antdist.distributed.ray_session import ray_session
    from antdist.runs.adapt import relearn
    from antdist.runs.pretrain import pretrain
    from antdist.serving.apply import find_model, open_model, recommend_items
    from antdist.serving.score import score
    from antdist.tracking.store import ui_command

    with ray_session(pretrain_config.ray):
        _stage("prepare features", f"antdist featurize {OUT}/data/* --text hashed --image histogram --price quantile")
        _featurize(names)
        _stage("pre-train", f"antdist pretrain --config {CONFIGS}/demo.yaml")
        pretrained = pretrain(pretrain_config)
        _print(pretrained.lines())
        _stage("re-learn", f"antdist relearn --config {CONFIGS}/demo-relearn.yaml target={target}")
        adapted = relearn(relearn_config)
    _stage("recommend", f"antdist recommend {adapted.model} {OUT}/data/{target} --user ... --storage {OUT}/runs")
    opened = open_model(adapted.model, OUT / "data" / target, OUT / "runs")
    for user in opened.domain.user_ids()[:USERS_SHOWN]:
        past, items = recommend_items(opened, user=user, history=None, n=3)
        print(f"{user} last took: {'; '.join(item.title for item in past[-2:])}")
        for item in items:
            print(f"    next: {item.title}  ({item.score:.2f})")
    out = f"{OUT}/scores/{target}"
    _stage("score", f"antdist score {adapted.model} {OUT}/data/{target} --out {out} --storage {OUT}/runs --workers 0")
    _print(score(find_model(adapted.model, OUT / "runs"), opened.domain, out, workers=0).lines())
    _stage("result")
    _print(adapted.lines())
    print(f"data in {OUT}/data, runs and models in {OUT}/runs")
    print(f"MLflow's pages: {ui_command(adapted.tracking_uri)}")
    print(f"{time.monotonic() - start:.0f} s in all")


def _make_world() -> tuple[str, list[str]]:
    from antdist.data.ingest.prepare import prepare_domain
    from antdist.data.synthetic.world import generate_world

    _stage("generate a world", f"antdist synth {OUT}/source")
    world = generate_world(OUT / "source")
    _print(world.lines())
    names = [domain.name for domain in world.domains]
    _stage("prepare", f"antdist prepare {OUT}/source/NAME --domain NAME --out {OUT}/data")
    for name in names:
        # small blocks, so that several workers have some each
        _print(prepare_domain(OUT / "source" / name, domain=name, out=OUT / "data", block_users=256).lines())
    return world.target, names


def _featurize(names: Sequence[str]) -> None:
    from antdist.data.domain import open_domain
    from antdist.features.featurize import featurize_domains

    domains = [open_domain(OUT / "data" / name) for name in names]
    _print(featurize_domains(domains, text="hashed", image="histogram", price="quantile", workers=2).lines())


def _stage(name: str, command: str | None = None) -> None:
    print(f"\n== {name}" + (f"\n   $ {command}" if command else ""), flush=True)


def _print(lines: Sequence[str]) -> None:
    for line in lines:
        print(line, flush=True)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(f"error: {error}")
