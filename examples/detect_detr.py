"""Compares vanilla and TrAct in DETR, RT-DETR, YOLOS and their like, trained by transformers' Trainer, by their mAP.

    python examples/detect_detr.py                                     # digit scenes, a small RT-DETR, a few minutes
    python examples/detect_detr.py --seeds 3 --report_to tensorboard
    python examples/detect_detr.py --model PekingU/rtdetr_r18vd --dataset cppe-5 --image_size 480 --num_train_epochs 20

Both arms train the first layer, which DETR freezes. Every option of TrainingArguments is an option here. Runs that
have finished are in OUTPUT_DIR/records.jsonl and not run again; a run that was killed goes on from its last epoch.
"""

import dataclasses
import json
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from PIL.Image import Image
from torch.utils.data import Dataset
from transformers import (
    CONFIG_MAPPING,
    IMAGE_PROCESSOR_MAPPING,
    AutoConfig,
    AutoImageProcessor,
    AutoModelForObjectDetection,
    HfArgumentParser,
    RTDetrImageProcessor,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

from comparison import Record, compare, two_arms
from detection_data import DetectionArguments, Detections, Example
from detection_metrics import MEASURES, Found, evaluate
from hf_tract import TrActCallback, find_first_layers
from step_clock import StepClock

SMALL_RT_DETR = {
    "backbone_config": {
        "model_type": "rt_detr_resnet",
        "embedding_size": 16,
        "hidden_sizes": [16, 32, 64, 64],
        "depths": [1, 1, 1, 1],
        "layer_type": "basic",
        "out_features": ["stage2", "stage3", "stage4"],
    },
    "encoder_in_channels": [32, 64, 64],
    "encoder_hidden_dim": 64,
    "encoder_ffn_dim": 128,
    "encoder_attention_heads": 4,
    "d_model": 64,
    "decoder_in_channels": [64, 64, 64],
    "decoder_ffn_dim": 128,
    "decoder_attention_heads": 4,
    "decoder_layers": 2,
    "num_queries": 30,
    "num_denoising": 20,
    "hidden_expansion": 0.5,
    "freeze_backbone_batch_norms": False,
}


@dataclass
class Arguments(DetectionArguments):
    """What is trained, and the arms."""

    model: str = field(default="rt_detr", metadata={"help": "a model type for random weights, or a checkpoint"})
    model_config: str = field(
        default="",
        metadata={
            "help": "JSON: settings of a model of random weights; by default a small RT-DETR's or the model type's own"
        },
    )
    image_size: int = field(
        default=128, metadata={"help": "of the square to which images are resized; 0: as the processor says"}
    )
    lam: float = field(default=0.1, metadata={"help": "TrAct's damping"})
    seeds: int = field(default=1, metadata={"help": "train each arm from that many seeds, from --seed on"})


USUAL = {
    "output_dir": "outputs/detect_detr",
    "num_train_epochs": 6,
    "per_device_train_batch_size": 8,
    "learning_rate": 1e-3,
    "per_device_eval_batch_size": 16,
    "weight_decay": 1e-4,
    "warmup_steps": 50,
    "lr_scheduler_type": "cosine",
    "max_grad_norm": 1.0,
    "eval_strategy": "epoch",
    "save_strategy": "epoch",
    "save_total_limit": 1,
    "seed": 0,
    "logging_strategy": "epoch",
    "report_to": "none",
    "dataloader_pin_memory": False,
}


def main() -> None:
    parser = HfArgumentParser([Arguments, TrainingArguments])  # type: ignore[list-item]
    parser.set_defaults(**USUAL)
    args, training = parser.parse_args_into_dataclasses()
    args.model_config = args.model_config or (json.dumps(SMALL_RT_DETR) if args.model == "rt_detr" else "{}")
    data = args.load()
    told = (
        "num_train_epochs",
        "per_device_train_batch_size",
        "learning_rate",
        "weight_decay",
        "warmup_steps",
        "max_grad_norm",
    )
    same = {key: value for key, value in vars(args).items() if key not in ("lam", "seeds")}
    same |= {key: getattr(training, key) for key in told}
    seeds = range(training.seed, training.seed + args.seeds)
    title = f"{Path(args.dataset).name}, {args.model}, lam {args.lam:g}"
    run_one = partial(train, data=data, args=args, training=training)
    compare(Path(training.output_dir), two_arms(same, args.lam), seeds, run_one, title, MEASURES["map_50"])


def train(
    arm: str, seed: int, settings: dict[str, Any], data: Detections, args: Arguments, training: TrainingArguments
) -> Record:
    """One run of one arm; it goes on from its last epoch where there is one."""
    folder = Path(str(training.output_dir)) / f"{arm}-{seed}"
    last = get_last_checkpoint(str(folder)) if folder.is_dir() else None
    set_seed(seed)
    model, processor = detector(args, data.names)
    if last:  # Trainer's own loading misses what transformers renames when it saves
        model = AutoModelForObjectDetection.from_pretrained(last)
    stem = find_first_layers(model)[0]
    if not stem.module.weight.requires_grad:
        print(f"\n{args.model} freezes its first layer, {stem.name}; here it is trained.")
        stem.module.requires_grad_(True)
    print(f"\n{arm}, seed {seed}: {model.num_parameters():,} parameters, first layer {stem.name} {stem.module}")
    clock = StepClock()
    train_data, test_data = cast("tuple[Dataset[Example], Dataset[Example]]", (data.train, data.test))
    trainer = DetectionTrainer(
        model=model,
        args=dataclasses.replace(training, output_dir=str(folder), seed=seed, remove_unused_columns=False),
        train_dataset=train_data,
        eval_dataset=test_data,
        processing_class=processor,
        data_collator=partial(collate, processor),
        callbacks=[clock, *([TrActCallback(lam=settings["lam"])] if "lam" in settings else [])],
    )
    trainer.train(resume_from_checkpoint=last)
    rows = [entry for entry in trainer.state.log_history if "eval_map_50" in entry]
    more = {MEASURES[name]: rows[-1][f"eval_{name}"] for name in MEASURES if name != "map_50"}
    return Record(arm, seed, [row["eval_map_50"] for row in rows], clock.median(), settings, more)


def detector(args: Arguments, names: list[str]) -> tuple[Any, Any]:
    """A detector and its image processor, which takes the boxes along."""
    maps: dict[str, Any] = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    if args.model in CONFIG_MAPPING:
        config = AutoConfig.for_model(args.model, **json.loads(args.model_config), **maps)
        known: Any = IMAGE_PROCESSOR_MAPPING.get(type(config), None)
        processor = (known["torchvision"] if known else RTDetrImageProcessor)()
        processor.do_normalize = (
            True  # which RT-DETR's is not asked for; lam is made for pixels of mean 0 and variance 1
        )
        model = AutoModelForObjectDetection.from_config(config)
    else:
        model = AutoModelForObjectDetection.from_pretrained(args.model, ignore_mismatched_sizes=True, **maps)
        processor = AutoImageProcessor.from_pretrained(args.model)
    if args.image_size:
        processor.size = {"height": args.image_size, "width": args.image_size}
    return model, processor


def collate(processor: Any, batch: list[Example]) -> dict[str, Any]:
    """Pixels, their mask where the images of a batch are padded, and labels in the form that DETR takes."""
    return dict(
        processor(
            [each.image for each in batch], annotations=[annotation(each) for each in batch], return_tensors="pt"
        )
    )


def annotation(example: Example) -> dict[str, Any]:
    """Objects as COCO writes them: boxes by left, top, width and height."""
    boxes, labels, difficult = example.objects
    rows = [
        {"bbox": box, "category_id": label, "area": box[2] * box[3], "iscrowd": int(hard)}
        for box, label, hard in zip(
            torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], 1).tolist(),
            labels.tolist(),
            difficult.tolist(),
            strict=True,
        )
    ]
    return {"image_id": 0, "annotations": rows}


class DetectionTrainer(Trainer):
    """A Trainer whose evaluation is the mean average precision."""

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """The figures of `detection_metrics.evaluate`, logged."""
        examples: Any = eval_dataset or self.eval_dataset
        find = partial(detect, self.accelerator.unwrap_model(self.model), self.processing_class)
        figures = evaluate(find, examples, self.args.per_device_eval_batch_size)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in figures.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


def detect(model: Any, processor: Any, images: list[Image]) -> list[Found]:
    """What a model finds in images."""
    model.eval()
    inputs = processor(images, return_tensors="pt").to(model.device)
    sizes = [(image.height, image.width) for image in images]
    found: list[Found] = processor.post_process_object_detection(model(**inputs), threshold=0.0, target_sizes=sizes)
    return found


if __name__ == "__main__":
    main()
