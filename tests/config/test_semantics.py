"""What a key means, derived from the schema, against the four lists that said it before and the digests of that time."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import BaseModel

from antdist.config.load import dump_config, load_config
from antdist.config.schema import (
    AdaptationTrainingConfig,
    Component,
    ModelConfig,
    PretrainConfig,
    RelearnConfig,
    TrainingConfig,
)
from antdist.config.semantics import (
    architecture,
    comparable,
    defining,
    differences,
    meanings,
    resume_changes,
    resume_of,
)
from antdist.evaluation.results import budget_digest
from antdist.training.adaptation import treatments

CONFIGS = Path(__file__).parents[2] / "configs"

# the lists as they stood before they were derived
OPERATIONAL = {"resume", "name", "profile", "ray", "tracking", "data.cache", "data.cache_gb"}
TRAINING_OPERATIONAL = set(["engine", "zero_stage", "deepspeed", "checkpoint_every", "keep_checkpoints"])
TRAINING_OPERATIONAL |= set(["keep_every", "stop_after", "log_every", "max_skipped", "hang"])
OPERATIONAL |= {f"training.{key}" for key in TRAINING_OPERATIONAL}
NOW_FREE = {
    "loss.chunk",
    "model.activation_checkpointing",
}  # the one change: both leave the result alike up to rounding
LONGER = {"training.epochs", "training.patience"}
GENTLER = {"training.learning_rate", "training.clip", "training.precision"}
CONTINUE_FREE = {"dropout", "item_dropout", "activation_checkpointing", "initialisation", "initial_shift"}
MADE_BY = {
    "theta": {"dim", "mixture", "experts", "missing"},
    "positions": {"dim", "max_length"},
    "phi": {"dim", "layers", "heads", "inner"},
}
KINDS = [PretrainConfig, RelearnConfig]


def below(key: str, listed: set[str]) -> bool:
    """Whether a list names the key or one of its sections."""
    parts = key.split(".")
    return any(".".join(parts[:n]) in listed for n in range(1, len(parts) + 1))


class TestGolden:
    @pytest.mark.parametrize("kind", KINDS)
    def test_resume_meanings_equal_the_former_lists(self, kind: type[BaseModel]) -> None:
        for key, meaning in meanings(kind).items():
            before = "free" if below(key, OPERATIONAL | NOW_FREE) else "longer_ok" if key in LONGER else "fixed"
            assert meaning.resume == ("gentler_ok" if key in GENTLER else before), key

    def test_compared_keys_equal_the_former_digest(self) -> None:
        sections = {"model", "loss", "stream", "training"}
        for key, meaning in meanings(RelearnConfig).items():
            section = key.partition(".")[0]
            before = section in sections and not below(key, OPERATIONAL | NOW_FREE)
            assert meaning.compare == (before or key == "data.feature_dtype"), key

    def test_continue_and_adaptation_equal_the_former_lists(self) -> None:
        assert set(architecture()) == set(ModelConfig.model_fields) - CONTINUE_FREE
        assert {group: set(defining(group)) for group in MADE_BY} == MADE_BY
        assert all(not defining(group) for group in treatments("relearn").keys() - MADE_BY.keys())

    @pytest.mark.parametrize(
        ("file", "overrides", "digest"),
        [
            (None, [], "8e7ac48141c645f91ce5d46b241290d4642c34f3004574d3305ccdab1a06e9ff"),
            (
                None,
                ["loss.chunk=9", "ray.workers=3"],
                "8e7ac48141c645f91ce5d46b241290d4642c34f3004574d3305ccdab1a06e9ff",
            ),
            ("demo-relearn.yaml", [], "a9642a394bc24c5ba0db40ec236f8cab070d3bb367c340036f47b7e43274840e"),
            ("relearn.yaml", [], "dbc20654c3a49383bda33dc842b934993f6f17fce904f0bb3559e3972fa4997e"),
            (
                None,
                [
                    "model.dim=64",
                    "training.clip=1.0",
                    "stream.mode=prefix",
                    "data.feature_dtype=float16",
                    "loss.samples=3",
                    "training.schedule.kind=cosine",
                ],
                "a1e7e69cab1d4b76c97ccf9eef9ce57b70a846a1803c730ba5b800ce0118efea",
            ),
        ],
    )
    def test_budget_digests_of_earlier_results(self, file: str | None, overrides: list[str], digest: str) -> None:
        config = load_config(RelearnConfig, CONFIGS / file if file else None, overrides)
        assert budget_digest(config) == digest


class TestMeanings:
    @pytest.mark.parametrize("kind", KINDS)
    def test_every_key_states_its_meaning(self, kind: type[BaseModel]) -> None:
        """A new field without one fails here, and wherever a configuration is compared."""
        assert len(meanings(kind)) > 60

    def test_a_nested_field_without_a_meaning_is_an_error(self) -> None:
        class Inner(Component):
            width: int = 3

        class Outer(Component):
            inner: Inner = Inner()

        with pytest.raises(TypeError, match=r"Inner\.width must state one Meaning, not 0"):
            meanings(Outer)

    def test_adaptations_own_defaults_keep_the_meaning(self) -> None:
        assert meanings(AdaptationTrainingConfig) == meanings(TrainingConfig)
        shared = meanings(PretrainConfig).keys() & meanings(RelearnConfig).keys()
        assert all(meanings(PretrainConfig)[key] == meanings(RelearnConfig)[key] for key in shared)

    def test_comparable_holds_the_compared_values_alone(self) -> None:
        tree = comparable(RelearnConfig())
        assert tree["data"] == {"feature_dtype": "float32"} and "chunk" not in tree["loss"]
        assert tree.keys() == {"data", "model", "loss", "stream", "training"} and "hang" not in tree["training"]


class TestDifferences:
    def test_differences_name_the_key_and_both_values(self) -> None:
        here = {"training": {"schedule": {"floor": 0.5}, "deepspeed": {"a": 1}}, "name": "x"}
        there = {"training": {"schedule": {"floor": 0.1}, "deepspeed": {}}}
        assert differences(PretrainConfig, there, here) == {
            "name": (None, "x"),
            "training.deepspeed": ({}, {"a": 1}),
            "training.schedule.floor": (0.1, 0.5),
        }

    def test_keys_of_another_version_keep_their_sections_meaning(self) -> None:
        there = {"training": {"hang": {"gone": 1}}, "ray": {"gone": 1}, "model": {"gone": 1}, "gone": 1}
        assert list(resume_changes(PretrainConfig, there, {})) == ["gone", "model.gone"]
        assert resume_of(PretrainConfig, "ray.gone") == "free"

    def test_a_resume_ignores_free_keys_and_tells_the_rest(self) -> None:
        import yaml

        before, after = (
            yaml.safe_load(dump_config(load_config(PretrainConfig, None, overrides)))
            for overrides in ([], ["loss.chunk=5", "ray.workers=2", "training.epochs=9", "model.dim=64"])
        )
        assert resume_changes(PretrainConfig, before, after) == {
            "model.dim": ("fixed", "model.dim was 256, is 64"),
            "training.epochs": ("longer_ok", "training.epochs was 300, is 9"),
        }
