"""Settings of every test: no network, an empty Hugging Face home, one thread a worker."""

import atexit
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


def pytest_collection_modifyitems(items):
    """A row of the test matrix may leave a test out, or a test with some parameter ("test:parameter"), and says why."""
    for item in items:
        callspec = getattr(item, "callspec", None)
        row = callspec and callspec.params.get("row")
        for name, reason in getattr(row, "leaves_out", {}).items():
            test, _, parameter = name.partition(":")
            if item.originalname == test and (not parameter or parameter in callspec.id.split("-")):
                item.add_marker(pytest.mark.skip(reason=reason))
