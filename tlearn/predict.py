"""A trained model from a run folder: predictions for images, scores for labelled data."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tlearn.config import Config
from tlearn.data.decode import UnreadableImageError
from tlearn.data.loader import EVAL_IMAGES, Share, Steps, eval_loader
from tlearn.data.plan import Options
from tlearn.data.prepare import comes_split, prepare_cached
from tlearn.data.shards import INDEX, read_index
from tlearn.data.source import open_source
from tlearn.data.transforms import EvalTransform, Preprocessing, normalise
from tlearn.errors import TlearnError
from tlearn.evaluate import evaluate
from tlearn.models.heads import Mirrored
from tlearn.runtime import Runtime
from tlearn.trained import load_trained


class Prediction(NamedTuple):
    """The most likely classes of one image, or why there are none."""

    file: str
    classes: list[tuple[str, float]]
    """(class, probability), the most likely first."""
    error: str | None = None


class Classifier:
    """A trained model with its preprocessing.

    Attributes:
        net: (B, 3, S, S) normalised images -> (B, classes) logits, in eval mode.
        classes: names in label order.
        preprocessing: what it was trained and evaluated with.
        config: of the run.
        data_fingerprint: of the data it was trained on.
    """

    def __init__(
        self,
        net: torch.nn.Module,
        classes: Sequence[str],
        preprocessing: Preprocessing,
        runtime: Runtime,
        config: Config,
        data_fingerprint: str,
    ) -> None:
        self.classes, self.preprocessing, self.runtime = tuple(classes), preprocessing, runtime
        self.config, self.data_fingerprint = config, data_fingerprint
        self.net = Mirrored(net) if config.data.eval_flips else net

    def predict(self, paths: Sequence[str | Path], topk: int = 5) -> list[Prediction]:
        """The `topk` most likely classes of every file, in the files' order; unreadable files carry an error."""
        if topk < 1:
            raise TlearnError(f"topk = {topk}: at least 1")
        found: dict[int, Prediction] = {}
        transform = EvalTransform(self.preprocessing)
        for start_at in range(0, len(paths), EVAL_IMAGES):
            images: dict[int, torch.Tensor] = {}
            for i in range(start_at, min(start_at + EVAL_IMAGES, len(paths))):
                try:
                    path = Path(paths[i])
                    if path.exists() and not path.is_file():  # reading a pipe would wait for ever
                        raise UnreadableImageError("not a regular file")
                    images[i] = torch.from_numpy(transform(path.read_bytes()))
                except UnreadableImageError as error:
                    found[i] = Prediction(str(paths[i]), [], str(error))
                except OSError as error:
                    found[i] = Prediction(str(paths[i]), [], f"cannot be read: {error.strerror}")
            if not images:
                continue
            probabilities = self._probabilities(torch.stack(list(images.values())))
            values, labels = probabilities.topk(min(topk, len(self.classes)), dim=1)
            for i, v, n in zip(images, values.tolist(), labels.tolist(), strict=True):
                found[i] = Prediction(str(paths[i]), [(self.classes[k], p) for k, p in zip(n, v, strict=True)])
        return [found[i] for i in range(len(paths))]

    def evaluate(self, data: str | Path | None = None) -> dict[str, Any]:
        """Scores on the val and test images of prepared data, or on all images of a folder of class folders.

        Args:
            data: classes may be missing in it. Default: what the run itself held out.

        Raises:
            TlearnError: classes that the model does not know, or a run's data that are no longer the same.
        """
        loaders = self._held_out() if data is None else self._foreign(Path(data).expanduser())
        if not loaders:
            raise TlearnError(f"{data}: has no val or test images")
        results: dict[str, Any] = {}
        for name, loader in loaders.items():
            with closing(loader):
                results[name] = evaluate(self.runtime, self.net, loader, self.classes)
        return results | {"image_size_px": self.preprocessing.size_px}

    def _held_out(self) -> dict[str, Steps]:
        source = open_source(self.config)
        if source.fingerprint != self.data_fingerprint:
            raise TlearnError(
                f"{self.config.data.path}: holds other images than when this run was trained: it may have trained on "
                "what is held out now; name what is to be scored with --data"
            )
        where = self.preprocessing, Share(EVAL_IMAGES), self.runtime.device, self.runtime.dtype
        held_out = [name for name in ("val", "test", "target") if name in source.sizes]
        return {name: source.eval_loader(name, *where) for name in held_out}

    def _foreign(self, path: Path) -> dict[str, Steps]:
        if not path.is_dir():
            raise TlearnError(f"--data {path}: no such folder; give class folders or prepared data")
        if (path / INDEX).is_file():
            index = read_index(path)
        else:
            # a plain folder of classes is all there to be scored, of one with train and test only what is held out
            index = prepare_cached(path, Options(val=0.0 if comes_split(path) else 1.0))
        if unknown := sorted(set(index.classes) - set(self.classes)):
            raise TlearnError(f"{path}: classes that the model does not know: {', '.join(unknown[:5])}")
        labels = [self.classes.index(name) for name in index.classes]
        return {
            name: eval_loader(
                index.splits[name].relabelled(labels),
                self.preprocessing,
                Share(EVAL_IMAGES),
                device=self.runtime.device,
                dtype=self.runtime.dtype,
                workers=self.config.data.workers,
            )
            for name in ("val", "test")
            if name in index.splits
        }

    def _probabilities(self, images: torch.Tensor) -> torch.Tensor:
        batch = normalise(images.to(self.runtime.device), self.preprocessing, self.runtime.dtype)
        with torch.no_grad(), self.runtime.accelerator.autocast():
            probabilities: torch.Tensor = self.net(batch).float().softmax(dim=1).cpu()
        return probabilities


def load(run: str | Path) -> Classifier:
    """The best model of a run.

    Raises:
        TlearnError: no run there, or one that has not finished an epoch.
    """
    net, _, card, config, _ = load_trained(Path(run))
    runtime = Runtime()
    # what was trained on another device can be used on this one
    runtime.set_precision("fp32" if runtime.unsupported(config.precision) else config.precision)
    net.to(runtime.device, runtime.dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return Classifier(net, card.classes, card.preprocessing, runtime, config, card.data_fingerprint)
