"""Second derivatives of steps whose backward is written out.

A backward that is differentiated itself (`create_graph=True`: gradient penalties, Hessians) runs with gradients enabled. What it
then gives must have a graph: it is formed by autograd from the step's formula in plain PyTorch.
"""

from collections.abc import Callable, Sequence

import torch


def differentiable_gradients(
    formula: Callable, inputs: Sequence[torch.Tensor | None], needed: Sequence[bool], *grads: torch.Tensor | None
) -> tuple[torch.Tensor | None, ...]:
    """The gradients of a step, with a graph of their own.

    Args:
        formula: the step in plain PyTorch: takes `inputs`, returns an output or a tuple of outputs.
        inputs: what the step was called with, as saved for backward.
        needed: for each input whether its gradient is asked for (`ctx.needs_input_grad`).
        *grads: the gradients of the outputs.

    Returns:
        `tuple`: a gradient for each input, None where none is needed.
    """
    # Views of their own: one input may be made from another, or be the same tensor, and counts for itself alone.
    inputs = [x.view_as(x) if wanted and x is not None else x for x, wanted in zip(inputs, needed)]
    if not any(needed[: len(inputs)]):
        return (None,) * len(inputs)
    outputs = formula(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    asked = [x for x, wanted in zip(inputs, needed) if wanted and x is not None]
    found = iter(torch.autograd.grad(outputs, asked, grads, create_graph=True, allow_unused=True))
    return tuple(next(found) if wanted else None for _, wanted in zip(inputs, needed))
