"""The rows of the test matrix. A new family, or a variant worth running through every check, is a row here.

Each row is a configuration so small that a whole model runs in milliseconds, with weights large enough that every token
matters. Checks are parametrised over the rows: `@causal_rows def test_x(row): model = row.causal_lm() ...`.
"""

from dataclasses import dataclass, field, replace

import pytest
import torch
from transformers import BertConfig, LlamaConfig, set_seed

from hf_linear_attn import SeaConfig
from hf_linear_attn.registration import FAMILIES

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
}
# What a SeaConfig itself takes; every other size is its host's.
SEA_FIELDS = set(SeaConfig.__dataclass_fields__) - {
    "host_config", "vocab_size", "pad_token_id", "bos_token_id", "eos_token_id", "tie_word_embeddings", "layer_types",
} | {"num_labels", "id2label", "label2id", "problem_type"}  # fmt: skip
# Hosts hand no mask to their layers, and positions come from the mask of the keys, not from a state's counts.
SEA_IMMUNE = ("mask_is_applied_too_early", "counts_stay_in_place")
# A padded token enters DenseAttention as a zero row, which writes nothing, and a state holds its own counts.
DANET_IMMUNE = ("mask_is_applied_too_early", "counts_stay_in_place")
ONE_GRAPH = (
    "SEA reads as many keys as the data ask for; its estimator alone is one graph (tests/sea/test_sea_estimator.py)"
)
NO_TEACHER = "without a teacher the estimator gets no gradient, because none passes the selection (specification, 2.2)"
SIZES_OF_THE_HOST = (
    "PEFT reads sizes from the configuration's fields, which are the host's: they have to be given to it"
)
OWN_LOSS = "the control changes the other families' loss (ours: test_labels_of_padded_tokens_do_not_count)"
INSIDE = "a head holds the host's model with its head, not a SeaModel: its parts are elsewhere, its checkpoints load the same"
SEA_LEAVES_OUT = {
    "test_cache_implementations:offloaded": "Transformers moves keys to the CPU and back in streams of an accelerator",
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
        family: a key of `registration.FAMILIES`.
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
        config_class = FAMILIES[self.family][0]
        return config_class(**{**COMMON, **TINY[self.family], **self.options, **changes})

    def layers(self, count: int) -> dict:
        """Changes that leave the first `count` layers."""
        windows = getattr(self.config(), "layer_windows", None)
        changes = {"num_hidden_layers": count}
        return changes if windows is None else {**changes, "layer_windows": windows[:count]}

    def heads(self) -> dict[str, type]:
        """Auto class name -> our class, for those this row can be built as."""
        heads = FAMILIES[self.family][1]
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
        return model.eval().to(dtype)

    def causal_lm(self, dtype=torch.float32, seed: int = 0, **changes):
        """The causal language model; it ends no text early, so that every step is compared."""
        return self.build("AutoModelForCausalLM", dtype, seed, **changes)

    def mixers(self, model) -> list[torch.nn.Module]:
        """The token mixing layers of a model."""
        return [module for name, module in model.named_modules() if name.split(".")[-1] == self.mixer]


@dataclass(frozen=True)
class SeaRow(Row):
    """SEA over a host, llama (causal) or bert."""

    host: str = "llama"

    def config(self, **changes):
        """Changes that SeaConfig does not know are the host's."""
        fields = {**COMMON, **TINY[self.family], **self.options, **changes}
        own = {name: fields.pop(name) for name in SEA_FIELDS & set(fields)}
        fields["attention_probs_dropout_prob"] = fields["hidden_dropout_prob"]
        host_class = LlamaConfig if self.host == "llama" else BertConfig
        tied = {"tie_word_embeddings": fields.pop("tie_word_embeddings", True)}
        return SeaConfig(host_config=host_class(**fields, **tied, bos_token_id=1, eos_token_id=None), **tied, **own)

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
    Row("fastformer-encoder", "fastformer", {"is_causal": False}, causal=False),
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
        traced=False,
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
CAUSAL = [row for row in ROWS if row.causal]
# Recurrent layers beside layers of softmax attention, whose keys and values lie in Transformers' own cache layers.
HYBRIDS = [
    Row(
        f"danet-{pattern}",
        "danet",
        {"layer_pattern": pattern, "softmax_attention_heads": 2},
        bounded=False,
        traced=False,
        explains=False,
        keeps_inputs=True,
        immune=DANET_IMMUNE,
    )
    for pattern in ("softmax_g_sw", "swa@softmax_g_sw", "sw_l@softmax_g")
]
# All that leave a state: also softmax layers whose windows begin elsewhere, and those that SEA leaves as they are.
STATES = [
    *CAUSAL,
    *HYBRIDS,
    replace(
        HYBRIDS[0],
        name="danet-sl@softmax_softmax_g",
        options={"layer_pattern": "sl@softmax_softmax_g", "softmax_attention_heads": 2},
    ),
    replace(next(row for row in CAUSAL if row.name == "sea"), name="sea-softmax", options={"softmax_layers": [0, 2]}),
]


def _over(rows):
    return pytest.mark.parametrize("row", rows, ids=[row.name for row in rows])


all_rows = _over(ROWS)
causal_rows = _over(CAUSAL)
state_rows = _over(STATES)
TRACED = [row for row in ROWS if row.traced]
traced_rows = _over(TRACED)
TRACED_CAUSAL = [row for row in CAUSAL if row.traced]

# One row a family, for checks that cost seconds and do not depend on the variant.
FIRST = [next(row for row in CAUSAL if row.family == name) for name in dict.fromkeys(r.family for r in CAUSAL)]
first_rows = _over(FIRST)
FIRST_STATES = FIRST + STATES[len(CAUSAL) :]  # a row a family, and all that have softmax layers
first_state_rows = _over(FIRST_STATES)


def in_every_run(*names, of):
    """Over the rows `of`, for checks that cost ten seconds each: rows that are not named here are slow tests."""
    return pytest.mark.parametrize(
        "row", [pytest.param(row, id=row.name, marks=[pytest.mark.slow] * (row.name not in names)) for row in of]
    )


# Multiple choice takes inputs of three dimensions: its tests are those of its family.
rows_with_heads = pytest.mark.parametrize(
    ("row", "head"),
    [
        pytest.param(row, head, id=f"{row.name}-{head}")
        for row in ROWS
        for head in row.heads()
        if head != "AutoModelForMultipleChoice"
    ],
)
