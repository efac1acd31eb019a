"""Checkpoints in the names of the published packages."""

import json
import os
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from ..families import FAMILIES

# family -> module here whose `from_published(config, state_dict)` builds the model
CONVERTERS = {name: family.published for name, family in FAMILIES.items() if family.published is not None}


def from_published(family: str, config: dict, state_dict: dict[str, torch.Tensor]):
    """Build one of our models from a published package's configuration and parameter names.

    Args:
        family (`str`): `"leap"` or `"fastformer"` (package leap-transformer) give `LeapForCausalLM` / `FastformerForCausalLM`;
            `"danet"` gives a `DanetForPreTraining` with the published scale, pooling and epsilon;
            `"sea"` gives the `SeaAttentionCore` of one layer.
        config (`dict`): the published configuration fields; absent ones take the published defaults.
        state_dict (`dict`): the published parameter names and tensors; the model takes their dtype.

    Returns:
        The model, in evaluation mode.

    Raises:
        ValueError: an unknown family or configuration field, a missing or unexpected parameter, a wrong shape.
    """
    if family not in CONVERTERS:
        raise ValueError(f"`family` is {family!r}, expected one of {', '.join(map(repr, CONVERTERS))}")
    return import_module(f".{CONVERTERS[family]}", __package__).from_published(family, config, state_dict)


def load_published(family: str, folder: str | os.PathLike):
    """Build one of our models from a published checkpoint's folder: `config.json` and safetensors weights.

    Raises:
        OSError: no such folder, no configuration, or only pickled weights, which are never opened.
        ValueError: see [`from_published`].
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise OSError(f"there is no config.json in {str(folder)!r}: give the folder of a published checkpoint")
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise OSError(
            f"{str(folder)!r} holds no safetensors weights; pickled ones can run code when opened and are never loaded: save "
            "them again with safetensors.torch.save_file"
        )
    config = json.loads((folder / "config.json").read_text())
    if not isinstance(config, dict):
        raise ValueError(f"the config.json in {str(folder)!r} holds a {type(config).__name__}, not an object")
    if config.get("model_type") in CONVERTERS and "auto_map" in config:
        raise ValueError(f"{str(folder)!r} is a checkpoint of this package already: AutoModel loads it")
    weights: dict[str, torch.Tensor] = {}
    for file in files:
        try:
            weights |= load_file(file)
        except SafetensorError as error:
            raise OSError(f"{file} is damaged or cut short ({error}): download or copy it again") from error
    return from_published(family, config, weights)


def rename(state_dict: dict[str, torch.Tensor], rules: Callable[[str], str | None]) -> dict[str, torch.Tensor]:
    """Apply `rules` (published name -> our name, None for a name that is not known) to every parameter."""
    renamed = {name: rules(name) for name in state_dict}
    unknown = sorted(name for name, ours in renamed.items() if ours is None)
    if unknown:
        raise ValueError(f"`state_dict` holds parameters that the published model does not have: {unknown[:5]}")
    return {ours: state_dict[name] for name, ours in renamed.items() if ours is not None}


def load_exactly(model: torch.nn.Module, state_dict: dict[str, torch.Tensor]) -> None:
    """Load every parameter, refusing missing, unexpected and wrongly shaped ones; tied weights may be given once."""
    dtypes = {tensor.dtype for tensor in state_dict.values() if tensor.is_floating_point()}
    if len(dtypes) == 1:
        model.to(dtypes.pop())
    shapes = {name: tuple(p.shape) for name, p in model.state_dict().items()}
    for name, tensor in state_dict.items():
        if name in shapes and tuple(tensor.shape) != shapes[name]:
            raise ValueError(
                f"parameter {name} has shape {tuple(tensor.shape)}, but the configuration asks for {shapes[name]}"
            )
    missing, unexpected = model.load_state_dict(state_dict, strict=False)
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    missing = [name for name in missing if name not in tied]
    if missing or unexpected:
        raise ValueError(
            f"parameters missing: {missing[:5]}; unexpected: {unexpected[:5]}: does the configuration fit?"
        )
    tie_weights = getattr(model, "tie_weights", None)
    if tie_weights is not None:
        tie_weights()
