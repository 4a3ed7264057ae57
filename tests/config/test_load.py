"""A mistake in a configuration costs seconds: each is told with its key and what would be right."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from antdist.config.load import check_config, dump_config, known_keys, load_config, names_target
from antdist.config.schema import PretrainConfig, RelearnConfig
from antdist.errors import UserError


def write(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "run.yaml"
    file.write_text(text)
    return file


def message(file: Path | None, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load_config(PretrainConfig, file, overrides)
    return str(caught.value)


def test_overrides_win_over_the_file_and_the_file_over_defaults(tmp_path: Path) -> None:
    file = write(tmp_path, "training: {epochs: 7, learning_rate: 0.01}\n")
    config = load_config(
        PretrainConfig, file, ["training.epochs=9", "training.learning_rate=1e-4", "model.modalities=[text]"]
    )
    assert (config.training.epochs, config.training.learning_rate) == (9, 1e-4)
    assert config.model.modalities == ["text"]
    assert config.training.keep_checkpoints == 2


def test_a_resolved_configuration_reads_back_as_itself() -> None:
    config = RelearnConfig.model_validate({"from": "models:/a/1", "target": "t"})
    import yaml

    again = check_config(RelearnConfig, yaml.safe_load(dump_config(config)))
    assert again == config and again.parent == "models:/a/1"


@pytest.mark.parametrize("kind", [PretrainConfig, RelearnConfig])
def test_a_run_is_profiled_where_it_is_asked_for(kind: Any) -> None:
    assert load_config(kind, None, []).profile is False
    assert load_config(kind, None, ["profile=true"]).profile is True


def test_the_number_of_workers_may_be_a_range() -> None:
    assert load_config(PretrainConfig, None, ["ray.workers=4"]).ray.fewest == 4
    assert load_config(PretrainConfig, None, ["ray.workers=4", "ray.min_workers=2"]).ray.fewest == 2
    assert (
        message(None, "ray.workers=2", "ray.min_workers=3") == "configuration: ray: min_workers 3 is above workers 2."
    )
    assert "STRICT_SPREAD goes with a fixed number of workers: leave min_workers out" in message(
        None, "ray.workers=2", "ray.min_workers=1", "ray.placement=STRICT_SPREAD"
    )


def test_an_unknown_key_names_the_nearest_known_one(tmp_path: Path) -> None:
    told = message(write(tmp_path, "training:\n  epoch: 3\n"))
    assert told.split("/")[-1] == "run.yaml: unknown key training.epoch. Did you mean training.epochs."
    assert "unknown key model.zzz. Known keys here: model.activation_checkpointing, model.beta" in message(
        None, "model.zzz=3"
    )


def test_a_wrong_type_names_key_and_value() -> None:
    told = message(None, "training.epochs=many")
    assert "training.epochs" in told and "valid integer" in told and "'many'" in told
    assert "training.epochs" in message(None, "training.epochs=-1")


def test_contradicting_values_are_refused() -> None:
    assert "dim 255 is not a multiple of heads 2" in message(None, "model.dim=255")
    assert "each once" in message(None, "model.modalities=[text, text]")


def test_a_missing_file_a_broken_one_and_a_list_are_told(tmp_path: Path) -> None:
    assert "no such file" in message(tmp_path / "absent.yaml")
    assert "run.yaml:2: not valid YAML" in message(write(tmp_path, "a: [1,\nb: 2: 3\n"))
    assert "mapping" in message(write(tmp_path, "- 1\n"))


def test_an_override_that_is_none_is_told() -> None:
    assert "not of the form key=value" in message(None, "training.epochs")
    assert "name holds a value" in message(None, "name=a", "name.b=2")


def test_numbers_are_numbers_in_files_as_in_overrides(tmp_path: Path) -> None:
    """YAML 1.1 takes 1e-3 for text; a whole number is a float, too."""
    config = load_config(PretrainConfig, write(tmp_path, "training: {learning_rate: 1e-3, clip: 1}\nname: '1e5'\n"))
    assert (config.training.learning_rate, config.training.clip, config.name) == (1e-3, 1.0, "1e5")
    assert load_config(PretrainConfig, write(tmp_path, dump_config(config))) == config
    assert load_config(PretrainConfig, None, ["training.learning_rate=1"]).training.learning_rate == 1.0
    assert "finite number" in message(None, "model.beta=.nan")
    assert "finite number" in message(None, "training.learning_rate=.inf")


def test_a_key_that_stands_twice_is_told(tmp_path: Path) -> None:
    told = message(write(tmp_path, "seed: 1\ntraining: {epochs: 2}\ntraining: {clip: 1.0}\n"))
    assert "run.yaml:3: not valid YAML: the key training stands twice" in told


def test_a_value_where_a_section_belongs_is_told_with_the_sections_keys() -> None:
    assert "training.schedule is a section of keys, not 'cosine'. Give its keys: training.schedule.kind," in message(
        None, "training.schedule=cosine"
    )
    assert "training is a section of keys, not 3" in message(None, "training=3")


def test_a_key_of_a_section_leaves_adaptations_other_defaults() -> None:
    config = load_config(RelearnConfig, None, ["loss.chunk=100", "training.log_every=1", "training.schedule.floor=0.1"])
    assert (config.loss.negatives, config.loss.alignment) == ("catalogue", 0.0)
    assert (config.training.epochs, config.training.schedule.factor) == (100, 0.99)


@pytest.mark.parametrize(("seeds", "told"), [("[]", "at least 1 item"), ("[0, 1, 0]", "each seed once")])
def test_seeds_are_some_and_each_once(seeds: str, told: str) -> None:
    with pytest.raises(UserError, match=told):
        load_config(RelearnConfig, None, [f"seeds={seeds}"])


def test_known_keys_carry_aliases() -> None:
    assert "from" in known_keys(RelearnConfig) and "training.schedule.kind" in known_keys(RelearnConfig)


@pytest.mark.parametrize("file", sorted((Path(__file__).parents[2] / "configs").glob("*.yaml")), ids=lambda f: f.name)
def test_every_shipped_configuration_is_valid(file: Path) -> None:
    kind = RelearnConfig if "target" in file.read_text() else PretrainConfig
    load_config(kind, file)


@pytest.mark.parametrize("override", ["training.epochs=[1,", "model.modalities={a: }}", "name=!!int x", "name='x"])
def test_an_override_that_is_no_yaml_is_told_with_what_was_typed(override: str) -> None:
    told = message(None, override)
    assert told.startswith(f"{override}: the value is not valid YAML: ") and "Quote a text" in told


def test_an_empty_file_is_all_defaults(tmp_path: Path) -> None:
    assert load_config(PretrainConfig, write(tmp_path, "# nothing\n")) == PretrainConfig()


def test_what_the_user_set_is_written_alone() -> None:
    config = load_config(PretrainConfig, None, ["training.epochs=9", "name=x"])
    assert dump_config(config, defaults=False) == "name: x\ntraining:\n  epochs: 9\n"
    assert "learning_rate" in dump_config(config)


def test_a_configuration_with_a_target_or_a_strategy_is_one_of_relearning(tmp_path: Path) -> None:
    assert names_target(None, ["target=x"]) and names_target(write(tmp_path, "seeds: [1]\n"), [])
    assert not names_target(write(tmp_path, "name: x\n"), ["training.epochs=3"])
