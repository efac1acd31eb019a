"""The border to PyTorch: whether code runs now or is traced, transformed or recorded, and the undocumented names for that.

Checked on PyTorch 2.11 to 2.15. When a release moves something, this is the file to change.
"""

import contextlib

import torch
from torch._subclasses.fake_tensor import is_fake
from torch.nn.modules.module import _has_any_global_hook


def can_read_values(tensor: torch.Tensor) -> bool:
    """Whether the tensor holds values now that Python may look at.

    Not while the code is traced, transformed by `torch.func` or recorded in a CUDA graph, nor in a `FakeTensorMode`, where a
    model runs for its shapes and memory alone.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or is_fake(tensor):
        return False
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return False
    return not (torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing())


# Whether this code is being compiled or exported, instead of run.
is_traced = torch.compiler.is_compiling


def is_in_backward() -> bool:
    """Whether autograd runs this code: the backward of a custom function, or a layer that is run again for its gradients."""
    return torch._C._current_graph_task_id() != -1


def is_transformed(tensor: torch.Tensor) -> bool:
    """Whether a function transform (`torch.func.grad`, `vmap`, ...) looks at this tensor: custom backwards cannot follow it."""
    return not torch.compiler.is_compiling() and torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def records_gradients(*tensors: torch.Tensor) -> bool:
    """Whether operations are recorded for backward; with tensors: whether one on these would be."""
    return torch.is_grad_enabled() and (not tensors or any(x.requires_grad for x in tensors))


def converts(tensor: torch.Tensor) -> bool:
    """Whether autocast chooses the dtype of products on this tensor's device."""
    return torch.is_autocast_enabled(tensor.device.type)


def product_dtype(tensor: torch.Tensor) -> torch.dtype:
    """The dtype in which a product of `tensor` with a weight of its own dtype is formed."""
    kind = tensor.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else tensor.dtype


def as_written(tensor: torch.Tensor) -> contextlib.AbstractContextManager:
    """Within the block dtypes are those that the code says: autocast, which would sum in half precision, is off."""
    return torch.autocast(tensor.device.type, enabled=False)


def making_buffers() -> contextlib.AbstractContextManager:
    """Within the block, tensors that later calls write to: one made in inference mode could not be written outside of it."""
    if torch.compiler.is_compiling() or not torch.is_inference_mode_enabled():
        return contextlib.nullcontext()
    return torch.inference_mode(False)


def keeps_address(tensor: torch.Tensor) -> None:
    """Tell a compiler that all calls will find this tensor where it is now."""
    if not torch.compiler.is_compiling():
        torch._dynamo.mark_static_address(tensor)


@torch.compiler.assume_constant_result
def float32_products_are_rounded() -> bool:
    """Whether the user allows TF32 or bfloat16 inside products of float32."""
    return torch.get_float32_matmul_precision() != "highest"


def has_global_hooks() -> bool:
    """Whether a forward hook is registered for every module of the process."""
    return bool(_has_any_global_hook())


def check_when_run(condition: torch.Tensor, message: str) -> None:
    """Refuse, in a program that is being traced, values that show only when it runs (RuntimeError)."""
    torch._assert_async(condition, message)
