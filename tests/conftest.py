"""Settings of every test: no network, an empty Hugging Face home, one thread a worker."""

import atexit
import gc
import os
import shutil
import tempfile

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="hf-home-")
atexit.register(shutil.rmtree, os.environ["HF_HOME"], ignore_errors=True)

import pytest  # noqa: E402 (the environment has to be set first)
import torch  # noqa: E402

import hf_linear_attn  # noqa: E402, F401 (registers the families)

torch.set_num_threads(1)

# The ids of all collected tests, those too that `-m` leaves out.
COLLECTED = pytest.StashKey[list[str]]()


def pytest_itemcollected(item):
    item.config.stash.setdefault(COLLECTED, []).append(item.nodeid)


@pytest.fixture
def collected_ids(request) -> list[str]:
    """What this run has collected: with the whole of tests/, every test there is."""
    return request.config.stash[COLLECTED]


def pytest_collection_modifyitems(items):
    """A row of the test matrix may leave a test out, or a test with some parameter ("test:parameter"), and says why."""
    items.sort(key=lambda item: item.get_closest_marker("long") is None)
    for item in items:
        callspec = getattr(item, "callspec", None)
        row = callspec and callspec.params.get("row")
        for name, reason in getattr(row, "leaves_out", {}).items():
            test, _, parameter = name.partition(":")
            if item.originalname == test and (not parameter or parameter in callspec.id.split("-")):
                item.add_marker(pytest.mark.skip(reason=reason))


def pytest_collection_finish():
    """The garbage collector need not look again and again at what the libraries made while they were imported."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)


def pytest_unconfigure():
    """Otherwise compiled libraries report everything that was frozen as leaked."""
    gc.unfreeze()
