"""A pretrained model in a small file: for machines that a few dozen megabytes can be brought to, and no more.

Every row of a matrix is divided by its root mean square and rounded to multiples of `step`; the integers are Huffman coded.
For Gaussian rows that takes ``2.05 - log2(step)`` bits a weight and adds an error of ``step^2 / 12`` of the row's variance:
step 0.4 is 3.4 bits and 1.3 % (a 4-bit block format adds about 1 %), step 0.05 is 6.4 bits and 0.02 %. Where the sizes of a
layer's inputs are known (`input_sizes`), columns are first multiplied by them: the error of the layer's output, not that of
its weights, is then spread evenly. Vectors are kept in float16. Of the vocabulary only the tokens that a text uses are kept,
numbered anew; tied embeddings stay tied.

A model that was packed is the start of a comparison, whose contenders all start from it; it is not the model it was made from.
"""

import json
import zlib
from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig, PreTrainedModel


def used_tokens(*ids: np.ndarray, always: tuple[int, ...] = ()) -> np.ndarray:
    """The sorted token ids that occur, and those of `always`."""
    return np.unique(np.concatenate([np.asarray(always, np.int64), *(x.astype(np.int64).ravel() for x in ids)]))


def renumber(ids: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """Token ids -> their place in `kept` (uint16 where it fits)."""
    return np.searchsorted(kept, ids).astype(np.uint16 if len(kept) <= 2**16 else np.uint32)


@torch.no_grad()
def input_sizes(model: PreTrainedModel, ids: torch.Tensor) -> dict[str, np.ndarray]:
    """Root mean square of each input of every linear layer on a batch of token ids: parameter name -> (columns,)."""
    found: dict[str, np.ndarray] = {}

    def recording(name):
        def hook(module, inputs):
            found[name + ".weight"] = inputs[0].float().square().flatten(0, -2).mean(0).sqrt().numpy()

        return hook

    layers = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    handles = [module.register_forward_pre_hook(recording(name)) for name, module in layers.items()]
    model(input_ids=ids)
    for handle in handles:
        handle.remove()
    return found


def pack(
    model: PreTrainedModel,
    kept: np.ndarray,
    path: Path,
    step: float,
    embedding_step: float,
    sizes: dict[str, np.ndarray] | None = None,
) -> int:
    """Write the model with the tokens `kept` alone; returns the bytes of the file. sizes: what `input_sizes` found."""
    vocabulary = model.config.vocab_size
    arrays: dict[str, np.ndarray] = {}
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    for name, tensor in model.state_dict().items():
        if name in tied or not tensor.is_floating_point():
            continue
        values = tensor.detach().float().numpy()
        if values.ndim != 2:
            arrays[f"plain/{name}"] = values.astype(np.float16)
            continue
        of_tokens = len(values) == vocabulary
        values = values[kept] if of_tokens else values
        columns = np.ones(values.shape[1], np.float16)
        if sizes and name in sizes and not of_tokens:
            columns = (sizes[name] / sizes[name].mean()).clip(1e-3, 1e3).astype(np.float16)
        values = values * columns.astype(np.float32)
        scale = np.sqrt(np.square(values).mean(axis=1, keepdims=True)).clip(1e-8).astype(np.float16)
        width = embedding_step if of_tokens else step
        symbols = np.rint(values / (scale.astype(np.float32) * width)).clip(-32767, 32767).astype(np.int16)
        symbols = symbols.astype(np.int8) if np.abs(symbols).max() <= 127 else symbols
        coder = zlib.compressobj(level=9, strategy=zlib.Z_HUFFMAN_ONLY)
        # Columns of like size next to each other: the code is made anew every few thousand integers.
        coded = coder.compress(symbols.T[np.argsort(columns, kind="stable")].tobytes()) + coder.flush()
        arrays[f"coded/{name}"] = np.frombuffer(coded, np.uint8)
        arrays[f"scale/{name}"] = scale * np.float16(width)
        arrays[f"columns/{name}"] = columns
    fields = model.config.to_dict() | {"vocab_size": len(kept)}
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        at = fields.get(name)
        fields[name] = int(np.searchsorted(kept, at)) if isinstance(at, int) and at in kept else None
    arrays["config"] = np.array(json.dumps(fields))
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **arrays)
    return path.stat().st_size


def unpack(path: Path, auto_class: type, **options) -> PreTrainedModel:
    """The model of `auto_class`, in float32; `options` change its configuration (another `num_labels`, say).

    Weights of heads that the packed model did not have are drawn at random.
    """
    with np.load(path) as arrays:
        fields = json.loads(str(arrays["config"])) | options
        config = AutoConfig.for_model(fields.pop("model_type"), **fields)
        model = auto_class.from_config(config)
        state = {}
        for key in arrays.files:
            kind, _, name = key.partition("/")
            if kind == "plain":
                state[name] = torch.from_numpy(arrays[key].astype(np.float32))
            elif kind == "coded":
                scale = arrays[f"scale/{name}"].astype(np.float32)
                columns = arrays[f"columns/{name}"]
                decoded = zlib.decompress(arrays[key].tobytes())
                small = len(decoded) == len(columns) * len(scale)
                sorted_columns = np.frombuffer(decoded, np.int8 if small else np.int16).reshape(len(columns), -1)
                symbols = np.empty_like(sorted_columns)
                symbols[np.argsort(columns, kind="stable")] = sorted_columns
                state[name] = torch.from_numpy(symbols.T * scale / columns.astype(np.float32))
    prefix = model.base_model_prefix + "."
    own = set(model.state_dict())
    state = {name if name in own else prefix + name: value for name, value in state.items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    heads = {name for name in missing if name.startswith(prefix)}
    if unexpected or heads - {name for name in heads if "position_ids" in name or "pooler" in name}:
        raise ValueError(f"{path} does not fit {type(model).__name__}: {sorted(heads)[:3]}, {unexpected[:3]}")
    model.tie_weights()
    return model
