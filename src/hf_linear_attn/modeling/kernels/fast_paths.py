"""Fast paths: other ways to compute what a layer's `forward`, or a function, says. The code of a model shows none of them.

A decorator stands over the plain code and names a table, best path first:

    @fast_paths(*BLOCK_PATHS)
    def forward(self, hidden_states, call):
        ...                                  # the model, as the paper has it

A table lies in the family's `kernels/` folder, beside what it names; without that folder it is empty, and the plain code runs.
Each path says itself which calls it covers, in terms of `conditions`. While a model is compiled or exported the plain code is
traced, and the paths that are PyTorch operators (`traceable`).
"""

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

from .conditions import NextPath
from .dispatch import HAS_TRITON, chosen_backend
from .tracing import is_traced


def _always(*args, **kwargs) -> bool:
    return True


@dataclass(frozen=True)
class FastPath:
    """One way to compute something faster. All functions take the arguments of what they stand for.

    name: for `explain_paths`, in a few words.
    run: computes it; same arguments, same result.
    covers: None, or the reason why this call is not covered (`conditions`); a `NextPath` where another path is as good.
    suits: whether the call is of the kind that the path is for (a decoding step, say); the others go on in silence, also where
        `use_backend("triton")` makes an error of a call that a kernel does not cover.
    backend: "triton" runs on CUDA tensors; "torch" on every device, and under `use_backend("torch")`, too.
    traceable: whether a compiler may see it.
    """

    name: str
    run: Callable
    covers: Callable[..., str | None]
    suits: Callable[..., bool] = _always
    backend: str = "triton"
    traceable: bool = False

    def takes(self, *args, **kwargs) -> bool:
        """Whether this path runs the call.

        Raises:
            ValueError: within `use_backend("triton")`, if it is not covered.
        """
        if not self.traceable and is_traced():
            return False
        if self.backend == "torch":
            return self.suits(*args, **kwargs) and self.covers(*args, **kwargs) is None
        backend = chosen_backend()
        if backend == "torch" or (backend == "auto" and not (HAS_TRITON and _first_tensor(args, kwargs).is_cuda)):
            return False
        if not self.suits(*args, **kwargs):
            return False
        reason = self.covers(*args, **kwargs)
        if backend == "triton" and (reason is not None or not HAS_TRITON) and not isinstance(reason, NextPath):
            raise ValueError(
                f"the Triton kernel ({self.name}) cannot run this call: {reason or NO_TRITON}; use the backend 'auto' or 'torch'"
            )
        return reason is None

    def why_not(self, *args, **kwargs) -> str | None:
        """Why `takes` says no, for a person to read: what of the machine, and what of the call. None where it says yes."""
        if not self.suits(*args, **kwargs):
            return OTHER_KIND
        reasons = (self._why_not_here(args, kwargs), self.covers(*args, **kwargs))
        return "; ".join(reason for reason in reasons if reason is not None) or None

    def _why_not_here(self, args: tuple, kwargs: dict) -> str | None:
        if self.backend == "torch":
            return None
        if chosen_backend() == "torch":
            return 'use_backend("torch") is in force'
        device = _first_tensor(args, kwargs).device
        if device.type != "cuda" and chosen_backend() == "auto":
            return f"it runs on CUDA devices, the input is on {device}"
        return None if HAS_TRITON else NO_TRITON


OTHER_KIND = "made for another kind of call"
NO_TRITON = "the package triton is not installed"


@dataclass
class Choice:
    """What ran for one call: `path` is the name of the fast path, None for the plain code.

    function: the decorated function's qualified name. layer: the module it is a method of, if any. within: the layer whose
    call it was part of. reasons: by path that was asked before, why not that one.
    """

    function: str
    layer: torch.nn.Module | None
    within: torch.nn.Module | None
    path: str | None = None
    reasons: dict[str, str] = field(default_factory=dict)


_choices: contextvars.ContextVar[list[Choice] | None] = contextvars.ContextVar("choices", default=None)
_layer: contextvars.ContextVar[torch.nn.Module | None] = contextvars.ContextVar("layer", default=None)


@contextlib.contextmanager
def recorded_choices() -> Iterator[list[Choice]]:
    """Within the block, every choice between paths is entered into the list, in the order of the calls."""
    choices: list[Choice] = []
    token = _choices.set(choices)
    try:
        yield choices
    finally:
        _choices.reset(token)


def fast_paths(*paths: FastPath):
    """Decorates a function or method: the first of `paths` that takes a call runs it, else the function itself does."""

    def decorate(plain: Callable) -> Callable:
        if not paths:
            return plain
        anywhere = tuple(path for path in paths if path.backend == "torch")

        @functools.wraps(plain)
        def wrapper(*args, **kwargs):
            traced = is_traced()
            if not traced and _choices.get() is not None:
                return _recording(plain, paths, args, kwargs)
            asked = paths
            if chosen_backend(traced) != "triton" and not _first_tensor(args, kwargs).is_cuda:
                asked = anywhere  # the others would all say no
            for path in asked:
                if path.takes(*args, **kwargs):
                    return path.run(*args, **kwargs)
            return plain(*args, **kwargs)

        return wrapper

    return decorate


def _recording(plain, paths, args, kwargs):
    layer = args[0] if isinstance(args[0], torch.nn.Module) else None
    choice = Choice(plain.__qualname__, layer, _layer.get())
    _choices.get().append(choice)
    run = plain
    for path in paths:
        if path.takes(*args, **kwargs):
            choice.path, run = path.name, path.run
            break
        choice.reasons[path.name] = path.why_not(*args, **kwargs)
    token = _layer.set(layer or choice.within)
    try:
        return run(*args, **kwargs)
    finally:
        _layer.reset(token)


def _first_tensor(args: tuple, kwargs: dict) -> torch.Tensor:
    for x in args:
        if isinstance(x, torch.Tensor):
            return x
    return next(x for x in kwargs.values() if isinstance(x, torch.Tensor))
