"""A model's card: its metadata read back, what it tells and what it keeps to itself."""

import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.repocard import metadata_eval_result, metadata_load
from PIL import Image

from hf_tract import TrActConfig, TrActError
from hf_tract.integrations import TrainingRecord, provenance, training_record
from hf_tract.integrations.model_card import CURVE_FILE, MARK, is_hub_id
from hf_tract.integrations.training_record import CONFIG_FILE, RECORD_FILE, without_local_path

ROWS = [{"epoch": float(i), "loss": 3 / i, "eval_loss": 2 / i, "accuracy": 0.1 * i, "top5": 0.9} for i in range(1, 6)]
RECORD = TrainingRecord(
    name="vit-flowers",
    library="transformers",
    dataset="dpdl-benchmark/oxford_flowers102",
    tract=TrActConfig(lam=0.2),
    layers=["vit.embeddings.patch_embeddings.projection"],
    base_model="google/vit-base-patch16-224-in21k",
    license="apache-2.0",
    metrics={"accuracy": 0.8125, "top5": 0.95, "loss": 1.0},
    history=ROWS,
    hyperparameters={"learning_rate": 1e-3, "optim": "adamw"},
    seed=3,
    command="python transfer.py --lam 0.2",
)


def saved_card(record: TrainingRecord, folder: Path, model_id: str | None = None) -> ModelCard:
    record.save(folder, model_id)
    return ModelCard.load(folder / "README.md")


def test_the_metadata_is_valid_and_reads_back_equal(tmp_path):
    data = saved_card(RECORD, tmp_path, "me/vit-flowers").data
    assert data.to_dict() == ModelCardData(**metadata_load(tmp_path / "README.md")).to_dict()
    assert (data.library_name, data.pipeline_tag, data.license) == (
        "transformers",
        "image-classification",
        "apache-2.0",
    )
    assert data.base_model == RECORD.base_model
    assert data.datasets == [RECORD.dataset]
    assert data.tags == ["tract", "hf-tract", "image-classification"]
    assert [(r.metric_name, r.metric_value, r.dataset_split) for r in data.eval_results] == [
        ("top-1 accuracy", 0.8125, "test"),
        ("top-5 accuracy", 0.95, "test"),
    ]
    expected = metadata_eval_result(  # huggingface_hub's own way to the same block
        model_pretty_name="vit-flowers",
        task_pretty_name="Image classification",
        task_id="image-classification",
        metrics_pretty_name="top-1 accuracy",
        metrics_id="accuracy",
        metrics_value=0.8125,
        dataset_pretty_name=RECORD.dataset,
        dataset_id=RECORD.dataset,
        dataset_split="test",
    )
    del expected["model-index"][0]["results"][0]["metrics"][0]["verified"]  # of the Hub's own evaluations alone
    one = saved_card(dataclasses.replace(RECORD, metrics={"accuracy": 0.8125}), tmp_path)
    assert one.data.to_dict()["model-index"] == expected["model-index"]
    first = data.to_dict()["model-index"][0]["results"][0]
    assert first["metrics"][0] == expected["model-index"][0]["results"][0]["metrics"][0]


def test_the_card_tells_what_was_done_and_how(tmp_path):
    text = saved_card(RECORD, tmp_path, "me/vit-flowers").text
    for phrase in (
        'pipeline("image-classification", model="me/vit-flowers")',
        "lam = 0.2",
        "patch_embeddings.projection",
        "python transfer.py --lam 0.2",
        "Seed 3",
        f"torch {provenance.versions()['torch']}",
        "| learning_rate | 0.001 |",
        "| 5 | 0.6 | 0.4 | 0.5 | 0.9 |",
        "title     = {{TrAct}: Making First-layer Pre-Activations Trainable}",
        "81.2 %",
        f"]({CURVE_FILE})",
    ):
        assert phrase in text, phrase
    with Image.open(tmp_path / CURVE_FILE) as image:
        assert image.width > 800
    assert TrActConfig.from_json_file(tmp_path / CONFIG_FILE) == RECORD.tract
    assert TrainingRecord.from_json_file(tmp_path / RECORD_FILE) == RECORD


def test_a_run_without_tract_is_not_tagged_and_says_so(tmp_path):
    RECORD.save(tmp_path)
    card = saved_card(dataclasses.replace(RECORD, tract=None, layers=[], base_model=None), tmp_path)
    assert card.data.tags == ["image-classification"]
    assert "without TrAct" in card.text
    assert "from random weights" in card.text
    assert "lam" not in card.text.split("### To reproduce")[0]
    assert not (tmp_path / CONFIG_FILE).exists()  # the earlier run's settings


def test_a_model_of_another_task_is_no_classifier(tmp_path):
    card = saved_card(dataclasses.replace(RECORD, task="object-detection", metrics={}), tmp_path, "me/detr")
    assert card.data.pipeline_tag == "object-detection"
    assert "An object detector, fine-tuned from" in card.text
    assert 'pipeline("object-detection", model="me/detr")' in card.text
    card = saved_card(dataclasses.replace(RECORD, task=None, metrics={}), tmp_path, "me/mae")
    assert card.data.pipeline_tag is None
    assert card.data.tags == ["tract", "hf-tract"]
    assert "A model, fine-tuned from" in card.text
    assert 'It loads by `from_pretrained("me/mae")` of the class' in card.text
    assert "classif" not in card.text


def test_scores_are_those_of_the_models_task_and_without_one_the_hub_gets_none(tmp_path):
    card = saved_card(dataclasses.replace(RECORD, task="audio-classification"), tmp_path)
    assert {(each.task_type, each.task_name) for each in card.data.eval_results} == {
        ("audio-classification", "Audio classification")
    }
    card = saved_card(dataclasses.replace(RECORD, task=None), tmp_path)
    assert "model-index" not in card.data.to_dict()
    assert "81.2 %" in card.text


def test_an_unknown_origin_is_not_told_and_a_module_is_loaded_by_its_state_dict(tmp_path):
    card = saved_card(dataclasses.replace(RECORD, base_model="", library="pytorch", task=None), tmp_path)
    assert "A model, trained on [dpdl" in card.text
    assert card.data.base_model is None
    assert "load_state_dict" in card.text
    text = saved_card(dataclasses.replace(RECORD, library="torchvision"), tmp_path).text
    assert "It loads by torchvision." in text
    assert "pipeline" not in text


def test_each_folder_whose_card_stays_is_told(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(training_record, "_warned", set())
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "README.md").write_text("# My notes\n")
        RECORD.save(tmp_path / name)
    assert [Path(entry.getMessage().split()[1]).parent.name for entry in caplog.records] == ["a", "b"]


def test_a_card_that_somebody_wrote_or_claimed_stays(tmp_path, caplog, monkeypatch):
    path = tmp_path / "README.md"
    for own in ("# My notes\n", str(saved_card(RECORD, tmp_path)).replace(MARK, "")):
        monkeypatch.setattr(training_record, "_warned", set())
        path.write_text(own, encoding="utf-8")
        caplog.clear()
        for _ in range(2):
            dataclasses.replace(RECORD, seed=4).save(tmp_path)
        assert path.read_text(encoding="utf-8") == own
        (message,) = [entry.getMessage() for entry in caplog.records]
        assert "README.md stays, since neither hf-tract nor Trainer wrote it." in message
        assert TrainingRecord.from_json_file(tmp_path / RECORD_FILE).seed == 4


def test_a_timm_model_is_loaded_by_timm(tmp_path):
    card = saved_card(dataclasses.replace(RECORD, library="timm"), tmp_path, "me/resnet")
    assert card.data.library_name == "timm"
    assert 'timm.create_model("hf-hub:me/resnet", pretrained=True)' in card.text


def test_without_matplotlib_there_is_a_table_and_no_curve(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    text = saved_card(RECORD, tmp_path).text
    assert CURVE_FILE not in text
    assert not (tmp_path / CURVE_FILE).exists()
    assert "| epoch | loss |" in text


def test_of_a_long_history_the_table_has_some_rows_and_the_last(tmp_path):
    long = [{"epoch": epoch, "loss": 1.0} for epoch in range(1, 301)]
    text = saved_card(dataclasses.replace(RECORD, history=long), tmp_path).text
    rows = [line for line in text.splitlines() if line.endswith("| 1 |")]
    assert len(rows) == 20
    assert rows[-1] == "| 300 | 1 |"


def test_what_is_no_hub_id_is_named_and_not_linked(tmp_path):
    folder = tmp_path / "my-images"
    folder.mkdir()
    assert without_local_path(str(folder)) == "my-images"
    assert not is_hub_id(str(folder))
    RECORD.to_json_file(folder / RECORD_FILE)
    assert without_local_path(str(folder)) == "vit-flowers"  # a trained model's
    dataclasses.replace(RECORD, base_model=str(folder)).to_json_file(folder / RECORD_FILE)
    assert without_local_path(str(folder)) == "vit-flowers"
    (folder / RECORD_FILE).write_text('{"epochs": 3}')  # another program's
    assert without_local_path(str(folder)) == "my-images"
    RECORD.to_json_file(folder / RECORD_FILE)
    assert not is_hub_id("photo crops")
    assert is_hub_id("uoft-cs/cifar10")
    assert dataclasses.replace(RECORD, dataset=str(folder)).dataset == "vit-flowers"
    card = saved_card(dataclasses.replace(RECORD, dataset="my images", base_model="a folder"), tmp_path)
    assert card.data.datasets is None
    assert card.data.base_model is None
    assert card.data.eval_results[0].dataset_type == "my-images"
    assert "fine-tuned from a folder on my images" in card.text


def test_a_model_may_be_trained_on_in_its_own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(3):
        record = TrainingRecord("flowers", "transformers", "my images", base_model="model")
        record.save("model")
    assert TrainingRecord.from_json_file(Path("model") / RECORD_FILE).base_model == "flowers"


def test_what_is_no_record_is_refused(tmp_path):
    path = tmp_path / RECORD_FILE
    with pytest.raises(TrActError, match=r"`path` \(='.*training_record.json'\) is no record of a training run"):
        TrainingRecord.from_json_file(path)
    path.write_text(json.dumps({"name": "x", "tract": None}))
    with pytest.raises(TrActError, match="is no record"):
        TrainingRecord.from_json_file(path)


CARDS = Path(__file__).parents[2] / "model_cards"


def figures_of(card: ModelCard) -> tuple[dict, list[str]]:
    lines = [line for line in card.text.splitlines() if line.startswith(("|", "Seed "))]
    return card.data.to_dict(), lines


def follows_from_its_record(path: Path, scratch: Path) -> bool:
    record = path.with_name(RECORD_FILE)
    if not record.exists():
        return False
    return figures_of(ModelCard.load(path)) == figures_of(saved_card(TrainingRecord.from_json_file(record), scratch))


def test_each_card_of_this_repository_follows_from_the_record_beside_it(tmp_path):
    cards = [path for path in sorted(CARDS.rglob("*.md")) if path != CARDS / "README.md"]
    for path in cards:
        assert follows_from_its_record(path, tmp_path / path.parent.name), path


def test_a_card_without_its_record_or_with_another_figure_would_be_found(tmp_path):
    path = tmp_path / "model" / "README.md"
    text = str(saved_card(RECORD, path.parent, "me/vit-flowers"))
    assert follows_from_its_record(path, tmp_path / "again")
    for changed in (text.replace("81.2 %", "82.2 %"), text.replace("value: 0.8125", "value: 0.8225")):
        assert changed != text
        path.write_text(changed, encoding="utf-8")
        assert not follows_from_its_record(path, tmp_path / "again")
    path.write_text(text, encoding="utf-8")
    path.with_name(RECORD_FILE).unlink()
    assert not follows_from_its_record(path, tmp_path / "again")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["/mnt/me/transfer.py", "--dataset", "/data/x/flowers"], "python transfer.py --dataset PATH_TO/flowers"),
        (["transfer.py", "--hub_token", "sec=ret"], "python transfer.py --hub_token TOKEN"),
        (["transfer.py", "--hub_token=secret"], "python transfer.py --hub_token=TOKEN"),
        (["transfer.py", "--note", "my hf_AbCdEfGh12345 token"], "python transfer.py --note 'my TOKEN token'"),
        (
            ["train.py", "--wandb_api_key", "a1", "--password=b2"],
            "python train.py --wandb_api_key TOKEN --password=TOKEN",
        ),
        (["train.py", "hub_token=a1", "logger.api_key=b2"], "python train.py hub_token=TOKEN logger.api_key=TOKEN"),
        (["train.py", "--label_key", "species"], "python train.py --label_key species"),
        (["train.py", "--uri", "https://me:pw@host/x"], "python train.py --uri https://TOKEN@host/x"),
        (["train.py", "--dataset=/data/x", "--lam", "0.1"], "python train.py --dataset=PATH_TO/x --lam 0.1"),
        (["/x/ipykernel_launcher.py", "-f", "/me/kernel-1.json"], "# in a notebook"),
    ],
)
def test_a_command_is_told_without_tokens_and_folders(arguments, expected):
    assert provenance.command(arguments) == expected


def test_a_path_below_the_working_folder_is_told_from_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert provenance.command(["train.py", str(tmp_path / "out" / "a")]) == "python train.py out/a"


def test_a_command_tells_of_several_processes(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert provenance.command(["train.py"]) == "python train.py   # by a launcher, on 2 processes"


def test_the_device_that_accelerate_uses_is_the_hardware(monkeypatch):
    """As of a run on the CPU of a machine with a GPU."""
    monkeypatch.setattr(PartialState, "_shared_state", {})
    PartialState(cpu=True)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("mps"))
    assert provenance.hardware().endswith((" thread", " threads"))


def test_another_accelerator_is_named_as_the_hardware(monkeypatch):
    monkeypatch.setattr(PartialState, "_shared_state", {})
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("mps"))
    assert provenance.hardware().endswith(", mps")
