"""The file of a saved state, and what is checked before any of it is used.

A state means something only to the model that left it, so the file says which model that was:

    format    which form of file this is
    schema    JSON: family, config (what decides what the model computes), batch_size, lengths (columns seen, one a layer)
    digest    SHA-256 of the schema and of every tensor's name, dtype, shape and bytes
    tensors   layers.0.0, layers.0.1, ... as `state_tensors` of the family's configuration lists them

Files of release 0.1.0 hold `format` and `lengths` alone: their tensors are checked, their configuration cannot be.
"""

import dataclasses
import hashlib
import json
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import PreTrainedConfig
from transformers.utils import logging

from .whole_files import write_whole

logger = logging.get_logger(__name__)

FORMAT = "hf_linear_attn.cache.v2"
FORMAT_WITHOUT_SCHEMA = "hf_linear_attn.cache.v1"
SCHEMA_FIELDS = ("family", "config", "batch_size", "lengths")
WAY_OUT = "load it with the configuration of the model that wrote it, or run that model on the text again"

# Fields of configurations that a state does not depend on; a field that is not named here is compared, also one that a later
# release adds. Any dropout is left out, too.
CANNOT_MATTER = frozenset(
    [
        *("pad_token_id", "bos_token_id", "eos_token_id"),  # which words they are decides nothing before they are read
        *("initializer_range", "query_initializer_range", "init_std"),  # weights are there
        *("use_cache", "tie_word_embeddings", "layer_types"),
        *("attention_mode", "chunk_size", "backend"),  # the order of the arithmetic; results are equal
        *("fused_linear_cross_entropy", "num_recomputed_mlps", "feature_redraw_interval"),  # of training
        *("use_local_attention", "ffn_expansion"),  # they fill in other fields, which are compared
    ]
)

SUM_DTYPES = (torch.float32, torch.float64)
INPUT_DTYPES = (*SUM_DTYPES, torch.bfloat16, torch.float16)


class StateTensor(NamedTuple):
    """What one tensor of a saved state has to be.

    Attributes:
        shape: its sizes behind the batch.
        dtypes: sums are at least float32, copies of inputs have the model's dtype.
        is_log: whether it holds logarithms of weights, -inf for a weight of 0.
        optional: whether it may be missing.
        shared: a name for what all layers hold alike.
        is_count: whether it counts columns.
    """

    shape: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...] = SUM_DTYPES
    is_log: bool = False
    optional: bool = False
    shared: str | None = None
    is_count: bool = False


COUNTS = StateTensor((), (torch.int64,), shared="row counts", is_count=True)


def numbered(*tensors: StateTensor) -> dict[str, StateTensor]:
    """The tensors of a recurrent layer by name, the row counts last, as `RecurrentStateLayer` keeps them."""
    return {str(i): tensor for i, tensor in enumerate((*tensors, COUNTS))}


def keys_and_values(heads: int, head_dim: int, length: int, window: int | None = None) -> dict[str, StateTensor]:
    """Keys and values after `length` columns; a sliding window looks back at the last w - 1 alone."""
    columns = length if window is None else min(length, window - 1)
    return dict.fromkeys(("keys", "values"), StateTensor((heads, columns, head_dim), INPUT_DTYPES))


def noted_columns(length: int | None = None) -> dict[str, StateTensor]:
    """What one layer of a model notes of the columns so far (`PastColumns`); with their mask where `length` is given."""
    numbers = dict.fromkeys(("shift", "document", "padding"), StateTensor((), (torch.int64,), optional=True))
    numbers["gap"] = COUNTS._replace(optional=True, shared=None)
    return numbers if length is None else numbers | {"kept_mask": StateTensor((length,), (torch.bool,), optional=True)}


def describe(config: PreTrainedConfig) -> dict[str, Any]:
    """What decides what a model of this configuration computes: the fields of its own class but those that cannot matter."""
    general = {field.name for field in dataclasses.fields(PreTrainedConfig)}
    described = {}
    for field in dataclasses.fields(config):
        name, value = field.name, getattr(config, field.name)
        if name in general or name in CANNOT_MATTER or "drop" in name:
            continue
        if isinstance(value, PreTrainedConfig):
            value = {"model_type": value.model_type, **describe(value)}
        described[name] = value
    return json.loads(json.dumps(described, default=str))


def write_state(path, config, lengths: list[int], tensors: dict[str, torch.Tensor]) -> None:
    """Write tensors `layers.i.name` as a file that `read_state` reads; an earlier one is replaced when it is whole.

    Raises:
        ValueError: `read_state` would refuse the file.
    """
    batch = next(iter(tensors.values())).shape[0]
    schema = {"family": config.model_type, "config": describe(config), "batch_size": batch, "lengths": lengths}
    written = json.dumps(schema)
    # Copies, since layers may share memory, which safetensors refuses, or look at a part of a larger buffer.
    tensors = {name: x.detach().cpu().clone(memory_format=torch.contiguous_format) for name, x in tensors.items()}
    _check_tensors("this cache", config, batch, lengths, tensors)
    metadata = {"format": FORMAT, "schema": written, "digest": _digest(written, tensors)}
    write_whole(path, lambda part: save_file(tensors, part, metadata=metadata))


def read_state(path, config) -> tuple[list[int], list[dict[str, torch.Tensor]]]:
    """The columns that each layer has seen, and its tensors by name, on the CPU; everything is checked against `config`.

    Raises:
        ValueError: a file that is damaged, of another model, or no saved state.
        OSError: it cannot be opened.
    """
    if not hasattr(config, "state_tensors") or not getattr(config, "is_causal", True):
        kind = f"{type(config).__name__} (model type {getattr(config, 'model_type', None)!r})"
        raise ValueError(
            f"{path}: `config` is a {kind}, which keeps no such state: pass the configuration of the causal language model "
            "that wrote the file, `model.config`"
        )
    metadata, tensors = _open(path)
    version = metadata.get("format")
    if version == FORMAT_WITHOUT_SCHEMA:
        lengths = _checked_lengths(path, _parse(path, metadata, "lengths"), config)
        batches = [x.shape[0] for x in tensors.values() if x.dim()]
        batch = batches[0] if batches else 0
        logger.warning(
            f"{path} was written by hf-linear-attn 0.1.0, which noted no configuration: only names, shapes and dtypes were "
            "compared with `config`. Save the state again to have it checked from now on"
        )
    elif version == FORMAT:
        try:
            batch, lengths = _checked_schema(path, _parse(path, metadata, "schema"), config)
        except RecursionError as error:
            raise _refusal(path, "schema", "nested without end", "a configuration") from error
    else:
        raise ValueError(f"{path} is not a saved cache (format {version!r}, expected {FORMAT!r})")
    _check_tensors(path, config, batch, lengths, tensors)
    if version == FORMAT and metadata.get("digest") != (computed := _digest(metadata["schema"], tensors)):
        raise ValueError(
            f"{path}: `digest` is {metadata.get('digest')!r}, but what the file holds gives {computed!r}: it was damaged or "
            "changed after `save` had written it; run the model on the text again"
        )
    layers: list[dict[str, torch.Tensor]] = [{} for _ in lengths]
    for name, tensor in tensors.items():
        _, layer, part = name.split(".")
        layers[int(layer)][part] = tensor
    return lengths, layers


def _open(path) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            # Copies: otherwise they would be views of the file, which the next `save` may overwrite.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (a file, not a dict)
            return file.metadata() or {}, tensors
    except (SafetensorError, RuntimeError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"{path} is not a saved cache, or a damaged one (safetensors: {error}): run the model on the text again"
        ) from error


def _parse(path, metadata: dict[str, str], name: str):
    try:
        return json.loads(metadata[name])
    except (KeyError, ValueError, RecursionError) as error:
        found = f"{metadata[name][:60]!r}" if name in metadata else "missing"
        raise ValueError(
            f"{path}: `{name}` of its metadata is {found}, expected what `save` writes there as JSON: it was damaged or changed; "
            "run the model on the text again"
        ) from error


def _checked_schema(path, schema, config) -> tuple[int, list[int]]:
    """Batch size and lengths of a schema that belongs to `config`."""
    if not isinstance(schema, dict) or set(schema) != set(SCHEMA_FIELDS):
        found: object = sorted(schema) if isinstance(schema, dict) else type(schema).__name__
        raise _refusal(path, "schema", found, f"the fields {', '.join(SCHEMA_FIELDS)}")
    if schema["family"] != config.model_type:
        raise _refusal(path, "family", repr(schema["family"]), f"{config.model_type!r}, that of `config`")
    if not isinstance(schema["config"], dict):
        raise _refusal(path, "config", f"{schema['config']!r:.60}", "the fields of a configuration")
    differing = list(_differences(schema["config"], config))
    if differing:
        more = f" (and {len(differing) - 4} more)" if len(differing) > 4 else ""
        raise ValueError(f"{path} is the state of another model: {'; '.join(differing[:4])}{more}: {WAY_OUT}")
    batch = schema["batch_size"]
    if type(batch) is not int or batch < 1:
        raise _refusal(path, "batch_size", repr(batch), "a number of rows, at least 1")
    return batch, _checked_lengths(path, schema["lengths"], config)


def _differences(found: dict, config, prefix: str = ""):
    """A sentence for each field of a description that is not as in `config`."""
    own = describe(config)
    if prefix:
        own["model_type"] = config.model_type
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    for name in sorted({*found, *own}):
        if isinstance(found.get(name), dict) and isinstance(getattr(config, name, None), PreTrainedConfig):
            yield from _differences(found[name], getattr(config, name), f"{prefix}{name}.")
        elif name not in own:
            yield f"`{prefix}{name}` is {found[name]!r:.60} in the file, and unknown to this release (a later one wrote it)"
        # A release that did not know the option did what is its default now.
        elif not _same(found[name] if name in found else defaults.get(name), own[name]):
            there = f"{found[name]!r:.60}" if name in found else "not named"
            yield f"`{prefix}{name}` is {there} in the file, {own[name]!r} in `config`"


def _same(first, second) -> bool:
    return first == second and isinstance(first, bool) == isinstance(second, bool)


def _checked_lengths(path, lengths, config) -> list[int]:
    """One number of columns a layer; those that have seen any have seen the same."""
    layers = len(config.state_tensors(1))
    if not isinstance(lengths, list) or len(lengths) != layers:
        found = f"{len(lengths)} numbers" if isinstance(lengths, list) else f"{lengths!r:.60}"
        raise _refusal(path, "lengths", found, f"{layers}, one for each layer that `config` describes")
    if any(type(length) is not int or not 0 <= length < 2**63 for length in lengths):
        raise _refusal(path, "lengths", f"{lengths!r:.60}", "whole numbers of columns, 0 or more")
    if len(set(lengths) - {0}) != 1:
        raise _refusal(path, "lengths", f"{lengths!r:.60}", "the same number of columns in each layer, at least 1")
    return lengths


def _check_tensors(path, config, batch: int, lengths: list[int], tensors: dict[str, torch.Tensor]) -> None:
    """Names, shapes, dtypes and values of all tensors, from the configuration, the batch size and the number of columns."""
    length = max(lengths)
    expected = {
        f"layers.{i}.{name}": tensor
        for i, (layer, seen) in enumerate(zip(config.state_tensors(length), lengths))
        for name, tensor in layer.items()
        if seen
    }
    wanted = {name for name, tensor in expected.items() if not tensor.optional or name in tensors}
    for name in sorted(wanted ^ set(tensors)):
        found, there = ("there", "no such tensor") if name in tensors else ("missing", "a tensor")
        raise _refusal(path, name, found, there)
    for name, tensor in tensors.items():
        _check_tensor(path, name, tensor, expected[name], batch, length)
    first: dict[str, str] = {}
    for name, tensor in expected.items():
        if tensor.shared is None:
            continue
        other = first.setdefault(tensor.shared, name)
        if (name in tensors) != (other in tensors):
            raise _refusal(path, name, "there" if name in tensors else "missing", f"as `{other}`")
        if name in tensors and not torch.equal(tensors[name], tensors[other]):
            raise _refusal(
                path, name, f"{tensors[name].tolist()!s:.60}", f"as `{other}`: {tensors[other].tolist()!s:.60}"
            )


def _check_tensor(path, name: str, tensor, expected: StateTensor, batch: int, length: int) -> None:
    if tensor.dtype not in expected.dtypes:
        raise _refusal(path, name, f"of {tensor.dtype}", " or ".join(map(str, expected.dtypes)))
    if batch < 1 or tuple(tensor.shape) != (batch, *expected.shape):
        raise _refusal(path, name, f"of shape {tuple(tensor.shape)}", f"{(max(batch, 1), *expected.shape)}")
    if not tensor.numel() or tensor.dtype == torch.bool:
        return
    if tensor.is_floating_point():
        wrong = tensor.isnan() | (tensor.isposinf() if expected.is_log else tensor.isinf())
        if bool(wrong.any()):
            raise _refusal(path, name, f"{tensor[wrong][0].item()} in a place", "finite numbers")
        return
    low, high = int(tensor.min()), int(tensor.max())
    if expected.is_count and (low < 0 or high > length):
        raise _refusal(path, name, f"{low if low < 0 else high} tokens", f"0 to {length}, the columns seen")


def _refusal(path, field: str, found: object, expected: str) -> ValueError:
    return ValueError(f"{path}: `{field}` is {found}, expected {expected}: {WAY_OUT}")


def _digest(schema: str, tensors: dict[str, torch.Tensor]) -> str:
    digest = hashlib.sha256(schema.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
