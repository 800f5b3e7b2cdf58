"""Models that read images of one size only: guesses have that size, or it is told that they had not."""

from types import SimpleNamespace

import pytest
import timm
import torch
from torch import nn

from hf_tract import apply_tract, find_first_layers


def names(model: nn.Module, **kwargs) -> list[str]:
    return [layer.name for layer in find_first_layers(model, **kwargs)]


def branch(channels: int, side: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(channels, 4, 4, 4), nn.Flatten(), nn.Linear(4 * (side // 4) ** 2, 2))


class TwoStreams(nn.Module):
    """Reads colours and depth in one stack."""

    def __init__(self, side: int) -> None:
        super().__init__()
        self.rgb, self.depth = branch(3, side), branch(1, side)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.rgb(x[:, :3]) + self.depth(x[:, 3:])


@pytest.mark.parametrize("side", [16, 28, 32, 48, 64, 84, 96, 128, 224, 256, 384])
def test_every_branch_is_found_at_the_sizes_that_people_train_with(side, caplog):
    assert names(TwoStreams(side)) == ["rgb.0", "depth.0"]
    assert not caplog.records


def test_it_is_told_that_no_guess_may_have_reached_every_branch(caplog):
    assert names(TwoStreams(100)) == ["rgb.0"]
    (record,) = caplog.records
    assert "meet rgb.0, which is taken" in record.getMessage()
    assert "not the only place (several branches), give a batch with `example_batch=`" in record.getMessage()
    assert names(TwoStreams(100), example_batch=torch.rand(1, 4, 100, 100)) == ["rgb.0", "depth.0"]


def test_nothing_is_told_where_no_other_layer_could_read_the_pixels(caplog):
    model = nn.Sequential(nn.Conv2d(3, 4, 4, 4), nn.Conv2d(4, 4, 1), nn.Flatten(), nn.Linear(2500, 2))
    assert names(model) == ["0"]
    assert not caplog.records


def test_a_frozen_target_is_not_taken_for_its_predictor():
    class RandomDistillation(nn.Module):
        def __init__(self):
            super().__init__()
            self.target, self.predictor = branch(1, 84).requires_grad_(False), branch(1, 84)

        def forward(self, x):
            target = self.target(x)
            return self.predictor(x) - target

    assert [layer.name for layer in apply_tract(RandomDistillation()).layers] == ["predictor.0"]


@pytest.mark.parametrize("in_config", [False, True])
def test_a_size_that_a_part_names_is_tried(in_config, caplog):
    model = TwoStreams(100)
    if in_config:
        model.rgb.config = SimpleNamespace(vision_config=SimpleNamespace(image_size=[100, 100]))
    else:
        # What is no size is passed over.
        model.rgb.sample_size, model.rgb.input_size, model.depth.img_size = "all", 0, (100, 100)
    assert names(model) == ["rgb.0", "depth.0"]
    assert not caplog.records


def test_a_timm_model_of_another_size_than_its_checkpoints_is_searched(caplog):
    model = timm.create_model("vit_tiny_patch16_224", features_only=True, img_size=64)
    assert names(model) == ["model.patch_embed.proj"]
    assert not caplog.records


def test_volumes_have_common_sides_too(caplog):
    class TwoVolumes(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv3d(1, 2, 16, 16), nn.Conv3d(1, 2, 16, 16)
            self.head = nn.Linear(128, 2)

        def forward(self, x):
            return self.head(self.a(x).flatten(1)) + self.head(self.b(x).flatten(1))

    assert names(TwoVolumes()) == ["a", "b"]
    assert not caplog.records
