"""Controls: with the code broken on purpose, each check of generate() has to fail. They show what the checks can see."""

from contextlib import contextmanager
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from common.families import CAUSAL, FIRST, rows_and
from common.generation import check_batch_operations, check_cache, check_rows_alone

from hf_linear_attn.modeling.shared import call as shared_call
from hf_linear_attn.modeling.shared.states.state_layer import RecurrentStateLayer


@contextmanager
def beams_keep_their_state(row, model):
    """Beam search without reordering."""
    with patch.object(RecurrentStateLayer, "reorder_cache", lambda self, beam_idx: None):
        yield


@contextmanager
def state_is_never_read(row, model):
    """Every step starts from nothing."""
    with patch.object(RecurrentStateLayer, "get_state", lambda self: None):
        yield


@contextmanager
def mask_is_applied_too_early(row, model):
    """Padding is zeroed before the mechanism, as native recurrent models do it, where a zero is still a token."""
    mixers = row.mixers(model)
    assert mixers, f"no submodule named {row.mixer}"

    def early(forward):
        def masked(hidden_states, *, call):
            if call.mask is not None:
                hidden_states = hidden_states * call.mask[..., None]
            return forward(hidden_states, call=replace(call, mask=None, _formed={}))

        return masked

    originals = [mixer.forward for mixer in mixers]
    for mixer in mixers:
        mixer.forward = early(mixer.forward)
    yield
    for mixer, forward in zip(mixers, originals):
        mixer.forward = forward


@contextmanager
def counts_stay_in_place(row, model):
    """The rows of a cache move, the lengths of their texts do not."""
    move = RecurrentStateLayer._map_rows

    def forgetful(self, function):
        counts = self.get_token_counts()
        move(self, function)
        batch = self.recurrent_states[0].shape[0]
        self.recurrent_states[self.number_of_states - 1] = counts.repeat(-(-batch // len(counts)))[:batch]

    with patch.object(RecurrentStateLayer, "_map_rows", forgetful):
        yield


CONTROLS = {
    "beams-keep-their-state": (beams_keep_their_state, lambda m: check_cache(m, num_beams=4, num_return_sequences=2)),
    "state-is-never-read": (state_is_never_read, check_cache),
    "mask-is-applied-too-early": (mask_is_applied_too_early, check_rows_alone),
    "counts-stay-in-place": (counts_stay_in_place, check_batch_operations),
}


@rows_and("control", CONTROLS, CAUSAL, lambda row, control: row in FIRST)
def test_the_check_sees_the_fault(row, control):
    breaks, check = control
    if breaks.__name__ in row.immune:
        pytest.skip("the construction of this family makes the fault harmless")
    if breaks is counts_stay_in_place and not row.positional:
        pytest.skip("without positions nothing depends on the counts")
    model = row.causal_lm(torch.float64)
    check(model)
    with breaks(row, model), pytest.raises(AssertionError):
        check(model)


@pytest.mark.parametrize(
    "row", [row for row in CAUSAL if row.name in ("danet-learned", "danet-cosine")], ids=lambda r: r.name
)
def test_windows_that_count_columns_are_seen(row, monkeypatch):
    """DANet's windows have borders: without the order that puts real tokens first, padding shifts them."""
    layout = shared_call.token_layout
    model = row.causal_lm(torch.float64)
    check_rows_alone(model)
    monkeypatch.setattr(shared_call, "token_layout", lambda *args: layout(*args)._replace(order=None, slots=None))
    with pytest.raises(AssertionError):
        check_rows_alone(model)
