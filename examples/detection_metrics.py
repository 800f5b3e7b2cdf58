"""How well a detector does: mean average precision, by torchmetrics and pycocotools, over all processes."""

from collections.abc import Callable, Sequence

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from PIL.Image import Image
from torch import Tensor
from torchmetrics.detection import MeanAveragePrecision

from detection_data import Examples, Objects

Found = dict[str, Tensor]  # boxes (k, 4): left, top, right, bottom in pixels; scores (k,); labels (k,), from 0
MEASURES = {"map_50": "mAP at IoU .5", "map": "mAP, COCO", "map_voc07": "mAP, VOC 2007"}


@torch.no_grad()
def evaluate(detect: Callable[[list[Image]], list[Found]], examples: Examples, batch_size: int) -> dict[str, float]:
    """The mean average precisions over all test images, of which each process looks at its part."""
    state = PartialState()
    mine = range(state.process_index, len(examples), state.num_processes)
    seen: list[tuple[Found, Objects]] = []
    for first in range(0, len(mine), batch_size):
        batch = [examples[index] for index in mine[first : first + batch_size]]
        found = detect([each.image for each in batch])
        on_host = [
            {name: values.float().cpu() if name != "labels" else values.cpu() for name, values in f.items()}
            for f in found
        ]
        seen += zip(on_host, (each.objects for each in batch), strict=True)
    return mean_average_precision(*zip(*gather_object(seen), strict=True))


def mean_average_precision(found: Sequence[Found], wanted: Sequence[Objects]) -> dict[str, float]:
    """Of detections and the objects of the same images.

    Args:
        found: what a model says of each image.
        wanted: what is there; difficult objects are ignored, as crowds are in COCO.

    Returns:
        `map`: COCO's mean over IoU .5 to .95; `map_50`: at .5; `map_voc07`: at .5, by VOC 2007's eleven recalls.
        (VOC's own program measures a box of whole pixels one pixel larger, and matches difficult objects by IoU
        instead of overlap.)
    """
    targets = [{"boxes": each.boxes, "labels": each.labels, "iscrowd": each.difficult.int()} for each in wanted]
    coco = MeanAveragePrecision(backend="pycocotools")
    voc = MeanAveragePrecision(
        iou_thresholds=[0.5], rec_thresholds=[step / 10 for step in range(11)], backend="pycocotools"
    )
    for metric in (coco, voc):
        metric.warn_on_many_detections = False
        metric.update(list(found), targets)
    figures = coco.compute()
    return {"map_50": float(figures["map_50"]), "map": float(figures["map"]), "map_voc07": float(voc.compute()["map"])}
