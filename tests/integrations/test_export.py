"""torch.export and ONNX of prefill and step: they compute what the model computes, at sizes they were not exported with.

The export of a whole forward is in test_matrix_compile.
"""

import subprocess
import sys

import numpy as np
import pytest
import torch
from common.batches import tokens
from common.families import first_rows, in_every_run
from common.tiny import FAMILY_ROWS
from torch.export import Dim, export

from hf_linear_attn.exporting import DecodeStep, OnnxDecoder, Prefill, empty_state, save_onnx_step

pytestmark = pytest.mark.long

BATCH, LENGTH = Dim("batch", min=1, max=64), Dim("length", min=2, max=128)

# LEAP's step in every run of the tests, those of the other families among the slow ones: each export takes seconds.
onnx_rows = pytest.mark.parametrize(
    "row",
    [
        pytest.param(row, id=row.family, marks=[pytest.mark.slow] * (row.family != "leap"))
        for row in FAMILY_ROWS
        if row.causal
    ],
)
dynamic_rows = in_every_run("leap", "danet", of=[row for row in FAMILY_ROWS if row.causal])
RUN_ALONE = """
import sys, numpy as np, onnxruntime
first = np.load(sys.argv[1] + ".state.npz")
feeds = {name: first[name] for name in first.files} | {"input_ids": np.array([[5]])}
logits = onnxruntime.InferenceSession(sys.argv[1]).run(None, feeds)[0]
assert logits.shape[0] == 1 and np.isfinite(logits).all() and "torch" not in sys.modules
"""


@dynamic_rows
def test_prefill_then_steps(row):
    """The prompt in one graph, each further token in the other: the logits of the whole text."""
    model = row.causal_lm(**row.layers(2))
    text = tokens(3, 20, seed=2)
    with torch.no_grad():
        shapes = {"input_ids": {0: BATCH, 1: LENGTH}}
        prefill = export(Prefill(model), (tokens(2, 6),), dynamic_shapes=shapes, strict=False).module()
        state = empty_state(model, 2)
        shapes = {"input_ids": {0: BATCH}, "state": tuple({0: BATCH} for _ in state)}
        step = export(DecodeStep(model), (tokens(2, 1), *state), dynamic_shapes=shapes, strict=False).module()
        expected = model(text).logits
        logits, *state = prefill(text[:, :12])
        torch.testing.assert_close(logits, expected[:, 11], rtol=1e-4, atol=1e-5)
        for place in range(12, 20):
            logits, *state = step(text[:, place : place + 1], *state)
            torch.testing.assert_close(logits, expected[:, place], rtol=1e-4, atol=1e-5)


@first_rows
def test_steps_from_nothing(row):
    """The empty state is the state before the first token."""
    model = row.causal_lm()
    text, step = tokens(2, 6), DecodeStep(model)
    state = empty_state(model, 2)
    with torch.no_grad():
        expected = model(text).logits
        for place in range(6):
            logits, *state = step(text[:, place : place + 1], *state)
            torch.testing.assert_close(logits, expected[:, place], rtol=1e-4, atol=1e-5)


class TestOnnx:
    """The decode step in onnxruntime."""

    @pytest.fixture(autouse=True)
    def _needs_onnx(self):
        for name in ("onnx", "onnxscript", "onnxruntime"):
            pytest.importorskip(name, reason=f"needs {name}: pip install hf-linear-attn[onnx]")

    @onnx_rows
    def test_the_same_tokens(self, row, tmp_path):
        """Greedy decoding of a batch gives `generate`'s tokens; the logits agree at every step; no torch is needed."""
        model = row.causal_lm(**row.layers(2))
        save_onnx_step(model, tmp_path / "step.onnx")
        prompt = tokens(3, 7)
        generated = model.generate(prompt, max_new_tokens=10, do_sample=False, pad_token_id=0)
        found = OnnxDecoder(tmp_path / "step.onnx", batch=3).generate(prompt.numpy(), 10)
        assert found.tolist() == generated.tolist()
        decoder = OnnxDecoder(tmp_path / "step.onnx", batch=3)
        with torch.no_grad():
            expected = model(generated).logits
        for place in range(generated.shape[1]):
            logits = decoder.step(generated[:, place].numpy())
            np.testing.assert_allclose(logits, expected[:, place].numpy(), rtol=1e-3, atol=1e-4)
        done = subprocess.run([sys.executable, "-c", RUN_ALONE, tmp_path / "step.onnx"], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
