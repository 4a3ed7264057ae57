"""`antdist config`: the resolved configuration, what differs from another, the JSON Schema for editors."""

from __future__ import annotations

from pathlib import Path

import jsonschema
import pytest
import yaml
from click.testing import CliRunner, Result

from antdist.cli.main import cli
from antdist.config.describe import annotated_yaml, difference_rows, json_schema, read_other, tree_of
from antdist.config.load import check_config, dump_config, is_relearn, load_config, parse_tree
from antdist.config.schema import PretrainConfig, RelearnConfig
from antdist.errors import UserError

SHIPPED = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli, ["config", *arguments])


class TestShow:
    @pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.name)
    def test_output_reads_back_as_the_resolved_configuration(self, file: Path) -> None:
        tree = parse_tree(run("show", "--config", str(file)).output, "output")
        kind = RelearnConfig if is_relearn(tree) else PretrainConfig
        assert check_config(kind, tree) == load_config(kind, file)

    def test_values_that_differ_are_marked_with_the_default(self) -> None:
        lines = run("show", "training.epochs=5", "training.deepspeed={a: 1}").output.splitlines()
        assert "  epochs: 5  # default: 300" in lines and "  deepspeed: {a: 1}  # default: {}" in lines
        assert sum("# default" in line for line in lines) == 2

    def test_numbers_like_text_are_quoted(self) -> None:
        config = load_config(PretrainConfig, None, ["name='1e5'", "data.domains=['on', 'a: b']"])
        assert check_config(PretrainConfig, parse_tree("\n".join(annotated_yaml(config)), "")) == config

    def test_a_target_makes_it_a_relearning(self) -> None:
        assert "strategy: relearn" in run("show", "target=food").output

    def test_credentials_are_redacted(self) -> None:
        for verb in ("show", "diff"):
            output = run(verb, "tracking.uri=https://me:hidden@host").output
            assert "https://***@host" in output and "hidden" not in output


class TestDiff:
    def test_from_the_defaults(self) -> None:
        lines = run("diff", "training.epochs=5", "ray.workers=2", "model.dim=64").output.splitlines()
        rows = {line.split()[0]: line.split() for line in lines if "." in line}
        assert rows == {
            "model.dim": ["model.dim", "256", "64", "refused"],
            "ray.workers": ["ray.workers", "1", "2", "allowed"],
            "training.epochs": ["training.epochs", "300", "5", "allowed"],
        }
        assert run("diff").output == "no difference from the defaults\n"

    def test_from_a_run_folder_of_relearning(self, tmp_path: Path) -> None:
        before = load_config(RelearnConfig, None, ["target=food", "training.epochs=7"])
        (tmp_path / "config.yaml").write_text(dump_config(before))
        rows = difference_rows(RelearnConfig, read_other(tmp_path, RelearnConfig), tree_of(before), "run")
        assert len(rows) == 1
        lines = run("diff", "--run", str(tmp_path), "target=food", "loss.chunk=9").output.splitlines()
        assert [line.split() for line in lines if "." in line] == [
            ["loss.chunk", "8192", "9", "allowed", "may", "differ"],
            ["training.epochs", "7", "100", "refused", "must", "agree"],
        ]

    def test_meaning_for_compared_trials(self) -> None:
        here = tree_of(load_config(RelearnConfig, None, ["training.epochs=7", "loss.chunk=9"]))
        assert difference_rows(RelearnConfig, tree_of(RelearnConfig()), here, "default") == [
            ("key", "default", "here", "on resume", "compared trials"),
            ("loss.chunk", "8192", "9", "allowed", "may differ"),
            ("training.epochs", "100", "7", "refused", "must agree"),
        ]

    def test_a_file_of_an_earlier_version(self, tmp_path: Path) -> None:
        (tmp_path / "old.yaml").write_text("name: x\nmodel: {gone: 3}\n")
        output = run("diff", "--run", str(tmp_path / "old.yaml"), "name=x").output
        assert "model.gone" in output

    def test_other_kind_and_nothing_there_are_refused(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="is the configuration of a re-learning, to be compared with one of a pre-"):
            read_other(SHIPPED[0].with_name("relearn.yaml"), PretrainConfig)
        with pytest.raises(UserError, match=r"no such file\. Name a run's folder or a YAML file"):
            read_other(tmp_path, PretrainConfig)

    def test_from_a_registered_model(self, tmp_path: Path) -> None:
        from antdist.tracking.registry import Lineage, register
        from antdist.tracking.run import start_run

        uri, model = f"sqlite:///{tmp_path / 'mlflow.db'}", tmp_path / "model"
        model.mkdir()
        (model / "weights").write_text("w")
        config = load_config(PretrainConfig, None, ["model.dim=64"]).model_dump(mode="json", by_alias=True)
        tracked = start_run(uri, "e", "one", tmp_path / "run", config=config)
        tracked.finish()
        version = register(uri, tracked.run_id, model, "m", Lineage({"a": "f"}))
        for place in (version.uri, f"runs:/{tracked.run_id}"):
            done = run("diff", "--run", place, "--storage", str(tmp_path))
            assert "model.dim" in done.output and "256" in done.output, done
        absent = run("diff", "--run", "models:/other/1", "--storage", str(tmp_path))
        assert "no registered model 'other'" in str(absent.exception)


class TestSchema:
    @pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.name)
    def test_shipped_configurations_are_valid(self, file: Path) -> None:
        tree = parse_tree(file.read_text(), file)
        schema = yaml.safe_load(run("schema", "relearn" if is_relearn(tree) else "pretrain").output)
        jsonschema.Draft202012Validator.check_schema(schema)
        jsonschema.validate(tree, schema)

    @pytest.mark.parametrize("wrong", ["trainin: {}", "training: {epoch: 3}", "training: {epochs: many}", "model: 3"])
    def test_mistakes_are_found(self, wrong: str) -> None:
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(yaml.safe_load(wrong), json_schema(PretrainConfig))

    def test_help_documents_the_language_server(self) -> None:
        assert "# yaml-language-server: $schema=" in run("schema", "--help").output
