"""From training options to a fresh model: the one place that knows how each family spells its config."""

import difflib
import json
from collections.abc import Sequence
from functools import partial
from typing import Any, get_args

from ..families import TASKS, Sizes, sized
from .options import ENCODERS, TrainingOptions


def build_model(options: TrainingOptions, tokenizer, labels: Sequence[str] = ()) -> Any:
    """The model for the options' task: with new weights (drawn from PyTorch's global seed) that fit the tokenizer and the block
    length, or with those of a checkpoint. labels: names of the classes, for classification.
    """
    import transformers

    from ..hub.loading import load_model

    head = getattr(transformers, TASKS[options.task])
    classes = (
        {"id2label": dict(enumerate(labels)), "label2id": {name: i for i, name in enumerate(labels)}} if labels else {}
    )
    if options.from_checkpoint is None:
        config = build_config(options, tokenizer)
        for name, value in classes.items():
            setattr(config, name, value)
        return _fresh_model(head, config, options)
    return load_model(head, options.from_checkpoint, new_head=True, **_checkpoint_fields(options), **classes)


def _checkpoint_fields(options: TrainingOptions) -> dict[str, Any]:
    """Changes to a checkpoint's config that the options ask for or the task wants, after a look at whether it fits them."""
    from ..hub.loading import load_config, saved_class

    config = load_config(options.from_checkpoint)
    if options.family not in (None, config.model_type):
        raise ValueError(
            f"family is {options.family!r}, and {options.from_checkpoint} holds a {config.model_type!r} model"
        )
    if options.task == "mlm" and (getattr(config, "is_causal", False) or config.model_type not in ENCODERS):
        raise ValueError(
            f"{options.from_checkpoint} holds no encoder ({config.model_type}): it cannot learn masked words"
        )
    limit = getattr(config, "max_position_embeddings", None)
    absolute = getattr(config, "position_embedding_type", "absolute") in ("absolute", "learned")
    if absolute and limit is not None and options.block_length > limit:
        raise ValueError(
            f"block_length={options.block_length} is more than the {limit} positions of {options.from_checkpoint}"
        )
    given = fitting_values(type(config), options.config_fields(), "config")
    fields = config.to_dict()
    sizes = sized().get(config.model_type, Sizes())
    values = {k: v for k, v in dict.fromkeys(sizes.dropout, options.dropout).items() if k in fields}
    if options.dropout and not values:
        raise ValueError(f"dropout is no field of a {config.model_type} model: leave it out")
    if options.task == "classification" and "SequenceClassification" not in (saved_class(config) or ""):
        values |= {k: v for k, v in sizes.classifier.items() if getattr(config, k) is None}
    return values | given


def _fresh_model(head: Any, config: Any, options: TrainingOptions) -> Any:
    """A model with new weights. Where the user gave fields of the configuration, a failure to build it is theirs."""
    try:
        return head.from_config(config)
    except (KeyError, TypeError, RuntimeError, AssertionError, ZeroDivisionError, OverflowError) as error:
        if not options.config:
            raise
        raise ValueError(
            f"a {options.family} with config {' '.join(options.config)} cannot be built ({type(error).__name__}: {error})"
        ) from error


def build_config(options: TrainingOptions, tokenizer) -> Any:
    """Config of `options.family`. ValueError for an option or a config field that the family does not have."""
    from transformers import AutoConfig

    values: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": options.hidden_size,
        "num_hidden_layers": options.num_hidden_layers,
        "num_attention_heads": options.num_attention_heads,
        "max_position_embeddings": options.block_length,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    values |= _fields_of_the_family(options, sized()[options.family])
    config_class = type(AutoConfig.for_model(options.family))
    given = fitting_values(config_class, options.config_fields(), "config")
    make = config_class if options.preset is None else partial(config_class.preset, options.preset)
    config = make(**(values | given))
    if config.vocab_size < len(tokenizer):
        raise ValueError(
            f"config: vocab_size={config.vocab_size} is less than the {len(tokenizer)} tokens of the tokenizer"
        )
    absolute = getattr(config, "position_embedding_type", "absolute") in ("absolute", "learned")
    if absolute and config.max_position_embeddings < options.block_length:
        raise ValueError(
            f"config: max_position_embeddings={config.max_position_embeddings} is less than block_length={options.block_length}"
        )
    return config


def _fields_of_the_family(options: TrainingOptions, sizes: Sizes) -> dict[str, Any]:
    """What the record of a family makes of the options. ValueError for an option that the family does not have."""
    family, values = options.family, dict.fromkeys(sizes.dropout, options.dropout) | sizes.all
    values |= {name: times * options.hidden_size for name, times in sizes.per_width.items()}
    if sizes.decoder and options.causal:
        values |= sizes.decoder if options.preset is None else {}
        values |= {name: times * options.block_length for name, times in sizes.decoder_per_length.items()}
    elif sizes.decoder and options.task == "causal-lm":
        raise ValueError(
            f"{family} has an encoder and a decoder, and language models that write are decoders: give causal"
        )
    else:
        values |= sizes.encoder | (sizes.classifier if options.task == "classification" else {})
    if options.preset is not None and options.preset not in sizes.presets:
        raise ValueError(f"preset {options.preset} belongs to {_names('presets', ', ')}, not to {family}")
    if options.preset is not None and sizes.decoder and not options.causal:
        raise ValueError(f"preset {options.preset} of {family} is a decoder: give causal, and the task causal-lm")
    if options.windows is not None or options.all_global:
        if not sizes.windows:
            raise ValueError(f"windows and all_global belong to {_names('windows', ', ')}, not to {family}")
        values |= {"use_local_attention": False} if options.all_global else {"layer_windows": options.layer_windows()}
    if options.position_embedding is not None and options.position_embedding not in sizes.positions:
        raise ValueError(f"position_embedding is a choice of {_names('positions', ' and ')}, not of {family}")
    if sizes.positions and (options.preset is None or options.position_embedding is not None):
        values["position_embedding_type"] = options.position_embedding or sizes.positions[0]
    return values


def _names(field: str, between: str) -> str:
    """The families whose sizes have something in that field."""
    return between.join(name for name, sizes in sized().items() if getattr(sizes, field))


def fitting_values(config_class: Any, given: dict[str, Any], name: str) -> dict[str, Any]:
    """Fields of a configuration as a user types them: 1 is taken where a float is wanted, and 1e3 where an int is.

    Raises:
        ValueError: a field that the configuration does not have, or a value of another type; `name` is the option's.
    """
    aliases = getattr(config_class, "attribute_map", {})
    declared = {each: field.type for each, field in config_class.__dataclass_fields__.items()}
    known = set(config_class().to_dict()) | set(aliases) | set(declared)
    found = dict(given)
    for key, value in given.items():
        if key not in known:
            raise ValueError(f"{name}: {config_class.__name__} has no field {key!r}{_did_you_mean(key, known)}")
        wanted = declared.get(aliases.get(key, key))
        types = set(get_args(wanted) or (wanted,))
        if isinstance(value, int) and not isinstance(value, bool) and float in types and int not in types:
            found[key] = _as_float(value, f"{name}: {key}")
        elif isinstance(value, float) and value.is_integer() and int in types and float not in types:
            found[key] = int(value)
        simple = types <= {int, float, bool, str, type(None)}
        if simple and type(found[key]) not in types:
            words = " or ".join(sorted("null" if each is type(None) else each.__name__ for each in types))
            raise ValueError(f"{name}: {key} must be {words}, got {json.dumps(value)}")
    return found


def _as_float(value: int, name: str) -> float:
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{name} is too large a number") from None


def _did_you_mean(key: str, known: set[str]) -> str:
    near = difflib.get_close_matches(key, known, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""
