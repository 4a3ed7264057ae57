"""A fan-out: what is asked for, which jobs run and how many at a time, what is told at the end; on a cluster that is feigned.
Through Ray: test_fanout_jobs.py."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from antdist.cli.main import cli
from antdist.config.load import check_config
from antdist.config.schema import ModelConfig, RelearnConfig
from antdist.data.domain import open_domain
from antdist.errors import Preempted, UserError
from antdist.evaluation.ranking import Ranks
from antdist.evaluation.report import Row
from antdist.evaluation.results import Run, RunKey, save_ranks
from antdist.evaluation.significance import Comparison, Verdict
from antdist.io.files import write_json
from antdist.jobs import fanout
from antdist.jobs.client import JobResult, run_key
from antdist.jobs.fanout import (
    FanoutRequest,
    FanoutResult,
    check_request,
    read_document,
    read_request,
    read_seeds,
    read_strategies,
    read_targets,
    run_jobs,
    survey_on_cluster,
)
from antdist.jobs.submission import INSTALLED, Submission
from antdist.jobs.survey import Survey, TargetSurvey, survey
from antdist.model.io import ModelCard, save_model
from antdist.model.recommender import build_recommender
from antdist.runs import adapt as relearning
from antdist.runs.adapt import judge_trials
from antdist.runs.comparison import record_config
from antdist.runs.folder import run_folder
from antdist.runs.trials import Trial, common_config, trials_of
from antdist.runs.verdict import AdaptedModel
from antdist.tracking.resolve import resolve
from antdist.tracking.run import start_run
from tests.jobs.test_submission import EVIL, received
from tests.worlds import give_features, make_domain, make_domains

SMALL = {"dim": 16, "inner": 16, "experts": 2, "max_length": 8}
STRATEGIES = ["scratch", "relearn"]


# -- what is asked for -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "seeds"), [("0-4", [0, 1, 2, 3, 4]), ("0,2,5", [0, 2, 5]), ("7", [7]), ("5, 0-2", [5, 0, 1, 2])]
)
def test_seeds(text: str, seeds: list[int]) -> None:
    assert read_seeds(text) == seeds


def test_targets_and_strategies() -> None:
    assert read_targets("food, arts") == ["food", "arts"]
    assert read_strategies("relearn,scratch") == ["scratch", "relearn"]  # in the order in which they win ties
    wanted = read_request(None, ["strategy=auto", "seeds=[3]"], "all", parent="models:/p/1")
    assert wanted.targets is None and wanted.config.strategy == ["scratch", "finetune", "relearn"]
    assert (wanted.config.seeds, wanted.config.parent) == ([3], "models:/p/1")


PLACES = ["data.root=/shared/data", "ray.storage=/shared/runs"]
GOOD = ["--targets=food", "--strategies=scratch", "--seeds=0-1"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seeds=4-0"], "--seeds: '4-0' is neither a seed nor a range of seeds. Write for example 0-4 or 0,2,5."),
        (["--seeds=one"], "--seeds: 'one' is neither a seed"),
        (["--seeds=-1"], "--seeds: '-1' is neither a seed"),
        (["--seeds="], "--seeds: names nothing"),
        (["--seeds=0,,1"], "--seeds: a name is empty"),
        (["--seeds=0-2,1"], "--seeds: the seed 1 is named twice"),
        (["--seeds=0-99999999"], "--seeds: more than 1000 seeds"),
        (["--strategies=scratch,magic"], "--strategies: unknown strategy 'magic'. Known: scratch, finetune"),
        (["--strategies=scratch,scratch"], "--strategies: 'scratch' is named twice"),
        (["--strategies=relearn"], "from: strategy relearn starts from a pre-trained model. Give one"),
        (["--targets="], "--targets: names nothing. Name prepared domains with commas, or all."),
        (["--targets=food,food"], "--targets: 'food' is named twice"),
        (["--targets=food,../x"], "--targets: '../x' is not the name of a domain"),
        (["--targets=food,a b"], "--targets: 'a b' is not the name of a domain"),
        *((["--targets", f"food,{evil}"], "--targets: ") for evil in EVIL),
        (["--parallel=0"], "Invalid value for '--parallel'"),
        (["training.epoch=3"], "unknown key training.epoch. Did you mean training.epochs."),
        (["ray.storage=runs"], "ray.storage: 'runs' would be resolved in the job's temporary copy"),
        (["--from=runs/p/model"], "from: 'runs/p/model' would be resolved"),
        (
            ["--targets=food,arts", "tracking.registered_model=one"],
            "tracking.registered_model: several targets cannot share a name in the registry",
        ),
        (["--installed", "--working-dir=."], "give either --working-dir or --installed"),
    ],
)
def test_invalid_arguments_are_refused_before_submission(arguments: list[str], message: str) -> None:
    words = ["fanout", *GOOD, *PLACES, *arguments, "--address=http://127.0.0.1:9"]
    told = CliRunner().invoke(cli, words)
    assert told.exit_code != 0
    assert message in str(told.exception) + told.output, (told.exception, told.output)


def test_targets_are_checked_here_where_their_data_are_seen(tmp_path: Path) -> None:
    make_domain(tmp_path / "data", "good")
    make_domain(tmp_path / "data", "bare", dims={})
    config = check_config(
        RelearnConfig,
        {"strategy": "scratch", "data": {"root": str(tmp_path / "data")}, "ray": {"storage": str(tmp_path / "runs")}},
    )
    assert check_request(FanoutRequest(config, ["good"]), here=False).targets == ["good"]
    for target, message in [
        ("goof", r"--targets: no prepared domain 'goof' in .* \(there: bare, good\)"),
        ("bare", r"domain bare has no text features\. Run `antdist featurize"),
    ]:
        with pytest.raises(UserError, match=message):
            check_request(FanoutRequest(config, ["good", target]), here=False)


# -- the jobs --------------------------------------------------------------------------------------------------------


class Feigned:
    """A cluster whose jobs end at the second look, and what they left behind: trials trained, verdicts given."""

    def __init__(self) -> None:
        self.failing: set[str] = set()
        self.jobs: list[tuple[str, Submission]] = []
        self.looks: dict[str, int] = {}
        self.state: dict[str, JobResult] = {}
        self.trained: set[str] = set()
        self.most = 0
        self.interrupt_at: int | None = None
        self.deaf: set[str] = set()  # jobs that, from an interrupt on, do not hear the first time that they are to stop
        self.stopping = False
        self.stopped: list[str] = []

    def active_jobs(self) -> dict[tuple[str, ...], str]:
        return {run_key(sent.metadata): job for job, sent in self.jobs if job not in self.state}

    def submit(self, submission: Submission) -> str:
        if len(self.jobs) == self.interrupt_at:
            self.stopping, self.deaf = True, set(self.active_jobs().values())
            raise KeyboardInterrupt
        job = f"job-{len(self.jobs)}"
        self.jobs.append((job, submission))
        self.looks[job] = 0
        self.most = max(self.most, len(self.active_jobs()))
        return job

    def ended(self, job: str) -> JobResult | None:
        self.looks[job] += 1
        if job not in self.state and (self.looks[job] < 2 or self.stopping):
            return None
        run = dict(self.jobs)[job].metadata["run"]
        if job not in self.state:
            code = 1 if run in self.failing else 0
            self.state[job] = JobResult(job, "failed" if code else "done", code)
            if not code:
                self.trained.add(run)
        return self.state[job]

    def why(self, job: str) -> str:
        return "error: as was feigned"

    def logs(self, job: str) -> str:
        target = dict(self.jobs)[job].metadata["run"].split("/")[1]
        done = {run.split("/")[2].rpartition("-seed")[0] for run in self.trained if run.startswith(f"n/{target}/")}
        missing = any(run.startswith(f"n/{target}/") for run in self.failing)
        told = {"test": [told_row(s) for s in STRATEGIES if s in done], "notes": []}
        if not missing:
            told |= {"chosen": "scratch", "model": f"models:/n-{target}/1", "holder": f"models:/n-{target}/1"}
        return f"said before\n{json.dumps(told)}\nsaid after it\n"

    def ask_to_stop(self, job: str) -> bool:
        if job in self.deaf:
            self.deaf.remove(job)
            return False
        self.stopped.append(job)
        self.state[job] = JobResult(job, "stopped", Preempted.EXIT_CODE)
        return True

    def runs(self) -> list[str]:
        return [sent.metadata["run"] for _, sent in self.jobs]


def told_row(strategy: str) -> dict[str, Any]:
    means = dict.fromkeys(("Recall@10", "Recall@50", "NDCG@10", "NDCG@50"), 0.5)
    verdict = None if strategy == "scratch" else Verdict("positive", Comparison(0.1, 0.25, 0.01, True, 40, 2), [])
    return asdict(Row(strategy, means, None, verdict))


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Feigned:
    monkeypatch.setattr(fanout, "POLL_SECONDS", 0.0)
    return Feigned()


def config(**changes: Any) -> RelearnConfig:
    tree = {
        "name": "n",
        "strategy": STRATEGIES,
        "seeds": [0, 1, 2],
        "from": "models:/p@champion",
        "data": {"root": "/shared/data"},
        "ray": {"storage": "/shared/runs"},
        **changes,
    }
    return check_config(RelearnConfig, tree)


def found(cluster: Feigned, targets: list[str]) -> Survey:
    """As a survey would: the trials of which there is no outcome."""
    told = {}
    for target in targets:
        todo = [trial for trial in trials_of(config(target=target)) if f"n/{target}/{trial}" not in cluster.trained]
        told[target] = TargetSurvey(todo, None)
    return Survey("models:/p/3", told)


def run(cluster: Feigned, targets: list[str], parallel: int = 2) -> FanoutResult:
    return run_jobs(cluster, config(), found(cluster, targets), here=False, code=INSTALLED, parallel=parallel)


def test_trials_then_verdicts_run_within_the_parallel_limit(
    cluster: Feigned,
) -> None:
    done = run(cluster, ["a", "b"], parallel=3)
    trials = {f"n/{t}/{s}-seed{seed}" for t in "ab" for s in STRATEGIES for seed in (0, 1, 2)}
    runs = cluster.runs()
    assert set(runs) == trials | {"n/a", "n/b"} and len(runs) == 14 and cluster.most == 3
    assert runs.index("n/a") > max(index for index, name in enumerate(runs) if name.startswith("n/a/"))
    assert runs.index("n/a") < len(runs) - 2  # not after the other target's trials
    assert (done.left, done.failures) == (0, [])
    one = next(sent for _, sent in cluster.jobs if sent.metadata["run"] == "n/b/relearn-seed2")
    assert one.entrypoint == "exec python -m antdist relearn --config antdist-job.yaml --only=trial"
    # an alias may move while jobs wait: all start from the same version
    sent = [check_config(RelearnConfig, __import__("yaml").safe_load(s.metadata["config"])) for _, s in cluster.jobs]
    assert {each.parent for each in sent} == {"models:/p/3"}
    assert sorted({tuple(each.seeds) for each in sent}) == [(0,), (0, 1, 2), (1,), (2,)]


def test_a_failed_trial_alone_runs_again(cluster: Feigned, capsys: pytest.CaptureFixture[str]) -> None:
    cluster.failing = {"n/a/scratch-seed1", "n/b/relearn-seed0"}
    first = run(cluster, ["a", "b", "c"])
    assert [failure.task for failure in first.failures] == ["a scratch-seed1", "b relearn-seed0"]
    assert len(cluster.trained) == 16 + 3 and first.left == 4  # two trials, two verdicts
    text = "\n".join(first.lines())
    assert "failed: a scratch-seed1: error: as was feigned (antdist logs job-1)" in text
    assert text.endswith("run the same command again: 4 jobs are left")
    assert [line.split()[-1] for line in first.lines() if line.startswith("c  ")] == ["models:/n-c/1", "positive"]
    assert "not decided" in next(line for line in first.lines() if line.startswith("a  "))

    cluster.failing, before = set(), len(cluster.jobs)
    second = run(cluster, ["a", "b", "c"])
    again = cluster.runs()[before:]
    assert sorted(again) == ["n/a", "n/a/scratch-seed1", "n/b", "n/b/relearn-seed0", "n/c"]
    assert second.left == 0 and not second.failures
    assert "jobs are left" not in "\n".join(second.lines())
    assert "3 ended, 0 of them failed" in capsys.readouterr().err


def test_without_a_complete_strategy_there_is_no_verdict(cluster: Feigned) -> None:
    cluster.failing = {"n/a/scratch-seed1", "n/a/relearn-seed0"}
    done = run(cluster, ["a"])
    assert "n/a" not in cluster.runs() and done.left == 3
    assert "a: no strategy is trained with all seeds" in done.lines()


def test_a_failed_verdict_is_reported_and_left(cluster: Feigned) -> None:
    cluster.failing = {"n/a"}
    done = run(cluster, ["a"])
    assert [failure.task for failure in done.failures] == ["a verdict"] and done.left == 1
    told = "\n".join(done.lines())
    assert "failed: a verdict" in told and "no strategy" not in told and told.endswith("again: 1 job is left")


def test_active_jobs_of_an_earlier_fanout_are_followed(cluster: Feigned) -> None:
    everything = found(cluster, ["a"])
    job = cluster.submit(
        fanout.make_submission(
            "relearn",
            config(target="a", strategy="relearn", seeds=[2]),
            ["--only=trial"],
            here=False,
            code=INSTALLED,
        )
    )
    done = run_jobs(cluster, config(), everything, here=False, code=INSTALLED, parallel=2)
    assert cluster.runs().count("n/a/relearn-seed2") == 1 and job in cluster.state
    assert done.left == 0 and cluster.most == 2


def test_a_complete_fanout_runs_nothing(cluster: Feigned) -> None:
    verdict = {"test": [told_row("scratch")], "chosen": "scratch", "model": "m", "holder": "m", "notes": []}
    done = run_jobs(
        cluster, config(), Survey(None, {"a": TargetSurvey([], verdict)}), here=False, code=INSTALLED, parallel=2
    )
    assert not cluster.jobs and done.left == 0 and done.verdicts == {"a": verdict}


def test_ctrl_c_stops_running_jobs_and_says_how_to_continue(
    cluster: Feigned, capsys: pytest.CaptureFixture[str]
) -> None:
    cluster.interrupt_at = 5
    with pytest.raises(KeyboardInterrupt):
        run(cluster, ["a"])
    assert cluster.stopped == ["job-4"] and len(cluster.jobs) == 5
    assert "stopped: run the same command again to continue" in capsys.readouterr().err
    cluster.interrupt_at, cluster.stopping = None, False
    assert run(cluster, ["a"]).left == 0
    assert sorted(cluster.runs()[5:]) == ["n/a", "n/a/relearn-seed1", "n/a/relearn-seed2"]


def test_a_cluster_outage_is_waited_out(
    cluster: Feigned, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    look, looks = cluster.ended, 0

    def away(job: str) -> JobResult | None:
        nonlocal looks
        looks += 1
        if looks < 4:
            raise UserError("Ray's job server failed", where="http://head:8265")
        return look(job)

    monkeypatch.setattr(cluster, "ended", away)
    assert run(cluster, ["a"]).left == 0
    assert capsys.readouterr().err.count("asking again for 10 minutes: http://head:8265") == 1
    looks = 0
    monkeypatch.setattr(fanout, "OUTAGE_SECONDS", -1.0)
    cluster.trained.clear()
    with pytest.raises(UserError, match="job server failed"):
        run(cluster, ["a"])
    assert "2 jobs continue; run the same command again to follow them" in capsys.readouterr().err


def test_the_survey_of_a_cluster_is_a_job(cluster: Feigned, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    told = Survey("models:/p/3", {"a": TargetSurvey([trial_of(config(), "a", "scratch", 1)], None)}, ["a note"])
    monkeypatch.setattr(cluster, "logs", lambda job: f"said\n{json.dumps(told.to_json())}\n")
    wanted = FanoutRequest(config(target="a"), ["a", "b"])
    assert survey_on_cluster(cluster, wanted, INSTALLED) == told
    assert received(cluster.jobs[0][1].entrypoint, tmp_path) == [
        "-m", "antdist", "fanout", "--config", "antdist-job.yaml", "--targets=a,b", "--dry-run", "--json=-",
    ]  # fmt: skip
    cluster.failing = {"n/a"}
    with pytest.raises(UserError, match=r"^as was feigned\. `antdist logs job-1`"):
        survey_on_cluster(cluster, wanted, INSTALLED)


def test_the_last_document_of_a_log_is_read() -> None:
    assert read_document('{"a": 1}\n{"b": 2}\n{torn\nerror') == {"b": 2}
    assert read_document("nothing") is None


def trial_of(config: RelearnConfig, target: str, strategy: Any, seed: int) -> Trial:
    (trial,) = trials_of(config.model_copy(update={"target": target, "strategy": strategy, "seeds": [seed]}))
    return trial


# -- the survey and the verdict, on disk -----------------------------------------------------------------------------

USERS, SEEDS = 60, [0, 1]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    make_domains(folder / "data", ["aa", "bbb", "food", "arts1"])
    config = ModelConfig(**SMALL)  # type: ignore[arg-type]
    dims: Any = {"text": 12, "image": 10, "price": 6}
    card = {"kind": "pretrained", "config": config, "dims": dims, "domains": ["aa", "bbb"]}
    save_model(folder / "parent", build_recommender(config, dims), ModelCard.model_validate(card))
    return folder


def on_disk(world: Path, name: str, **changes: Any) -> RelearnConfig:
    places = {"data": {"root": str(world / "data")}, "ray": {"storage": str(world / "runs")}}
    given = {"name": name, "seeds": SEEDS, "model": SMALL, "from": str(world / "parent"), "tracking": store(world)}
    return config(**{**places, **given, "stream": {"batch_size": 200}, **changes})


def store(world: Path) -> dict[str, str]:
    return {"uri": f"sqlite:///{world}/mlflow.db"}


def hits(strategy: str, seed: int) -> np.ndarray:
    """Which users a trial serves: relearn more of them than scratch, each seed others."""
    random = np.random.default_rng([len(strategy), seed])
    return random.random(USERS) < (0.8 if strategy == "relearn" else 0.5)


def train(config: RelearnConfig, target: str, strategy: Any, seed: int) -> None:
    """What a trial leaves behind."""
    mine = trial_of(config, target, strategy, seed).folder.path
    run = start_run(str(config.tracking.uri), "e", mine.name, mine)
    assert run.finish() is None
    write_json(mine / "run.json", {"run_id": run.run_id, "parent": None if strategy == "scratch" else config.parent})
    (mine / "model").mkdir()
    (mine / "model" / "weights").write_text(f"{strategy} {seed}")
    ranks = Ranks(np.arange(USERS), np.where(hits(strategy, seed), 1, 99), np.zeros(USERS, bool))
    manifest = open_domain(Path(config.data.root) / target).fingerprint
    for split in ("validation", "test"):
        key = RunKey(target=target, manifest=manifest, features={}, seeds=(seed,), epochs=1, budget="b", split=split)  # type: ignore[arg-type]
        save_ranks(mine / f"{split}.npz", Run(key, [ranks]))
    write_json(mine / "outcome.json", {"epoch": 1})


def verdict_of(config: RelearnConfig, target: str) -> Any:
    with pytest.MonkeyPatch.context() as patch:  # the trials' models are no models
        patch.setattr(relearning, "make_servable", lambda folder, domain: None)
        return judge_trials(config.model_copy(update={"target": target}))


def test_all_targets_exclude_the_parents_domains(world: Path) -> None:
    told = survey(on_disk(world, "all"), None)
    assert list(told.targets) == ["arts1", "food"] and told.parent == str(world / "parent")
    assert f"left out, as {world}/parent learned from them: aa, bbb" in told.notes
    assert told.left == 10 and told.targets["food"].todo == trials_of(on_disk(world, "all", target="food"))
    assert "food: to do: scratch-seed0, scratch-seed1, relearn-seed0, relearn-seed1, verdict" in told.lines()
    assert Survey.from_json(json.loads(json.dumps(told.to_json())), on_disk(world, "all")) == told
    # without a parent every domain may be one
    alone = survey(on_disk(world, "all", strategy="scratch", **{"from": None}), None)
    assert list(alone.targets) == ["aa", "arts1", "bbb", "food"]
    remote = on_disk(world, "all", data={"root": f"file://{world}/data", "cache": str(world / "cache")})
    (world / "data/no-domain").mkdir()
    assert list(survey(remote, None).targets) == ["arts1", "food"]
    named = survey(on_disk(world, "all"), ["aa"])
    assert "the target aa is one of the parent's auxiliary domains: its gain is not transfer" in named.notes


def test_a_survey_finds_trained_trials_and_their_verdict(world: Path) -> None:
    config = on_disk(world, "done")
    for strategy, seed in [("scratch", 0), ("scratch", 1), ("relearn", 0)]:
        train(config, "food", strategy, seed)
    assert survey(config, ["food"]).targets["food"] == TargetSurvey([trial_of(config, "food", "relearn", 1)], None)

    part = verdict_of(config, "food")  # nothing is registered among some: it could not be undone
    assert not isinstance(part, AdaptedModel) and [row.strategy for row in part.rows] == ["scratch"]
    assert part.notes == ["not registered, as these are not trained: relearn-seed1"]
    with pytest.raises(UserError, match="no registered model"):
        resolve("models:/done-food/latest", str(config.tracking.uri))

    train(config, "food", "relearn", 1)
    whole = verdict_of(config, "food")
    gains = np.mean([hits("relearn", s) * 1.0 - hits("scratch", s) for s in SEEDS], axis=0)
    t = gains.mean() / (gains.std(ddof=1) / np.sqrt(USERS))
    random = np.random.default_rng(0)  # Student's t by its definition
    draws = random.standard_normal(400_000) / np.sqrt(random.chisquare(USERS - 1, 400_000) / (USERS - 1))
    comparison = whole.rows[1].verdict.comparison
    assert comparison.difference == pytest.approx(gains.mean())
    assert comparison.p_value == pytest.approx(np.mean(np.abs(draws) > t), abs=1e-3) and comparison.p_value < 0.05
    reached = [hits("relearn", s).mean() for s in SEEDS]
    assert whole.rows[1].means["Recall@10"] == pytest.approx(np.mean(reached))
    assert whole.rows[1].deviations["Recall@10"] == pytest.approx(np.std(reached, ddof=1))
    assert (whole.chosen, whole.model, whole.holder) == ("relearn", "models:/done-food/1", "models:/done-food/1")
    assert resolve("models:/done-food@champion", str(config.tracking.uri)).tags["parent"] == str(world / "parent")

    known = survey(config, ["food"])
    assert known.left == 0 and known.targets["food"].verdict == json.loads(json.dumps(whole.to_json()))
    table = FanoutResult(["food"], {"food": json.loads(json.dumps(whole.to_json()))}).lines()
    mean, deviation = np.mean(reached), np.std(reached, ddof=1)
    row = next(line for line in table if "relearn  " in line)
    assert f"{mean:.4f} ± {deviation:.4f}" in row and f"{gains.mean():+.4f}" in row
    assert row.split()[-3:] == ["positive", "positive", "models:/done-food/1"]
    assert "relearn: transfer on test users positive on 1 of 1 targets" in table
    # of other seeds or strategies it says nothing, and of trials that were trained since neither
    assert survey(on_disk(world, "done", seeds=[0]), ["food"]).targets["food"] == TargetSurvey([], None)
    assert survey(on_disk(world, "done", strategy="scratch"), ["food"]).targets["food"] == TargetSurvey([], None)
    trial_of(config, "food", "relearn", 1).folder.result_file.touch()
    assert survey(config, ["food"]).targets["food"] == TargetSurvey([], None)


def test_without_scratch_the_transfer_is_unknown(world: Path) -> None:
    config = on_disk(world, "unknown")
    for strategy, seed in [("scratch", 0), ("relearn", 0), ("relearn", 1)]:
        train(config, "food", strategy, seed)
    part = verdict_of(config, "food")
    assert [(row.strategy, row.verdict.transfer) for row in part.rows] == [("relearn", "unknown")]
    lines = FanoutResult(["food"], {"food": json.loads(json.dumps(part.to_json()))}, left=2).lines()
    assert "food: relearn: transfer unknown: no matching scratch" in lines
    assert "food: not registered, as these are not trained: scratch-seed1" in lines
    with pytest.raises(UserError, match="no registered model"):
        resolve("models:/unknown-food/latest", str(config.tracking.uri))
    with pytest.raises(UserError, match="no strategy is trained with all seeds"):
        verdict_of(on_disk(world, "unknown", strategy="finetune"), "food")


def test_a_survey_refuses_what_would_fail_in_each_job(world: Path) -> None:
    given = on_disk(world, "refused").model_copy(update={"target": "food"})
    run_folder(given).path.mkdir(parents=True)
    record_config(run_folder(given), common_config(given))
    wider = {**SMALL, "dim": 32}
    for name, changes, message in [
        ("refused", {"from": "elsewhere"}, "neither an existing folder nor a reference to a model"),
        ("refused", {"training": {"epochs": 7}}, "another configuration: training.epochs was 100, is 7"),
        ("refused", {"tracking": {"uri": "http://127.0.0.1:9"}}, "the tracking server does not answer"),
        ("other", {"model": wider}, "model.dim"),
    ]:
        with pytest.raises(UserError, match=message):
            survey(on_disk(world, name, **changes), ["food"])


def test_trials_that_started_elsewhere_are_not_taken_for_these(world: Path) -> None:
    config = on_disk(world, "moved")
    train(config, "food", "relearn", 0)
    write_json(trial_of(config, "food", "relearn", 0).folder.record_file, {"run_id": "r", "parent": "models:/p/1"})
    with pytest.raises(UserError, match=r"relearn-seed0: this trial started from models:/p/1, not from .*/parent"):
        survey(config, ["food"])


def test_a_survey_refuses_other_encoders_than_the_parents(tmp_path: Path) -> None:
    food = make_domain(tmp_path / "data", "food", dims={"text": 12})
    make_domain(tmp_path / "data", "aa", dims={"text": 12})
    config = ModelConfig(**SMALL, modalities=["text"])  # type: ignore[arg-type]
    card = {
        "kind": "pretrained", "config": config, "dims": {"text": 12}, "domains": ["aa"],
        "features": {"text": {"identity": "another", "encoder": {}}},
    }  # fmt: skip
    save_model(tmp_path / "parent", build_recommender(config, {"text": 12}), ModelCard.model_validate(card))
    give_features(food, "text", 12, encoder="random")
    wanted = on_disk(tmp_path, "n", strategy="finetune", model={**SMALL, "modalities": ["text"]})
    with pytest.raises(UserError, match="another"):
        survey(wanted, ["food"])


def test_a_dry_run_lists_what_would_run(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    words = ["fanout", "--targets=food", "--strategies=scratch", "--seeds=0-1", "--dry-run", "name=dry", "--json=-"]
    places = [f"data.root={world}/data", f"ray.storage={world}/runs", f"tracking.uri={store(world)['uri']}"]
    told = CliRunner().invoke(cli, [*words, *places, "model.dim=16", "stream.batch_size=200"])
    assert told.exit_code == 0, told.output + str(told.exception)
    *lines, last = told.stdout.splitlines()
    assert lines == ["food: to do: scratch-seed0, scratch-seed1, verdict", "3 jobs"]
    assert Survey.from_json(json.loads(last), on_disk(world, "dry")).left == 3
