"""The families of this package: one record each. Registration, the command line, cards, conversion and the tests read it, and a
family is listed nowhere else.

Classes stand here as text, so that reading the records imports nothing: `hf-linear-attn --help` must not wait for PyTorch, and a
process that loads one family need not load the others.
"""

from dataclasses import dataclass, field
from typing import Any

CAUSAL_LM, MASKED_LM = "AutoModelForCausalLM", "AutoModelForMaskedLM"
# Task of `hf-linear-attn train` -> Auto class of its models.
TASKS = {"causal-lm": CAUSAL_LM, "mlm": MASKED_LM, "classification": "AutoModelForSequenceClassification"}


@dataclass(frozen=True)
class Card:
    """Words of a model card.

    summary: what the family is. citation: BibTeX of its source. limit: what its mechanism cannot do; causal_limit: and what
    else of a causal model.
    """

    summary: str
    citation: str
    limit: str = "A state of fixed size cannot hold everything: exact recall of far tokens is weaker than with softmax attention."
    causal_limit: str = ""


@dataclass(frozen=True)
class Sizes:
    """How the options of `hf-linear-attn train` and `bench` become fields of a configuration.

    default_for: tasks whose family this is where none is named. dropout: fields that `--dropout` sets. positions: choices of
    `--position-embedding`, the default first; none: the family has no choice. windows: whether it takes `--windows`.
    kinds: whether these may name other kinds of layer, too. presets: choices of `--preset`, which take the place of `decoder`.
    all: fields of every model; decoder, encoder, classifier: of these alone (a family with both a decoder and an encoder is a
    decoder where `--causal` is given). per_width, per_length: field -> how many times the width, or the block length.
    """

    default_for: tuple[str, ...] = ()
    dropout: tuple[str, ...] = ("hidden_dropout_prob",)
    positions: tuple[str, ...] = ()
    windows: bool = False
    kinds: bool = False
    presets: tuple[str, ...] = ()
    all: dict[str, Any] = field(default_factory=dict)
    decoder: dict[str, Any] = field(default_factory=dict)
    encoder: dict[str, Any] = field(default_factory=dict)
    classifier: dict[str, Any] = field(default_factory=dict)
    per_width: dict[str, int] = field(default_factory=dict)
    decoder_per_length: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Family:
    """One family.

    Args:
        name: its `model_type`.
        module: where its modules lie, a package of Python.
        classes: module below that -> public classes in it.
        configuration: name of the configuration class.
        heads: Auto class -> class.
        card: words of its model cards.
        lora_targets: linear layers where PEFT puts adapters when the user names no target.
        sizes: how the command line sizes it; None: `train` and `bench` do not make it.
        published: module of `conversion` that reads the published package's checkpoints; None: there are none.
        linearizes: whether `linearize` puts it into a pretrained model.
    """

    name: str
    module: str
    classes: dict[str, tuple[str, ...]]
    configuration: str
    heads: dict[str, str]
    card: Card
    lora_targets: tuple[str, ...] = ()
    sizes: Sizes | None = None
    published: str | None = None
    linearizes: bool = False

    def __post_init__(self):
        lacking = {self.configuration, *self.heads.values()} - set(self.places())
        if lacking:
            raise ValueError(f"family {self.name!r}: `classes` does not say where {sorted(lacking)} lie")

    def places(self) -> dict[str, str]:
        """Public class -> module that holds it."""
        return {name: f"{self.module}.{module}" for module, names in self.classes.items() for name in names}

    def load(self, name: str) -> Any:
        """One of its public classes; imports the module that holds it."""
        from .registration import load  # which imports this file

        return load(self.places()[name], name)

    def config_class(self) -> Any:
        """Its configuration class."""
        return self.load(self.configuration)

    def head(self, auto_class: str) -> Any:
        """Its class behind an Auto class."""
        return self.load(self.heads[auto_class])

    def head_classes(self) -> dict[str, type]:
        """Auto class -> class, for all of them."""
        return {auto_class: self.load(name) for auto_class, name in self.heads.items()}

    @property
    def is_an_encoder(self) -> bool:
        """Whether it has a model that sees both sides of a word, and so can guess a masked one."""
        return MASKED_LM in self.heads


def heads(prefix: str, *endings: str) -> dict[str, str]:
    """`heads("Leap", "Model", "ForCausalLM")` -> `{"AutoModel": "LeapModel", "AutoModelForCausalLM": "LeapForCausalLM"}`"""
    return {"AutoModel" + ending.removeprefix("Model"): prefix + ending for ending in endings}


HERE = __package__
CLASSIFIERS = ("ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")

LEAP = Family(
    name="leap",
    module=f"{HERE}.modeling.leap",
    configuration="LeapConfig",
    classes={
        "configuration_leap": ("LeapConfig",),
        "modeling_leap": (
            "LeapAttention",
            "LeapBlock",
            "LeapModel",
            "LeapForCausalLM",
            "LeapForSequenceClassification",
            "LeapForTokenClassification",
            "LeapForQuestionAnswering",
        ),
    },
    heads=heads("Leap", "Model", "ForCausalLM", *CLASSIFIERS),
    lora_targets=("qfkv_proj", "q_proj", "v_proj"),
    # The published model has learned positions, which end with the blocks that it was trained on.
    sizes=Sizes(
        default_for=("causal-lm",),
        positions=("rotary", "learned"),
        windows=True,
        kinds=True,
        presets=("published", "fixed-state", "hybrid"),
    ),
    published="leap",
    card=Card(
        "A causal language model whose layers are gated, focus-weighted running means (LEAP): linear time, and a state of "
        "fixed size in place of a cache that grows.",
        "@misc{leap_transformer,\n  title = {{LEAP}: Linear Explainable Attention in Parallel},\n"
        "  howpublished = {Python package leap-transformer},\n  year = {2023}\n}",
    ),
)

FASTFORMER = Family(
    name="fastformer",
    module=f"{HERE}.modeling.fastformer",
    configuration="FastformerConfig",
    classes={
        "configuration_fastformer": ("FastformerConfig",),
        "modeling_fastformer": (
            "FastformerAttention",
            "FastformerBlock",
            "FastformerModel",
            "FastformerForCausalLM",
            "FastformerForSequenceClassification",
            "FastformerForTokenClassification",
            "FastformerForQuestionAnswering",
        ),
    },
    heads=heads("Fastformer", "Model", "ForCausalLM", *CLASSIFIERS),
    lora_targets=("qkv_proj",),
    sizes=Sizes(windows=True),
    published="leap",
    card=Card(
        "Additive attention in linear time (Fastformer), as a causal language model with a state of fixed size or as an encoder.",
        "@article{wu2021fastformer,\n  title = {Fastformer: Additive Attention Can Be All You Need},\n"
        "  author = {Wu, Chuhan and Wu, Fangzhao and Qi, Tao and Huang, Yongfeng and Xie, Xing},\n"
        "  journal = {arXiv preprint arXiv:2108.09084},\n  year = {2021}\n}",
    ),
)

DANET = Family(
    name="danet",
    module=f"{HERE}.modeling.danet",
    configuration="DanetConfig",
    classes={
        "configuration_danet": ("DanetConfig",),
        "block": ("DanetBlock", "DenseAttention"),
        "modeling_danet": (
            "DanetModel",
            "DanetForMaskedLM",
            "DanetForPreTraining",
            "DanetForSequenceClassification",
            "DanetForTokenClassification",
            "DanetForQuestionAnswering",
            "DanetForMultipleChoice",
        ),
        "modeling_danet_causal": ("DanetForCausalLM",),
    },
    heads=heads("Danet", "Model", "ForCausalLM", "ForMaskedLM", "ForPreTraining", *CLASSIFIERS, "ForMultipleChoice"),
    lora_targets=("query_proj", "q_proj", "v_proj"),
    sizes=Sizes(
        default_for=("mlm", "classification"),
        dropout=("hidden_dropout_prob", "attention_dropout"),
        positions=("rotary", "learned"),
        presets=("published", "fixed-state", "hybrid"),
        # Windows for short blocks (of 8 and 32 the better one on the speeches in blocks of 512), and global layers scaled for
        # the length trained at.
        decoder={"is_causal": True, "layer_pattern": "sw_sw_g", "window_size": 8, "ffn_type": "swiglu"},
        decoder_per_length={"scale_length": 1},
        encoder={"layer_pattern": "l_sl_g", "window_size": 32},  # of the published encoders at 128 tokens
        # The mean of vectors that MaxNorm keeps below 1 is small, and the layers of a new head make it smaller still: logits
        # near 1e-3, which take hundreds of steps to grow. Of the published models lra-text has this norm (no weights).
        classifier={"pooler_norm": "uncentered_fixed_ln"},
    ),
    published="danet",
    card=Card(
        "A transformer with DenseAttention (DANet): attention without a softmax, whose matrix products can be taken in linear "
        "or in quadratic order with equal results.",
        "@misc{argatkiny2025matmuls,\n"
        "  title = {MatMuls are Enough for Efficient and Performant Linear-Time Attention},\n"
        "  author = {Argatkiny, Andrew and Makarov},\n  note = {ICML 2025 workshops},\n  year = {2025}\n}",
    ),
)

SEA = Family(
    name="sea",
    module=f"{HERE}.modeling.sea",
    configuration="SeaConfig",
    classes={
        "configuration_sea": ("SeaConfig",),
        "modeling_sea": (
            "SeaModel",
            "SeaForMaskedLM",
            "SeaForSequenceClassification",
            "SeaForTokenClassification",
            "SeaForQuestionAnswering",
        ),
        "modeling_sea_causal": ("SeaForCausalLM",),
    },
    heads=heads("Sea", "Model", "ForCausalLM", "ForMaskedLM", *CLASSIFIERS),
    lora_targets=("query", "value", "q_proj", "v_proj", "c_attn"),  # of whichever host
    published="sea",
    linearizes=True,
    card=Card(
        "A pretrained transformer whose attention is estimated in linear time and applied to few keys a query (SEA), distilled "
        "from the original.",
        "@inproceedings{lee2024sea,\n  title = {{SEA}: Sparse Linear Attention with Estimated Attention Mask},\n"
        "  author = {Lee, Heejun and Kim, Jina and Willette, Jeffrey and Hwang, Sung Ju},\n"
        "  booktitle = {International Conference on Learning Representations},\n  year = {2024}\n}",
        limit="Which few keys a query reads is an estimate: it can miss the one that matters.",
        causal_limit="Keys and values of every token are kept, so the cache grows with the text.",
    ),
)

HEDGEHOG = Family(
    name="hedgehog",
    module=f"{HERE}.modeling.hedgehog",
    configuration="HedgehogConfig",
    classes={
        "configuration_hedgehog": ("HedgehogConfig",),
        "modeling_hedgehog": ("HedgehogModel", "HedgehogForCausalLM", "HedgehogForSequenceClassification"),
    },
    heads=heads("Hedgehog", "Model", "ForCausalLM", "ForSequenceClassification"),
    lora_targets=("q_proj", "k_proj", "v_proj", "o_proj", "out_proj", "c_attn"),  # of whichever host
    linearizes=True,
    card=Card(
        "A pretrained transformer whose attention became linear: exact softmax over the last tokens, learned positive features "
        "for all older ones (Hedgehog, in the form of LoLCATs), and a state of fixed size in place of a cache that grows.",
        "@inproceedings{zhang2024hedgehog,\n"
        "  title = {The Hedgehog \\& the Porcupine: Expressive Linear Attentions with Softmax Mimicry},\n"
        "  author = {Zhang, Michael and Bhatia, Kush and Kumbong, Hermann and R{\\'e}, Christopher},\n"
        "  booktitle = {International Conference on Learning Representations},\n  year = {2024}\n}",
    ),
)

FAMILIES: dict[str, Family] = {family.name: family for family in (LEAP, FASTFORMER, DANET, SEA, HEDGEHOG)}

# Models of Transformers' own that `train` and `bench` set beside ours: tasks, and how they are sized.
BASELINES: dict[str, tuple[tuple[str, ...], Sizes]] = {
    "gpt2": (
        ("causal-lm", "classification"),
        # The same tanh GELU as GPT-2's own, in PyTorch's fused form: the baseline gets its best speed.
        Sizes(dropout=("attn_pdrop", "resid_pdrop", "embd_pdrop"), all={"activation_function": "gelu_pytorch_tanh"}),
    ),
    "bert": (
        ("mlm", "classification"),
        Sizes(dropout=("hidden_dropout_prob", "attention_probs_dropout_prob"), per_width={"intermediate_size": 4}),
    ),
}


def sized() -> dict[str, Sizes]:
    """Name -> sizes of all that `train` makes: our families, then the baselines."""
    ours = {name: family.sizes for name, family in FAMILIES.items() if family.sizes is not None}
    return ours | {name: sizes for name, (_, sizes) in BASELINES.items()}


def tasks_of(name: str) -> tuple[str, ...]:
    """Tasks of `train` that a family or a baseline has a model for."""
    if name in BASELINES:
        return BASELINES[name][0]
    return tuple(task for task, auto_class in TASKS.items() if auto_class in FAMILIES[name].heads)
