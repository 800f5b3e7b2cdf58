"""Works with: plain PyTorch loops and any optimizer; float16 with a GradScaler; EMA."""

import copy

import pytest
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from helpers.models import Images, small_vit, stem_of, weights
from helpers.oracle import assert_close, expected
from hf_tract import apply_tract

OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-3),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=1e-3),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_accumulation_is_one_large_batch(name):
    moved = []
    for micros in (1, 4):
        model, data = small_vit().double(), Images().batch()
        data["pixel_values"] = data["pixel_values"].double()
        start = weights(model)
        apply_tract(model, lam=0.1)
        optimizer = OPTIMIZERS[name](model.parameters())
        for _ in range(5):
            chunks = [{key: value.chunk(micros)[i] for key, value in data.items()} for i in range(micros)]
            for chunk in chunks:
                (model(**chunk).loss / micros).backward()
            optimizer.step()
            optimizer.zero_grad()
        moved.append(weights(model) - start)
    assert_close(moved[1], moved[0], 1e-7)


def test_the_optimizer_gets_the_preconditioned_gradient():
    plain, batch = small_vit(), Images().batch()
    model = copy.deepcopy(plain)
    with apply_tract(model, lam=0.1):
        model(**batch).loss.backward()
    plain(**batch).loss.backward()
    wanted = expected(stem_of(plain).weight.grad, batch["pixel_values"], stem_of(plain), 0.1)
    assert_close(stem_of(model).weight.grad, wanted, 1e-5)


def test_a_grad_scaler_sees_inf_and_trains_on():
    """The scaled gradient goes through the solve as it is: linear, and non-finite where it was."""
    model, batch = small_vit(), Images().batch()
    apply_tract(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    before = weights(model)
    bad = {**batch, "pixel_values": batch["pixel_values"].clone().fill_(torch.inf)}
    for data, moves in ((bad, False), (batch, True)):
        optimizer.zero_grad()
        scaler.scale(model(**data).loss).backward()
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(weights(model), before) != moves
    assert scaler.get_scale() == 512.0
    assert weights(model).isfinite().all()


def test_an_averaged_copy_follows_the_model():
    model, batch = small_vit(), Images().batch()
    apply_tract(model)
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    mean = None
    for _ in range(3):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        ema.update_parameters(model)
        mean = weights(model) if mean is None else 0.9 * mean + 0.1 * weights(model)
    assert_close(weights(ema.module), mean, 1e-6)
    assert (mean - weights(model)).norm() > 1e-3
    assert ema(batch["pixel_values"]).logits.isfinite().all()
