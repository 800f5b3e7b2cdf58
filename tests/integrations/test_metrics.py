"""Top-1 and top-5 accuracy, with and without the package evaluate."""

import pickle
import subprocess
import sys
import threading

import numpy as np
import pytest
from transformers import EvalPrediction

from hf_tract import TrActError
from hf_tract.metrics import TopK, compute_top_k

# Six classes, worst to best in every row: the label 5 is the best, 1 is among the five best, 0 is not.
SCORES = np.arange(24, dtype=np.float32).reshape(4, 6)
LABELS = np.array([5, 1, 1, 0])
EXPECTED = {"top1": 0.25, "top5": 0.75}

WITHOUT_EVALUATE = """
import sys
sys.modules["evaluate"] = sys.modules["datasets"] = None
import numpy as np
import hf_tract.metrics

class Prediction:
    predictions = np.arange(24, dtype=np.float32).reshape(4, 6)
    label_ids = np.array([5, 1, 1, 0])

assert hf_tract.metrics.compute_top_k(Prediction) == {"top1": 0.25, "top5": 0.75}
try:
    hf_tract.metrics.TopK
except ImportError as error:
    print(error)
"""


def test_trainer_s_function_counts_the_best_and_the_five_best():
    assert compute_top_k(EvalPrediction(SCORES, LABELS)) == EXPECTED


def test_the_evaluate_metric_gives_the_same_over_batches_and_can_be_pickled():
    metric = TopK()
    for scores, labels in zip(SCORES, LABELS, strict=True):
        metric.add_batch(predictions=scores[None], references=labels[None])
    assert metric.compute() == EXPECTED
    assert pickle.loads(pickle.dumps(TopK)) is TopK


def test_without_evaluate_the_function_works_and_the_metric_names_what_to_install():
    done = subprocess.run([sys.executable, "-c", WITHOUT_EVALUATE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "`hf_tract.metrics.TopK` needs the package datasets: `pip install evaluate`" in done.stdout


@pytest.mark.parametrize(
    ("scores", "labels"),
    [((4, 6), (4, 6)), ((4, 1), (4,)), ((4,), (4,)), ((4, 6, 2, 2), (4, 2, 2))],
    ids=["several labels", "one number", "no classes", "maps"],
)
def test_scores_of_another_task_are_refused(scores, labels):
    with pytest.raises(TrActError, match=r"`predictions` \(4.* must be scores \(images, classes\) and one class"):
        compute_top_k(EvalPrediction(np.zeros(scores), np.zeros(labels, dtype=int)))


def test_the_evaluate_metric_may_be_one_of_several_processes(tmp_path):
    done = []

    def run(rank):
        metric = TopK(num_process=2, process_id=rank, experiment_id="x", cache_dir=str(tmp_path))
        metric.add_batch(predictions=SCORES[2 * rank : 2 * rank + 2], references=LABELS[2 * rank : 2 * rank + 2])
        done.append(metric.compute())

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert EXPECTED in done
    assert len(done) == 2


def test_of_several_outputs_the_first_are_the_scores():
    scores, labels = np.random.default_rng(0).normal(size=(12, 7)), np.arange(12) % 7
    several = EvalPrediction((scores, np.zeros((12, 3, 4))), labels)
    assert compute_top_k(several) == compute_top_k(EvalPrediction(scores, labels))
