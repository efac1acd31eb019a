"""`use_backend`: for one thread alone, but also where a backward that was called in the block runs a layer again."""

import contextlib
import contextvars
import threading

import pytest
import torch

from hf_linear_attn import use_backend
from hf_linear_attn.modeling.kernels.dispatch import chosen_backend


def test_each_thread_has_its_own():
    seen, together = {}, threading.Barrier(3)

    def ask(name):
        with use_backend(name):
            together.wait()  # both blocks are open
            seen[name] = chosen_backend()
            together.wait()

    threads = [threading.Thread(target=ask, args=(name,)) for name in ("torch", "triton")]
    for thread in threads:
        thread.start()
    together.wait()
    outside = chosen_backend()
    together.wait()
    for thread in threads:
        thread.join()
    assert seen == {"torch": "torch", "triton": "triton"}
    assert outside == chosen_backend() == "auto"
    assert torch.compile(chosen_backend, backend="eager")() == "auto"  # whichever block ended last


def test_backward_in_a_thread_that_knows_no_block():
    """A GPU's backward has a thread of its own, with an empty context; here the context alone is empty."""
    seen = []
    x = torch.ones(1, requires_grad=True)
    x.register_hook(lambda gradient: seen.append(contextvars.Context().run(chosen_backend)))
    with use_backend("torch"):
        (2 * x).sum().backward()
        assert contextvars.Context().run(chosen_backend) == "auto"
    (2 * x).sum().backward()
    assert seen == ["torch", "auto"]


def test_blocks_nest_and_end_with_an_error():
    with use_backend("torch"):
        with contextlib.suppress(RuntimeError), use_backend("auto"):
            assert chosen_backend() == "auto"
            raise RuntimeError
        assert chosen_backend() == "torch"
    assert chosen_backend() == "auto"


def test_bad_input():
    with pytest.raises(ValueError, match="'cuda', expected one of 'auto', 'torch', 'triton'"), use_backend("cuda"):
        pass
