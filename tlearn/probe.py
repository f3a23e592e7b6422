"""`tlearn probe`: how well do a backbone's frozen features separate the classes? A linear probe, in seconds."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, StratifiedKFold
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC

from tlearn.config import Config, Stage
from tlearn.data.source import Indexed
from tlearn.errors import TlearnError
from tlearn.metrics import wilson_interval
from tlearn.models.build import Model, build_model
from tlearn.models.cut import NoCutError, rest_only
from tlearn.precision import choose_precision
from tlearn.runtime import Runtime
from tlearn.stagecache import StageCache
from tlearn.stages import HEAD_ONLY, resolve

Matrix = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]
Classifier = Literal["linear", "logreg", "svm", "knn"]

FOLDS = 5
RATES = (0.1, 1.0)
"""Times about the largest one that is stable: 1 / Lipschitz constant of the gradient, from a sample of rows."""
WEIGHT_DECAYS = (1e-3, 1e-2, 1e-1, 1.0)
STEPS = 200
BATCH = 1024
"""Samples of which a step of all linear heads is made."""

_SPECTRUM_ROWS = 2048

_SKLEARN: dict[str, tuple[Any, dict[str, list[Any]]]] = {
    "logreg": (LogisticRegression(max_iter=2000), {"C": [1e-4, 1e-3, 1e-2, 1e-1, 1.0]}),
    "svm": (SVC(), {"C": [0.1, 1.0, 10.0, 100.0]}),
    "knn": (KNeighborsClassifier(), {"n_neighbors": [1, 3, 5, 11, 21]}),
}


class Choice(NamedTuple):
    """What cross-validation chose, and what it predicts for val."""

    options: dict[str, float]
    cv_top1: float
    predicted: Labels


def probe(config: Config, classifier: Classifier) -> dict[str, Any]:
    """Fit a classifier to a backbone's features; options chosen by cross-validation on train, val scored once.

    Args:
        config: data, model, precision and seed count.
        classifier: linear: many linear heads at once; logreg, svm, knn: scikit-learn's.

    Returns:
        backbone, weights, image_size_px, classifier, features, options, cv/top1, val/top1 with its 95 % interval, the
        share of the largest class, seconds.

    Raises:
        TlearnError: a class with fewer than two train images, a model without a head to cut off.
    """
    start = time.perf_counter()
    model, x, y = frozen_features(config)
    choice = fitted(config, x, y, classifier)
    hits, n = int((choice.predicted == y["val"]).sum()), len(y["val"])
    return {
        "backbone": model.backbone,
        "weights": model.weights,
        "image_size_px": model.preprocessing.size_px,
        "classifier": classifier,
        "features": x["train"].shape[1],
        "options": choice.options,
        "cv/top1": choice.cv_top1,
        "val/top1": hits / n,
        "val/top1_interval95": list(wilson_interval(hits, n)),
        "val/n": n,
        "largest_class": float(np.bincount(y["val"]).max() / n),
        "seconds": round(time.perf_counter() - start, 2),
    }


def frozen_features(config: Config) -> tuple[Model, dict[str, Matrix], dict[str, Labels]]:
    """A backbone, what reaches its head, (n, features), and labels, by split.

    Raises:
        TlearnError: no index, a model without a head to cut off.
    """
    runtime = Runtime()
    if config.data.reader != "indexed":
        raise TlearnError("data.reader: a probe needs an index; prepare the data")
    source = Indexed(config)
    model = build_model(config, len(source.classes), None, source.colours)
    runtime.set_precision(choose_precision(config.precision, runtime.device, model)[0])
    model.net.to(runtime.device)
    return model, *_features(config, runtime, model, source)


def fitted(config: Config, x: dict[str, Matrix], y: dict[str, Labels], classifier: Classifier) -> Choice:
    """A classifier of features, its options chosen by cross-validation on train.

    Raises:
        TlearnError: a class with fewer than two train images.
    """
    smallest = int(np.bincount(y["train"], minlength=int(y["val"].max()) + 1).min())
    if smallest < 2:
        raise TlearnError(f"{config.data.path}: a class has {smallest} train images; cross-validation needs two")
    folds = StratifiedKFold(min(FOLDS, smallest), shuffle=True, random_state=config.seed % 2**32)
    splits = list(folds.split(x["train"], y["train"]))
    fit = _linear if classifier == "linear" else _sklearn
    return fit(classifier, x["train"], y["train"], x["val"], splits, config.seed)


def _features(
    config: Config, runtime: Runtime, model: Model, source: Indexed
) -> tuple[dict[str, Matrix], dict[str, Labels]]:
    """What reaches the head, (n, features), and labels, by split; from the cache, or computed into it."""
    stage = Stage(name="probe", epochs=1, train=HEAD_ONLY, views=1)
    names = [name for name, _ in model.net.named_parameters()]
    model.set_trainable(resolve(stage, names, model.head, model.blocks))
    seen: list[torch.Tensor] = []
    hook = model.net.get_submodule(model.head).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    x, y = {}, {}
    try:
        cache = StageCache(config, runtime, model, source, stage)
        with cache.filled(), rest_only(model.net, cache.cut):
            model.net.eval()
            for split in ("train", "val"):
                seen.clear()
                with torch.no_grad(), runtime.accelerator.autocast():
                    for features in cache.in_order(split):
                        model.net(features)
                x[split] = torch.cat(seen).float().cpu().numpy()
                y[split] = np.asarray(source.splits[split].rows["label"], dtype=np.int64)
    except NoCutError as reason:
        raise TlearnError(f"{model.backbone}: its features cannot be stored: {reason}") from None
    finally:
        hook.remove()
    return x, y


def _sklearn(
    name: str, x: Matrix, y: Labels, val: Matrix, splits: Sequence[tuple[Labels, Labels]], seed: int
) -> Choice:
    estimator, grid = _SKLEARN[name]
    fewest = min(len(train) for train, _ in splits)
    grid = {key: [v for v in values if key != "n_neighbors" or v <= fewest] for key, values in grid.items()}
    named = {f"{type(estimator).__name__.lower()}__{key}": values for key, values in grid.items()}
    search = GridSearchCV(make_pipeline(StandardScaler(), estimator), named, cv=splits).fit(x, y)
    options = {key.partition("__")[2]: float(value) for key, value in search.best_params_.items()}
    return Choice(options, float(search.best_score_), search.predict(val))


def _linear(name: str, x: Matrix, y: Labels, val: Matrix, splits: Sequence[tuple[Labels, Labels]], seed: int) -> Choice:
    """Every rate, weight decay and fold is a head; all of them train in the same steps."""
    grid = [(lr, decay) for lr in RATES for decay in WEIGHT_DECAYS]
    mean, std = x.mean(0), x.std(0) + 1e-6
    features, labels = torch.from_numpy((x - mean) / std), torch.from_numpy(y)
    classes = int(y.max()) + 1
    member = torch.zeros(len(splits), len(y))
    for fold, (train, _) in enumerate(splits):
        member[fold, torch.from_numpy(train)] = 1
    member = member.repeat_interleave(len(grid), 0)
    weights, biases = _trained(features, labels, classes, grid * len(splits), member, seed)
    hits = torch.zeros(len(weights))
    for some in torch.arange(len(y)).split(BATCH):  # type: ignore[no-untyped-call]
        right = _logits(features[some], weights, biases).argmax(2) == labels[some]
        hits += (right * (1 - member[:, some])).sum(1)
    scores = hits.view(len(splits), len(grid)).sum(0) / len(y)
    best = int(scores.argmax())
    weights, biases = _trained(features, labels, classes, [grid[best]], torch.ones(1, len(y)), seed)
    predicted = (torch.from_numpy((val - mean) / std) @ weights[0] + biases[0]).argmax(1).numpy()
    return Choice({"lr": grid[best][0], "weight_decay": grid[best][1]}, float(scores[best]), predicted)


def _trained(
    x: torch.Tensor, y: torch.Tensor, classes: int, grid: Sequence[tuple[float, float]], member: torch.Tensor, seed: int
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Linear heads, one per (rate, weight decay), by gradient descent with Nesterov's momentum and a cosine rate.

    Args:
        x: (n, d) standardised.
        y: (n,) int64.
        classes: of them.
        grid: H pairs.
        member: (H, n), 1 where a sample trains a head.
        seed: of the order of samples.

    Returns:
        H weights, (d, classes), and H biases, (classes,).
    """
    weights = [torch.zeros(x.shape[1], classes, requires_grad=True) for _ in grid]
    biases = [torch.zeros(classes, requires_grad=True) for _ in grid]
    # of the softmax: at most half the largest eigenvalue of the features' covariance (Böhning 1992)
    generator = torch.Generator().manual_seed(seed % 2**63)
    some = x[torch.randperm(len(x), generator=generator)[:_SPECTRUM_ROWS]]
    unit = 2 * len(some) / float(torch.linalg.matrix_norm(some, 2)) ** 2
    groups = [
        {"params": [w], "lr": lr * unit, "weight_decay": decay} for w, (lr, decay) in zip(weights, grid, strict=True)
    ]
    groups += [{"params": [b], "lr": lr * unit} for b, (lr, _) in zip(biases, grid, strict=True)]
    optimizer = torch.optim.SGD(groups, lr=unit, momentum=0.9, nesterov=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    for _ in range(STEPS):
        some = torch.randperm(len(y), generator=generator)[:BATCH] if len(y) > BATCH else torch.arange(len(y))
        logits = _logits(x[some], weights, biases)
        target = y[some].expand(len(grid), -1)
        losses = F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none").view(len(grid), -1)
        mine = member[:, some]
        # a sum over heads: each is trained by its own mean
        loss = ((losses * mine).sum(1) / mine.sum(1).clamp(min=1)).sum()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return [w.detach() for w in weights], [b.detach() for b in biases]


def _logits(x: torch.Tensor, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor]) -> torch.Tensor:
    """(heads, n, classes), by one matrix product."""
    product = (x @ torch.cat(list(weights), 1)).view(len(x), len(weights), -1)
    return (product + torch.stack(list(biases))).transpose(0, 1)
