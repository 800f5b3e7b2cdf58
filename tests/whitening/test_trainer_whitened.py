"""`TrActCallback(whiten_init=True)`: Trainer's own first batches, once, and nothing else of the training differs."""

import contextlib
import copy
import multiprocessing
import os
import random
import re
import threading

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler, Sampler
from transformers import ViTConfig

from helpers.models import STEM, Images, Watch, small_convnext, small_vit, stem_of, trainer, weights
from helpers.oracle import assert_close
from hf_tract import TrActCallback, TrActError, whiten_first_layer
from hf_tract.whitening.batches import first_batches
from hf_tract.whitening.fresh import were_whitened

WHITENED = {"lam": 0.1, "whiten_init": True}


class Noisy(Dataset):
    """Augmented by all three kinds of random numbers."""

    def __init__(self) -> None:
        self.images = Images()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        pixels = self.images[index]["pixel_values"] * (1 + random.random())
        drawn = torch.randn(1) + float(np.random.rand())  # noqa: NPY002 the global numbers are what it is about
        return {"pixel_values": pixels + drawn, "labels": self.images[index]["labels"]}


def whitened_by_hand(batches: list[dict[str, torch.Tensor]]) -> torch.nn.Module:
    model = small_vit()
    whiten_first_layer(model, batches)
    return model


def test_the_start_is_that_of_the_first_batches_and_the_training_that_of_a_model_whitened_before(tmp_path):
    """One batch holds all images, so that their order in the loader does not matter."""
    whole = {"per_device_train_batch_size": 64, "max_steps": 3}
    run = trainer(tmp_path, small_vit(), [TrActCallback(**WHITENED)], **whole)
    run.train()
    other = trainer(tmp_path, whitened_by_hand([Images().batch()]), [TrActCallback(lam=0.1)], **whole)
    other.train()
    assert_close(weights(run.model), weights(other.model), 1e-5)
    assert were_whitened(run.model, [stem_of(run.model)])
    without = trainer(tmp_path, small_vit(), [TrActCallback(lam=0.1)], **whole)
    without.train()
    assert (weights(run.model) - weights(without.model)).norm() > 1e-2 * weights(without.model).norm()


@pytest.mark.parametrize("workers, persistent", [(0, False), (2, False), (1, True)])
def test_looking_at_the_first_batches_changes_nothing_of_the_training(tmp_path, workers, persistent, monkeypatch):
    """With the whitening itself taken out, the run is bit for bit that of a callback without it."""
    monkeypatch.setattr(
        "hf_tract.integrations.trainer_callback.whiten_first_layer",
        lambda model, batches, *_: seen.append(len(batches)),
    )
    seen, ends = [], []
    for settings in ({"whiten_init": True}, {}):
        loading = {"dataloader_num_workers": workers, "dataloader_persistent_workers": persistent}
        run = trainer(tmp_path, small_vit(hidden_dropout_prob=0.1), [TrActCallback(**settings)], **loading)
        run.train_dataset = Noisy()
        run.train()
        ends.append(weights(run.model))
    assert seen == [4]
    assert torch.equal(*ends)


def test_a_loader_s_own_generators_stand_where_they_stood():
    loader = DataLoader(Noisy(), 16, shuffle=True, generator=torch.Generator().manual_seed(3))
    first = first_batches(loader, 2)
    again = first_batches(loader, 9)
    assert [len(first), len(again)] == [2, 4]
    assert torch.equal(first[0]["labels"], again[0]["labels"])
    assert torch.equal(first[0]["pixel_values"], again[0]["pixel_values"])


class Stream(IterableDataset):
    """Reads once: what has been read is gone."""

    def __init__(self) -> None:
        self.images, self.source = Images(), iter(range(64))

    def __iter__(self):
        for index in self.source:
            yield self.images[index]


class OwnNumbers(Noisy):
    """Augments by a generator of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = np.random.default_rng(0)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        image = self.images[index]
        return {**image, "pixel_values": image["pixel_values"] * self.numbers.random()}


class OwnOrder(Sampler):
    """Shuffles by a generator of its own."""

    def __init__(self) -> None:
        self.numbers = random.Random(0)

    def __iter__(self):
        order = list(range(64))
        self.numbers.shuffle(order)
        return iter(order)

    def __len__(self) -> int:
        return 64


@pytest.fixture(params=["fork", "spawn"])
def start_method(request):
    """How processes start: the latter as on macOS and Windows."""
    before = multiprocessing.get_start_method(allow_none=True)
    multiprocessing.set_start_method(request.param, force=True)
    yield request.param
    multiprocessing.set_start_method(before, force=True)


@pytest.mark.parametrize(
    "make",
    [
        lambda: DataLoader(Stream(), 8),
        lambda: DataLoader(OwnNumbers(), 8),
        lambda: DataLoader(Images(), 8, sampler=OwnOrder()),
        lambda: DataLoader(Images(), batch_size=None, sampler=OwnOrder()),
    ],
    ids=["a stream", "its own augmentation", "its own order", "no batches"],
)
def test_data_that_keeps_count_of_its_reading_stays_where_it_is(make, start_method):
    looked_at, untouched = make(), make()
    assert len(first_batches(looked_at, 3)) == 3
    for one, other in zip(looked_at, untouched, strict=True):
        assert torch.equal(one["pixel_values"], other["pixel_values"])


class FromWhere(Images):
    """Tells the process that reads."""

    def __getitem__(self, index: int) -> int:
        return os.getpid()


@pytest.mark.parametrize(("num_workers", "starts_one"), [(0, False), (1, True)])
def test_a_script_is_not_imported_by_a_process_that_its_loader_would_not_start(num_workers, starts_one, monkeypatch):
    """It would run again, where nothing guards what it does."""
    monkeypatch.setattr(multiprocessing, "get_start_method", lambda allow_none: None)
    monkeypatch.setattr(multiprocessing, "get_all_start_methods", lambda: ["forkserver", "spawn", "fork"])
    (batch,) = first_batches(DataLoader(FromWhere(), 8, num_workers=num_workers), 1)
    assert (int(batch[0]) != os.getpid()) == starts_one


def test_what_reads_once_is_refused():
    with pytest.raises(TrActError, match=r"`batches` \(=generator\) reads once, and training would miss"):
        first_batches(batch for batch in [Images().batch()])
    stream = Stream()
    stream.__reduce_ex__ = None  # goes to no other process where that must be pickled
    loader = DataLoader(stream, 8, num_workers=1, multiprocessing_context="spawn")
    with pytest.raises(TrActError, match=r"a stream \(Stream\) that no other process can read"):
        first_batches(loader)
    assert len(list(stream)) == 64


def test_data_that_only_this_process_can_read_is_read_here_and_told(caplog):
    class Here(Images):
        home = os.getpid()

        def __getitem__(self, index):
            if os.getpid() != self.home:
                raise RuntimeError("Cannot re-initialize CUDA in forked subprocess")
            return super().__getitem__(index)

    assert len(first_batches(DataLoader(Here(), 16), 2)) == 2
    (message,) = [record.getMessage() for record in caplog.records]
    assert "no other process can read Here" in message
    assert multiprocessing.active_children() == []


def test_no_process_is_left_behind_an_error_that_is_kept():
    class Broken(IterableDataset):
        def __iter__(self):
            raise RuntimeError("tied to its process")

    with pytest.raises(TrActError, match="tied to its process") as kept:
        first_batches(DataLoader(Broken(), 8))
    assert multiprocessing.active_children() == []
    assert kept.value.__cause__ is not None


def test_a_sampler_that_cannot_be_copied_is_used_itself_and_told(caplog):
    order = OwnOrder()
    order.lock = threading.Lock()
    assert len(first_batches(DataLoader(Images(), 8, sampler=order), 2)) == 2
    (message,) = [record.getMessage() for record in caplog.records]
    assert "BatchSampler cannot be copied" in message


def test_the_generator_of_a_sampler_that_cannot_be_copied_stands_where_it_stood():
    orders = []
    for look in (True, False):
        sampler = RandomSampler(Images(), generator=torch.Generator().manual_seed(3))
        sampler.lock = threading.Lock()
        loader = DataLoader(Images(), 8, sampler=sampler)
        if look:
            first_batches(loader, 2)
        orders.append(list(sampler))
    assert orders[0] == orders[1]


def test_it_is_whitened_once_also_when_training_begins_again(tmp_path, monkeypatch, capsys):
    """An out-of-memory error, and a second `train()`."""
    calls = []
    real = whiten_first_layer
    monkeypatch.setattr(
        "hf_tract.integrations.trainer_callback.whiten_first_layer", lambda *args: calls.append(real(*args))
    )
    watch = Watch(raise_at=1, error=RuntimeError)
    run = trainer(tmp_path, callbacks=[TrActCallback(**WHITENED), watch], auto_find_batch_size=True)
    for _ in range(2):
        run.train()
    assert len(watch.had_tract) > 8
    assert len(calls) == 1
    said = "".join(capsys.readouterr())
    assert said.count("the first layer starts whitened") == 1
    assert said.count("whitened before and goes on from there. A fresh start needs a new model.") == 2


def test_a_resumed_run_ends_in_the_same_weights(tmp_path, monkeypatch):
    callback = TrActCallback(**WHITENED)
    settings = {"num_train_epochs": 2, "save_strategy": "steps", "save_steps": 4}
    whole = trainer(tmp_path / "whole", small_convnext(), [callback], **settings)
    whole.train()
    first = trainer(tmp_path / "cut", small_convnext(), [callback, Watch(raise_at=6)], **settings)
    with pytest.raises(KeyboardInterrupt):
        first.train()
    second = trainer(tmp_path / "cut", small_convnext(seed=1), [callback], **settings)
    second.train(resume_from_checkpoint=True)
    assert torch.equal(weights(second.model), weights(whole.model))
    monkeypatch.setattr("hf_tract.integrations.trainer_callback.whiten_first_layer", None)
    second.train()  # and goes on from there


def test_a_run_that_resumes_from_one_that_was_not_whitened_says_so(tmp_path, caplog):
    trainer(tmp_path, small_convnext(), [TrActCallback()], save_strategy="epoch").train()
    rest = trainer(tmp_path, small_convnext(), [TrActCallback(**WHITENED)], num_train_epochs=2)
    rest.train(resume_from_checkpoint=True)
    (message,) = [text for text in caplog.messages if "of a run with other settings" in text]
    assert message.count("'whiten_init': True") == 1


def test_a_loader_that_changes_its_batches_as_it_goes_is_read_itself(caplog):
    class Scaled(DataLoader):
        def __iter__(self):
            for batch in super().__iter__():
                yield {**batch, "pixel_values": 5 + batch["pixel_values"]}

    (batch,) = first_batches(Scaled(Images(), 8), 1)
    assert torch.equal(batch["pixel_values"], 5 + Images().pixels[:8])
    assert "Scaled has an `__iter__` of its own" in caplog.text
    with pytest.raises(TrActError, match="has a stream and an `__iter__` of its own, and training would miss"):
        first_batches(Scaled(Stream(), 8))


def test_workers_of_a_loader_that_is_read_itself_go_on(caplog):
    class Counted(DataLoader):
        epochs = 0

        def __iter__(self):
            self.epochs += 1
            return super().__iter__()

    loader = Counted(Images(), 8, num_workers=1, persistent_workers=True)
    assert len(first_batches(loader, 2)) == 2
    assert len(list(loader)) == 8
    assert "Counted has an `__iter__` of its own" in caplog.text


def test_a_fold_that_begins_from_the_same_fresh_weights_is_whitened_again(tmp_path):
    model = small_vit()
    fresh, ends = copy.deepcopy(model.state_dict()), []
    for _ in range(2):
        model.load_state_dict(fresh)
        run = trainer(tmp_path, model, [TrActCallback(**WHITENED)])
        run.train()
        ends.append(weights(run.model).clone())
    assert torch.equal(*ends)


class WithoutLabels(torch.nn.Module):
    """Its loss is computed outside of it."""

    def __init__(self, broken: bool = False) -> None:
        super().__init__()
        self.stem, self.broken = torch.nn.Conv2d(3, 4, 16), broken

    def forward(self, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
        if self.broken:
            raise RuntimeError("the model's own")
        return {"logits": self.stem(pixel_values).flatten(1)}


def outside(outputs: dict[str, torch.Tensor], labels: torch.Tensor, **_) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(outputs["logits"], labels)


def test_labels_that_the_model_does_not_take_pass_and_its_own_errors_show(tmp_path):
    for broken in (False, True):
        run = trainer(tmp_path, WithoutLabels(broken), [TrActCallback(**WHITENED)], remove_unused_columns=False)
        run.compute_loss_func = outside
        with pytest.raises(RuntimeError, match="the model's own") if broken else contextlib.nullcontext():
            run.train()
        assert type(run.model.stem) is torch.nn.Conv2d


def test_each_model_of_model_init_is_whitened(tmp_path):
    run = trainer(tmp_path, callbacks=[TrActCallback(**WHITENED)], model_init=lambda: small_vit(), learning_rate=0.0)
    for _ in range(2):
        run.train()
        assert were_whitened(run.model, [stem_of(run.model)])
        assert not torch.equal(stem_of(run.model).weight, stem_of(small_vit()).weight)


def test_a_trained_model_is_refused_and_left_as_it_was(tmp_path):
    small_vit().save_pretrained(tmp_path / "checkpoint")
    model = type(small_vit()).from_pretrained(tmp_path / "checkpoint")
    before = weights(model).clone()
    run = trainer(tmp_path, model, [TrActCallback(**WHITENED)])
    with pytest.raises(TrActError, match=re.escape(f"`model` has a first layer ({STEM}) that comes from {tmp_path}")):
        run.train()
    assert torch.equal(weights(model), before)
    assert type(stem_of(model)).__name__ == "Conv2d"


def test_the_card_tells_it_and_no_base_model_where_a_checkpoint_gave_its_config_alone(tmp_path):
    small_vit().save_pretrained(tmp_path / "checkpoint")
    model = type(small_vit())(ViTConfig.from_pretrained(tmp_path / "checkpoint"))
    run = trainer(tmp_path / "out", model, [TrActCallback(**WHITENED)], save_strategy="epoch")
    run.train()
    card = (tmp_path / "out" / "README.md").read_text()
    assert "whiten_init" in card
    assert "base_model" not in card
