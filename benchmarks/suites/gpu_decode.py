"""Decoding: one step of a language model of 12 layers x 768, batch 16, after a context of so many tokens, in bfloat16.

    step            one CUDA graph, as generate() itself records it (`DecodingGraph`)
    compiled step   one CUDA graph made by torch.compile, mode "reduce-overhead"
    generate()      the whole loop of Transformers, greedy: the time of 72 new tokens less that of 8, a token
    prefill         one row of the context in chunks of 16,384 tokens

Peers: GPT-2 with a dynamic cache (its default) and with a static one, compiled; Gated DeltaNet and Mamba2 of
flash-linear-attention where that is installed. "length" is the context; ours at a million tokens holds the same state.
"""

import importlib.util
import statistics
from dataclasses import dataclass
from functools import partial

import torch
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel, StaticCache

from hf_linear_attn import DanetConfig, DanetForCausalLM, LeapConfig, LeapForCausalLM, RecurrentCache

from ..harness import Case, Work, device, milliseconds, relative_error
from ..private import private


@dataclass(frozen=True)
class Size:
    """Of all models, and the rows that are decoded at once."""

    batch: int = 16
    width: int = 768
    layers: int = 12
    heads: int = 12
    vocabulary: int = 50257
    few: int = 8  # new tokens of a short call of generate(), and of a long one
    many: int = 72


FULL, QUICK = Size(), Size(2, 32, 4, 2, 50, 1, 6)
LENGTHS = (1024, 16384, 1048576)
LONGEST_CACHE = 16384
CHUNK = 16384
CALLS = 5


def about(suite: str) -> dict:
    """Facts for the head of the JSON."""
    return {"unit": "ms", "batch": FULL.batch, "dtype": "bfloat16", "vocab_size": FULL.vocabulary}


def sizes(size: Size) -> dict[str, int]:
    """Fields of our configurations."""
    return {
        "hidden_size": size.width, "num_hidden_layers": size.layers, "num_attention_heads": size.heads,
        "vocab_size": size.vocabulary,
    }  # fmt: skip


def leap(size: Size, context: int):
    """LEAP with rotary positions, which have no end."""
    return LeapForCausalLM(LeapConfig(**sizes(size), position_embedding_type="rotary"))


def danet(size: Size, context: int):
    """Causal DANet with rotary positions: half of its layers global, half sliding windows."""
    pattern = {"layer_pattern": "g_sw", "window_size": 64, "position_embedding_type": "rotary", "is_causal": True}
    return DanetForCausalLM(DanetConfig(**sizes(size), **pattern, scale_mode="fixed"))


def gpt2(size: Size, context: int):
    """GPT-2 with room for the context and what is decoded."""
    fields = {"vocab_size": size.vocabulary, "n_embd": size.width, "n_layer": size.layers, "n_head": size.heads}
    return GPT2LMHeadModel(GPT2Config(**fields, n_positions=context + 512, attn_implementation="sdpa"))


def fla(name: str, size: Size, context: int):
    """A model of flash-linear-attention of about the same size."""
    import fla.models as models

    config = getattr(models, f"{name}Config")
    options = {"hidden_size": size.width, "num_hidden_layers": size.layers, "vocab_size": size.vocabulary}
    if name == "Mamba2":
        options |= {"num_heads": 2 * size.heads, "head_dim": 64, "num_hidden_layers": 2 * size.layers}
    else:
        options |= {"num_heads": 6, "head_dim": 128}
    return getattr(models, f"{name}ForCausalLM")(config(**options))


def build(make, size: Size, context: int):
    """The model on the device."""
    torch.manual_seed(0)
    with torch.device(device()):
        model = make(size, context)
    model.generation_config.pad_token_id = 0
    model.generation_config.eos_token_id = None
    return model.to(torch.bfloat16).eval()


def tokens(size: Size, context: int, rows: int | None = None) -> torch.Tensor:
    """Random ids, a batch of rows by default."""
    generator = torch.Generator(device()).manual_seed(0)
    return torch.randint(1, size.vocabulary, (rows or size.batch, context), device=device(), generator=generator)


@torch.no_grad()
def read(model, ids, cache) -> None:
    """Run a context into a cache, in chunks."""
    for start in range(0, ids.shape[1], CHUNK):
        model(
            input_ids=ids[:, start : start + CHUNK], use_cache=True, logits_to_keep=1, **private("cache_keyword")(cache)
        )


def filled_states(model, size: Size, context: int) -> RecurrentCache:
    """The state after a context, the same for all rows: one row is read and repeated."""
    cache = RecurrentCache(config=model.config)
    read(model, tokens(size, context, 1), cache)
    cache.batch_repeat_interleave(size.batch)
    return cache


def static_states(model, size: Size, context: int) -> StaticCache:
    """The same in a cache of fixed addresses."""
    found = filled_states(model, size, context)
    cache = StaticCache(config=model.config, max_cache_len=context + 4 * size.many)
    for layer, source in zip(cache.layers, found.layers):
        layer.load_tensors(source.saved_tensors(), context)
    return cache


def compiled_step(make, size: Size, context: int) -> Work:
    """One step as a CUDA graph."""
    model = build(make, size, context)
    facts, where = {}, {}
    if isinstance(model, GPT2LMHeadModel):
        # The same position again and again: its cache has an end. Ours counts by itself.
        where["position_ids"] = torch.full((1, 1), context, device=device())
        cache = StaticCache(config=model.config, max_cache_len=context + 4 * size.many)
        read(model, tokens(size, context), cache)
        facts["state_mib"] = round(sum(x.keys.nbytes + x.values.nbytes for x in cache.layers) / 2**20, 2)
    else:
        cache = static_states(model, size, context)
        held = sum(t.nbytes for layer in cache.layers for t in layer.saved_tensors().values())
        facts["state_mib"] = round(held / 2**20, 2)
    run = torch.compile(model, mode="reduce-overhead", fullgraph=True)
    ids = tokens(size, 1)

    @torch.no_grad()
    def step():
        torch.compiler.cudagraph_mark_step_begin()
        run(input_ids=ids, use_cache=True, **where, **private("cache_keyword")(cache))

    return Work(step, size.batch, facts)


def graph_step(make, size: Size, context: int) -> Work:
    """One step as generate() replays it."""
    model = build(make, size, context)
    cache, ids = filled_states(model, size, context), tokens(size, 1)
    run = private("DecodingGraph")(model)

    @torch.no_grad()
    def step():
        run(input_ids=ids, cache=cache, use_cache=True)

    return Work(step, size.batch, {"state_mib": round(cache.state_size() / 2**20, 2)})


def eager_step(make, size: Size, context: int) -> Work:
    """One step as it stands."""
    model = build(make, size, context)
    ids, names = tokens(size, context), private("cache_keyword")
    if isinstance(model, GPT2LMHeadModel):
        cache = DynamicCache(config=model.config)
    elif type(model).__module__.startswith("fla."):
        cache, names = None, lambda cache: {"past_key_values": cache}  # its own outputs, whatever the release
    else:
        cache = RecurrentCache(config=model.config)
    with torch.no_grad():
        for start in range(0, context, CHUNK):
            part = ids[:, start : start + CHUNK]
            output = model(input_ids=part, use_cache=True, logits_to_keep=1, **names(cache))
            cache = getattr(output, next(iter(names(cache))))
    new = tokens(size, 1)

    @torch.no_grad()
    def step():
        model(input_ids=new, use_cache=True, **names(cache))

    for _ in range(20):  # a cache that grows has its memory from the allocator then
        step()
    return Work(step, size.batch)


def generating(make, size: Size, context: int, **options) -> Work:
    """generate() as a user calls it."""
    model = build(make, size, context)
    ids = tokens(size, context)
    common = {"do_sample": False, "attention_mask": torch.ones_like(ids), **options}

    def call(number):
        model.generate(ids, max_new_tokens=number, **common)

    return timed(call, size)


def timed(call, size: Size) -> Work:
    """A loop `call(number of new tokens)`: the time of a token is that of many less that of few."""
    call(size.few)  # the first call compiles
    few, many = (statistics.median(milliseconds(partial(call, number), CALLS)) for number in (size.few, size.many))
    facts = {
        f"ms_of_a_call_with_{size.few}_tokens": round(few, 1),
        "ms_a_token": round((many - few) / (size.many - size.few), 3),
    }
    return Work(partial(call, size.many), size.batch * size.many, facts, size.many)


def going_on(make, size: Size, context: int) -> Work:
    """generate() after a context that a saved state holds: the prompt is one token."""
    model = build(make, size, context)
    ids = tokens(size, context + 1)

    def call(number):
        cache = filled_states(model, size, context) if call.cache is None else call.cache
        call.cache = cache
        for layer, tensors in zip(cache.layers, call.tensors or ()):
            layer.load_tensors(tensors, context)
        if call.tensors is None:
            call.tensors = [{k: v.clone() for k, v in x.saved_tensors().items()} for x in cache.layers]
        options = {"do_sample": False, "attention_mask": torch.ones_like(ids)}
        model.generate(ids, max_new_tokens=number, cache=cache, **options)

    call.cache = call.tensors = None
    return timed(call, size)


def prefill(make, size: Size, context: int) -> Work:
    """A row read in chunks, from nothing."""
    model, ids = build(make, size, context), tokens(size, context, 1)
    return Work(lambda: read(model, ids, RecurrentCache(config=model.config)), context)


def check(make, size: Size) -> tuple[float, float]:
    """Logits of eight tokens decoded one by one against the whole text at once, in float32, beside the same in bfloat16."""
    model = build(make, size, 300)
    ids = tokens(size, 300, 2)

    @torch.no_grad()
    def run(dtype, backend, parts):
        typed, cache = model.to(dtype), None
        with private("use_backend")(backend):
            for part in ids.split(parts, dim=1):
                out = typed(input_ids=part, cache=cache, use_cache=True)
                cache = out.cache
        return out.logits[:, -1]

    exact = run(torch.float32, "torch", 300)
    same = run(torch.bfloat16, "torch", 300)
    return relative_error(run(torch.bfloat16, "auto", [292, *[1] * 8]), exact), 2 * relative_error(same, exact) + 1e-6


def cases(suite: str, lengths: list[int], quick: bool) -> list[Case]:
    """All contenders at all contexts."""
    made, size = [], QUICK if quick else FULL

    def add(name: str, length: int, work, model, gate=None, **options) -> None:
        made.append(Case(name, length, partial(work, model, size, length, **options), gate))

    for length in lengths or ([12] if quick else LENGTHS):
        short = length <= LONGEST_CACHE
        for name, model in (("LEAP", leap), ("DANet", danet)):
            gate = partial(check, model, size)
            add(f"{name}, ours, step", length, graph_step, model, gate)
            add(f"{name}, ours, compiled step", length, compiled_step, model, gate)
            if short:
                add(f"{name}, ours, generate()", length, generating, model, gate)
                add(f"{name}, ours, generate() static", length, generating, model, gate, cache_implementation="static")
            else:
                add(f"{name}, ours, generate() from a state", length, going_on, model, gate)
            add(f"{name}, ours, prefill in chunks", length, prefill, model, gate)
        if short:
            add("GPT-2, dynamic cache, step", length, eager_step, gpt2)
            add("GPT-2, static cache, compiled step", length, compiled_step, gpt2)
            add("GPT-2, generate()", length, generating, gpt2)
            add("GPT-2, generate() static", length, generating, gpt2, cache_implementation="static")
        for name in ("GatedDeltaNet", "Mamba2") if short and importlib.util.find_spec("fla") else ():
            add(f"{name} (fla), step", length, eager_step, partial(fla, name))
    return made
