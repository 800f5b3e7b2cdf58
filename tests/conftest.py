import os
import shutil
import sys
import tempfile

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="hf-tract-tests-")
os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start: `pytest -n 2` has two of everything

import pytest
import torch
from hypothesis import settings

from helpers.environments import reset_accelerate

settings.register_profile("default", deadline=None, print_blob=True, derandomize="CI" in os.environ)
settings.load_profile("default")
torch.set_num_threads(1)  # the models are tiny: a second thread costs more than it brings


def pytest_unconfigure():
    shutil.rmtree(os.environ["HF_DATASETS_CACHE"], ignore_errors=True)


@pytest.fixture(autouse=True)
def _same_start():
    torch.manual_seed(0)
    yield
    if "accelerate" in sys.modules:
        reset_accelerate()
