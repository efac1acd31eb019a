"""Which fast path each layer of a model takes, and why not a faster one."""

import contextlib
import copy
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from ..modeling.kernels.fast_paths import OTHER_KIND, Choice, recorded_choices
from ..modeling.shared.compat import CACHE_NAMES

PLAIN = "plain PyTorch"


@dataclass(frozen=True)
class PathRow:
    """One choice of a forward.

    layer: name of the module in the model, empty for the model itself. function: what was called there.
    path: name of the fast path that ran, or "plain PyTorch". reasons: by path that was asked before, why not that one.
    """

    layer: str
    function: str
    path: str
    reasons: dict[str, str]


class PathTable(tuple[PathRow, ...]):
    """The rows of `explain_paths`, in the order of the calls. Printed, layers that say the same stand in one line."""

    def __str__(self) -> str:
        groups: dict[tuple, list[str]] = {}
        for row in self:
            told = tuple((name, why) for name, why in row.reasons.items() if why != OTHER_KIND)
            key = re.sub(r"\d+", "*", row.layer), row.function, row.path, told
            groups.setdefault(key, []).append(row.layer)
        names = [_joined(pattern, layers) for (pattern, *_), layers in groups.items()]
        width, span = (max(map(len, column), default=0) for column in (names, [key[1] for key in groups]))
        lines = []
        for name, (_, function, path, told) in zip(names, groups):
            lines.append(f"{name:{width}}  {function:{span}}  {path}")
            lines += [f"{'':{width}}    not {asked!r}: {why}" for asked, why in told]
        return "\n".join(lines)


def _joined(pattern: str, layers: list[str]) -> str:
    distinct = list(dict.fromkeys(layers))
    if len(distinct) == 1:
        return distinct[0] or "(the model)"
    return f"{pattern} ({len(distinct)} layers)"


def explain_paths(model: nn.Module, batch: Mapping, training: bool = False) -> PathTable:
    """Run `model(**batch)` once, and say how each layer ran: `print(explain_paths(model, batch))`.

    A layer of this package runs as plain PyTorch or, where the call allows it, by a fast path: a Triton kernel, several layers as
    one step, a backward that is written out. Each answer holds for this machine and this call: its device and dtype, padding,
    hooks and adapters, autocast and `use_backend` around it. While a model is compiled, plain code is traced, and what a compiler
    makes of it is not told here.

    Args:
        model: a model with layers of this package, adapted by PEFT or not.
        batch: what the model is called with. To see a decoding step, give the next tokens together with a cache that holds the
            text before them; the cache itself stays as it is.
        training: whether to run as in training (training mode, gradients recorded, no backward) instead of inference.

    Returns:
        [`PathTable`]: a tuple of [`PathRow`], which prints as a table.

    Raises:
        ValueError: no layer of this package ran; or, within `use_backend("triton")`, a call that no kernel covers.
    """
    model = getattr(model, "_orig_mod", model)  # of a compiled one
    batch = {name: copy.deepcopy(value) if name in CACHE_NAMES else value for name, value in batch.items()}
    with _in_mode(model, training), torch.set_grad_enabled(training), recorded_choices() as choices:
        model(**batch)
    if not choices:
        raise ValueError(f"no layer of hf_linear_attn ran in this {type(model).__name__}: give a model that has some")
    names = {id(module): name for name, module in model.named_modules()}
    return PathTable(_row(choice, names) for choice in choices)


def _row(choice: Choice, names: dict[int, str]) -> PathRow:
    layer = choice.within if choice.layer is None else choice.layer
    name = "" if layer is None else names.get(id(layer), type(layer).__name__)
    return PathRow(name, choice.function, choice.path or PLAIN, dict(choice.reasons))


@contextlib.contextmanager
def _in_mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Training or evaluation mode for the block; then each module's own again, and the random numbers where they were."""
    modes = [(module, module.training) for module in model.modules()]
    devices = {parameter.device for parameter in model.parameters() if parameter.is_cuda}
    try:
        with torch.random.fork_rng(devices=sorted(devices, key=str)):
            model.train(training)
            yield
    finally:
        for module, mode in modes:
            module.training = mode
