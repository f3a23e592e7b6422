"""Options of the images: which, at which size, how they are changed. Imports neither torch nor the rest of tlearn."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Pair = Annotated[tuple[float, float], Field(strict=False)]  # YAML has lists only

PRESETS: dict[str, dict[str, Any]] = {
    "imagenet": {"fit": "crop", "augment": {"crop": "resized", "scale": [0.08, 1.0]}},
    "small_image": {"fit": "squash", "augment": {"crop": "padded", "pad_px": 4}},
    "squash": {"fit": "squash", "augment": {"crop": "resized", "scale": [0.6, 1.0], "ratio": [1.0, 1.0]}},
    "medical": {"fit": "pad", "grey": True, "augment": {"crop": "resized", "scale": [0.8, 1.0], "ratio": [0.9, 1.1]}},
}
"""What a preset sets, where nothing else is given."""


class Section(BaseModel):
    """A group of options; unknown keys are errors, values do not change once read."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True, allow_inf_nan=False
    )


class Augment(Section):
    """Random changes to training images; drawn per sample from (seed, epoch, sample)."""

    crop: Literal["resized", "padded"] = "resized"
    """resized: a random part of the image, scaled to the square (Szegedy et al. 2015); padded: the image scaled to the
    square, moved by up to `pad_px` with a border of the background (He et al. 2016, for small images)."""
    scale: Pair = (0.35, 1.0)
    """Share of the image's area that a resized crop covers, (smallest, largest)."""
    ratio: Pair = (0.75, 4 / 3)
    """Aspect ratio (width / height) of a resized crop, (smallest, largest)."""
    pad_px: int = Field(4, ge=1, le=256)
    """Largest move of a padded crop, px."""
    hflip: float = Field(0.5, ge=0, le=1)
    """Probability of a left-right flip; 0 where left and right differ in meaning (digits, text, signs)."""
    policy: Literal["none", "trivial", "rand"] = "none"
    """Changes of colour and shape: trivial: one, of random strength (TrivialAugment, Müller & Hutter 2021); rand: two,
    of strength `magnitude` (RandAugment, Cubuk et al. 2020)."""
    magnitude: int = Field(9, ge=0, le=30)
    """Strength of `policy: rand`, of 30."""
    erase: float = Field(0.0, ge=0, le=1)
    """Probability that a random rectangle is covered with the mean colour (random erasing, Zhong et al. 2020)."""
    mixup: float = Field(0.0, ge=0)
    """Above 0: images are blended in pairs, with shares from Beta(mixup, mixup) (Zhang et al. 2018); 0.2, say."""
    cutmix: float = Field(0.0, ge=0)
    """Above 0: a rectangle of one image replaces that of another, areas from Beta(cutmix, cutmix) (Yun et al. 2019);
    1.0, say. With `mixup` too, one of both for each pair."""
    views: int | None = Field(None, ge=1, le=1000)
    """So many changed versions of every image, in turn, epoch by epoch; 1: the image as evaluation sees it, unchanged.
    Default: a new one in every epoch. With few views frozen layers need not run again (`features.cache`)."""

    @field_validator("scale", "ratio")
    @classmethod
    def _ordered(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not 0 < value[0] <= value[1]:
            raise ValueError("takes two numbers above 0, the smaller one first")
        return value

    @field_validator("scale")
    @classmethod
    def _share(cls, value: tuple[float, float]) -> tuple[float, float]:
        if value[1] > 1:
            raise ValueError("a crop covers at most the whole image: largest share 1.0")
        return value


class Stream(Section):
    """What an index would say of shards that have none."""

    val: str = Field(min_length=1)
    """Shards of the validation images, written like `data.path`."""
    classes: list[str] = Field(min_length=2)
    """Names of classes 0, 1, 2, ..."""
    train_samples: int = Field(ge=1)
    """Training images: the length of an epoch."""
    val_samples: int = Field(ge=1)
    """Validation images; evaluation fails if it counts others."""


class Data(Section):
    """Which images, at which size, and how they are fed."""

    preset: Literal["imagenet", "small_image", "squash", "medical"] | None = None
    """Values for `fit`, `grey` and `augment` where they are not given (tlearn/dataconfig.py lists them)."""
    path: str
    """A folder of class folders, or the output of `tlearn prepare`; for `reader: stream` WebDataset shards, as
    `FOLDER/train-{000000..000127}.tar`, http URLs or `pipe:COMMAND`."""
    reader: Literal["indexed", "stream"] = "indexed"
    """stream: shards without an index, read from start to end (tlearn/data/stream.py says what that gives up)."""
    stream: Stream | None = None
    """What an index would say; for `reader: stream` only."""
    image_size: int | None = Field(None, ge=16, le=2048)
    """Side of the square the model sees, px. Default: the size its weights were trained for."""
    fit: Literal["crop", "pad", "squash"] = "crop"
    """How a rectangle becomes a square: centre crop, pad with the background, or change the aspect ratio."""
    grey: bool = False
    """Colours are removed: three equal channels (X-rays, scans)."""
    normalise: Literal["weights", "own"] = "weights"
    """weights: by the mean and deviation of the pixels that the weights were trained on; own: of the train images, for
    data unlike photographs."""
    sampling: Literal["natural", "balanced"] = "natural"
    """balanced: every class is as frequent in an epoch as any other; images of small classes come several times, some
    of the large ones not at all."""
    augment: Augment = Augment()
    """Random changes to training images."""
    max_train: int | None = Field(None, ge=1)
    """Train on at most this many images, the classes as equal as they can be. Default: all."""
    max_val: int | None = Field(None, ge=1)
    """Validate on at most this many images, the classes as equal as they can be. Default: all."""
    score_test: bool = True
    """Score the test split, where there is one, at the end of the run; `--quick` leaves that to the full run."""
    eval_flips: bool = False
    """Evaluation and prediction take the mean of the logits of every image and of its mirror image."""
    workers: int = Field(2, ge=0, le=256)
    """Loader processes per training process; 0 decodes in the training process. Does not change the batches."""

    @model_validator(mode="before")
    @classmethod
    def _filled_by_preset(cls, raw: Any) -> Any:
        if isinstance(raw, dict) and raw.get("preset") in PRESETS and isinstance(raw.get("augment", {}), dict):
            preset, augment = PRESETS[raw["preset"]], raw.get("augment", {})
            same_crop = augment.get("crop") in (None, preset["augment"]["crop"])
            raw = {**preset, **raw, "augment": {**(preset["augment"] if same_crop else {}), **augment}}
        return raw
