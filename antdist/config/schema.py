"""Typed configuration, one class per component. Every key has a default, and a `Meaning`; unknown keys are refused."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Modality = Literal["text", "image", "price"]
Strategy = Literal["scratch", "finetune", "finetune_all", "relearn"]
Positive = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]
Resume = Literal["free", "longer_ok", "gentler_ok", "fixed"]


@dataclass(frozen=True)
class Meaning:
    """What a change of a key means for a run, written on the key: `Annotated[int, OPERATION]`.

    Args:
        resume: when a run of this name may go on with another value. `free`: always; `longer_ok`: a pre-training may;
            `gentler_ok`: a pre-training may after its loss diverged; `fixed`: never.
        compare: whether the trials of two strategies must agree in it, for their difference to be due to the strategy.
        continued: whether `continue=MODEL` may change it; `fixed` keys make the saved weights what they are.
        defines: the parameter groups (`training.adaptation`) whose saved values make sense only with the same value.
    """

    resume: Resume
    compare: bool
    continued: Literal["free", "fixed"]
    defines: tuple[str, ...] = ()

    def defining(self, *groups: str) -> Meaning:
        """Return this meaning for a key that also defines `groups`."""
        return replace(self, defines=groups)


OPERATION = Meaning(resume="free", compare=False, continued="free")  # how the work is done: same result up to rounding
IDENTITY = Meaning(resume="fixed", compare=False, continued="free")  # which run it is; data are compared by fingerprint
LEARNING = Meaning(resume="fixed", compare=True, continued="free")  # what is learned
LONGER = Meaning(resume="longer_ok", compare=True, continued="free")
GENTLER = Meaning(resume="gentler_ok", compare=True, continued="free")
ARCHITECTURE = Meaning(resume="fixed", compare=True, continued="fixed")  # what the weights are


class Component(BaseModel):
    """Base of all configuration: immutable, no unknown keys, no silent conversion of text to numbers, no NaN."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class ModelConfig(Component):
    """The recommender (spec, sections 3 and 4). Feature dimensions are not here: they come from the feature tables."""

    modalities: Annotated[list[Modality], ARCHITECTURE] = Field(
        ["text", "image", "price"], description="inputs of the item tower; leave one out to ablate it"
    )
    dim: Annotated[Positive, ARCHITECTURE.defining("theta", "positions", "phi")] = Field(
        256, description="width of item and user embeddings"
    )
    experts: Annotated[Positive, ARCHITECTURE.defining("theta")] = Field(8, description="experts per modality")
    mixture: Annotated[bool, ARCHITECTURE.defining("theta")] = Field(
        True, description="false: one linear layer with bias a modality (ablation without MoE)"
    )
    fusion: Annotated[bool, ARCHITECTURE] = Field(True, description="false: no text-image synergy (ablation)")
    beta: Annotated[float, ARCHITECTURE] = Field(0.1, description="weight of the text-image synergy")
    item_dropout: Annotated[Fraction, LEARNING] = Field(0.2, description="dropout on features before the experts")
    missing: Annotated[Literal["mask", "reference"], ARCHITECTURE.defining("theta")] = Field(
        "mask", description="mask: a missing modality adds nothing; reference: its zero feature passes the tower"
    )
    layers: Annotated[Positive, ARCHITECTURE.defining("phi")] = Field(2, description="transformer layers")
    heads: Annotated[Positive, ARCHITECTURE.defining("phi")] = Field(
        2, description="attention heads; dim must be a multiple of them"
    )
    inner: Annotated[Positive, ARCHITECTURE.defining("phi")] = Field(256, description="width of the feed-forward layer")
    dropout: Annotated[Fraction, LEARNING] = Field(0.5, description="hidden and attention dropout of the transformer")
    max_length: Annotated[Positive, ARCHITECTURE.defining("positions")] = Field(
        50, description="most recent interactions that a prediction sees"
    )
    temperature: Annotated[float, Field(gt=0), ARCHITECTURE] = Field(
        0.07, description="tau: cosines are divided by it before the softmax"
    )
    initialisation: Annotated[Literal["normal", "xavier", "reference"], LEARNING] = Field(
        "normal",
        description="of the experts, fresh weights alike in every strategy: normal N(0, 0.02) or xavier; reference: normal, but re-learning draws xavier",
    )
    initial_shift: Annotated[Literal["zero", "mean"], LEARNING] = Field(
        "zero",
        description="where fresh experts' shifts start: zero is the paper's; mean centres the features, which helps those with a large common part (histograms, prices)",
    )
    item_embeddings: Annotated[bool, ARCHITECTURE] = Field(
        False, description="ANT_t: a learned embedding for each target item, added to the item's embedding"
    )
    activation_checkpointing: Annotated[bool, OPERATION] = Field(
        False, description="recompute the transformer's layers in the backward pass"
    )

    @model_validator(mode="after")
    def _consistent(self) -> ModelConfig:
        if self.dim % self.heads:
            raise ValueError(f"dim {self.dim} is not a multiple of heads {self.heads}")
        if not self.modalities or len(set(self.modalities)) != len(self.modalities):
            raise ValueError("modalities must name at least one modality, and each once")
        return self


class LossConfig(Component):
    """The next-item softmax and the text-image alignment (spec, sections 5 and 6)."""

    negatives: Annotated[Literal["in_batch", "catalogue", "sampled"], LEARNING] = Field(
        "in_batch",
        description="candidates of the softmax: in_batch the other next items of the step, catalogue all items, sampled as many as samples",
    )
    samples: Annotated[Positive, LEARNING] = Field(1024, description="candidates drawn a step, for negatives=sampled")
    log_q: Annotated[bool, LEARNING] = Field(
        False, description="subtract the log of each candidate's sampling probability from its logit"
    )
    alignment: Annotated[float, Field(ge=0), LEARNING] = Field(
        1e-3, description="weight of the text-image alignment loss"
    )
    chunk: Annotated[Positive, OPERATION] = Field(8192, description="candidates a chunk of the softmax")


class StreamConfig(Component):
    """The order of training examples (architecture, law 1)."""

    mode: Annotated[Literal["sequence", "prefix"], LEARNING] = Field(
        "sequence",
        description="sequence: one causal pass predicts at every position; prefix: each prefix is one example (the paper's)",
    )
    batch_size: Annotated[Positive, LEARNING] = Field(
        2048, description="predictions a step over all ranks; in sequence mode the mean, as whole users are taken"
    )
    mixing: Annotated[float, Field(ge=0.0, le=1.0), LEARNING] = Field(
        1.0, description="exponent on domain sizes: 1 proportional, 0 all domains alike"
    )
    batches: Annotated[Literal["mixed", "single_domain"], LEARNING] = Field(
        "mixed", description="whether a batch may hold several domains"
    )
    streams: Annotated[Positive, LEARNING] = Field(
        4, description="canonical streams a domain: runs of shards that are read, and merged, side by side"
    )
    window_shards: Annotated[Positive, LEARNING] = Field(4, description="shards whose blocks are shuffled together")
    window_blocks: Annotated[Positive, LEARNING] = Field(16, description="blocks whose examples are shuffled together")


class ScheduleConfig(Component):
    """Learning rate over time. `decay`: the reference's, times `factor` each epoch; `cosine`: after a linear warm-up; `step`: times `factor` after each of `milestones` (epochs)."""

    kind: Annotated[Literal["constant", "decay", "cosine", "step"], LEARNING] = Field(
        "decay", description="shape of the learning rate over time"
    )
    factor: Annotated[float, Field(gt=0, le=1), LEARNING] = Field(0.995, description="of decay and step")
    warmup_steps: Annotated[int, Field(ge=0), LEARNING] = Field(
        0, description="steps over which the learning rate rises linearly at first, whatever the kind"
    )
    milestones: Annotated[list[Positive], LEARNING] = Field(
        default_factory=list, description="epochs after which step multiplies by factor"
    )
    floor: Annotated[float, Field(ge=0), LEARNING] = Field(
        0.0, description="cosine's last learning rate, as a share of the first"
    )


class HangConfig(Component):
    """Limits on a rank without progress; beyond them it exits, and Ray restarts the workers from the last checkpoint."""

    start_minutes: Annotated[float, Field(gt=0), OPERATION] = Field(
        30.0, description="from the resume to the end of the first step"
    )
    step_minutes: Annotated[float, Field(gt=0), OPERATION] = Field(10.0, description="a step, with its wait for data")
    checkpoint_minutes: Annotated[float, Field(gt=0), OPERATION] = Field(
        30.0, description="a validation, or a checkpoint with its wait for the one before"
    )

    @property
    def longest_seconds(self) -> float:
        return 60 * max(self.start_minutes, self.step_minutes, self.checkpoint_minutes)


class TrainingConfig(Component):
    """The loop."""

    epochs: Annotated[Positive, LONGER] = Field(300, description="passes over the data")
    learning_rate: Annotated[float, Field(gt=0), GENTLER] = Field(1e-3, description="of AdamW, before the schedule")
    weight_decay: Annotated[float, Field(ge=0), LEARNING] = Field(0.0, description="decoupled, of AdamW")
    schedule: ScheduleConfig = Field(default_factory=lambda: ScheduleConfig())
    accumulation: Annotated[Positive, LEARNING] = Field(
        1, description="micro-batches a step; negatives are those of the micro-batch"
    )
    clip: Annotated[Annotated[float, Field(gt=0)] | None, GENTLER] = Field(
        None, description="largest norm of the gradient"
    )
    precision: Annotated[Literal["fp32", "bf16", "fp16"], GENTLER] = Field(
        "fp32", description="of matrix products; losses, norms, master weights and optimizer state are float32"
    )
    engine: Annotated[Literal["deepspeed", "plain"], OPERATION] = Field(
        "deepspeed", description="plain: torch alone, the tested twin"
    )
    zero_stage: Annotated[int, Field(ge=0, le=3), OPERATION] = Field(
        1,
        description="what DeepSpeed shards over the ranks: 0 nothing, 1 optimizer state, 2 gradients too, 3 weights too",
    )
    deepspeed: Annotated[dict[str, Any], OPERATION] = Field(
        default_factory=dict, description="passed through to the DeepSpeed engine, checked by it first"
    )
    validate_every: Annotated[Positive, LEARNING] = Field(1, description="epochs")
    validation_users: Annotated[Positive | None, LEARNING] = Field(
        None, description="at most this many validation users a domain; null: all"
    )
    patience: Annotated[Positive | None, LONGER] = Field(
        None, description="stop after this many validations without a better Recall@10"
    )
    checkpoint_every: Annotated[Positive | None, OPERATION] = Field(
        None, description="steps; null: at the end of each epoch"
    )
    keep_checkpoints: Annotated[int, Field(ge=2), OPERATION] = Field(
        2, description="the newest ones; the best weights are kept beside them in any case"
    )
    keep_every: Annotated[Positive | None, OPERATION] = Field(
        None, description="steps; besides, the first checkpoint at or after each multiple of it is kept for good"
    )
    stop_after: Annotated[Positive | None, OPERATION] = Field(
        None, description="steps after which this session ends; the run can be resumed"
    )
    log_every: Annotated[Positive, OPERATION] = Field(10, description="steps between two points of the training curves")
    max_skipped: Annotated[int, Field(ge=0), OPERATION] = Field(
        10,
        description="steps with a NaN or Inf loss or gradient are skipped; more than this many among the last hundred times "
        "as many stop the run",
    )
    hang: HangConfig = Field(default_factory=lambda: HangConfig())


class AdaptationLossConfig(LossConfig):
    """In adaptation: all items of the target, no alignment (spec, section 6)."""

    negatives: Annotated[Literal["in_batch", "catalogue", "sampled"], LEARNING] = Field(
        "catalogue",
        description="candidates of the softmax: in_batch the other next items of the step, catalogue all items, sampled as many as samples",
    )
    alignment: Annotated[float, Field(ge=0), LEARNING] = Field(
        0.0, description="weight of the text-image alignment loss"
    )


class AdaptationScheduleConfig(ScheduleConfig):
    """In adaptation the learning rate decays faster."""

    factor: Annotated[float, Field(gt=0, le=1), LEARNING] = Field(0.99, description="of decay and step")


class AdaptationTrainingConfig(TrainingConfig):
    """In adaptation the loop is shorter."""

    epochs: Annotated[Positive, LONGER] = Field(100, description="passes over the data")
    schedule: AdaptationScheduleConfig = Field(default_factory=lambda: AdaptationScheduleConfig())


class DataConfig(Component):
    """Prepared domains below one folder."""

    root: Annotated[str, IDENTITY] = Field(
        "data", description="folder that holds a folder a domain; or any fsspec URI (s3://BUCKET/FOLDER) to one"
    )
    domains: Annotated[list[str], IDENTITY] = Field(
        default_factory=list, description="auxiliary domains of the pre-training"
    )
    feature_dtype: Annotated[Literal["float32", "float16"], LEARNING] = Field(
        "float32", description="type of the looked-up features"
    )
    cache: Annotated[Annotated[str, Field(min_length=1)] | None, OPERATION] = Field(
        None,
        description="where root is a URI: folder on each node's own disk for what was fetched, shared by all runs there; "
        "null: in the folder for temporary files (TMPDIR)",
    )
    cache_gb: Annotated[float, Field(gt=0), OPERATION] = Field(
        50.0, description="largest size of the cache, in 10^9 bytes"
    )


class RayConfig(Component):
    """Workers and resources that Ray Train provides, and where runs are stored."""

    workers: Annotated[Positive, OPERATION] = Field(1, description="Ray Train workers, one process each")
    min_workers: Annotated[Positive | None, OPERATION] = Field(
        None,
        description="go on with as few when nodes are lost, and with more, up to `workers`, when nodes come; null: `workers`",
    )
    cpus_per_worker: Annotated[Positive, OPERATION] = Field(1, description="CPUs that each worker requests")
    gpus_per_worker: Annotated[float, Field(ge=0), OPERATION] = Field(
        0, description="GPUs that each worker requests; 0: train on CPUs"
    )
    placement: Annotated[Literal["PACK", "SPREAD", "STRICT_SPREAD"], OPERATION] = Field(
        "PACK",
        description="how Ray places the workers: on few nodes, on many, or each on its own node. With `min_workers` not the "
        "last: a worker that asks for all CPUs or GPUs of a node has it to itself",
    )
    wait_minutes: Annotated[Annotated[float, Field(gt=0)] | None, OPERATION] = Field(
        60.0,
        description="how long to wait for nodes that the cluster lacks, at the start and after losses; null: forever",
    )
    address: Annotated[str | None, OPERATION] = Field(
        None, description="null: RAY_ADDRESS, else a local Ray started by the command"
    )
    storage: Annotated[str, OPERATION] = Field(
        "runs", description="folder for runs and checkpoints, shared by all nodes"
    )
    remote_storage: Annotated[Annotated[str, Field(min_length=1)] | None, OPERATION] = Field(
        None,
        description="any fsspec URI (s3://BUCKET/FOLDER) or folder: checkpoints are copied there in the background, and a run "
        "whose folder is gone goes on from there; one run of a name at a time",
    )
    max_failures: Annotated[int, Field(ge=-1), OPERATION] = Field(
        3, description="restarts of the workers after a failure; -1: any number"
    )

    @model_validator(mode="after")
    def _range(self) -> RayConfig:
        if self.fewest > self.workers:
            raise ValueError(f"min_workers {self.min_workers} is above workers {self.workers}")
        if self.placement == "STRICT_SPREAD" and self.fewest < self.workers:  # Ray Train counts CPUs and GPUs alone
            raise ValueError(
                "placement STRICT_SPREAD goes with a fixed number of workers: leave min_workers out, or have each worker ask for "
                "all CPUs or GPUs of a node (cpus_per_worker, gpus_per_worker), which spreads them too"
            )
        return self

    @property
    def fewest(self) -> int:
        """The least workers that a run starts with."""
        return self.workers if self.min_workers is None else self.min_workers


class TrackingConfig(Component):
    """MLflow. With no `uri`, MLFLOW_TRACKING_URI, else SQLite and files below the runs' folder."""

    uri: Annotated[str | None, OPERATION] = Field(
        None, description="MLflow's tracking URI; null: MLFLOW_TRACKING_URI, else SQLite and files in ray.storage"
    )
    experiment: Annotated[str, OPERATION] = Field("antdist", description="MLflow's experiment")
    registered_model: Annotated[str | None, OPERATION] = Field(
        None, description="name in the registry; null: the run's name"
    )
    offline_ok: Annotated[bool, OPERATION] = Field(
        False,
        description="true: a run starts though the store is unreachable; its records wait on disk until it is reachable, at the "
        "latest until the same command is run again. What `from` or `resume` names in the registry must have been resolved "
        "by this run once",
    )


PROFILE = "true: each worker writes a trace of some steps to profile/ in the run's folder, for Perfetto"


class PretrainConfig(Component):
    """A pre-training run (spec, section 5)."""

    model_config = ConfigDict(validate_by_name=True, validate_by_alias=True)  # `continue` is a keyword of Python

    name: Annotated[str, OPERATION] = Field(
        "pretrain", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="of the run: its folder below ray.storage"
    )
    seed: Annotated[int, Field(ge=0), IDENTITY] = Field(0, description="of weights, order and noise")
    resume: Annotated[str | None, OPERATION] = Field(
        None, description="MODEL whose training state this run goes on from"
    )
    parent: Annotated[str | None, IDENTITY] = Field(
        None,
        alias="continue",
        description="MODEL whose weights and optimizer state this new run begins with, on data that have grown or are others",
    )
    profile: Annotated[bool, OPERATION] = Field(False, description=PROFILE)
    data: DataConfig = Field(default_factory=lambda: DataConfig())
    model: ModelConfig = Field(default_factory=lambda: ModelConfig())
    loss: LossConfig = Field(default_factory=lambda: LossConfig())
    stream: StreamConfig = Field(default_factory=lambda: StreamConfig())
    training: TrainingConfig = Field(default_factory=lambda: TrainingConfig())
    ray: RayConfig = Field(default_factory=lambda: RayConfig())
    tracking: TrackingConfig = Field(default_factory=lambda: TrackingConfig())

    @model_validator(mode="after")
    def _one_start(self) -> PretrainConfig:
        if self.resume is not None and self.parent is not None:
            raise ValueError("resume goes on with a run, continue begins another: give one of the two")
        return self


Variant = Literal["learn_input_norm", "keep_price_bias", "redraw_positions"]


class RelearnConfig(Component):
    """Adaptation to one target (spec, section 6)."""

    model_config = ConfigDict(validate_by_name=True, validate_by_alias=True)  # `from` is a keyword of Python

    name: Annotated[str, OPERATION] = Field(
        "relearn", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="of the run: its folder below ray.storage"
    )
    target: Annotated[str | None, IDENTITY] = Field(None, description="domain below data.root to adapt to")
    strategy: Annotated[Strategy | Literal["auto"] | list[Strategy], IDENTITY] = Field(
        "relearn",
        description="one, or a list; auto: scratch, finetune and relearn. Of several: scratch, or the best on validation whose "
        "transfer is positive",
    )
    parent: Annotated[str | None, IDENTITY] = Field(
        None, alias="from", description="MODEL to adapt; not needed for scratch"
    )
    seeds: Annotated[list[Annotated[int, Field(ge=0)]], IDENTITY] = Field(
        default_factory=lambda: [0], min_length=1, description="one trial of each strategy per seed"
    )
    variants: Annotated[list[Variant], IDENTITY] = Field(
        default_factory=list, description="deviations of the reference code (spec, section 6)"
    )
    profile: Annotated[bool, OPERATION] = Field(False, description=PROFILE)
    data: DataConfig = Field(default_factory=lambda: DataConfig())
    model: ModelConfig = Field(default_factory=lambda: ModelConfig())
    loss: AdaptationLossConfig = Field(default_factory=lambda: AdaptationLossConfig())
    stream: StreamConfig = Field(default_factory=lambda: StreamConfig())
    training: AdaptationTrainingConfig = Field(default_factory=lambda: AdaptationTrainingConfig())
    ray: RayConfig = Field(default_factory=lambda: RayConfig())
    tracking: TrackingConfig = Field(default_factory=lambda: TrackingConfig())

    @model_validator(mode="after")
    def _distinct(self) -> RelearnConfig:
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"seeds {self.seeds} must name each seed once")
        if isinstance(self.strategy, list) and not 0 < len(set(self.strategy)) == len(self.strategy):
            raise ValueError(f"strategy {self.strategy} must name at least one strategy, and each once")
        return self
