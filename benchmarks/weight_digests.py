"""Prints digests of weights after four steps with TrAct, which a change that is meant to change nothing leaves alone.

A digest depends on the machine and on the version of torch, so it is compared on one machine:

    python -m benchmarks.weight_digests --output before.json     # on the old commit
    python -m benchmarks.weight_digests --compare before.json    # on the new one
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel
from transformers import ViTConfig, ViTForImageClassification

from benchmarks.common.options import new_parser
from hf_tract import apply_tract

STEPS = 4
BATCH = 16
MICRO_STEPS = 4
RANKS = 2


class Logits(nn.Module):
    """Wraps a ViT so that its forward takes pixels and returns a tensor."""

    def __init__(self) -> None:
        super().__init__()
        config = ViTConfig(
            hidden_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            image_size=16,
            patch_size=4,
        )
        config.num_labels = 4
        self.vit = ViTForImageClassification(config)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Return the scores, (N, 4)."""
        scores: Tensor = self.vit(pixel_values).logits
        return scores


def linear() -> nn.Module:
    """Make a classifier of flat images."""
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 24), nn.GELU(), nn.Linear(24, 4))


def convolution(dims: int) -> nn.Module:
    """Make a classifier with a stem of that many dimensions and overlapping patches."""
    layer = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1](3, 8, 3, stride=2, padding=1)
    return nn.Sequential(layer, nn.GELU(), nn.Flatten(), nn.LazyLinear(4))


def resnet_stem() -> nn.Module:
    """Make a classifier with a ResNet's first layers."""
    stem = nn.Conv2d(3, 16, 7, stride=2, padding=3, bias=False)
    return nn.Sequential(stem, nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 4))


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "Linear": (linear, (3, 16, 16)),
    "Conv1d": (lambda: convolution(1), (3, 32)),
    "Conv2d": (lambda: convolution(2), (3, 16, 16)),
    "Conv3d": (lambda: convolution(3), (3, 6, 8, 8)),
    "ViT": (Logits, (3, 16, 16)),
    "ResNet stem": (resnet_stem, (3, 32, 32)),
}


def digest(name: str, rank: int = 0, ranks: int = 1, micro_steps: int = 1) -> str:
    """Train one model and return the digest of its weights."""
    make, shape = MODELS[name]
    torch.manual_seed(0)
    model = make()
    # This sets the sizes of lazy layers.
    model(torch.zeros(2, *shape))
    apply_tract(model, lam=0.1, layers="auto" if name == "ViT" else next(iter(_layer_names(model))))
    wrapped = DistributedDataParallel(model) if ranks > 1 else model
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        pixels = torch.randn(BATCH, *shape, generator=generator)
        labels = torch.randint(0, 4, (BATCH,), generator=generator)
        optimizer.zero_grad()
        my_pixels = pixels.chunk(ranks)[rank].chunk(micro_steps)
        my_labels = labels.chunk(ranks)[rank].chunk(micro_steps)
        for part, part_labels in zip(my_pixels, my_labels, strict=True):
            loss = nn.functional.cross_entropy(wrapped(part), part_labels) / micro_steps
            loss.backward()
        optimizer.step()
    weights = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    return hashlib.sha256(weights.numpy().tobytes()).hexdigest()[:16]


def _layer_names(model: nn.Module) -> list[str]:
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d))
    ]


def _rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    digests = {name: digest(name, rank, RANKS) for name in MODELS}
    dist.barrier()
    dist.destroy_process_group()
    Path(folder, f"{rank}.json").write_text(json.dumps(digests), encoding="utf-8")


def all_digests() -> dict[str, str]:
    """Return the digest of each model in each way of training."""
    torch.set_num_threads(1)
    found = {}
    for name in MODELS:
        found[f"{name}, one batch"] = digest(name)
        found[f"{name}, {MICRO_STEPS} micro-steps"] = digest(name, micro_steps=MICRO_STEPS)
    with tempfile.TemporaryDirectory() as folder:
        spawn(_rank, (folder,), nprocs=RANKS)
        for rank in range(RANKS):
            digests = json.loads(Path(folder, f"{rank}.json").read_text(encoding="utf-8"))
            for name, value in digests.items():
                found[f"{name}, {RANKS} ranks, rank {rank}"] = value
    return found


def main() -> None:
    """Print the digests, and compare or write them."""
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("--output", type=Path, help="a JSON file to write the digests to")
    add("--compare", type=Path, help="a JSON file with the digests of another commit; exit code 1 if one differs")
    arguments = parser.parse_args()
    found = all_digests()
    for name, value in found.items():
        print(f"{value}  {name}")
    if arguments.output:
        arguments.output.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    if arguments.compare:
        before = json.loads(arguments.compare.read_text(encoding="utf-8"))
        different = [name for name in before if found.get(name) != before[name]]
        print(f"different: {', '.join(different)}" if different else f"all {len(before)} are equal")
        sys.exit(bool(different))


if __name__ == "__main__":
    main()
