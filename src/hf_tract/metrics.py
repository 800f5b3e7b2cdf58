"""Computes top-1 and top-5 accuracy, for Trainer and for other training loops.

    trainer = Trainer(..., compute_metrics=compute_top_k)

`TopK` is an `evaluate` metric that downloads nothing. Only this class needs the packages evaluate and datasets, so it
is created when it is first accessed.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_tract.config import TrActError

if TYPE_CHECKING:
    import evaluate
    from transformers import EvalPrediction

    TopK: type[evaluate.Metric]


def compute_top_k(prediction: EvalPrediction) -> dict[str, float]:
    """Return `top1` and `top5`, as shares of 1; pass this function to Trainer as `compute_metrics`.

    Where a model has several outputs, the first one holds the scores, as transformers orders them.
    """
    scores = prediction.predictions
    if isinstance(scores, tuple):
        scores = scores[0]
    return _top_k(scores, prediction.label_ids)


def _top_k(predictions: Any, references: Any) -> dict[str, float]:
    """Return the shares of images whose label has the highest score (`top1`), or one of the five highest (`top5`).

    Args:
        predictions: scores, (images, classes).
        references: labels, (images,).

    Raises:
        TrActError: for other shapes, such as those of several labels for each image.
    """
    scores = np.asarray(predictions)
    labels = np.asarray(references)
    if labels.ndim != 1 or scores.ndim != 2 or scores.shape[1] < 2:
        raise TrActError(
            f"`predictions` {scores.shape} and `references` {labels.shape} must "
            "be scores (images, classes) and one class for each image: for "
            "another task give Trainer another `compute_metrics`."
        )
    best = np.argsort(-scores, axis=1, kind="stable")[:, :5]
    hits = best == labels[:, None]
    top1 = hits[:, 0].mean()
    top5 = hits.any(axis=1).mean()
    return {"top1": float(top1), "top5": float(top5)}


def __getattr__(name: str) -> Any:
    if name == "TopK":
        return _top_k_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@functools.cache
def _top_k_class() -> Any:
    try:
        import datasets
        import evaluate
    except ImportError as error:
        raise ImportError(
            f"`hf_tract.metrics.TopK` needs the package {error.name}: `pip "
            "install evaluate` brings it. `compute_top_k` does without."
        ) from error

    class TopK(evaluate.Metric):  # type: ignore[misc]  # evaluate is not typed
        """Computes the shares of images whose label has the highest score (`top1`), or is among the five (`top5`)."""

        __qualname__ = "TopK"  # where pickle finds it

        def __init__(self, **kwargs: Any) -> None:
            # evaluate keeps the parts of several processes in files.
            kwargs.setdefault("keep_in_memory", kwargs.get("num_process", 1) == 1)
            super().__init__(**kwargs)

        def _info(self) -> evaluate.MetricInfo:
            scores = datasets.Sequence(datasets.Value("float32"))
            labels = datasets.Value("int64")
            return evaluate.MetricInfo(
                description="top-1 and top-5 accuracy",
                citation="",
                features=datasets.Features({"predictions": scores, "references": labels}),
            )

        def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
            return _top_k(predictions, references)

    return TopK
