"""Top-1 and top-5 accuracy as an `evaluate` metric, which nothing has to be downloaded for."""

from typing import Any

import datasets
import evaluate
import numpy as np


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
