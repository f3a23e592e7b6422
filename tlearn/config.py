"""Every option of a run: typed, documented, validated. Read from YAML by configfile.py.

Imports no torch, so that `--help` is instant.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from tlearn.dataconfig import Data, Section
from tlearn.modelconfig import Model

StrategyName = Literal["feature_extraction", "partial", "full", "staged", "progressive", "scratch", "auto"]
Rule = Annotated[tuple[str, Annotated[float, Field(ge=0)]], Field(strict=False)]
Epochs = Annotated[int, Field(ge=1, le=10**6)]
Duration = Annotated[float, Field(gt=0)] | Annotated[str, Field(pattern=r"^(100|[1-9]\d?(\.\d+)?|0\.\d*[1-9]\d*)%$")]


class Adam(Section):
    """Adam with L2 regularisation (Kingma & Ba 2015)."""

    name: Literal["adam"] = "adam"
    lr: float = Field(1e-3, gt=0)
    """Peak learning rate of parameters with multiplier 1."""
    weight_decay: float = Field(0.0, ge=0)
    """Not applied to biases and norm layers."""


class AdamW(Section):
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019)."""

    name: Literal["adamw"] = "adamw"
    lr: float = Field(1e-3, gt=0)
    """Peak learning rate of parameters with multiplier 1."""
    weight_decay: float = Field(0.01, ge=0)
    """Not applied to biases and norm layers."""


class SGD(Section):
    """Stochastic gradient descent with momentum."""

    name: Literal["sgd"] = "sgd"
    lr: float = Field(1e-2, gt=0)
    """Peak learning rate of parameters with multiplier 1."""
    momentum: float = Field(0.9, ge=0, lt=1)
    """0 is plain SGD."""
    weight_decay: float = Field(0.0, ge=0)
    """Not applied to biases and norm layers."""


Optimizer = Annotated[Adam | AdamW | SGD, Field(discriminator="name")]


class _Warmup(Section):
    warmup_epochs: float = Field(0.0, ge=0)
    """Linear rise of the rate from 0 over this many epochs at the start of the stage."""


class Constant(_Warmup):
    """The rate stays."""

    name: Literal["constant"] = "constant"


class Step(_Warmup):
    """The rate is multiplied by `gamma` every `step_epochs`."""

    name: Literal["step"] = "step"
    step_epochs: float = Field(1.0, gt=0)
    """Epochs between two drops."""
    gamma: float = Field(0.1, gt=0, le=1)
    """Factor of each drop."""


class Cosine(_Warmup):
    """Half a cosine from the peak rate to `min_lr_ratio` of it over the stage."""

    name: Literal["cosine"] = "cosine"
    min_lr_ratio: float = Field(0.0, ge=0, le=1)
    """Final rate as a share of the peak rate."""


class CosineWarmRestarts(_Warmup):
    """SGDR (Loshchilov & Hutter 2017): cosine cycles, each `t_mult` times as long as the one before."""

    name: Literal["cosine_warm_restarts"] = "cosine_warm_restarts"
    t_0: Duration = 1.0
    """Length of the first cycle: epochs, or a share of the stage (`25%`; `100%` is one cycle a stage)."""
    t_mult: int = Field(2, ge=1)
    """Growth of the cycle length from one restart to the next."""
    min_lr_ratio: float = Field(0.0, ge=0, le=1)
    """Rate at the end of a cycle as a share of the peak rate."""


Schedule = Annotated[Constant | Step | Cosine | CosineWarmRestarts, Field(discriminator="name")]


class Stage(Section):
    """What trains, how, for how long: a strategy is a list of these."""

    name: str = Field(min_length=1)
    """Shown in tables and logs."""
    epochs: Epochs
    """Passes over the training set."""
    train: list[Rule] = Field(min_length=1)
    """(pattern, learning-rate multiplier): the first match wins, 0 freezes, every parameter must match one.
    A pattern is `head`, `last:N` (the last N blocks of the backbone), a range of layers such as `features.0-9`, or a
    regular expression for the start of a parameter's name."""
    optimizer: Optimizer | None = None
    """Default: the run's `optimizer`."""
    schedule: Schedule | None = None
    """Default: the run's `schedule`."""
    image_size: int | None = Field(None, ge=16, le=2048)
    """Training size of this stage, px. Default: `data.image_size`, at which every stage is evaluated."""
    views: int | None = Field(None, ge=1, le=1000)
    """Default: `data.augment.views`."""
    layer_decay: float | None = Field(None, gt=0, le=1)
    """Default: the run's `layer_decay`."""
    patience: int | None = Field(None, ge=1)
    """Default: the run's `patience`."""


class Features(Section):
    """What frozen layers give, which is the same for the same picture in every epoch: computed once, and stored."""

    cache: Literal["auto", "on", "off"] = "auto"
    """auto: in stages whose first layers are frozen and whose images come again (`views`), where it pays and fits; on:
    in all that have frozen layers, or an error that says why not; off: every layer computes in every step."""
    max_gib: float = Field(20.0, gt=0)
    """Largest size of all that is stored, over all runs; what was not used longest goes first."""
    dtype: Literal["auto", "bf16"] = "auto"
    """auto: as the layers give them; bf16: half the size of fp32, rounded to 3 digits."""


class _OnLabels(Section):
    needs_images: ClassVar[bool] = False
    """Whether it looks at the images themselves, so that stored features do not do."""
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    """Share of the target spread evenly over the classes."""
    class_weight: Literal["none", "inverse", "effective"] = "none"
    """inverse: each class weighs the same in all, however many images it has; effective: between the two, by the
    effective number of samples (Cui et al. 2019)."""


class Supervised(_OnLabels):
    """Cross-entropy on the labels."""

    name: Literal["supervised"] = "supervised"


class Binary(_OnLabels):
    """Two classes, one logit, binary cross-entropy; the second class is answered above probability 0.5."""

    name: Literal["binary"] = "binary"


class Distillation(_OnLabels):
    """A trained network teaches a smaller one."""

    needs_images: ClassVar[bool] = True
    name: Literal["distillation"] = "distillation"
    teacher: str = Field(min_length=1)
    """Its run folder; the same classes."""
    alpha: float = Field(0.5, ge=0, le=1)
    """Weight of the teacher's answers; the labels have the rest."""
    temperature: float = Field(4.0, gt=0)
    """By which logits are divided before they are compared."""
    features: float = Field(0.0, ge=0)
    """Weight of the mean square difference of the features in front of the heads; through a projection where their
    widths differ."""


class DomainAdversarial(_OnLabels):
    """Labelled images of one domain, and images of another one without labels, for which it is meant."""

    needs_images: ClassVar[bool] = True
    name: Literal["domain_adversarial"] = "domain_adversarial"
    target: str = Field(min_length=1)
    """Images of the target domain, as `data.path`; their labels are used for its accuracy alone, where the class names
    are those of `data.path`. A batch holds `batch.size` images of each domain."""
    strength: float = Field(1.0, gt=0)
    """Of the reversed gradient at the end of the run; it rises from 0."""
    hidden: int = Field(256, ge=1)
    """Width of the discriminator."""


Objective = Annotated[Supervised | Binary | Distillation | DomainAdversarial, Field(discriminator="name")]


class Batch(Section):
    """How many images make one optimizer step."""

    size: int = Field(32, ge=1)
    """Images per optimizer step over all processes: the only batch knob."""
    micro: int | None = Field(None, ge=1)
    """At most this many images per process at once (of each domain, where there are two); the rest of the batch is
    accumulated. Default: no limit."""
    find: bool = False
    """Halve `micro` at the start of a stage until a step fits the memory of every process."""


class SaveEvery(Section):
    """When checkpoints are written, beside training; one is always written at the end of a stage and on a signal."""

    epochs: Epochs | None = 1
    """Every so many epochs, before the evaluation; null: not by epochs."""
    steps: int | None = Field(None, ge=1)
    """Every so many optimizer steps as well."""
    minutes: float | None = Field(15.0, gt=0)
    """At the first step so many minutes after the one before as well; null: not by the clock."""


class Keep(Section):
    """What of a run's weights stays on the disk."""

    checkpoints: int = Field(2, ge=2)
    """The newest so many checkpoints; not fewer than two, in case the newest is damaged."""
    best: int = Field(1, ge=1)
    """Weights of so many of the best epochs: best/model.safetensors, best/top-2.safetensors, ..."""


class Wandb(Section):
    """Weights & Biases."""

    mode: Literal["online", "offline", "disabled"] = "online"
    """online: where an API key is set up, otherwise the run is recorded offline."""
    project: str = "tlearn"
    """The W&B project."""


class Tracking(Section):
    """Where metrics go besides metrics.jsonl."""

    wandb: Wandb = Wandb()
    """Weights & Biases."""


class Quick(Section):
    """What `--quick` and `--quick-first` change; without them these have no effect."""

    image_size: int = Field(128, ge=16, le=2048)
    """Largest image size of a quick run, px."""
    samples: int = Field(1000, ge=1)
    """Largest number of train images, and of val images; classes as equal as they can be."""
    epochs: Epochs = 6
    """Epochs of all stages together; every stage keeps at least one."""
    minutes: float | None = Field(None, gt=0)
    """Stop the training after so many minutes, with the verdict `unsure`; the same command goes on. How long a quick
    run is follows from data and config, not from this. null: no limit."""
    init_from_quick: bool = False
    """With `--quick-first` the full run starts from the quick run's weights, head included: progressive resizing."""


class RunOptions(Section):
    """How the run itself behaves."""

    audit: bool = False
    """Write the hash of every global batch's sample keys to metrics.jsonl."""


class Config(Section):
    """One training run."""

    data: Data
    """Which images, at which size, and how they are fed."""
    model: Model = Model()
    """The backbone and the weights it starts from."""
    strategy: StrategyName = "staged"
    """A named list of stages (tlearn/stages.py); only a label where `stages` are listed. auto: what `tlearn plan` would
    choose, backbone, sizes and stages, around the options that are set (tlearn/planner.py)."""
    stages: list[Stage] | None = Field(None, min_length=1)
    """The stages themselves, in place of a named strategy's."""
    epochs: Epochs = 12
    """Epochs of a named strategy, all stages together."""
    optimizer: Optimizer = AdamW()
    """For stages that name no other."""
    schedule: Schedule = Cosine()
    """For stages that name no other."""
    layer_decay: float = Field(1.0, gt=0, le=1)
    """The rates of the backbone's last block are multiplied by this, those of the block before it by its square, and so
    on (Clark et al. 2020, Bao et al. 2022); 0.75, say, for a Vision Transformer. For stages that name no other."""
    patience: int | None = Field(None, ge=1)
    """A stage ends once so many epochs in a row were no better on val. For stages that name no other."""
    ema: float | None = Field(None, gt=0, lt=1)
    """Decay per step, 0.999 say, of a moving average of the weights, which is evaluated and kept in their place."""
    features: Features = Features()
    """The outputs of frozen layers, stored."""
    objective: Objective = Supervised()
    """What is minimised."""
    batch: Batch = Batch()
    """How many images make one optimizer step."""
    clip_norm: float | None = Field(1.0, gt=0)
    """Largest L2 norm of the gradient; null: no clipping."""
    precision: Literal["auto", "fp32", "bf16", "fp16", "fp64"] = "auto"
    """auto: bf16 where it pays (CUDA devices that have it, CPUs on which it was measured to be faster), else fp32."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Of everything random: order, augmentation, initial weights, dropout."""
    save_every: SaveEvery = SaveEvery()
    """When checkpoints are written."""
    keep: Keep = Keep()
    """What of a run's weights stays on the disk."""
    tracking: Tracking = Tracking()
    """Where metrics go besides metrics.jsonl."""
    quick: Quick = Quick()
    """What `--quick` changes."""
    run: RunOptions = RunOptions()
    """How the run itself behaves."""

    @field_validator("optimizer", "schedule", "objective", mode="before")
    @classmethod
    def _default_kind(cls, value: Any, info: ValidationInfo) -> Any:
        # `optimizer.lr=1e-4` alone means the default optimizer at another rate
        if isinstance(value, dict) and "name" not in value:
            return {**value, "name": cls.model_fields[str(info.field_name)].default.name}
        return value

    @model_validator(mode="before")
    @classmethod
    def _scratch_means_random(cls, raw: Any) -> Any:
        if isinstance(raw, dict) and raw.get("strategy") == "scratch" and isinstance(raw.get("model", {}), dict):
            raw = {**raw, "model": {"weights": "random", **raw.get("model", {})}}
        return raw

    @model_validator(mode="after")
    def _reader_has_what_it_needs(self) -> Config:
        data = self.data
        if data.reader == "indexed" and data.stream is not None:
            raise ValueError("data.stream has no effect with data.reader: indexed; set data.reader=stream")
        if data.reader == "stream":
            if data.stream is None:
                raise ValueError("data.reader: stream needs data.stream (val, classes, train_samples, val_samples)")
            if data.max_train is not None or data.max_val is not None:
                raise ValueError("data.max_train and data.max_val need an index; set data.stream.train_samples instead")
            if data.sampling != "natural" or data.normalise != "weights" or data.augment.mixup or data.augment.cutmix:
                raise ValueError(
                    "data.sampling, data.normalise, mixup and cutmix need an index; data.reader: stream has none"
                )
            if self.objective.class_weight != "none":
                raise ValueError("objective.class_weight needs counts from an index; data.reader: stream has none")
            if data.augment.views is not None or any(stage.views for stage in self.stages or []):
                raise ValueError("views need an index; data.reader: stream draws new crops in every epoch")
            if self.features.cache == "on":
                raise ValueError("features.cache: on needs an index; data.reader: stream has none")
        return self

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        if self.strategy == "scratch" and self.model.weights != "random":
            raise ValueError(
                f"strategy scratch trains random weights, but model.weights is {self.model.weights!r}: "
                "set model.weights=random, or strategy=full to fine-tune them"
            )
        if self.data.sampling == "balanced" and self.objective.class_weight != "none":
            raise ValueError("data.sampling: balanced and objective.class_weight correct the same twice; choose one")
        mixes = self.data.augment.mixup > 0 or self.data.augment.cutmix > 0
        alone = not (mixes or self.batch.find or self.data.reader == "stream")
        if self.objective.name == "binary" and self.model.head is not None:
            raise ValueError("objective.name: binary has one logit, model.head.text one per class; use supervised")
        if self.objective.name == "domain_adversarial" and not alone:
            raise ValueError("domain_adversarial goes with neither mixup, cutmix, batch.find nor data.reader: stream")
        names = [stage.name for stage in self.stages or []]
        if len(set(names)) < len(names):
            raise ValueError(f"stages: every stage needs a name of its own, got {names}")
        return self
