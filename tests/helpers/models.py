"""Makes small models, images and Trainers that the tests share."""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import Dataset
from transformers import (
    ConvNextConfig,
    ConvNextForImageClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)

from hf_tract.core.attach import TrActLayer

STEM = "vit.embeddings.patch_embeddings.projection"


class Images(Dataset):
    """Holds `count` random 16x16 images of varied brightness and their labels, equal for equal seeds."""

    def __init__(self, count: int = 64, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.pixels = (
            torch.randn(count, 3, 16, 16, generator=generator) * torch.rand(count, 1, 1, 1, generator=generator) * 2
        )
        self.labels = torch.randint(0, 4, (count,), generator=generator)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"pixel_values": self.pixels[index], "labels": self.labels[index]}

    def batch(self, start: int = 0, stop: int | None = None) -> dict[str, torch.Tensor]:
        return {"pixel_values": self.pixels[start:stop], "labels": self.labels[start:stop]}


def small_vit(seed: int = 0, **settings: Any) -> ViTForImageClassification:
    torch.manual_seed(seed)
    shape = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = ViTConfig(**{**shape, "image_size": 16, "patch_size": 4, "num_labels": 4, **settings})
    return ViTForImageClassification(config)


def trainer(
    folder: Path, model: nn.Module | None = None, callbacks: list[Any] | None = None, **settings: Any
) -> Trainer:
    """Makes a Trainer of four optimizer steps by default: 64 images, batches of 16."""
    init = settings.pop("model_init", None)
    defaults = {"per_device_train_batch_size": 16, "num_train_epochs": 1, "learning_rate": 1e-2, "save_strategy": "no"}
    defaults |= {
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "logging_strategy": "steps",
        "logging_steps": 2,
    }
    args = TrainingArguments(output_dir=str(folder), **{**defaults, **settings})
    model = None if init else (model if model is not None else small_vit())
    data = Images()
    return Trainer(
        model=model, model_init=init, args=args, train_dataset=data, eval_dataset=data, callbacks=callbacks or []
    )


def weights(model: nn.Module) -> torch.Tensor:
    """Returns all parameters in one vector."""
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def stem_of(model: nn.Module) -> nn.Conv2d:
    stem = model.get_submodule(STEM)
    assert isinstance(stem, nn.Conv2d)
    return stem


def small_convnext(seed: int = 0) -> ConvNextForImageClassification:
    torch.manual_seed(seed)
    return ConvNextForImageClassification(
        ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, num_labels=4)
    )


def has_tract(model: nn.Module) -> bool:
    return any(isinstance(module, TrActLayer) for module in model.modules())


class Watch(TrainerCallback):
    """Notes at each step whether the first layer has TrAct, and raises at one step when told to."""

    def __init__(self, raise_at: int | None = None, error: type[BaseException] = KeyboardInterrupt) -> None:
        self.had_tract: list[bool] = []
        self.raise_at, self.error = raise_at, error

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.model = model
        self.had_tract.append(has_tract(model))
        if state.global_step == self.raise_at:
            self.raise_at = None
            raise self.error("out of memory, CUDA out of memory. Tried to allocate")


class Adapted(nn.Linear):
    """Adds a low rank to its weight, as loralib's layers do."""

    def __init__(self, n, m):
        super().__init__(n, m)
        self.a, self.b = nn.Parameter(torch.randn(2, n)), nn.Parameter(torch.randn(m, 2))

    def forward(self, x):
        return F.linear(x, self.weight, self.bias) + F.linear(F.linear(x, self.a), self.b)


class Gated(nn.Conv2d):
    """Multiplies by the output of a layer of the same shape that it contains."""

    def __init__(self):
        super().__init__(3, 4, 2, 2)
        self.gate = nn.Conv2d(3, 4, 2, 2)

    def forward(self, x):
        return super().forward(x) * self.gate(x).sigmoid()


class Airbench(nn.Module):
    """Reads the weight of its first layer by `F.conv2d`, as cifar10-airbench does."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.whiten, self.conv = nn.Conv2d(3, 24, 2), nn.Conv2d(24, 8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(F.gelu(F.conv2d(x, self.whiten.weight, self.whiten.bias))).mean((2, 3))
