"""The border to Transformers: the cache's two names, what generate() hands on, and which releases are supported."""

import copy
import inspect
import logging
import pickle
import re
import string
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
import transformers
from common.batches import left_padded, tokens
from common.caches import CACHE_NAME, CACHE_NAMES
from common.families import (
    CAUSAL,
    HYBRIDS,
    TRACED_CAUSAL,
    VOCAB,
    HostRow,
    all_rows,
    causal_rows,
    first_rows,
    in_every_run,
)
from common.generation import PROMPT, generate, texts
from packaging.specifiers import SpecifierSet
from packaging.version import Version
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, StaticCache
from transformers.exporters.exporter_dynamo import register_cache_pytrees_for_model
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import ModelOutput

from hf_linear_attn import RecurrentCache
from hf_linear_attn.modeling.shared.releases import NEWEST, OLDEST, RELEASE, check_release
from hf_linear_attn.modeling.shared.sequence import GENERATION_KEYWORDS

ROOT = Path(__file__).parents[1]
either_name = pytest.mark.parametrize("name", CACHE_NAMES)
language_models = pytest.mark.parametrize("row", CAUSAL + HYBRIDS, ids=[row.name for row in CAUSAL + HYBRIDS])


# ---- a cache has two names


@either_name
@language_models
@torch.no_grad()
def test_a_caller_may_say_either_name(row, name):
    """Forward, the body, the mask for generate() and generate() itself go on from a cache under either name."""
    model = row.causal_lm(torch.float64)
    ids = tokens(2, 9)
    whole = model(ids, use_cache=False)
    cache = model(ids[:, :6]).cache
    output = model(ids[:, 6:], **{name: cache})
    torch.testing.assert_close(output.logits, whole.logits[:, 6:], atol=1e-9, rtol=0)
    assert getattr(output, name) is output[name] is output.get(name) is cache
    assert name in output
    if row.family != "sea":  # a SEA body is its host's, inside of the head
        found = model.model(ids[:, :6], use_cache=True)
        assert isinstance(found[name], RecurrentCache)
        model.model(ids[:, 6:], **{name: found[name]})
        assert found[name].get_seq_length() == 9
    embeds = model.get_input_embeddings()(ids[:, 6:])
    mask = torch.ones(2, 9, dtype=torch.long)
    assert model.create_masks_for_generate(model.config, embeds, mask, **{name: cache}) is None or row in HYBRIDS
    text = generate(model, ids, new=4)
    assert text[name] is getattr(text, name)
    assert torch.equal(
        generate(model, text.sequences, new=4, **{name: text[name]}).sequences, generate(model, ids, new=8).sequences
    )
    prepared = model.prepare_inputs_for_generation(ids, next_sequence_length=3, **{name: cache})
    assert prepared[CACHE_NAME] is cache


@either_name
@causal_rows
@torch.no_grad()
def test_layers_take_either_name(row, name):
    """Blocks and attention layers that are called on their own."""
    model = row.causal_lm(torch.float64)
    if isinstance(row, HostRow):
        pytest.skip("its layers are the host's, which Transformers calls")
    x = torch.randn(2, 7, model.config.hidden_size, dtype=torch.float64)
    places = {"position_ids": torch.arange(7)[None]} if row.family == "leap" else {}
    for layer in (model.model.layers[0], model.model.layers[0].attention):
        cache = RecurrentCache(config=model.config)
        layer(x, **places, **{name: cache})
        assert cache.layers[0].get_seq_length() == 7
        assert CACHE_NAME in inspect.signature(layer.forward).parameters


@causal_rows
def test_two_caches_are_refused(row):
    model = row.causal_lm()
    first, second = (model(tokens(1, 4), use_cache=True).cache for _ in range(2))
    for call in (model, lambda ids, **both: model.generate(ids, max_new_tokens=1, **both)):
        with pytest.raises(ValueError, match="two names of one argument"):
            call(tokens(1, 5), cache=first, past_key_values=second)
    same = model(tokens(1, 1), cache=first, past_key_values=first)
    assert same.cache is first


@all_rows
def test_output_classes_are_those_of_transformers(row):
    """Whoever asks `isinstance`, or for the fields, finds what Transformers' own models return."""
    body = row.build("AutoModel")(tokens(1, 4))
    assert isinstance(body, BaseModelOutputWithPast) or row.name == "sea-encoder"
    assert isinstance(body, ModelOutput)
    if row.causal:
        assert isinstance(row.causal_lm()(tokens(1, 4)), CausalLMOutputWithPast)


@pytest.fixture
def fresh_compiler():
    """Functions of all models share their decorators' code, of which the compiler keeps eight versions a process."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@all_rows
@torch.no_grad()
def test_outputs_are_pickled_and_copied(row):
    """Of bodies, heads and generate(): classes made for the release at hand come back, with both names."""
    ids, found = tokens(1, 4), [row.build(head)(tokens(1, 4)) for head in row.heads() if "MultipleChoice" not in head]
    if row.causal:
        found += [row.causal_lm()(ids, use_cache=True), generate(row.causal_lm(), ids, new=2)]
    if row.family == "sea":
        found.append(row.build("AutoModel")(ids, output_sea=True))
    for output in found:
        for again in (pickle.loads(pickle.dumps(output)), copy.deepcopy(output)):
            assert type(again) is type(output)
            assert list(again.keys()) == list(output.keys())
            assert torch.equal(again[0], output[0])


@causal_rows
def test_a_cache_is_set_under_either_name(row):
    for name in CACHE_NAMES:
        output = row.causal_lm()(tokens(1, 4), use_cache=True)
        other = RecurrentCache(config=row.config())
        output[name] = other
        assert output.cache is output.past_key_values is output["cache"] is output["past_key_values"] is other
        assert len(set(output.keys()) & set(CACHE_NAMES)) == 1


@either_name
@causal_rows
def test_a_cache_is_refused_under_checkpointing(row, name):
    """Layers run twice there, and would lose the context (Transformers takes their cache away) or read tokens twice."""
    model = row.causal_lm()
    cache = model(tokens(1, 4), use_cache=True).cache
    model.train()
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    with pytest.raises(ValueError, match="under checkpointing"):
        model(tokens(1, 3), **{name: cache})
    if not isinstance(row, HostRow):
        layer, hidden_states = model.model.layers[0], torch.randn(1, 3, model.config.hidden_size)
        with pytest.raises(ValueError, match="under checkpointing"):
            layer(hidden_states, **{name: cache})
    assert cache.get_seq_length() == 4
    assert model(tokens(1, 3), labels=tokens(1, 3)).loss.isfinite()


@in_every_run("leap", "danet", "danet-swa@softmax_g_sw", of=TRACED_CAUSAL + HYBRIDS)
@torch.no_grad()
def test_a_compiled_model_fills_a_cache(row, fresh_compiler):
    """A prompt as generate() sends it, then a step, each as one graph, with a cache under either name."""
    model = row.causal_lm()
    ids, place = tokens(2, 7), torch.arange(7)[None].expand(2, -1)
    whole = model(ids, use_cache=False).logits
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    begun = compiled(ids[:, :5], position_ids=place[:, :5], use_cache=True)
    torch.testing.assert_close(begun.logits, whole[:, :5])
    for at, name in zip((5, 6), CACHE_NAMES):
        step = slice(at, at + 1)
        found = compiled(ids[:, step], position_ids=place[:, step], **{name: begun.cache})
        torch.testing.assert_close(found.logits, whole[:, step])


@pytest.mark.parametrize("row", HYBRIDS, ids=[row.name for row in HYBRIDS])
@torch.no_grad()
def test_a_compiled_hybrid_refuses_packed_rows_with_a_cache(row, fresh_compiler):
    """Whether positions restart shows only when the program runs: then."""
    compiled = torch.compile(row.causal_lm(), backend="eager", fullgraph=True)
    plain = torch.arange(6)[None]
    compiled(tokens(1, 6), position_ids=plain, use_cache=True)
    with pytest.raises(RuntimeError, match="packed documents and a cache"):
        compiled(tokens(1, 6), position_ids=plain % 3, use_cache=True)


@pytest.mark.slow
@torch.no_grad()
def test_a_compiled_hybrid_refuses_a_document_that_begins_with_a_later_call(fresh_compiler):
    model, plain = HYBRIDS[0].causal_lm(), torch.arange(6)[None]
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    cache = model(tokens(1, 6), use_cache=True).cache
    with pytest.raises(RuntimeError, match="packed documents and a cache"):
        compiled(tokens(1, 6), position_ids=plain, cache=cache)


@either_name
@pytest.mark.parametrize("row", TRACED_CAUSAL, ids=[row.name for row in TRACED_CAUSAL])
@torch.no_grad()
def test_a_program_is_exported_with_either_name(row, name):
    model = row.causal_lm()
    register_cache_pytrees_for_model(model)
    cache = RecurrentCache(config=model.config)
    model(tokens(1, 5), cache=cache)
    step, going_on = tokens(1, 1, seed=1), cache.fork()
    program = torch.export.export(model, (step,), {name: cache, "use_cache": True}, strict=False)
    found = program.module()(step, **{name: going_on.fork(), "use_cache": True}).logits
    torch.testing.assert_close(found, model(step, cache=going_on).logits)


@first_rows
def test_the_second_place_of_a_tuple_is_the_cache(row):
    output = row.causal_lm()(tokens(1, 4), return_dict=False, use_cache=True)
    assert isinstance(output[1], RecurrentCache)


# ---- generate() on every release


@language_models
def test_greedy_generation_is_the_argmax_of_uncached_forwards(row):
    """The invariant that a renamed argument breaks in silence: generate() fills one cache, the model reads another."""
    model = row.causal_lm(torch.float64)
    ids, mask = left_padded(texts())
    found = generate(model, ids, mask, new=10).sequences
    for _ in range(10):
        with torch.no_grad():
            following = model(ids, attention_mask=mask, use_cache=False).logits[:, -1:].argmax(-1)
        ids, mask = torch.cat([ids, following], 1), torch.cat([mask, torch.ones_like(following)], 1)
    assert torch.equal(found, ids)


@pytest.mark.skipif(RELEASE < (5, 24), reason="older releases refuse assisted decoding with a static cache")
@causal_rows
def test_assisted_decoding_with_a_static_cache(row):
    model = row.causal_lm(torch.float64)
    ids = tokens(1, 4).repeat(1, 4)
    greedy = generate(model, ids, new=16)
    cache = StaticCache(config=model.config, max_cache_len=64)
    for options in ({"cache": cache}, {"cache_implementation": "static"}):
        found = generate(model, ids, new=16, prompt_lookup_num_tokens=3, **options)
        assert torch.equal(found.sequences, greedy.sequences)


@causal_rows
def test_caches_say_that_they_can_be_cropped(row):
    """Transformers 5.24 asks after the prompt, before it drafts."""
    model = row.causal_lm()
    cache = model(tokens(1, 5), use_cache=True).cache
    assert all(layer.is_croppable for layer in cache.layers)


# ---- what generate() hands on to forward


@pytest.fixture(scope="module")
def tokenizer():
    """A tokenizer of single characters."""
    letters = (string.ascii_letters + string.digits)[: VOCAB - 3]
    words = {"<pad>": 0, "<bos>": 1, "<eos>": 2} | {letter: 3 + i for i, letter in enumerate(letters)}
    characters = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    characters.pre_tokenizer, characters.decoder = pre_tokenizers.Split("", "isolated"), decoders.Fuse()
    special = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<pad>"}
    return PreTrainedTokenizerFast(tokenizer_object=characters, **special)


@language_models
def test_a_tokenizer_for_stop_strings(row, tokenizer):
    model = row.causal_lm(torch.float64)
    ids = tokens(1, PROMPT)
    text = generate(model, ids, new=12).sequences
    stop = tokenizer.decode(text[0, PROMPT + 4])
    found = generate(model, ids, new=12, tokenizer=tokenizer, stop_strings=[stop]).sequences
    end = PROMPT + 1 + text[0, PROMPT:].tolist().index(text[0, PROMPT + 4])
    assert torch.equal(found, text[:, :end])
    beams = generate(model, ids, new=5, tokenizer=tokenizer, stop_strings=["zyx"], num_beams=2).sequences
    assert torch.equal(beams, generate(model, ids, new=5, num_beams=2).sequences)


@first_rows
def test_token_healing(row, tokenizer):
    """It ends one token before the prompt's end and lets the model choose one that begins like it: the same here."""
    model = row.causal_lm(torch.float64)
    model.generation_config.bos_token_id = 1
    ids = tokens(1, PROMPT)
    found = generate(model, ids, new=3, tokenizer=tokenizer, token_healing=True).sequences
    assert found.shape[1] == PROMPT + 3


@first_rows
def test_a_pipeline_with_stop_strings(row, tokenizer):
    model = row.causal_lm()
    write = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer)
    found = write("HELLO", max_new_tokens=4, do_sample=False, tokenizer=tokenizer, stop_strings=["zyx"])
    assert found[0]["generated_text"].startswith("H")


@first_rows
def test_nothing_that_generate_keeps_for_itself_reaches_forward(row, tokenizer):
    """Otherwise a step would be taken for one with unknown arguments, which no CUDA graph holds."""
    model = row.causal_lm(torch.float64)
    reached = set()
    model.register_forward_pre_hook(lambda module, args, kwargs: reached.update(kwargs), with_kwargs=True)
    common = {"new": 4, "tokenizer": tokenizer, "stop_strings": ["zyx"]}
    ids = tokens(1, 4).repeat(1, 3)
    for mode in ({}, {"num_beams": 2}, {"do_sample": True}, {"prompt_lookup_num_tokens": 2}, {"prefill_chunk_size": 2}):
        generate(model, ids, **common, **mode)
    assert reached
    assert not reached & GENERATION_KEYWORDS
    keywords = {"tokenizer": tokenizer, "assistant_tokenizer": tokenizer}
    kept = model._extract_generation_mode_kwargs(None, keywords, True, model, object())
    assert set(kept) <= GENERATION_KEYWORDS, "generate() has a new argument of its own: add it to GENERATION_KEYWORDS"


@first_rows
def test_a_generating_function_of_the_users_own(row, tokenizer):
    """`custom_generate` hands model and arguments over; what it passes on to forward is known there."""

    def own(model, input_ids, logits_processor, stopping_criteria, generation_config, tokenizer=None, **kwargs):
        return input_ids, model(input_ids, tokenizer=tokenizer, use_cache=False).logits.shape[:2]

    ids = tokens(1, 5)
    found, shape = row.causal_lm().generate(ids, custom_generate=own, tokenizer=tokenizer, max_new_tokens=2)
    assert torch.equal(found, ids)
    assert shape == (1, 5)


# ---- which releases


def test_one_statement_of_what_is_supported():
    """shared/releases.py, pyproject.toml and constraints.txt agree; the range ends below the first untested minor release."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    stated = SpecifierSet(
        next(x for x in project["dependencies"] if x.startswith("transformers")).removeprefix("transformers")
    )
    for release in (OLDEST, NEWEST):
        assert stated.contains(f"{release[0]}.{release[1]}.0")
    assert stated.contains(f"{NEWEST[0]}.{NEWEST[1]}.99")
    assert not stated.contains(f"{NEWEST[0]}.{NEWEST[1] + 1}.0")
    assert not stated.contains(f"{OLDEST[0]}.{OLDEST[1] - 1}.99")
    pinned = {name: re.search(r"^transformers==(.+)$", (ROOT / name).read_text(), re.M)[1] for name in PINS}
    assert Version(pinned["constraints.txt"]).release[:2] == NEWEST
    assert Version(pinned["constraints-oldest.txt"]).release[:2] == OLDEST


PINS = ("constraints.txt", "constraints-oldest.txt")


def test_an_older_release_is_refused():
    with pytest.raises(
        ImportError, match=r"does not run on transformers 5\.16: pip install 'transformers>=5\.17,<5\.25'"
    ):
        check_release((5, 16))


def test_an_older_release_is_refused_before_anything_else():
    """What an older release lacks must not be what the user reads: here a Transformers that has nothing but a version."""
    lacking = "import sys, types; sys.modules['transformers'] = t = types.ModuleType('transformers'); t.__version__ = '4.57.1'"
    done = subprocess.run(
        [sys.executable, "-c", f"{lacking}; import hf_linear_attn"], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 1
    wanted = "pip install 'transformers>=5.17,<5.25'"
    assert done.stderr.splitlines()[-1] == f"ImportError: hf-linear-attn does not run on transformers 4.57: {wanted}"


def test_a_newer_release_is_said_in_one_line(caplog):
    with caplog.at_level(logging.WARNING):
        check_release(NEWEST)
        assert not caplog.records
        check_release((NEWEST[0], NEWEST[1] + 1))
        check_release((6, 0))
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 2
    assert all("\n" not in message and "pip install 'transformers>=" in message for message in messages)


def test_the_newest_release_is_a_tested_one():
    """Asks the package registry; skipped where there is none."""
    asked = [sys.executable, "-m", "pip", "index", "versions", "transformers", "--disable-pip-version-check"]
    try:
        answer = subprocess.run(asked, capture_output=True, text=True, timeout=60, check=True).stdout
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired):
        pytest.skip("the package registry cannot be reached")
    newest = re.match(r"transformers \(([^)]+)\)", answer)[1]
    pinned = re.search(r"^transformers==(.+)$", (ROOT / "constraints.txt").read_text(), re.M)[1]
    assert Version(newest) <= Version(pinned), (
        f"transformers {newest} is out, the newest tested release is {pinned}: raise `transformers=={pinned}` in "
        "constraints.txt, run the tests, then raise the range in pyproject.toml and NEWEST in modeling/shared/releases.py"
    )


# ---- what users of Transformers' other tools meet


QUIET = {
    "import": ["-c", "import hf_linear_attn; from transformers import LlamaForCausalLM, AutoModelForCausalLM"],
    "command": ["-m", "hf_linear_attn", "generate", "My fellow citizens", "--max-new-tokens", "2"],
}


@pytest.mark.parametrize("name", QUIET)
def test_nothing_is_printed_that_is_not_ours(name):
    """Torchao and PyTorch say things about each other when Transformers' models are imported: not through us."""
    done = subprocess.run([sys.executable, *QUIET[name]], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert name == "command" or done.stdout == ""


def test_classes_are_found_on_the_transformers_module():
    """`transformers serve` looks `architectures[0]` up there, by name."""
    from hf_linear_attn.families import FAMILIES

    for family in FAMILIES.values():
        for ours in (family.config_class(), *family.head_classes().values()):
            assert getattr(transformers, ours.__name__) is ours


def test_a_class_of_transformers_own_is_not_hidden(monkeypatch):
    from hf_linear_attn.registration import register_all

    module = sys.modules["transformers"]  # made anew since this file imported it (`registration.Published`)
    monkeypatch.setattr(module, "__all__", [*module.__all__, "LeapModel"])
    with pytest.raises(ImportError, match="a class LeapModel of its own"):
        register_all()


@pytest.mark.skipif(RELEASE < (5, 24), reason="only newer releases ask for a PEFT that is not out yet")
@first_rows
def test_get_peft_model_works_where_add_adapter_refuses(row):
    peft = pytest.importorskip("peft", reason="needs peft: pip install hf-linear-attn[peft]")
    options = peft.LoraConfig(r=2)
    if Version(peft.__version__) < Version("0.22"):
        with pytest.raises((ImportError, ValueError), match=r"(?i)peft"):
            row.causal_lm().add_adapter(options)
    model = peft.get_peft_model(row.causal_lm(), options)
    assert model.generate(input_ids=tokens(1, 4), max_new_tokens=2).shape == (1, 6)
