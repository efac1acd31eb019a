"""What tools read off the models' signatures: the fields of what `forward` returns (sentence-transformers does)."""

import inspect
from dataclasses import fields, is_dataclass

import pytest

import hf_linear_attn
from hf_linear_attn.modeling.sea import modeling_sea, modeling_sea_causal


@pytest.mark.parametrize("name", sorted({*modeling_sea.__all__, *modeling_sea_causal.__all__} - {"SeaPreTrainedModel"}))
def test_forward_says_which_dataclass_it_returns(name):
    returned = inspect.signature(getattr(hf_linear_attn, name).forward).return_annotation
    assert is_dataclass(returned), returned
    wanted = {"SeaModel": "last_hidden_state", "SeaForQuestionAnswering": "start_logits"}.get(name, "logits")
    assert wanted in {field.name for field in fields(returned)}
