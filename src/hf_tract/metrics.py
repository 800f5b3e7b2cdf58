"""Top-1 and top-5 accuracy as an `evaluate` metric, which nothing has to be downloaded for.

from hf_tract.metrics import TopK, compute_top_k
trainer = Trainer(..., compute_metrics=compute_top_k)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import datasets
import evaluate
import numpy as np

if TYPE_CHECKING:
    from transformers import EvalPrediction


class TopK(evaluate.Metric):  # type: ignore[misc]  # evaluate is not typed
    """Shares of images whose label is the best, and among the five best, of the scores."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(keep_in_memory=True, **kwargs)

    def _info(self) -> evaluate.MetricInfo:
        features = {"predictions": datasets.Sequence(datasets.Value("float32")), "references": datasets.Value("int64")}
        return evaluate.MetricInfo(
            description="top-1 and top-5 accuracy",
            citation="",
            features=datasets.Features(features),
            inputs_description="predictions: scores, (images, classes); references: labels, (images,)",
        )

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        scores, labels = np.asarray(predictions), np.asarray(references)
        best = np.argsort(-scores, axis=1, kind="stable")[:, :5]
        hits = best == labels[:, None]
        return {"top1": float(hits[:, 0].mean()), "top5": float(hits.any(1).mean())}


def compute_top_k(prediction: EvalPrediction) -> dict[str, float]:
    """`top1` and `top5`, as Trainer's `compute_metrics`."""
    values: dict[str, float] = TopK().compute(predictions=prediction.predictions, references=prediction.label_ids)
    return values
