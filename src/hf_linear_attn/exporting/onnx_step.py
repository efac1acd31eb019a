"""ONNX of the decode step, and a decoder that runs it with onnxruntime and NumPy alone."""

import os
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel

from ..modeling.shared.files.whole_files import write_whole
from .decoding import DecodeStep, empty_state, state_names

INSTALL = "pip install 'hf-linear-attn[onnx]'"


def save_onnx_step(model: PreTrainedModel, path: str | os.PathLike) -> None:
    """Write one decoding step as an ONNX file with a dynamic batch.

    Its inputs are `input_ids` (B, 1) and the tensors of the state, its outputs `logits` (B, vocabulary) and `next_<name>` for
    each of them.

    Args:
        model (`PreTrainedModel`): a causal language model whose layers are all recurrent.
        path: the file, usually `step.onnx`; the state before the first token goes to `<path>.state.npz` beside it.

    Raises:
        ImportError: `onnx` or `onnxscript` is missing.
        ValueError: the model has layers with a growing cache.
    """
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError(f"ONNX export needs onnx and onnxscript: {INSTALL}") from error
    training = model.training
    model.eval()
    names = state_names(model)
    # Two rows, so that the exporter does not take the batch for a constant 1.
    state = empty_state(model, batch=2)
    ids = torch.zeros(2, 1, dtype=torch.long, device=model.device)
    batch = torch.export.Dim("batch")
    with torch.no_grad():
        program = torch.onnx.export(
            DecodeStep(model).eval(),
            (ids, *state),
            dynamo=True,
            verbose=False,
            input_names=["input_ids", *names],
            output_names=["logits", *(f"next_{name}" for name in names)],
            dynamic_shapes={"input_ids": {0: batch}, "state": tuple({0: batch} for _ in state)},
        )
    first = {name: tensor[:1].cpu().numpy() for name, tensor in zip(names, state)}

    def write(part: Path) -> None:
        program.save(os.fspath(part))
        np.savez(f"{os.fspath(part)}.state.npz", **first)

    write_whole(path, write)
    model.train(training)


class OnnxDecoder:
    """Runs a file of `save_onnx_step` token by token; needs onnxruntime and NumPy, neither torch nor Transformers.

    Args:
        path: the ONNX file; its first state lies beside it.
        batch (`int`, defaults to 1): texts that are decoded side by side.
    """

    def __init__(self, path: str | os.PathLike, batch: int = 1):
        try:
            import onnxruntime
        except ImportError as error:
            raise ImportError(f"running ONNX needs onnxruntime: {INSTALL}") from error
        self.session = onnxruntime.InferenceSession(os.fspath(path), providers=["CPUExecutionProvider"])
        with np.load(f"{os.fspath(path)}.state.npz") as first:
            self.state = {name: np.repeat(first[name], batch, axis=0) for name in first.files}

    def step(self, token_ids: np.ndarray) -> np.ndarray:
        """Feed one token a text, `(batch,)` integers; returns the logits of the next one, `(batch, vocabulary)`."""
        ids = np.asarray(token_ids, dtype=np.int64)[:, None]
        logits, *state = self.session.run(None, {"input_ids": ids, **self.state})
        self.state = dict(zip(self.state, state))
        return logits

    def generate(self, prompt: np.ndarray, max_new_tokens: int) -> np.ndarray:
        """Greedy continuation of prompts `(batch, length)`: `(batch, length + max_new_tokens)`."""
        tokens = [np.asarray(column, dtype=np.int64) for column in np.asarray(prompt).T]
        for column in tokens:
            logits = self.step(column)
        for number in range(max_new_tokens):
            tokens.append(logits.argmax(-1))
            if number + 1 < max_new_tokens:
                logits = self.step(tokens[-1])
        return np.stack(tokens, axis=1)
