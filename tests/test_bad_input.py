"""Bad input is refused with an error that names the argument, the value and the legal range.

One table: what is called, the error's class, and the words that its message has to contain.
"""

from dataclasses import dataclass

import pytest
import torch
from common.batches import tokens
from common.caches import CACHE_NAME
from common.families import CAUSAL, ROWS, VOCAB, Row
from transformers import DynamicCache, GPT2Config, StaticCache

from hf_linear_attn import LeapAttention, RecurrentCache
from hf_linear_attn.modeling.fastformer.modeling_fastformer import FastformerAttention

BY_NAME = {row.name: row for row in ROWS}
CAUSAL_ROW, ENCODER = "leap", "fastformer-encoder"
WITH_WINDOWS = ("leap", "fastformer")
BOUNDED = tuple(row.name for row in CAUSAL if row.bounded)
EVERY_CAUSAL = tuple(row.name for row in CAUSAL)
EVERY_BODY = tuple(row.name for row in ROWS)
NOT_SEA = tuple(row.name for row in ROWS if row.family != "sea")
LABELS_TOKENS = tuple(row.name for row in ROWS if "AutoModelForTokenClassification" in row.heads())
ANSWERS = tuple(row.name for row in ROWS if "AutoModelForQuestionAnswering" in row.heads())


@dataclass
class Case:
    """`call(row)` raises `error`, whose message contains `words`, for each of the rows `names`."""

    name: str
    call: object
    words: tuple[str, ...]
    error: type = ValueError
    names: tuple[str, ...] = EVERY_CAUSAL


def lm(**arguments):
    """A call of the language model on two texts of nine tokens, with these arguments instead."""
    return lambda row: row.causal_lm()(**{"input_ids": tokens(2, 9), **arguments})


def writing(**arguments):
    """Likewise of `generate()`."""
    return lambda row: row.causal_lm().generate(tokens(2, 9), max_new_tokens=2, **arguments)


def body(**arguments):
    """Likewise of the body, which encoders have, too."""
    return lambda row: row.build("AutoModel")(**{"input_ids": tokens(2, 9), **arguments})


def after(cache, **arguments):
    """A call of the language model that goes on from a cache made by `cache(row)`."""
    return lambda row: row.causal_lm()(tokens(2, 1), cache=cache(row), **arguments)


def seen(row: Row, batch: int = 2, **changes):
    """The cache of this row's model, or a changed one, after five tokens."""
    return row.causal_lm(**changes)(tokens(batch, 5), use_cache=True).cache


def layer(hidden_states, **arguments):
    """A call of each row's first mixing layer alone."""
    return lambda row: row.mixers(row.build("AutoModel"))[0](hidden_states, **arguments)


def ones(*shape):
    return torch.ones(*shape, dtype=torch.long)


CONFIGURATIONS = [
    Case(
        "heads-do-not-divide",
        lambda row: row.config(hidden_size=18, num_attention_heads=4),
        ("hidden_size", "18", "num_attention_heads", "4", "[1, 2, 3, 6]"),
        names=EVERY_BODY,
    ),
    Case("no-heads", lambda row: row.config(num_attention_heads=0), ("num_attention_heads", "0"), names=EVERY_BODY),
    Case("width-zero", lambda row: row.config(hidden_size=0), ("hidden_size", "0", "at least 1"), names=NOT_SEA),
    Case(
        "inner-width-zero",
        lambda row: row.config(intermediate_size=0),
        ("intermediate_size", "0", "at least 1"),
        names=WITH_WINDOWS,
    ),
    Case(
        "unknown-activation",
        lambda row: row.config(hidden_act="gelo"),
        ("hidden_act", "'gelo'", "'gelu'"),
        names=WITH_WINDOWS,
    ),
    Case(
        "dropout-above-one",
        lambda row: row.config(attention_dropout=1.5),
        ("attention_dropout", "1.5", "0 to 1"),
        names=WITH_WINDOWS,
    ),
    Case(
        "wavelengths-negative",
        lambda row: row.config(rope_theta=-5.0),
        ("rope_theta", "-5.0", "positive"),
        names=("leap-rotary",),
    ),
    Case("no-layers", lambda row: row.config(num_hidden_layers=0), ("num_hidden_layers", "0"), names=EVERY_BODY),
    Case(
        "window-zero",
        lambda row: row.config(layer_windows=[None, 0, 4]),
        ("layer_windows[1]", "0", "at least 1"),
        names=WITH_WINDOWS,
    ),
    Case(
        "window-negative",
        lambda row: row.config(layer_windows=[-4, None, 4]),
        ("layer_windows[0]", "-4"),
        names=WITH_WINDOWS,
    ),
    Case(
        "too-few-windows",
        lambda row: row.config(layer_windows=[4, 4]),
        ("layer_windows", "2 entries", "num_hidden_layers", "3"),
        names=WITH_WINDOWS,
    ),
    Case(
        "too-few-windows-published-name",
        lambda row: row.config(layer_windows=None, window_sizes=[4, 4]),
        ("layer_windows", "2 entries"),
        names=WITH_WINDOWS,
    ),
    Case(
        "unknown-positions",
        lambda row: row.config(position_embedding_type="alibi"),
        ("position_embedding_type", "'alibi'", "'learned'"),
        names=WITH_WINDOWS,
    ),
    Case(
        "unknown-focus",
        lambda row: row.config(focus_function="relu"),
        ("focus_function", "'relu'", "'elu'", "'exp'"),
        names=("leap",),
    ),
    Case(
        "more-layers-formed-again-than-there-are",
        lambda row: row.config(num_recomputed_mlps=100),
        ("num_recomputed_mlps", "100", "num_hidden_layers"),
        names=("leap",),
    ),
    Case(
        "odd-head-size-rotary",
        lambda row: row.config(hidden_size=18, num_attention_heads=2),
        ("rotary", "head size", "18 / 2", "odd"),
        names=("leap-rotary",),
    ),
    Case("rescale-zero", lambda row: row.config(rescale=0.0), ("rescale", "0.0", "positive"), names=("fastformer",)),
    Case(
        "rescale-infinite",
        lambda row: row.config(rescale=float("inf")),
        ("rescale", "inf", "positive"),
        names=("fastformer",),
    ),
    *(
        Case(
            f"{name}-{value}",
            lambda row, name=name, value=value: row.config(**{name: value}),
            (name, str(value), "1 to" if value > 0 else "at least 1"),
            names=EVERY_BODY,
        )
        for name, value in (
            ("vocab_size", -1),
            ("vocab_size", 2**31),
            ("hidden_size", 2 * 10**30),
            ("num_hidden_layers", 10**7),
            ("max_position_embeddings", 0),
            ("num_labels", 0),
        )
    ),
    Case(
        "window-beyond-any-state",
        lambda row: row.config(layer_windows=[None, 10**7, 4]),
        ("layer_windows[1]", "10000000", "262,144", "state"),
        names=WITH_WINDOWS,
    ),
    Case(
        "danet-window-beyond-any-state",
        lambda row: row.config(window_size=10**7),
        ("window_size", "10000000", "262,144", "state"),
        names=("danet",),
    ),
    Case("sea-k", lambda row: row.config(k=10**30), ("`k`", str(10**30), "2,147,483,647"), names=("sea",)),
    Case(
        "sea-keys-per-cell",
        lambda row: row.config(max_keys_per_cell=10**30),
        ("max_keys_per_cell", str(10**30), "2,147,483,647"),
        names=("sea",),
    ),
    Case(
        "sea-redraw-interval",
        lambda row: row.config(feature_redraw_interval=10**30),
        ("feature_redraw_interval", str(10**30)),
        names=("sea",),
    ),
    Case(
        "sea-cells-that-tie",
        lambda row: row.config(predictor_length=2),
        ("predictor_length", "at least 4", "is 2"),
        names=("sea-encoder",),
    ),
    Case(
        "sea-key-heads",
        lambda row: row.config(num_key_value_heads=3),
        ("num_attention_heads", "2", "num_key_value_heads", "3"),
        names=("sea",),
    ),
    Case(
        "head-size-one",
        lambda row: row.config(hidden_size=4, num_attention_heads=4),
        ("head size", "at least 2"),
        names=("fastformer",),
    ),
    Case(
        "encoder-as-language-model",
        lambda row: row.causal_lm(is_causal=False),
        ("is_causal=True", "FastformerForCausalLM"),
        names=("fastformer",),
    ),
]
TOKENS = [
    Case("no-tokens", body(input_ids=None), ("input_ids", "inputs_embeds", "exactly one"), names=EVERY_BODY),
    Case("ids-and-embeds", body(inputs_embeds=torch.zeros(2, 9, 16)), ("exactly one",), names=EVERY_BODY),
    Case(
        "ids-too-large", body(input_ids=tokens(2, 9) * 0 + VOCAB), (str(VOCAB), f"0 to {VOCAB - 1}"), names=EVERY_BODY
    ),
    Case("ids-negative", body(input_ids=tokens(2, 9) * 0 - 1), ("-1", "input_ids"), names=EVERY_BODY),
    Case("ids-of-one-dimension", body(input_ids=tokens(1, 9)[0]), ("input_ids", "(9,)"), names=EVERY_BODY),
    Case("ids-bool", body(input_ids=tokens(2, 9) > 5), ("input_ids", "bool", "integers"), names=EVERY_BODY),
    Case("ids-float", body(input_ids=tokens(2, 9).float()), ("input_ids", "float32", "integers"), names=EVERY_BODY),
    Case(
        "embeds-of-another-width",
        body(input_ids=None, inputs_embeds=torch.zeros(2, 9, 8)),
        ("inputs_embeds", "8", "16"),
    ),
    Case("empty-batch", body(input_ids=tokens(2, 9)[:0]), ("empty", "batch size 0", "at least 1"), names=EVERY_BODY),
    Case("length-zero", body(input_ids=tokens(2, 9)[:, :0]), ("empty", "length 0"), names=EVERY_BODY),
    Case("unknown-keyword", body(atention_mask=ones(2, 9)), ("atention_mask", "attention_mask"), TypeError, EVERY_BODY),
    Case("token-types", body(token_type_ids=ones(2, 9)), ("token_type_ids",), names=EVERY_BODY),
    Case("causal-encoder", body(is_causal=True), ("is_causal=True", "encoder"), names=(ENCODER,)),
    Case("not-causal", body(is_causal=False), ("is_causal=False", "earlier")),
]
MASKS_AND_POSITIONS = [
    Case("mask-of-generate-too-short", writing(attention_mask=ones(2, 8)), ("attention_mask", "(2, 8)", "(2, 9)")),
    Case(
        "mask-of-generate-of-another-batch", writing(attention_mask=ones(3, 9)), ("attention_mask", "(3, 9)", "(2, 9)")
    ),
    Case("mask-of-generate-no-tensor", writing(attention_mask=[[1] * 9] * 2), ("attention_mask", "list", "(2, 9)")),
    Case("mask-too-long", body(attention_mask=ones(2, 11)), ("attention_mask", "11", "9"), names=EVERY_BODY),
    Case("mask-too-short", body(attention_mask=ones(2, 8)), ("attention_mask", "(2, 8)", "(2, 9)"), names=EVERY_BODY),
    Case("mask-of-another-batch", body(attention_mask=ones(3, 9)), ("attention_mask", "(3, 9)"), names=EVERY_BODY),
    Case("mask-of-one-dimension", body(attention_mask=ones(9)), ("attention_mask", "(9,)"), names=EVERY_BODY),
    Case(
        "mask-of-four-dimensions",
        body(attention_mask=ones(2, 1, 9, 9)),
        ("attention_mask", "(2, 1, 9, 9)"),
        names=EVERY_BODY,
    ),
    Case("mask-with-twos", body(attention_mask=2 * ones(2, 9)), ("attention_mask", "2", "1 (keep)"), names=EVERY_BODY),
    Case(
        "mask-additive",
        body(attention_mask=torch.full((2, 9), -1e4)),
        ("attention_mask", "-10000", "additive"),
        names=EVERY_BODY,
    ),
    Case("mask-nan", body(attention_mask=torch.full((2, 9), torch.nan)), ("attention_mask", "nan"), names=EVERY_BODY),
    Case(
        "mask-of-other-columns", after(seen, attention_mask=ones(2, 4)), ("attention_mask", "4 tokens", "cache 5", "6")
    ),
    Case(
        "positions-of-another-length",
        body(position_ids=ones(2, 8)),
        ("position_ids", "(2, 8)", "(2, 9)"),
        names=EVERY_BODY,
    ),
    Case("positions-of-one-dimension", body(position_ids=ones(9)), ("position_ids", "(9,)"), names=EVERY_BODY),
    Case(
        "positions-float", body(position_ids=torch.arange(9.0)[None]), ("position_ids", "float32"), names=WITH_WINDOWS
    ),
    Case(
        "positions-too-large-for-an-encoder",
        body(position_ids=torch.arange(250, 259)[None]),
        ("position 258", "0 to 255", 'other than "learned"'),
        names=(ENCODER,),
    ),
    Case(
        "positions-too-large",
        body(position_ids=torch.arange(250, 259)[None]),
        ("position 258", "0 to 255", "max_position_embeddings"),
        names=BOUNDED,
    ),
    Case(
        "positions-negative", body(position_ids=torch.arange(-1, 8)[None]), ("position -1", "0 to 255"), names=BOUNDED
    ),
    Case("document-too-long", body(input_ids=tokens(1, 257)), ("position 256", "0 to 255", "shorten"), names=BOUNDED),
    Case(
        "conversation-too-long",
        lambda row: row.causal_lm(max_position_embeddings=5)(tokens(2, 1), cache=seen(row, max_position_embeddings=5)),
        ("position 5", "0 to 4"),
        names=BOUNDED,
    ),
]
PACKING = [
    Case("seq-idx-of-another-shape", body(seq_idx=ones(2, 8)), ("seq_idx", "(2, 8)", "(2, 9)")),
    Case(
        "cu-seq-lens-with-two-rows",
        body(cu_seq_lens_q=torch.tensor([0, 9])),
        ("cu_seq_lens_q", "batch of 2", "seq_idx"),
    ),
    Case(
        "cu-seq-lens-too-short",
        body(input_ids=tokens(1, 9), cu_seq_lens_q=torch.tensor([0, 8])),
        ("cu_seq_lens_q", "0 to 8", "0 to 9"),
    ),
    Case(
        "cu-seq-lens-from-one",
        body(input_ids=tokens(1, 9), cu_seq_lens_q=torch.tensor([1, 9])),
        ("cu_seq_lens_q", "1 to 9"),
    ),
    Case(
        "cu-seq-lens-that-fall",
        body(input_ids=tokens(1, 9), cu_seq_lens_q=torch.tensor([0, 6, 3, 9])),
        ("cu_seq_lens_q", "fall"),
    ),
    Case(
        "cu-seq-lens-empty",
        body(input_ids=tokens(1, 9), cu_seq_lens_q=torch.tensor([], dtype=torch.long)),
        ("cu_seq_lens_q", "0 entries"),
    ),
    Case(
        "encoder-packed",
        body(position_ids=torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])),
        ("packed", "row of its own"),
        names=(ENCODER,),
    ),
    Case("encoder-seq-idx", body(seq_idx=torch.tensor([[0] * 5 + [1] * 4] * 2)), ("packed",), names=(ENCODER,)),
]
LABELS = [
    Case("labels-of-another-length", lm(labels=ones(2, 8)), ("labels", "(2, 8)", "(2, 9)")),
    Case("labels-of-one-dimension", lm(labels=ones(2)), ("labels", "(2,)", "(2, 9)")),
    Case("labels-for-kept-logits", lm(labels=tokens(2, 9), logits_to_keep=3), ("labels", "logits_to_keep")),
    Case("labels-too-large", lm(labels=tokens(2, 9) * 0 + VOCAB), ("labels", str(VOCAB), f"0 to {VOCAB - 1}")),
    Case("labels-float", lm(labels=tokens(2, 9) * 1.0), ("labels", "float32", "integers")),
    Case("labels-negative", lm(labels=tokens(2, 9) * 0 - 1), ("labels", "-1", "-100")),
    Case(
        "token-labels",
        lambda row: row.build("AutoModelForTokenClassification")(tokens(2, 9), labels=ones(2)),
        ("labels", "(2,)", "(2, 9)"),
        names=LABELS_TOKENS,
    ),
    Case(
        "token-label-that-is-no-class",
        lambda row: row.build("AutoModelForTokenClassification")(tokens(2, 9), labels=2 * ones(2, 9)),
        ("labels", "2", "0 to 1"),
        names=LABELS_TOKENS,
    ),
    Case(
        "text-labels",
        lambda row: row.build("AutoModelForSequenceClassification")(tokens(2, 9), labels=ones(3)),
        ("labels", "3", "2"),
        names=EVERY_BODY,
    ),
    Case(
        "text-labels-of-two-dimensions",
        lambda row: row.build("AutoModelForSequenceClassification")(tokens(2, 9), labels=ones(2, 9)),
        ("labels", "(2, 9)", "(2,)"),
        names=NOT_SEA,
    ),
    Case(
        "text-label-that-is-no-class",
        lambda row: row.build("AutoModelForSequenceClassification")(tokens(2, 9), labels=2 * ones(2)),
        ("labels", "2", "0 to 1"),
        names=EVERY_BODY,
    ),
    Case(
        "several-labels-of-another-number",
        lambda row: row.build("AutoModelForSequenceClassification", num_labels=3)(
            tokens(2, 9), labels=torch.zeros(2, 2)
        ),
        ("labels", "(2, 2)", "(2, 3)"),
        names=NOT_SEA,
    ),
    Case(
        "answers-of-another-batch",
        lambda row: row.build("AutoModelForQuestionAnswering")(
            tokens(2, 9), start_positions=ones(3), end_positions=ones(3)
        ),
        ("start_positions", "(3,)", "(2,)"),
        names=tuple(name for name in NOT_SEA if name in ANSWERS),
    ),
    Case(
        "half-an-answer",
        lambda row: row.build("AutoModelForQuestionAnswering")(tokens(2, 9), start_positions=ones(2)),
        ("start_positions", "end_positions"),
        names=ANSWERS,
    ),
]
CACHES = [
    Case(
        "cache-without-configuration",
        after(lambda row: DynamicCache()),
        (CACHE_NAME, "0 layers", "config=model.config"),
    ),
    Case(
        "cache-of-gpt2",
        after(lambda row: DynamicCache(config=GPT2Config(n_layer=3))),
        (CACHE_NAME, "DynamicLayer", "3 recurrent"),
    ),
    Case(
        "cache-static-of-gpt2",
        after(lambda row: StaticCache(config=GPT2Config(n_layer=3), max_cache_len=9)),
        (CACHE_NAME, "StaticLayer"),
    ),
    Case("cache-a-tuple", after(lambda row: ((torch.zeros(1),) * 2,) * 3), (CACHE_NAME, "tuple")),
    Case(
        "cache-with-other-layers",
        after(lambda row: RecurrentCache(config=row.config(**row.layers(2)))),
        (CACHE_NAME, "2 layers", "3 recurrent"),
    ),
    Case("cache-of-another-width", after(lambda row: seen(row, hidden_size=32)), ("another model",)),
    Case("cache-of-other-heads", after(lambda row: seen(row, num_attention_heads=8)), ("another model",)),
    Case(
        "cache-of-other-windows",
        after(lambda row: seen(row, layer_windows=[9, 9, 9])),
        ("another model",),
        names=tuple(row.name for row in CAUSAL if row.family not in ("danet", "hedgehog")),
    ),
    Case(
        "cache-of-another-ring",
        after(lambda row: seen(row, window=8)),
        ("another model",),
        names=("hedgehog",),
    ),
    Case(
        "cache-with-logarithms",
        after(lambda row: seen(row, layer_windows=[None] * 3, rescale=80.0)),
        ("6 tensors", "expected 4", "another model"),
        names=("fastformer",),
    ),
    Case("cache-of-another-window", after(lambda row: seen(row, window_size=8)), ("another model",), names=("danet",)),
    Case(
        "cache-of-another-batch",
        after(lambda row: seen(row, batch=3)),
        ("3 rows", "batch has 2", "batch_select_indices"),
    ),
    Case("cache-for-an-encoder", body(cache=DynamicCache()), (CACHE_NAME, "encoder"), names=(ENCODER,)),
    Case("use-cache-of-an-encoder", body(use_cache=True), ("use_cache", "encoder"), names=(ENCODER,)),
    Case("attentions-with-a-state", after(seen, output_attentions=True), ("output_attentions", "use_cache=False")),
]
LAYERS = [
    Case("layer-no-tensor", layer([[[0.0] * 16] * 9]), ("hidden_states", "list"), TypeError, names=WITH_WINDOWS),
    Case("layer-width", layer(torch.zeros(2, 9, 8)), ("hidden_states", "(2, 9, 8)", "16"), names=WITH_WINDOWS),
    Case(
        "layer-mask-additive",
        layer(torch.zeros(2, 9, 16), attention_mask=torch.full((2, 9), -1e4)),
        ("attention_mask", "-10000", "additive"),
        names=WITH_WINDOWS,
    ),
    Case(
        "layer-mask-of-four-dimensions",
        layer(torch.zeros(2, 9, 16), attention_mask=torch.zeros(2, 1, 1, 9)),
        ("attention_mask", "(2, 1, 1, 9)", "(2, 9)"),
        names=WITH_WINDOWS,
    ),
    Case(
        "layer-mask-of-one-row",
        layer(torch.zeros(2, 9, 16), attention_mask=ones(1, 9).bool()),
        ("attention_mask", "(1, 9)", "(2, 9)"),
        names=WITH_WINDOWS,
    ),
    Case(
        "layer-documents-of-one-row",
        lambda row: LeapAttention(row.config())(torch.zeros(2, 9, 16), segment_ids=ones(1, 9)),
        ("segment_ids", "(1, 9)", "(2, 9)"),
        names=("leap",),
    ),
    Case(
        "layer-state-of-another-batch",
        lambda row: LeapAttention(row.config())(
            torch.zeros(2, 1, 16), state=LeapAttention(row.config())(torch.zeros(3, 4, 16), return_state=True).state
        ),
        ("state", "another batch size"),
        names=("leap",),
    ),
    Case(
        "layer-state-without-positions",
        lambda row: LeapAttention(row.config())(
            torch.zeros(2, 1, 16), state=LeapAttention(row.config())(torch.zeros(2, 4, 16), return_state=True).state
        ),
        ("position_ids", "rotary"),
        names=("leap-rotary",),
    ),
    Case(
        "fastformer-layer-state",
        lambda row: FastformerAttention(row.config())(
            torch.zeros(2, 1, 16),
            state=FastformerAttention(row.config())(torch.zeros(3, 4, 16), return_state=True).state,
        ),
        ("state", "another batch size"),
        names=("fastformer",),
    ),
]
# SEA's rows do not take: what the host says in its own words, what its hosts or caches can do, what it does not have.
NOT_OF_SEA = {"heads-do-not-divide", "no-heads", "token-types", "cache-of-other-windows", "attentions-with-a-state"}
CASES = [
    pytest.param(case, BY_NAME[name], id=f"{case.name}-{name}")
    for case in CONFIGURATIONS + TOKENS + MASKS_AND_POSITIONS + PACKING + LABELS + CACHES + LAYERS
    for name in case.names
    if not (BY_NAME[name].family == "sea" and case.name in NOT_OF_SEA)
    if not (BY_NAME[name].family == "hedgehog" and case.name in ("heads-do-not-divide", "no-heads"))  # its host says so
]


@pytest.mark.parametrize(("case", "row"), CASES)
def test_bad_input(case, row):
    with pytest.raises(case.error) as caught:
        case.call(row)
    assert type(caught.value) is case.error
    missing = [word for word in case.words if word not in str(caught.value)]
    assert not missing, f"the message lacks {missing}: {caught.value}"


NAMED = ("input_ids", "attention_mask", "position_ids", "inputs_embeds", "token_type_ids", "seq_idx", "cu_seq_lens_q")
ONE_OF_EACH = [
    (BY_NAME[name], head)
    for name in ("leap", "fastformer", "fastformer-encoder", "danet", "danet-encoder", "sea", "sea-encoder", "hedgehog")
    for head in BY_NAME[name].heads()
]


@pytest.mark.parametrize(("row", "head"), ONE_OF_EACH, ids=[f"{row.name}-{head}" for row, head in ONE_OF_EACH])
def test_what_is_no_tensor_is_named(row, head):
    model, ids = row.build(head), tokens(2, 9)
    names = list(NAMED)
    if "QuestionAnswering" in head:
        names += ["start_positions", "end_positions"]
    elif head != "AutoModel":
        names += ["labels"]
    if "CausalLM" in head:
        names += ["shift_labels", "logits_to_keep"]
    if "PreTraining" in head:
        names += ["next_sentence_label"]
    for name in names:
        for value in (ids.tolist(), ids.numpy(), "text", {"input_ids": ids}):
            given = {} if name == "inputs_embeds" else {"input_ids": ids}
            with pytest.raises(TypeError, match=f"`{name}` is a {type(value).__name__}, expected a torch.Tensor"):
                model(**{**given, name: value})
    with pytest.raises(TypeError, match="`input_ids` is a dict"):
        model({"input_ids": ids})


@pytest.mark.parametrize("name", ["leap", "fastformer", "danet", "sea"])
@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32, torch.uint8])
def test_whole_numbers_of_any_width_mean_the_same(name, dtype):
    ids, model = tokens(2, 9), BY_NAME[name].causal_lm()
    expected = model(ids, labels=ids).loss
    narrow, places, mask = ids.to(dtype), torch.arange(9, dtype=dtype)[None], torch.ones(2, 9, dtype=dtype)
    assert torch.equal(model(narrow, mask, position_ids=places, labels=narrow).loss, expected)
    texts = BY_NAME[name].build("AutoModelForSequenceClassification")
    one = torch.ones(2, dtype=dtype)
    assert torch.equal(texts(narrow, labels=one).loss, texts(ids, labels=one.long()).loss)


@pytest.mark.parametrize("name", ["leap", "fastformer", "danet", "sea", "sea-encoder"])
def test_embeddings_come_in_any_floating_dtype(name):
    model, ids = BY_NAME[name].build("AutoModel"), tokens(2, 9)
    embeds = model.get_input_embeddings()(ids).detach()
    found = model(inputs_embeds=embeds.double()).last_hidden_state
    assert found.dtype == torch.float32
    assert torch.equal(found, model(inputs_embeds=embeds).last_hidden_state)
    with pytest.raises(TypeError, match=r"`inputs_embeds` has dtype torch\.int64"):
        model(inputs_embeds=ids)
