"""What lam is measured against: C's eigenvalues, measured on batches, and what a user is told of their scale."""

import copy
import logging

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from helpers.models import Airbench, small_vit, trainer
from helpers.oracle import moment, says
from hf_tract import TrActCallback, TrActError, apply_tract, first_layer_spectrum, whiten_first_layer


def model() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.Flatten(), nn.Linear(8 * 16, 5))


def told(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name.startswith("hf_tract")]


@pytest.mark.parametrize("kind", ["a tensor", "tensors", "tuples", "a loader", "keywords"])
def test_the_figures_are_those_of_a_dense_float64_c(kind):
    net, x = model(), torch.randn(32, 3, 16, 16) * 0.7 + 0.2
    batches = {
        "a tensor": x,
        "tensors": list(x.split(8)),
        "tuples": [(part, torch.zeros(len(part))) for part in x.split(8)],
        "a loader": DataLoader(TensorDataset(x, torch.zeros(len(x))), 8),
        "keywords": [{"input": part, "labels": None} for part in x.split(8)],
    }[kind]
    found = first_layer_spectrum(net, batches, lam=0.2)
    values = torch.linalg.eigvalsh(moment(x, net[0])[0])
    assert list(found) == ["0"]
    assert found["0"].mean == pytest.approx(float(values.mean()))
    assert found["0"].largest == pytest.approx(float(values.max()))
    assert found["0"].condition == pytest.approx(float((values.max() + 0.2) / (values.min().clamp(min=0) + 0.2)))
    assert (found["0"].above, found["0"].n) == (int((values > 0.2).sum()), 48)


@pytest.mark.parametrize("columns", [1, 2], ids=["alone", "with targets"])
@pytest.mark.parametrize("kind", ["signals", "sequences"])
def test_batches_of_three_dimensions_are_no_lists_of_images(columns, kind):
    if kind == "signals":
        net, x = nn.Sequential(nn.Conv1d(3, 8, 5), nn.Flatten(), nn.Linear(8 * 12, 5)), torch.randn(32, 3, 16)
    else:
        net, x = nn.Sequential(nn.Linear(7, 8), nn.Flatten(), nn.Linear(8 * 6, 5)), torch.randn(32, 6, 7)
    loader = DataLoader(TensorDataset(*[x] * columns), 8)
    assert first_layer_spectrum(net, loader)["0"].mean == pytest.approx(first_layer_spectrum(net, x)["0"].mean)
    expected = copy.deepcopy(net)
    whiten_first_layer(net, loader)
    whiten_first_layer(expected, x)
    assert torch.allclose(net[0].weight, expected[0].weight, atol=1e-5)


def test_a_synchronised_batch_norm_stays_in_evaluation_mode():
    """Else it would wait for other processes."""
    net, x = nn.Sequential(nn.SyncBatchNorm(3), nn.Conv2d(3, 6, 4, 4)), 5 + torch.randn(16, 3, 8, 8)
    found = first_layer_spectrum(net, x, layers=["1"])["1"]
    assert found.mean == pytest.approx(float(x.square().mean()), rel=1e-3)


def test_a_weight_that_its_parent_reads_is_measured_there():
    net, x = Airbench(), torch.randn(16, 3, 8, 8)
    found = first_layer_spectrum(net, x)
    values = torch.linalg.eigvalsh(moment(x, net.whiten)[0])
    assert list(found) == ["whiten"]
    assert found["whiten"].mean == pytest.approx(float(values.mean()))


@pytest.mark.parametrize("layers", [["0"], ["0", "3"]])
def test_the_first_of_two_calls_in_a_forward_counts(layers):
    """Also where the forward runs on to a second layer."""

    class Twice(nn.Sequential):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self[0](5 * self[0](x).mean() + x)
            return super().forward(x)

    net, x = Twice(*model(), nn.Linear(5, 2)), torch.randn(16, 3, 16, 16)
    found = first_layer_spectrum(net, x, layers=layers)
    assert found["0"].mean == pytest.approx(float(x.square().mean()))


def test_the_buffers_of_a_spectral_norm_stay_as_they_are():
    net = model()
    nn.utils.parametrizations.spectral_norm(net[0])
    before = {name: value.clone() for name, value in net.state_dict().items()}
    first_layer_spectrum(net.train(), torch.randn(2, 3, 16, 16))
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_a_lam_that_is_none_is_refused():
    with pytest.raises(TrActError, match=says("`lam` (=0")):
        first_layer_spectrum(model(), torch.randn(2, 3, 16, 16), lam=0)


def step(net: nn.Module, x: torch.Tensor) -> None:
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    net(x).square().mean().backward()
    optimizer.step()


@pytest.mark.parametrize("scale, effect", [(0.15, "most directions are scaled alike"), (30, "learns slowly")])
def test_pixels_of_another_scale_are_told_after_the_first_step_with_what_to_do(caplog, scale, effect):
    net = model()
    handle = apply_tract(net)
    for _ in range(2):
        step(net, torch.randn(16, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * scale)
    mean = handle.stats()["0"]["mean_eigenvalue"]
    assert mean == pytest.approx(scale**2, rel=0.05)
    (message,) = told(caplog)
    assert f"the mean eigenvalue of C, the mean square of what the layer reads, is about {mean:.2g}" in message
    assert effect in message
    assert f"or use a lam of {0.05 * mean:.2g} to {0.2 * mean:.2g}" in message


@pytest.mark.parametrize("lam, scale", [(0.1, 1), (0.8, 1), (0.02, 0.47), (0.011, 0.47), (1600, 126), (800, 126)])
def test_a_lam_that_fits_the_pixels_is_no_news(caplog, lam, scale):
    net = model()
    apply_tract(net, lam=lam)
    step(net, torch.randn(16, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * scale)
    assert told(caplog) == []


def test_trainers_logs_have_the_mean_eigenvalue_and_the_warning(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "hf_tract"):
        run = trainer(tmp_path, small_vit(), callbacks=[TrActCallback()])
        run.train_dataset = [
            {**example, "pixel_values": example["pixel_values"] / 10}
            for example in map(run.train_dataset.__getitem__, range(64))
        ]
        run.train()
    figures = [entry["tract/mean_eigenvalue"] for entry in run.state.log_history if "loss" in entry]
    assert len(figures) == 2
    assert max(figures) < 0.3
    assert sum("the mean eigenvalue of C" in message for message in told(caplog)) == 1
