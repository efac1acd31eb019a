"""What all layers of a forward share is worked out once a forward, however many layers ask for it, and moves as a whole."""

import sys
from collections import Counter
from dataclasses import is_dataclass

import pytest
import torch
from common.families import all_rows

from hf_linear_attn.modeling.shared.body import open_cache, read_call
from hf_linear_attn.modeling.shared.call import Call
from hf_linear_attn.modeling.shared.positions import position_factors
from hf_linear_attn.modeling.shared.sequence import prepare_sequence
from hf_linear_attn.modeling.shared.token_order import token_layout

WORKED_OUT = {f.__code__: f.__name__ for f in (token_layout, position_factors, prepare_sequence, read_call, open_cache)}
IDS, MASK = torch.arange(3, 15).view(2, 6), torch.tensor([[0, 1, 1, 0, 1, 1], [1, 1, 1, 1, 1, 0]])


def body(row, times: int = 1):
    windows = getattr(row.config(), "layer_windows", None)
    changes = {"num_hidden_layers": 3 * times} | ({} if windows is None else {"layer_windows": windows * times})
    return row.build("AutoModel", **changes)


@torch.no_grad()
def counted(model, **options) -> Counter:
    """How often each of `WORKED_OUT` runs in a padded forward."""
    found: Counter = Counter()

    def count(frame, event, _):
        if event == "call" and frame.f_code in WORKED_OUT:
            found[WORKED_OUT[frame.f_code]] += 1

    sys.setprofile(count)
    try:
        model(IDS, attention_mask=MASK, **options)
    finally:
        sys.setprofile(None)
    return found


@all_rows
def test_worked_out_once(row):
    few, many = (counted(body(row, times), use_cache=row.causal) for times in (1, 2))
    assert few == many
    assert few["prepare_sequence"] == 1
    assert few["token_layout"] <= 1
    assert few["open_cache"] <= 1


def calls_in(model, row) -> list[Call]:
    """What each module of a padded forward was handed as its call."""
    found = []

    def keep(module, args, kwargs):
        found.extend(x for x in (*args, *kwargs.values()) if isinstance(x, Call))

    for module in model.modules():
        module.register_forward_pre_hook(keep, with_kwargs=True)
    with torch.no_grad():
        model(IDS, attention_mask=MASK, use_cache=row.causal)
    return found


def tensors(held):
    if isinstance(held, torch.Tensor):
        yield held
    elif isinstance(held, (tuple, list, dict)) or is_dataclass(held):
        parts = held.values() if isinstance(held, dict) else vars(held).values() if is_dataclass(held) else held
        for part in parts:
            yield from tensors(part)


@all_rows
def test_all_layers_take_the_same_call(row):
    first, *others = calls_in(body(row), row)
    assert all(call is first for call in others)
    assert len(others) >= 2
    with pytest.raises(AttributeError):
        first.mask = None
    moved = first.to("meta")
    assert moved.cache is first.cache
    held = {name: value for name, value in vars(moved).items() if name not in ("cache", "_formed")}
    assert {x.device.type for x in tensors(held)} == {"meta"}
    assert moved is first.to("meta")
