"""Frozen layers run once per image: which stages of a run are fed with their stored outputs in place of images."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import NamedTuple

from tlearn.checkpoint import Progress
from tlearn.config import Config, Stage
from tlearn.console import show
from tlearn.data.loader import Batch, Share, Steps
from tlearn.data.source import Indexed, Source
from tlearn.errors import TlearnError
from tlearn.models.build import Model
from tlearn.models.cut import NoCutError, rest_only
from tlearn.runtime import Runtime
from tlearn.stagecache import StageCache

CACHED = "cached"
NOTHING_FROZEN = "no layer is frozen"


class Inputs(NamedTuple):
    """What a stage is fed."""

    train: Callable[[Share], Steps]
    val: Steps
    blank: Callable[[int], Batch]
    """So many inputs of class 0, all zeros."""


class Features:
    """What the stages of a run are fed.

    Args:
        config, runtime, model, source: of the run.
        progress: keeps what was decided.
        stages: with image size and views filled in.
        plan: for each stage, the learning-rate multiplier of every parameter.
    """

    def __init__(
        self,
        config: Config,
        runtime: Runtime,
        model: Model,
        source: Source,
        progress: Progress,
        stages: Sequence[Stage],
        plan: Sequence[dict[str, float]],
    ) -> None:
        self.config, self.runtime, self.model, self.source = config, runtime, model, source
        self.progress, self.stages, self.plan = progress, stages, plan

    @contextmanager
    def inputs(self, number: int, images: Inputs) -> Iterator[Inputs]:
        """Inside, the network is what is behind its frozen beginning, and fed with what that gives; or all of it.

        Args:
            number: of the stage.
            images: what it is fed where the frozen layers compute in every step.

        Raises:
            TlearnError: `features.cache: on`, and why not.
            StoppedBySignalError: a signal came while the store was filled; what is there is used the next time.
        """
        stage = self.stages[number]
        recorded = self.progress.features.get(stage.name)
        self.model.set_trainable(self.plan[number])
        with ExitStack() as held:
            cache, reason = None, self._why_not(stage)
            if reason is None:
                try:
                    cache = self._cache(number)
                    held.enter_context(cache.filled(partial(self._start, number, cache)))
                except NoCutError as error:
                    cache, reason = None, str(error)
            self.progress.features[stage.name] = reason or CACHED
            if cache is not None:
                size = f"{cache.views} views, {cache.nbytes / 2**20:,.1f} MiB in {cache.folder}"
                show(f"stage {stage.name}: what layers up to {cache.cut.name} give is stored: {size}")
                held.enter_context(rest_only(self.model.net, cache.cut))
                yield Inputs(cache.train_loader, cache.val_loader(), cache.blank)
                return
            if reason != NOTHING_FROZEN:
                if self.config.features.cache == "on":
                    raise _refused(stage, reason)
                if self.config.features.cache == "auto" and reason != recorded:
                    show(f"stage {stage.name}: frozen layers run in every step: {reason}")
            yield images

    def _why_not(self, stage: Stage) -> str | None:
        return why_not(self.config, self.model, self.source, stage, self.progress.features.get(stage.name))

    def _cache(self, number: int) -> StageCache:
        assert isinstance(self.source, Indexed)
        return StageCache(self.config, self.runtime, self.model, self.source, self.stages[number])

    def _start(self, number: int, cache: StageCache, held: ExitStack) -> StageCache | None:
        """Stored outputs of earlier layers, from which those of this stage are computed in place of images.

        They are the last stage's, where more layers freeze from stage to stage, or the next one's, stored ahead, where
        fewer do. Neither changes in between, since all that is frozen there is frozen here.
        """
        for other in (number - 1, number + 1):
            if other not in range(len(self.stages)) or not self._frozen(other) < self._frozen(number):
                continue
            self.model.set_trainable(self.plan[other])
            try:
                start = None if self._why_not(self.stages[other]) else self._cache(other)
                if start is not None and start.can_start(cache) and (other > number or start.is_there()):
                    held.enter_context(start.filled(partial(self._start, other, start)))
                    return start
            except NoCutError:  # there is no room for both, say
                continue
            finally:
                self.model.set_trainable(self.plan[number])
        return None

    def _frozen(self, number: int) -> set[str]:
        return {name for name, multiplier in self.plan[number].items() if multiplier == 0}


def check_features(config: Config, model: Model, source: Source, stage: Stage) -> None:
    """What can be known before anything is written; the model as `set_trainable` left it.

    Raises:
        TlearnError: `features.cache: on`, and why not.
    """
    reason = why_not(config, model, source, stage, None)
    if config.features.cache == "on" and reason not in (None, NOTHING_FROZEN):
        raise _refused(stage, reason)


def _refused(stage: Stage, reason: str | None) -> TlearnError:
    return TlearnError(f"features.cache: on: stage {stage.name}: {reason}")


def why_not(config: Config, model: Model, source: Source, stage: Stage, recorded: str | None) -> str | None:
    """Why the frozen layers of a stage run in every step, as far as that can be said beforehand."""
    choice = config.features.cache
    if all(p.requires_grad for p in model.net.parameters()):
        return NOTHING_FROZEN
    if choice == "off":
        return "features.cache: off"
    if config.objective.needs_images:
        return f"objective {config.objective.name} looks at the images"
    if not isinstance(source, Indexed):
        return "a stream has no index"
    if stage.views is None:
        return "new crops in every epoch; set data.augment.views=4, say"
    if config.data.eval_flips:
        return "images are evaluated in two ways; set data.eval_flips=false"
    if config.data.augment.mixup or config.data.augment.cutmix:
        return "images are mixed in every step; set data.augment.mixup=0 and cutmix=0"
    if stage.image_size != model.preprocessing.size_px:
        return "it trains at another size than it is evaluated at"
    if choice == "auto" and recorded != CACHED:
        if recorded is not None:
            return recorded  # a run that goes on does what it did
        if stage.views >= stage.epochs:
            return f"no view comes again in {stage.epochs} epochs"
    return None
