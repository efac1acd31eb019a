"""A conversation's state on disk: saved through safetensors, resumed in another process, refused where it does not belong."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from common import resume
from common.batches import left_padded, tokens
from common.caches import held
from common.families import FIRST, FIRST_STATES, STATES, first_rows, first_state_rows, state_rows
from common.generation import NEW, PROMPT, generate
from huggingface_hub.dataclasses import strict
from safetensors import safe_open
from safetensors.torch import save_file

from hf_linear_attn import LeapConfig, RecurrentCache

BEFORE = 5
KEYED = [row for row in FIRST_STATES if row not in FIRST]  # rows with softmax layers


@pytest.fixture(scope="module")
def resumed(tmp_path_factory):
    """Folder -> for each row a conversation that was begun here and ended in one other process."""
    folder = tmp_path_factory.mktemp("conversations")
    for row in STATES:
        model = row.causal_lm(torch.float64)
        here = folder / row.name
        model.save_pretrained(here)
        begun = generate(model, tokens(2, PROMPT), new=BEFORE)
        begun.cache.save(here / "cache.safetensors")
        torch.save(begun.sequences, here / "begun.pt")
    source = str(Path(__file__).parents[1] / "src")
    subprocess.run(
        [sys.executable, resume.__file__, str(folder), str(NEW - BEFORE)],
        env={**os.environ, "PYTHONPATH": source},
        check=True,
        capture_output=True,
    )
    return folder


@state_rows
def test_resumes_in_another_process(row, resumed):
    ended = torch.load(resumed / row.name / "ended.pt")
    assert torch.equal(ended, generate(row.causal_lm(torch.float64), tokens(2, PROMPT)).sequences)


def saved_and_loaded(cache, config, folder) -> RecurrentCache:
    cache.save(folder / "c.safetensors")
    return RecurrentCache.load(folder / "c.safetensors", config)


@state_rows
def test_saved_state_is_the_same_to_the_bit(row, tmp_path):
    model = row.causal_lm()
    with torch.no_grad():
        cache = model(tokens(2, 9), use_cache=True).cache
        loaded = saved_and_loaded(cache, model.config, tmp_path)
        assert loaded.get_seq_length() == cache.get_seq_length() == 9
        step = tokens(2, 3, seed=1)
        first, second = (model(step, cache=c).logits for c in (cache, loaded))
    assert torch.equal(first, second)


def begun(model, history: str, length: int):
    """A cache that has seen `length` tokens and something before, and the mask over all its columns."""
    ids, mask = tokens(2, length), torch.ones(2, length, dtype=torch.long)
    if history == "padded":
        ids, mask = left_padded([ids[0], ids[1, : max(1, length - 3)]])
    cache = RecurrentCache(config=model.config)
    if history == "reset":
        model(tokens(2, 7, seed=3), cache=cache)
        cache.reset()
    if history == "cropped":
        cache.activate_past_recording()
        model(tokens(2, 3, seed=4), cache=cache)
        cache.crop(0)
        model(tokens(2, 5, seed=5), cache=cache)
        cache.crop(-3)
        mask = torch.ones(2, 5 + length, dtype=torch.long)
    model(ids, attention_mask=mask, cache=cache)
    if history == "reordered":
        cache.reorder_cache(torch.tensor([1, 1]))
        mask = mask[[1, 1]]
    if history == "repeated":
        cache.batch_repeat_interleave(3)
        mask = mask.repeat_interleave(3, 0)
    return cache, mask


@pytest.mark.parametrize("history", ["plain", "padded", "cropped", "reordered", "repeated", "reset"])
@pytest.mark.parametrize("row", KEYED, ids=[row.name for row in KEYED])
@torch.no_grad()
def test_goes_on_where_it_stopped(row, history, tmp_path):
    """Prompts shorter and longer than the window of 4: a file holds what the kept cache holds, counters included."""
    model = row.causal_lm()
    for length in (2, 9):
        cache, mask = begun(model, history, length)
        loaded = saved_and_loaded(cache, model.config, tmp_path)
        assert [layer.get_seq_length() for layer in loaded.layers] == [mask.shape[1]] * 3
        for seed in (1, 2):  # again: what the first call has moved on must have moved on alike
            step = tokens(len(mask), 3, seed=seed)
            mask = torch.nn.functional.pad(mask, [0, 3], value=1)
            if history == "cropped":
                cache.crop(0)  # a recording window of Transformers 5.17 hands out more than its mask covers
            first, second = (model(step, attention_mask=mask, cache=c).logits for c in (cache, loaded))
            assert torch.equal(first, second)


@first_rows
@torch.no_grad()
def test_the_state_after_packed_rows_is_saved(row, tmp_path):
    model = row.causal_lm()
    documents = torch.tensor([[0] * 4 + [1] * 5, [0] * 7 + [1] * 2])
    one = model(tokens(1, 9), seq_idx=documents[:1], use_cache=True).cache
    assert saved_and_loaded(one, model.config, tmp_path).get_seq_length() == 9
    cache = model(tokens(2, 9), seq_idx=documents, use_cache=True).cache
    cache.batch_repeat_interleave(2)
    loaded = saved_and_loaded(cache, model.config, tmp_path)
    step = tokens(4, 2, seed=1)
    assert torch.equal(*(model(step, cache=c).logits for c in (cache, loaded)))


@first_rows
@torch.no_grad()
def test_a_call_of_padding_alone_in_documents_changes_nothing(row, tmp_path):
    model = row.causal_lm(torch.float64)
    ids, step, nothing = tokens(1, 6), tokens(1, 2, seed=1), torch.zeros(1, 4, dtype=torch.long)
    caches = [model(ids, use_cache=True).cache for _ in range(2)]
    model(ids[:, :4], attention_mask=nothing, seq_idx=torch.zeros(1, 4, dtype=torch.long), cache=caches[0])
    loaded = saved_and_loaded(caches[0], model.config, tmp_path)
    first, second = (model(step, cache=c).logits for c in (loaded, caches[1]))
    torch.testing.assert_close(first, second, atol=1e-9, rtol=0)


@first_state_rows
@torch.no_grad()
def test_a_saved_file_can_be_written_again(row, tmp_path):
    """What was loaded is no view of the file."""
    model = row.causal_lm()
    cache = model(tokens(1, 9), use_cache=True).cache
    loaded = saved_and_loaded(cache, model.config, tmp_path)
    model(tokens(1, 4, seed=1), use_cache=True).cache.save(tmp_path / "c.safetensors")
    step = tokens(1, 1, seed=2)
    assert torch.equal(*(model(step, cache=c).logits for c in (cache, loaded)))


@pytest.mark.parametrize(
    ("wrote", "reads", "tolerance"),
    [
        (torch.float32, torch.bfloat16, 0.1),
        (torch.bfloat16, torch.float32, 0.1),
        (torch.float32, torch.float64, 1e-4),
    ],
)
@first_state_rows
@torch.no_grad()
def test_a_state_goes_on_in_a_model_of_another_dtype(row, wrote, reads, tolerance, tmp_path):
    """Sums stay at least float32, keys and values take the dtype of the model that goes on."""
    step = tokens(2, 3, seed=1)
    writer, reader = row.causal_lm(wrote), row.causal_lm(reads)
    loaded = saved_and_loaded(writer(tokens(2, 9), use_cache=True).cache, reader.config, tmp_path)
    own = reader(tokens(2, 9), use_cache=True).cache
    for ids in (step[:, :2], step[:, 2:]):
        found, expected = (reader(ids, cache=c).logits for c in (loaded, own))
        assert found.dtype == expected.dtype == reads
        if not row.sharp:  # rounding alone selects other keys
            assert (found - expected).abs().max() < tolerance * expected.abs().max()
    assert [x.dtype for layer in loaded.layers for x in held(layer)] == [
        x.dtype for layer in own.layers for x in held(layer)
    ]


@first_state_rows
def test_a_state_with_gradients_is_copied_without_them(row, tmp_path):
    """What `model(ids)` leaves outside of `torch.no_grad()`; the original keeps its part in backward."""
    model = row.causal_lm()
    cache = model(tokens(2, 6), use_cache=True).cache
    assert any(x.requires_grad for layer in cache.layers for x in held(layer))
    twins = [cache.fork(), copy.deepcopy(cache), saved_and_loaded(cache, model.config, tmp_path)]
    assert not any(x.requires_grad for twin in twins for layer in twin.layers for x in held(layer))
    step = tokens(2, 2, seed=1)
    expected = model(step, cache=cache).logits
    assert all(torch.equal(model(step, cache=twin).logits, expected) for twin in twins)


@first_rows
def test_refuses_files_and_models_that_do_not_fit(row, tmp_path):
    model = row.causal_lm()
    with pytest.raises(ValueError, match="not seen a token"):
        RecurrentCache(config=model.config).save(tmp_path / "empty.safetensors")
    with pytest.raises(ValueError, match="does not know its model"):
        RecurrentCache().save(tmp_path / "empty.safetensors")
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"other\.safetensors is not a saved cache"):
        RecurrentCache.load(tmp_path / "other.safetensors", model.config)
    with pytest.raises(FileNotFoundError, match="missing"):
        RecurrentCache.load(tmp_path / "missing.safetensors", model.config)
    with torch.no_grad():
        model(tokens(2, 4), use_cache=True).cache.save(tmp_path / "c.safetensors")
    with pytest.raises(ValueError, match=r"num_hidden_layers` is 3 in the file, 2 in `config`"):
        RecurrentCache.load(tmp_path / "c.safetensors", row.config(**row.layers(2)))
    wider = row.causal_lm(hidden_size=32)
    with pytest.raises(ValueError, match=r"state of another model: .*hidden_size` is 16 in the file, 32 in `config`"):
        RecurrentCache.load(tmp_path / "c.safetensors", wider.config)


# Changes of a configuration that leave every shape as it is, for each family.
OTHER_MODELS = {
    "leap": [
        {"focus_function": "exp", "layer_windows": [3, 2, 16]},
        {"position_embedding_type": "rotary"},
        {"rope_theta": 500.0},
        {"layer_norm_eps": 1e-3},
        {"hidden_act": "relu"},
    ],
    "fastformer": [{"rescale": 20.0}, {"position_embedding_type": "none"}, {"hidden_act": "relu"}],
    "danet": [
        {"layer_pattern": "sw_l_g"},
        {"scale_length": 2048},
        {"position_embedding_type": "cosine"},
        {"relpe_scheme": "qkv"},
        {"local_relpe": False},
        {"pre_norm": "standard_ln"},
        {"rope_theta": 500.0},
    ],
    "sea": [
        {"k": 6},
        {"softmax_layers": [1]},
        {"official": True},
        {"max_keys_per_cell": 2},
        {"rope_theta": 500.0},
        {"hidden_act": "relu"},
    ],
    "hedgehog": [
        {"forgetting": "head"},
        {"softmax_layers": [2]},
        {"rope_theta": 500.0},
        {"hidden_act": "relu"},
    ],
}


@first_state_rows
@torch.no_grad()
def test_refuses_other_models_whose_shapes_fit(row, tmp_path):
    cache = row.causal_lm()(tokens(1, 9), use_cache=True).cache
    cache.save(tmp_path / "c.safetensors")
    own = row.config()
    for change in OTHER_MODELS[row.family]:
        if all(getattr(own, name, None) == value for name, value in change.items()):
            continue  # no change of this row
        name = next(iter(change)).replace("rope_theta", "rope_")
        message = rf"c\.safetensors is the state of another model: .*{name}.* in the file, .* in `config`"
        with pytest.raises(ValueError, match=message):
            RecurrentCache.load(tmp_path / "c.safetensors", row.config(**change))
    for harmless in (
        {"hidden_dropout_prob": 0.5},
        {"initializer_range": 0.1},
        {"pad_token_id": 1},
        {"use_cache": False},
    ):
        RecurrentCache.load(tmp_path / "c.safetensors", row.config(**harmless))
    for other in STATES:
        if other.family != row.family:
            with pytest.raises(ValueError, match=f"`family` is '{row.family}', expected '{other.family}'"):
                RecurrentCache.load(tmp_path / "c.safetensors", other.config())


@strict
class NewerConfig(LeapConfig):
    """As a later release may have it."""

    added_later: str = "as before"


@torch.no_grad()
def test_an_option_that_came_later_is_compared(tmp_path):
    row = first(STATES, "leap")
    fields = row.config().to_dict()
    cache = row.causal_lm()(tokens(1, 9), use_cache=True).cache
    cache.save(tmp_path / "old.safetensors")
    RecurrentCache.load(tmp_path / "old.safetensors", NewerConfig(**fields))
    with pytest.raises(ValueError, match="`added_later` is not named in the file, 'otherwise' in `config`"):
        RecurrentCache.load(tmp_path / "old.safetensors", NewerConfig(**fields, added_later="otherwise"))
    cache.config = NewerConfig(**fields)
    cache.save(tmp_path / "new.safetensors")
    with pytest.raises(ValueError, match="`added_later` is 'as before' in the file, and unknown to this release"):
        RecurrentCache.load(tmp_path / "new.safetensors", row.config())


def first(rows, family):
    return next(row for row in rows if row.family == family)


def contents(path) -> tuple[dict, dict]:
    with safe_open(path, framework="pt") as file:
        return file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (a file, not a dict)


def changed_field(name: str, value):
    """Put something else into the schema."""

    def change(metadata, tensors):
        metadata["schema"] = json.dumps({**json.loads(metadata["schema"]), name: value})

    return change


def changed_tensor(function, last: bool = False):
    """Put something else in place of the first tensor, or of the last."""

    def change(metadata, tensors):
        name = sorted(tensors)[-1 if last else 0]
        tensors[name] = function(tensors[name]).contiguous()

    return change


def first_number(value):
    def change(tensor):
        tensor = tensor.clone()
        tensor.view(-1)[0] = value
        return tensor

    return change


# name -> what is done to a file, and what its refusal names
DAMAGES = {
    "no-schema": (lambda metadata, tensors: metadata.pop("schema"), "`schema`"),
    "schema-is-no-json": (lambda metadata, tensors: metadata.update(schema="{"), "`schema`"),
    "schema-is-deep": (lambda metadata, tensors: metadata.update(schema="[" * 100_000), "`schema`"),
    "schema-is-a-list": (lambda metadata, tensors: metadata.update(schema="[]"), "`schema`"),
    "schema-has-more": (changed_field("more", 1), "`schema`"),
    "family": (changed_field("family", 3), "`family`"),
    "config": (changed_field("config", None), "`config`"),
    "config-is-empty": (changed_field("config", {}), "in the file"),
    "batch-bool": (changed_field("batch_size", True), "`batch_size`"),
    "batch-other": (changed_field("batch_size", 1), r"`layers\.0\.\w+`"),
    "lengths-missing": (changed_field("lengths", None), "`lengths`"),
    "lengths-few": (changed_field("lengths", [9]), "`lengths`"),
    "lengths-negative": (changed_field("lengths", [-5, 9, 9]), "`lengths`"),
    "lengths-float": (changed_field("lengths", [9.0, 9, 9]), "`lengths`"),
    "lengths-bool": (changed_field("lengths", [True, True, True]), "`lengths`"),
    "lengths-huge": (changed_field("lengths", [10**30] * 3), "`lengths`"),
    "lengths-differ": (changed_field("lengths", [9, 9, 5]), "`lengths`"),
    "lengths-shorter": (changed_field("lengths", [8, 8, 8]), r"`layers\.\d\.\w+`"),
    "lengths-longer": (changed_field("lengths", [10, 10, 10]), r"`(layers\.\d\.\w+|digest)`"),
    "no-digest": (lambda metadata, tensors: metadata.pop("digest"), "`digest`"),
    "format": (
        lambda metadata, tensors: metadata.update(format="hf_linear_attn.cache.v3"),
        "format 'hf_linear_attn.cache.v3'",
    ),
    "extra": (lambda metadata, tensors: tensors.update({"layers.0.9": torch.zeros(2, 1)}), r"`layers\.0\.9`"),
    "name": (lambda metadata, tensors: tensors.update({"": torch.zeros(2, 1)}), "``"),
    "missing": (lambda metadata, tensors: tensors.pop(min(tensors)), r"`layers\.0\.\w+`"),
    "rows": (changed_tensor(lambda x: x[:1]), r"`layers\.0\.\w+`"),
    "no-rows": (changed_tensor(lambda x: x[:0]), r"`layers\.0\.\w+`"),
    "flat": (changed_tensor(torch.flatten), r"`layers\.0\.\w+`"),
    "scalar": (changed_tensor(torch.sum), r"`layers\.0\.\w+`"),
    "whole-numbers": (changed_tensor(lambda x: x.long()), r"`layers\.0\.\w+`"),
    "truths": (changed_tensor(lambda x: x.bool()), r"`layers\.0\.\w+`"),
    "bytes": (changed_tensor(lambda x: x.to(torch.float8_e4m3fn)), r"`layers\.0\.\w+`"),
    "nan": (changed_tensor(first_number(torch.nan)), r"`layers\.0\.\w+` is nan"),
    "inf": (changed_tensor(first_number(torch.inf)), r"`layers\.0\.\w+` is inf"),
    "minus-inf": (changed_tensor(first_number(-torch.inf)), r"`layers\.0\.\w+` is -inf"),
    "another-number": (changed_tensor(first_number(0.125)), "`digest`"),
    "transposed": (changed_tensor(lambda x: x.transpose(-1, -2).reshape(x.shape)), "`digest`"),
    "counts": (changed_tensor(first_number(-5), last=True), r"`(layers\.2\.\w+|digest)`"),
    "counts-high": (changed_tensor(first_number(10), last=True), r"`(layers\.2\.\w+|digest)`"),
}


@first_state_rows
@torch.no_grad()
def test_refuses_what_is_damaged(row, tmp_path):
    """With one class of error, which names the file and the field."""
    model = row.causal_lm()
    good, bad = tmp_path / "good.safetensors", tmp_path / "bad.safetensors"
    model(tokens(2, 9), use_cache=True).cache.save(good)
    metadata, tensors = contents(good)
    for damage, named in DAMAGES.values():
        other, kept = dict(metadata), dict(tensors)
        damage(other, kept)
        save_file(kept, bad, metadata=other)
        with pytest.raises(ValueError, match=rf"bad\.safetensors.*{named}"):
            RecurrentCache.load(bad, model.config)
    whole = good.read_bytes()
    for size in (0, 7, 100, len(whole) // 2, len(whole) - 1):
        bad.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"bad\.safetensors is not a saved cache, or a damaged one"):
            RecurrentCache.load(bad, model.config)
    bad.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))  # one bit
    with pytest.raises(ValueError, match=r"bad\.safetensors"):
        RecurrentCache.load(bad, model.config)


@first_state_rows
@torch.no_grad()
def test_a_state_with_nan_is_not_saved(row, tmp_path):
    model = row.causal_lm()
    cache = model(tokens(1, 9), use_cache=True).cache
    held(cache.layers[1])[0][(0,) * 4] = torch.nan
    with pytest.raises(ValueError, match=r"`layers\.1\.\w+` is nan in a place, expected finite numbers"):
        cache.save(tmp_path / "c.safetensors")
    assert not (tmp_path / "c.safetensors").exists()


def as_written_by_0_1_0(cache, path) -> None:
    """`save` of that release: no configuration, and of a sliding window its columns alone."""
    tensors = {}
    for i, layer in enumerate(cache.layers):
        named = (
            layer.saved_tensors() if hasattr(layer, "saved_tensors") else {"keys": layer.keys, "values": layer.values}
        )
        tensors |= {f"layers.{i}.{name}": tensor.detach().contiguous().cpu() for name, tensor in named.items()}
    lengths = [int(layer.get_seq_length()) for layer in cache.layers]
    save_file(tensors, path, metadata={"format": "hf_linear_attn.cache.v1", "lengths": json.dumps(lengths)})


@first_state_rows
@torch.no_grad()
def test_files_of_release_0_1_0(row, tmp_path):
    """They go on where they stopped, hybrids too; what they hold is checked as far as it goes."""
    path = tmp_path / "old.safetensors"
    model = row.causal_lm()
    cache = model(tokens(2, 9), use_cache=True).cache
    as_written_by_0_1_0(cache, path)
    loaded = RecurrentCache.load(path, model.config)
    step, mask = tokens(2, 3, seed=1), torch.ones(2, 12, dtype=torch.long)
    assert torch.equal(*(model(step, attention_mask=mask, cache=c).logits for c in (cache, loaded)))
    with pytest.raises(ValueError, match=r"old\.safetensors: `.*` is .*, expected"):
        RecurrentCache.load(path, row.config(hidden_size=32))
    metadata, tensors = contents(path)
    for lengths in ("[-5, 9, 9]", "[1e30, 9, 9]", "true", "[9, 9, 8]", "[8, 8, 8]", "[" * 100_000, "[9, 9", "{}"):
        save_file(tensors, path, metadata={**metadata, "lengths": lengths})
        with pytest.raises(ValueError, match=r"old\.safetensors: `(lengths|layers\.\d\.\w+)`"):
            RecurrentCache.load(path, model.config)


def test_refuses_configurations_that_keep_no_state(tmp_path):
    row = first(STATES, "fastformer")
    with torch.no_grad():
        row.causal_lm()(tokens(1, 4), use_cache=True).cache.save(tmp_path / "c.safetensors")
    for config in (row.config(is_causal=False), first(STATES, "sea").config().host_config):
        with pytest.raises(ValueError, match=r"c\.safetensors: `config` is a .*, which keeps no such state"):
            RecurrentCache.load(tmp_path / "c.safetensors", config)
