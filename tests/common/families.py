"""The rows of the test matrix. A new family, or a variant worth running through every check, is a row here.

Each row is a configuration so small that a whole model runs in milliseconds, with weights large enough that every token
matters. Checks are parametrised over the rows: `@causal_rows def test_x(row): model = row.causal_lm() ...`.
"""

import re
from dataclasses import dataclass, field, replace

import pytest
import torch
from transformers import BertConfig, GPT2Config, LlamaConfig, MistralConfig, OPTConfig, Qwen3Config, set_seed

from hf_linear_attn import HedgehogConfig, SeaConfig
from hf_linear_attn.families import FAMILIES

VOCAB = 64

# family -> the sizes that all its rows start from
TINY: dict[str, dict] = {
    "leap": {"layer_windows": [None, 2, 16], "initializer_range": 0.3},
    "fastformer": {"layer_windows": [None, 3, None], "initializer_range": 0.3},
    "danet": {
        "is_causal": True,
        "layer_pattern": "sw_sl_g",
        "window_size": 4,
        "chunk_size": 8,
        "scale_length": 32,
        "initializer_range": 0.3,
        "query_initializer_range": 0.3,
    },
    "sea": {"k": 5, "predictor_length": 16, "initializer_range": 0.3},
    "hedgehog": {"window": 4, "chunk_size": 4, "initializer_range": 0.3},
}
# All that a LEAP layer may have beside the mechanism.
MODERN = {
    "conv_kernel": 3,
    "output_gate": True,
    "head_norm": True,
    "output_projection": True,
    "norm_type": "rmsnorm",
    "ffn_type": "swiglu",
    "position_embedding_type": "rotary",
}
# All that a DenseAttention layer may have beside it.
DANET_MODERN = {
    "conv_kernel": 3,
    "output_gate": True,
    "head_norm": True,
    "output_projection": True,
    "pre_norm": "rmsnorm",
    "softmax_attention_heads": 2,
    "softmax_key_value_heads": 1,
}
# What a SeaConfig itself takes; every other size is its host's.
SEA_FIELDS = set(SeaConfig.__dataclass_fields__) - {
    "host_config", "vocab_size", "pad_token_id", "bos_token_id", "eos_token_id", "tie_word_embeddings", "layer_types",
} | {"num_labels", "id2label", "label2id", "problem_type"}  # fmt: skip
# Hosts hand no mask to their layers, and positions come from the mask of the keys, not from a state's counts.
SEA_IMMUNE = ("mask_is_applied_too_early", "counts_stay_in_place")
# Hosts hand no mask to their layers, and a state holds its own counts.
HEDGEHOG_IMMUNE = ("mask_is_applied_too_early", "counts_stay_in_place")
# A padded token enters DenseAttention as a zero row, which writes nothing, and a state holds its own counts.
DANET_IMMUNE = ("mask_is_applied_too_early", "counts_stay_in_place")
ONE_GRAPH = (
    "SEA reads as many keys as the data ask for; its estimator alone is one graph (tests/sea/test_sea_estimator.py)"
)
NO_DOCUMENTS = "keys and values keep no document numbers: packed rows with a cache are refused"
NO_TEACHER = "without a teacher the estimator gets no gradient, because none passes the selection (specification, 2.2)"
SIZES_OF_THE_HOST = (
    "PEFT reads sizes from the configuration's fields, which are the host's: they have to be given to it"
)
OWN_LOSS = "the control changes the other families' loss, which is not that of a host"
INSIDE = "a head holds the host's model with its head, not a SeaModel: its parts are elsewhere, its checkpoints load the same"
NEEDS_STREAMS = "Transformers moves keys to the CPU and back in streams of an accelerator"
SEA_LEAVES_OUT = {
    "test_cache_implementations:offloaded": NEEDS_STREAMS,
    "test_controls:padding_is_predicted": OWN_LOSS,
    "test_state_does_not_grow": "keys grow with the text; what SEA adds does not (tests/sea/test_sea_generation.py)",
    "test_packed_forward_is_one_graph": ONE_GRAPH,
    "test_lengths_do_not_recompile_for_ever": ONE_GRAPH,
    "test_generated_code": ONE_GRAPH,
    "test_prefill_then_steps": ONE_GRAPH,
    "test_steps_from_nothing": ONE_GRAPH,
    "test_the_same_tokens": ONE_GRAPH,
    "test_every_parameter_gets_a_gradient": NO_TEACHER,
    "test_gradients_through_a_state": NO_TEACHER,
    "test_lora_on_all_linear_layers": NO_TEACHER,
    "test_gradcheck": "differences cross the border between two selections; tests/sea checks with the selection held",
    "test_prompt_tuning": SIZES_OF_THE_HOST,
    "test_prefix_tuning_is_refused": SIZES_OF_THE_HOST,
    "test_prefix_tuning_refuses": SIZES_OF_THE_HOST,
    "test_a_body_is_found_in_a_headed_checkpoint": INSIDE,
    "test_a_body_loads_into_a_language_model_and_back": INSIDE,
    "test_int8_weights": INSIDE,
}
HEDGEHOG_LEAVES_OUT = {
    "test_gradcheck": "Llama's norms compute in float32; tests/hedgehog checks over GPT-2",
    "test_prompt_tuning": SIZES_OF_THE_HOST,
    "test_prefix_tuning_is_refused": SIZES_OF_THE_HOST,
    "test_prefix_tuning_refuses": SIZES_OF_THE_HOST,
}
HOSTS = {
    "llama": LlamaConfig,
    "bert": BertConfig,
    "opt": OPTConfig,
    "gpt2": GPT2Config,
    "mistral": MistralConfig,
    "qwen3": Qwen3Config,
}
# What a HedgehogConfig itself takes.
HEDGEHOG_FIELDS = set(HedgehogConfig.__dataclass_fields__) - {
    "host_config", "vocab_size", "pad_token_id", "bos_token_id", "eos_token_id", "tie_word_embeddings", "layer_types",
    "initializer_range",
} | {"num_labels", "id2label", "label2id", "problem_type"}  # fmt: skip
COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 256,
    "hidden_dropout_prob": 0.0,
    "pad_token_id": 0,
}


@dataclass(frozen=True)
class Row:
    """One variant of a family.

    Args:
        name: shown in the test's id.
        family: a key of `hf_linear_attn.families.FAMILIES`.
        options: configuration fields that differ from the family's tiny ones.
        causal: whether it has a causal language model; otherwise only the classification heads.
        bounded: whether positions are learned, which limits the length.
        positional: whether positions matter at all.
        shift_invariant: whether adding a number to all positions changes nothing.
        mixer: name of a layer's submodule that mixes tokens and takes `attention_mask`.
        explains: whether `output_attentions` and `output_focus_weights` are supported.
        traced: whether compiling and exporting it shows something that another row of its family does not.
        sharp: whether weights are so peaked that the rounding of half precision shows in the output.
        keeps_inputs: whether some states are not sums but copies of inputs, in the dtype of these.
        immune: names of faults in the controls that this row's construction makes harmless.
        leaves_out: name of a test that this row does not take -> why.
    """

    name: str
    family: str
    options: dict = field(default_factory=dict)
    causal: bool = True
    bounded: bool = True
    positional: bool = True
    shift_invariant: bool = False
    mixer: str = "attention"
    explains: bool = True
    traced: bool = True
    sharp: bool = False
    keeps_inputs: bool = False
    immune: tuple[str, ...] = ()
    leaves_out: dict[str, str] = field(default_factory=dict, hash=False)

    def config(self, **changes):
        """A new tiny configuration."""
        config_class = FAMILIES[self.family].config_class()
        return config_class(**{**COMMON, **TINY.get(self.family, {}), **self.options, **changes})

    def layers(self, count: int) -> dict:
        """Changes that leave the first `count` layers."""
        windows = getattr(self.config(), "layer_windows", None)
        changes = {"num_hidden_layers": count}
        return changes if windows is None else {**changes, "layer_windows": windows[:count]}

    def heads(self) -> dict[str, type]:
        """Auto class name -> our class, for those this row can be built as."""
        heads = FAMILIES[self.family].head_classes()
        other = "AutoModelForMaskedLM" if self.causal else "AutoModelForCausalLM"
        return {name: c for name, c in heads.items() if name != other}

    def build(self, head: str, dtype=torch.float32, seed: int = 0, **changes):
        """A model in evaluation mode with its own weights, always the same for the same seed."""
        set_seed(seed)
        model = self.heads()[head](self.config(**changes))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("bias"):  # zero biases would hide mistakes
                    parameter.normal_(std=0.1)
            for parameter in model.parameters():
                if not parameter.any():  # what begins at 0, where it changes nothing
                    parameter.normal_(std=0.3)
            for name, parameter in model.named_parameters():
                if re.search(r"(?i)(norm|ln_\w+)\.weight$", name):  # so would gains that are all one
                    parameter.mul_(torch.empty_like(parameter).uniform_(0.7, 1.4))
        return model.eval().to(dtype)

    @property
    def predictor_head(self) -> str:
        """The head that says something of every token: a causal or masked language model, else a classifier of tokens."""
        heads = ("AutoModelForCausalLM", "AutoModelForMaskedLM", "AutoModelForTokenClassification")
        return next(head for head in heads if head in self.heads())

    def predictor(self, dtype=torch.float32, seed: int = 0, **changes):
        """The model with that head."""
        return self.build(self.predictor_head, dtype, seed, **changes)

    def causal_lm(self, dtype=torch.float32, seed: int = 0, **changes):
        """The causal language model; it ends no text early, so that every step is compared."""
        return self.build("AutoModelForCausalLM", dtype, seed, **changes)

    def mixers(self, model) -> list[torch.nn.Module]:
        """The token mixing layers of a model."""
        return [module for name, module in model.named_modules() if name.split(".")[-1] == self.mixer]


@dataclass(frozen=True)
class HostRow(Row):
    """A family over a host.

    Args:
        host: a key of `HOSTS`.
        of_host: fields of the host's configuration by its own names.
    """

    host: str = "llama"
    of_host: dict = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class HedgehogRow(HostRow):
    """Hedgehog over a host."""

    def config(self, **changes):
        """Changes that HedgehogConfig does not know are the host's."""
        fields = {**COMMON, "bos_token_id": 1, "eos_token_id": None, **TINY[self.family], **self.options}
        fields |= self.of_host | changes
        own = {name: fields.pop(name) for name in HEDGEHOG_FIELDS & set(fields)}
        own["classifier_dropout"] = fields.pop("hidden_dropout_prob")
        fields.setdefault("tie_word_embeddings", True)
        return HedgehogConfig(host_config=HOSTS[self.host](**fields), **own)

    def build(self, head: str, dtype=torch.float32, seed: int = 0, **changes):
        """What Hedgehog adds moves away from its initial values, where every head has the same maps."""
        model = super().build(head, dtype, seed, **changes)
        with torch.no_grad():
            for core in model.hedgehog_layers().values():
                for parameter in core.parameters():
                    parameter.add_(torch.randn(parameter.shape) * 0.5)
                if core.forgetting != "none":
                    core.forget_bias.sub_(8.0)
        return model

    def mixers(self, model) -> list[torch.nn.Module]:
        """The hosts' attention layers."""
        return [module for module in model.modules() if hasattr(module, "hedgehog")]


@dataclass(frozen=True)
class SeaRow(HostRow):
    """SEA over a host."""

    def config(self, **changes):
        """Changes that SeaConfig does not know are the host's."""
        fields = {**COMMON, **TINY[self.family], **self.options, **changes}
        own = {name: fields.pop(name) for name in SEA_FIELDS & set(fields)}
        fields["attention_probs_dropout_prob"] = fields["hidden_dropout_prob"]
        fields |= self.of_host | {"bos_token_id": 1, "eos_token_id": None}
        tied = {"tie_word_embeddings": fields.pop("tie_word_embeddings", True)}
        return SeaConfig(host_config=HOSTS[self.host](**fields, **tied), **tied, **own)

    def build(self, head: str, dtype=torch.float32, seed: int = 0, **changes):
        """What SEA adds moves away from its initial values, where many cells tie and the scores of others never change."""
        model = super().build(head, dtype, seed, **changes)
        with torch.no_grad():
            for core in model.sea_layers().values():
                for name, parameter in core.named_parameters():
                    if name != "position_table":
                        parameter.add_(torch.randn_like(parameter) * 0.3)
        return model

    def mixers(self, model) -> list[torch.nn.Module]:
        """The hosts' attention layers."""
        return [module for module in model.modules() if hasattr(module, "sea")]


ROWS = [
    Row("leap", "leap"),
    Row("leap-global", "leap", {"layer_windows": [None, None, None]}, traced=False),
    Row(
        "leap-rotary",
        "leap",
        {"position_embedding_type": "rotary", "layer_windows": [5, None, 1]},
        bounded=False,
        traced=False,
        shift_invariant=True,
    ),
    Row(
        "leap-rotary-exp",
        "leap",
        {"position_embedding_type": "rotary", "focus_function": "exp", "layer_windows": [None, 3, 7]},
        bounded=False,
        shift_invariant=True,
    ),
    Row(
        "leap-decay",
        "leap",
        {**MODERN, "layer_windows": ["decay", 3, "decay"]},
        bounded=False,
        shift_invariant=True,
        immune=("mask_is_applied_too_early",),  # a norm a head takes away by how much zero rows lower a mean
    ),
    Row("fastformer", "fastformer"),
    Row(
        "fastformer-windows",
        "fastformer",
        {"position_embedding_type": "none", "layer_windows": [4, 1, 7]},
        bounded=False,
        positional=False,
        traced=False,
        shift_invariant=True,
    ),
    Row(
        "fastformer-large-rescale",
        "fastformer",
        {"rescale": 80.0, "layer_windows": [None, 5, None]},
        traced=False,
        sharp=True,
    ),
    Row(
        "fastformer-encoder",
        "fastformer",
        {"is_causal": False},
        causal=False,
        leaves_out={
            "test_packed_documents": "it pools over the whole row and refuses packed documents (test_bad_input)"
        },
    ),
    Row("danet", "danet", bounded=False, shift_invariant=True, explains=False, keeps_inputs=True, immune=DANET_IMMUNE),
    Row(
        "danet-swiglu",
        "danet",
        {"ffn_type": "swiglu", "layer_pattern": "sw_g"},
        bounded=False,
        shift_invariant=True,
        traced=False,
        explains=False,
        keeps_inputs=True,
        immune=DANET_IMMUNE,
    ),
    Row(
        "danet-learned",
        "danet",
        {"position_embedding_type": "learned", "layer_pattern": "l_sl_g"},
        traced=False,
        explains=False,
        keeps_inputs=True,
        immune=DANET_IMMUNE,
    ),
    Row(
        "danet-cosine",
        "danet",
        {"position_embedding_type": "cosine", "relpe_scheme": "qkv", "layer_pattern": "l_sl_sw"},
        bounded=False,
        explains=False,
        keeps_inputs=True,
        immune=DANET_IMMUNE,
    ),
    Row(
        "danet-encoder",
        "danet",
        {
            "is_causal": False,
            "layer_pattern": "l_sl_g",
            "pre_norm": "scaled_max_norm",
            "post_norm": "prescaled_max_norm",
        },
        causal=False,
        bounded=False,
        shift_invariant=True,
        explains=False,
        keeps_inputs=True,
        immune=DANET_IMMUNE,
    ),
    SeaRow(
        "sea",
        "sea",
        bounded=False,
        mixer="self_attn",
        explains=False,
        traced=False,
        sharp=True,
        keeps_inputs=True,
        immune=SEA_IMMUNE,
        leaves_out=SEA_LEAVES_OUT,
    ),
    SeaRow(
        "sea-encoder",
        "sea",
        causal=False,
        explains=False,
        traced=False,
        sharp=True,
        host="bert",
        leaves_out=SEA_LEAVES_OUT,
    ),
]
ROWS.append(
    HedgehogRow(
        "hedgehog",
        "hedgehog",
        of_host={"num_attention_heads": 4, "num_key_value_heads": 2},
        bounded=False,
        mixer="self_attn",
        explains=False,
        keeps_inputs=True,
        immune=HEDGEHOG_IMMUNE,
        leaves_out=HEDGEHOG_LEAVES_OUT,
    )
)
CAUSAL = [row for row in ROWS if row.causal]
# Recurrent layers beside layers of softmax attention, whose keys and values lie in Transformers' own cache layers.
HYBRIDS = [
    Row(
        f"danet-{pattern}",
        "danet",
        {"layer_pattern": pattern, "softmax_attention_heads": 2},
        bounded=False,
        shift_invariant=True,
        traced=False,
        explains=False,
        keeps_inputs=True,
        immune=DANET_IMMUNE,
        leaves_out={"test_state_after_a_packed_row_is_that_of_its_last_document": NO_DOCUMENTS},
    )
    for pattern in ("softmax_g_sw", "swa@softmax_g_sw", "sw_l@softmax_g")
] + [
    Row(
        "leap-softmax",
        "leap",
        {
            **MODERN,
            "layer_windows": ["softmax", "decay", 4],
            "softmax_attention_heads": 4,
            "softmax_key_value_heads": 2,
        },
        bounded=False,
        shift_invariant=True,
        traced=False,
        explains=False,
        keeps_inputs=True,
        leaves_out={
            "test_state_after_a_packed_row_is_that_of_its_last_document": NO_DOCUMENTS,
            "test_cache_implementations:offloaded": NEEDS_STREAMS,
        },
    )
]
_named = {row.name: row for row in ROWS}
HYBRIDS.append(
    replace(
        _named["hedgehog"],
        name="hedgehog-softmax",
        options={"softmax_layers": [1]},
        traced=False,
        leaves_out=HEDGEHOG_LEAVES_OUT | {"test_state_after_a_packed_row_is_that_of_its_last_document": NO_DOCUMENTS},
    )
)
# All that leave a state: also softmax layers whose windows begin elsewhere, and those that SEA leaves as they are.
STATES = [
    *CAUSAL,
    *HYBRIDS,
    replace(
        HYBRIDS[0],
        name="danet-sl@softmax_softmax_g",
        options={"layer_pattern": "sl@softmax_softmax_g", "softmax_attention_heads": 2},
    ),
    # Softmax in windows of their own width, whose keys are a state like any other.
    replace(
        _named["leap-decay"],
        name="leap-sliding",
        options={"layer_windows": ["softmax:5", "decay", "softmax:70"]},
        explains=False,
        keeps_inputs=True,
        bounded=True,
        shift_invariant=False,
    ),
    replace(_named["danet"], name="danet-decay", options={**DANET_MODERN, "layer_pattern": "decay_sw:6_softmax:5"}),
    replace(_named["sea"], name="sea-softmax", options={"softmax_layers": [0, 2]}),
]


def _encoder(name: str, **options) -> Row:
    """A DANet encoder that differs from `danet-encoder`."""
    fields = {"options": {"is_causal": False, **options}, "shift_invariant": "position_embedding_type" not in options}
    return replace(_named["danet-encoder"], name=f"danet-encoder-{name}", **fields)


# Further arithmetic of a family, hosts, layers and positions: these run through the checks of numbers alone (`number_rows`).
VARIANTS = [
    replace(
        _named["leap"],
        name="leap-decay-exp",
        options={"layer_windows": ["decay", "decay", None], "focus_function": "exp", "conv_kernel": 1},
    ),
    replace(
        _named["leap-decay"],
        name="leap-no-positions",
        options={
            **MODERN,
            "position_embedding_type": "none",
            "layer_windows": ["decay", "softmax:6", 4],
            "softmax_positions": "none",
        },
        positional=False,
        explains=False,
        keeps_inputs=True,
    ),
    replace(_named["danet"], name="danet-g", options={"layer_pattern": "g"}),
    replace(
        _named["danet"],
        name="danet-decay-softmax",
        options={**DANET_MODERN, "layer_pattern": "sl:6_decay_softmax:9", "softmax_positions": "none", "chunk_size": 2},
    ),
    *(
        replace(HYBRIDS[0], name=f"danet-{pattern}", options={"layer_pattern": pattern, "softmax_attention_heads": 2})
        for pattern in ("swa@softmax_g_l", "l@softmax_sl@softmax_g")
    ),
    _encoder("learned", position_embedding_type="learned", layer_pattern="g"),
    _encoder(
        "swiglu",
        ffn_type="swiglu",
        layer_pattern="l_sl_g",
        pre_norm="scaled_max_norm",
        post_norm="prescaled_max_norm",
        embedding_norm="standard_ln",
        final_norm="standard_ln",
    ),
    _encoder("cosine", position_embedding_type="cosine", relpe_scheme="qkv", layer_pattern="l_sl_g"),
    _encoder("cos-minus-sin", position_embedding_type="cos_minus_sin", layer_pattern="g_l", local_relpe=False),
    _encoder("sinusoidal", position_embedding_type="sinusoidal", layer_pattern="g"),
    _encoder("softmax", layer_pattern="softmax_g_l", softmax_attention_heads=2),
    _encoder("softmax-windows", layer_pattern="l@softmax_sl@softmax_g", softmax_attention_heads=2),
    replace(_named["sea"], name="sea-grouped", of_host={"num_attention_heads": 4, "num_key_value_heads": 2}),
    replace(
        _named["sea"],
        name="sea-gpt2",
        host="gpt2",
        mixer="attn",
        bounded=True,
        options={"backend": "chunked"},
        of_host={"scale_attn_by_inverse_layer_idx": True, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    ),
    replace(
        _named["sea"],
        name="sea-opt",
        host="opt",
        bounded=True,
        options={"backend": "dense", "softmax_layers": [1]},
        of_host={"ffn_dim": 24, "word_embed_proj_dim": 8, "init_std": 0.3, "dropout": 0.0},
    ),
]
VARIANTS += [
    replace(
        _named["hedgehog"],
        name="hedgehog-gpt2",
        host="gpt2",
        mixer="attn",
        bounded=True,
        traced=False,
        of_host={"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
        options={"feature_size": 12},
    ),
    replace(
        _named["hedgehog"],
        name="hedgehog-opt",
        host="opt",
        bounded=True,
        traced=False,
        of_host={"ffn_dim": 24, "word_embed_proj_dim": 8, "init_std": 0.3, "dropout": 0.0},
        options={"forgetting": "head", "feature_size": 3},
    ),
    replace(
        _named["hedgehog"],
        name="hedgehog-qwen3",
        host="qwen3",
        traced=False,
        of_host={"head_dim": 8, "num_attention_heads": 4, "num_key_value_heads": 2},
        options={"forgetting": "token", "window": 1},
    ),
]
# All whose outputs are compared with those of the same texts computed in another way.
NUMBERS = [*ROWS, *STATES[len(CAUSAL) :], *VARIANTS]


def _over(rows):
    return pytest.mark.parametrize("row", rows, ids=[row.name for row in rows])


all_rows = _over(ROWS)
causal_rows = _over(CAUSAL)
state_rows = _over(STATES)
number_rows = _over(NUMBERS)
CAUSAL_NUMBERS = [row for row in NUMBERS if row.causal]
causal_number_rows = _over(CAUSAL_NUMBERS)
TRACED = [row for row in [*ROWS, *VARIANTS] if row.traced]
traced_rows = _over(TRACED)
TRACED_CAUSAL = [row for row in TRACED if row.causal]

# One row a family, for checks that cost seconds and do not depend on the variant.
FIRST = [next(row for row in CAUSAL if row.family == name) for name in dict.fromkeys(r.family for r in CAUSAL)]
first_rows = _over(FIRST)
FIRST_STATES = FIRST + STATES[len(CAUSAL) :]  # a row a family, and all that have softmax layers
first_state_rows = _over(FIRST_STATES)


# One row a family and direction: they have between them every head and every kind of layer.
KINDS = [
    next(r for r in ROWS if (r.family, r.causal) == kind) for kind in dict.fromkeys((r.family, r.causal) for r in ROWS)
]
kind_rows = _over(KINDS)


def rows_and(argument: str, values: dict, of: list[Row], often):
    """Over the rows `of` and some values (id -> value); cases that `often(row, id)` does not name are slow tests."""
    return pytest.mark.parametrize(
        ("row", argument),
        [
            pytest.param(row, value, id=f"{row.name}-{key}", marks=[pytest.mark.slow] * (not often(row, key)))
            for row in of
            for key, value in values.items()
        ],
    )


def in_every_run(*names, of):
    """Over the rows `of`, for checks that cost ten seconds each: rows that are not named here are slow tests."""
    return pytest.mark.parametrize(
        "row", [pytest.param(row, id=row.name, marks=[pytest.mark.slow] * (row.name not in names)) for row in of]
    )


# Multiple choice takes inputs of three dimensions: its tests are those of its family. Heads are the same for every variant of a
# family: all of them run with one, the others with the head that says something of every token.
rows_with_heads = pytest.mark.parametrize(
    ("row", "head"),
    [
        pytest.param(
            row,
            head,
            id=f"{row.name}-{head}",
            marks=[pytest.mark.slow] * (row not in KINDS and head != row.predictor_head),
        )
        for row in ROWS
        for head in row.heads()
        if head != "AutoModelForMultipleChoice"
    ],
)
