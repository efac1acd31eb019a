"""Decoding: one step of a language model of 12 layers x 768, batch 16, after a context of so many tokens, in bfloat16.

    step            one CUDA graph, as generate() itself records it (`DecodingGraph`)
    compiled step   one CUDA graph made by torch.compile, mode "reduce-overhead"
    generate()      the whole loop of Transformers, greedy: the time of 72 new tokens less that of 8, a token
    prefill         one row of the context in chunks of 16,384 tokens

Peers: GPT-2 with a dynamic cache (its default) and with a static one, compiled; Gated DeltaNet and Mamba2 of
flash-linear-attention where that is installed. "length" is the context; ours at a million tokens holds the same state.
"""

import importlib.util
from functools import partial

import torch
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel, StaticCache

from hf_linear_attn import DanetConfig, DanetForCausalLM, LeapConfig, LeapForCausalLM, RecurrentCache
from hf_linear_attn.modeling.backend import use_backend
from hf_linear_attn.modeling.compat import cache_keyword
from hf_linear_attn.modeling.decoding_graph import DecodingGraph

from ..registry import Case, Work, device, milliseconds, relative_error

LENGTHS = (1024, 16384, 1048576)
LONGEST_CACHE = 16384
BATCH, WIDTH, LAYERS, HEADS, VOCABULARY = 16, 768, 12, 12, 50257
CHUNK = 16384
FEW, MANY, CALLS = 8, 72, 5


def about(suite: str) -> dict:
    """Facts for the head of the JSON."""
    return {"unit": "ms", "batch": BATCH, "dtype": "bfloat16", "vocab_size": VOCABULARY}


def leap(context: int):
    """LEAP with rotary positions, which have no end."""
    size = {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "vocab_size": VOCABULARY}
    return LeapForCausalLM(LeapConfig(**size, position_embedding_type="rotary"))


def danet(context: int):
    """Causal DANet with rotary positions: half of its layers global, half sliding windows."""
    size = {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "vocab_size": VOCABULARY}
    pattern = {"layer_pattern": "g_sw", "window_size": 64, "position_embedding_type": "rotary", "is_causal": True}
    return DanetForCausalLM(DanetConfig(**size, **pattern, scale_mode="fixed"))


def gpt2(context: int):
    """GPT-2 with room for the context."""
    size = {"vocab_size": VOCABULARY, "n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS}
    return GPT2LMHeadModel(GPT2Config(**size, n_positions=context + 2 * MANY, attn_implementation="sdpa"))


def fla(name: str, context: int):
    """A model of flash-linear-attention of about the same size."""
    import fla.models as models

    config = getattr(models, f"{name}Config")
    options = {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "vocab_size": VOCABULARY}
    if name == "Mamba2":
        options |= {"num_heads": 2 * HEADS, "head_dim": 64, "num_hidden_layers": 2 * LAYERS}
    else:
        options |= {"num_heads": 6, "head_dim": 128}
    return getattr(models, f"{name}ForCausalLM")(config(**options))


def build(make, context: int):
    """The model on the device."""
    torch.manual_seed(0)
    with torch.device(device()):
        model = make(context)
    model.generation_config.pad_token_id = 0
    model.generation_config.eos_token_id = None
    return model.to(torch.bfloat16).eval()


def tokens(context: int, rows: int | None = None) -> torch.Tensor:
    """Random ids, a batch of rows by default."""
    generator = torch.Generator(device()).manual_seed(0)
    return torch.randint(1, VOCABULARY, (rows or BATCH, context), device=device(), generator=generator)


@torch.no_grad()
def read(model, ids, cache) -> None:
    """Run a context into a cache, in chunks."""
    for start in range(0, ids.shape[1], CHUNK):
        model(input_ids=ids[:, start : start + CHUNK], use_cache=True, logits_to_keep=1, **cache_keyword(cache))


def filled_states(model, context: int) -> RecurrentCache:
    """The state after a context, the same for all rows: one row is read and repeated."""
    cache = RecurrentCache(config=model.config)
    read(model, tokens(context, 1), cache)
    cache.batch_repeat_interleave(BATCH)
    return cache


def static_states(model, context: int) -> StaticCache:
    """The same in a cache of fixed addresses."""
    found = filled_states(model, context)
    cache = StaticCache(config=model.config, max_cache_len=context + 4 * MANY)
    for layer, source in zip(cache.layers, found.layers):
        layer.load_tensors(source.saved_tensors(), context)
    return cache


def compiled_step(make, context: int) -> Work:
    """One step as a CUDA graph."""
    model = build(make, context)
    facts = {}
    if isinstance(model, GPT2LMHeadModel):
        cache = StaticCache(config=model.config, max_cache_len=context + 4 * MANY)
        read(model, tokens(context), cache)
        facts["state_mib"] = round(sum(x.keys.nbytes + x.values.nbytes for x in cache.layers) / 2**20, 2)
    else:
        cache = static_states(model, context)
        size = sum(t.nbytes for layer in cache.layers for t in layer.saved_tensors().values())
        facts["state_mib"] = round(size / 2**20, 2)
    run = torch.compile(model, mode="reduce-overhead", fullgraph=True)
    ids = tokens(1)
    # The same position again and again: the work of a step does not depend on what the state holds.
    positions = {"position_ids": torch.full((1, 1), context, device=device())}

    @torch.no_grad()
    def step():
        torch.compiler.cudagraph_mark_step_begin()
        run(input_ids=ids, use_cache=True, **cache_keyword(cache), **positions)

    return Work(step, BATCH, facts)


def graph_step(make, context: int) -> Work:
    """One step as generate() replays it."""
    model = build(make, context)
    cache, ids = filled_states(model, context), tokens(1)
    positions = torch.full((BATCH, 1), context, device=device())
    run = DecodingGraph(model)

    @torch.no_grad()
    def step():
        run(input_ids=ids, cache=cache, use_cache=True, position_ids=positions)

    return Work(step, BATCH, {"state_mib": round(cache.state_size() / 2**20, 2)})


def eager_step(make, context: int) -> Work:
    """One step as it stands."""
    model = build(make, context)
    ids, names = tokens(context), cache_keyword
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
    new = tokens(1)

    @torch.no_grad()
    def step():
        model(input_ids=new, use_cache=True, **names(cache))

    for _ in range(20):  # a cache that grows has its memory from the allocator then
        step()
    return Work(step, BATCH)


def generating(make, context: int, **options) -> Work:
    """generate() as a user calls it."""
    model = build(make, context)
    ids = tokens(context)
    common = {"do_sample": False, "attention_mask": torch.ones_like(ids), **options}

    def call(number):
        model.generate(ids, max_new_tokens=number, **common)

    return timed(call)


def timed(call) -> Work:
    """A loop `call(number of new tokens)`: the time of a token is that of many less that of few."""
    call(FEW)  # the first calls compile
    call(FEW)
    start = min(milliseconds(lambda: call(FEW)) for _ in range(CALLS))
    facts = {"ms_of_a_call_with_8_tokens": round(start, 1)}
    facts["ms_a_token"] = round((min(milliseconds(lambda: call(MANY)) for _ in range(CALLS)) - start) / (MANY - FEW), 3)
    return Work(lambda: call(MANY), BATCH * MANY, facts, MANY)


def going_on(make, context: int) -> Work:
    """generate() after a context that a saved state holds: the prompt is one token."""
    model = build(make, context)
    ids = tokens(context + 1)

    def call(number):
        cache = filled_states(model, context) if call.cache is None else call.cache
        call.cache = cache
        for layer, tensors in zip(cache.layers, call.tensors or ()):
            layer.load_tensors(tensors, context)
        if call.tensors is None:
            call.tensors = [{k: v.clone() for k, v in x.saved_tensors().items()} for x in cache.layers]
        options = {"do_sample": False, "attention_mask": torch.ones_like(ids)}
        model.generate(ids, max_new_tokens=number, cache=cache, **options)

    call.cache = call.tensors = None
    return timed(call)


def prefill(make, context: int) -> Work:
    """A row read in chunks, from nothing."""
    model, ids = build(make, context), tokens(context, 1)
    return Work(lambda: read(model, ids, RecurrentCache(config=model.config)), context)


def check(make) -> tuple[float, float]:
    """Logits of eight tokens decoded one by one against the whole text at once, in float32, beside the same in bfloat16."""
    model = build(make, 300)
    ids = tokens(300, 2)

    @torch.no_grad()
    def run(dtype, backend, parts):
        typed, cache = model.to(dtype), None
        with use_backend(backend):
            for part in ids.split(parts, dim=1):
                out = typed(input_ids=part, cache=cache, use_cache=True)
                cache = out.cache
        return out.logits[:, -1]

    exact = run(torch.float32, "torch", 300)
    same = run(torch.bfloat16, "torch", 300)
    return relative_error(run(torch.bfloat16, "auto", [292, *[1] * 8]), exact), 2 * relative_error(same, exact) + 1e-6


def cases(suite: str, lengths: list[int]) -> list[Case]:
    """All contenders at all contexts."""
    made = []
    for length in lengths or LENGTHS:
        for name, make in (("LEAP", leap), ("DANet", danet)):
            gate = partial(check, make)
            made.append(Case(f"{name}, ours, step", length, partial(graph_step, make, length), gate))
            made.append(Case(f"{name}, ours, compiled step", length, partial(compiled_step, make, length), gate))
            if length <= LONGEST_CACHE:
                made.append(Case(f"{name}, ours, generate()", length, partial(generating, make, length), gate))
                work = partial(generating, make, length, cache_implementation="static")
                made.append(Case(f"{name}, ours, generate() static", length, work, gate))
            else:
                made.append(
                    Case(f"{name}, ours, generate() from a state", length, partial(going_on, make, length), gate)
                )
            made.append(Case(f"{name}, ours, prefill in chunks", length, partial(prefill, make, length), gate))
        if length > LONGEST_CACHE:
            continue
        made.append(Case("GPT-2, dynamic cache, step", length, partial(eager_step, gpt2, length)))
        made.append(Case("GPT-2, static cache, compiled step", length, partial(compiled_step, gpt2, length)))
        made.append(Case("GPT-2, generate()", length, partial(generating, gpt2, length)))
        work = partial(generating, gpt2, length, cache_implementation="static")
        made.append(Case("GPT-2, generate() static", length, work))
        if importlib.util.find_spec("fla"):
            for name in ("GatedDeltaNet", "Mamba2"):
                made.append(Case(f"{name} (fla), step", length, partial(eager_step, partial(fla, name), length)))
    return made
