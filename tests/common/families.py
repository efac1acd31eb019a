"""The rows of the test matrix. A new family, or a variant worth running through every check, is a row here.

Each row is a configuration so small that a whole model runs in milliseconds, with weights large enough that every token
matters. Checks are parametrised over the rows: `@causal_rows def test_x(row): model = row.causal_lm() ...`.
"""

from dataclasses import dataclass, field

import pytest
import torch
from transformers import set_seed

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
}
# A padded token enters DenseAttention as a zero row, which writes nothing, and a state holds its own counts.
DANET_IMMUNE = ("mask_is_applied_too_early", "counts_stay_in_place")
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
]
CAUSAL = [row for row in ROWS if row.causal]


def _over(rows):
    return pytest.mark.parametrize("row", rows, ids=[row.name for row in rows])


all_rows = _over(ROWS)
causal_rows = _over(CAUSAL)
traced_rows = _over([row for row in ROWS if row.traced])
traced_causal_rows = _over([row for row in CAUSAL if row.traced])
# One row a family, for checks that cost seconds and do not depend on the variant.
first_rows = _over(
    [next(row for row in CAUSAL if row.family == name) for name in dict.fromkeys(r.family for r in CAUSAL)]
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
