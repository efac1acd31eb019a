"""Checks that the families' configurations share."""

import json
import math
import weakref
from typing import TYPE_CHECKING, NamedTuple

from transformers.activations import ACT2FN

if TYPE_CHECKING:  # a mixin's `super()` is what it is placed before
    from transformers import PreTrainedConfig as Base
else:
    Base = object

# What a saved configuration says about itself. Raised when a new field changes what a model computes, so that an older
# release refuses the checkpoint instead of computing something else.
FORMAT_FIELD = "hf_linear_attn_format"
FORMAT_VERSION = 1  # a family that has had later ones says so in `newest_format`

MOST_LAYERS = 10_000  # each is a module of its own
LONGEST_WINDOW = 1 << 18  # tokens: a layer's state holds them all from its first step on
LARGEST_SIZE = (1 << 31) - 1  # what an index of 32 bits can count


def check_format(config, kwargs: dict) -> None:
    """Take the format number out of `kwargs` and refuse one that this release does not know."""
    version, newest = kwargs.pop(FORMAT_FIELD, FORMAT_VERSION), getattr(config, "newest_format", FORMAT_VERSION)
    if not isinstance(version, int) or not 1 <= version <= newest:
        raise ValueError(
            f"this {config.model_type} checkpoint has `{FORMAT_FIELD}` {version!r}, but this release of hf-linear-attn reads "
            f"1 to {newest}: update it (pip install -U hf-linear-attn)"
        )


def format_of(config) -> int:
    """The format number to write beside a configuration: the lowest whose releases compute what it says."""
    return getattr(config, "needs_format", FORMAT_VERSION)


_read: dict[int, str] = {}  # of configurations read from a file, by id: what was in it


def saved_fields(fields: dict) -> str:
    """What a `config.json` says about the model, as a text to compare: without the names of other files in it."""
    kept = {name: value for name, value in fields.items() if name not in ("auto_map", "transformers_weights")}
    return json.dumps({name: value for name, value in kept.items() if name[0] != "_"}, sort_keys=True, default=str)


def fields_read(config) -> str | None:
    """`saved_fields` of the file that this very object was read from; None where it was made otherwise, or is a copy."""
    return _read.get(id(config))


class DerivedLayerTypes(Base):
    """Placed before `PreTrainedConfig`: keeps `layer_types`, which other fields decide, out of saved configurations.

    Trainer reads the configuration of a checkpoint with the base class, which knows only Transformers' own layer types.
    It also notes what was in the file, so that a model can be refused the configuration of a checkpoint since replaced.
    """

    @classmethod
    def from_dict(cls, config_dict: dict, **kwargs):
        """Build a configuration from the fields of a file, as in Transformers."""
        fields = saved_fields(config_dict)
        made = super().from_dict(config_dict, **kwargs)
        config = made[0] if isinstance(made, tuple) else made
        _read[id(config)] = fields
        weakref.finalize(config, _read.pop, id(config), None).atexit = False
        return made

    def to_dict(self) -> dict:
        """Every field that a configuration is built from."""
        fields = super().to_dict()
        fields.pop("layer_types", None)
        return fields


def apply_aliases(config, kwargs: dict) -> None:
    """Move published names out of `kwargs` into their fields, before anything is derived from these."""
    for alias, name in config.attribute_map.items():
        if alias in kwargs:
            setattr(config, name, kwargs.pop(alias))


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Refuse a word that is not one of `choices`."""
    if value not in choices:
        raise ValueError(f"`{name}` is {value!r}, expected one of {', '.join(map(repr, choices))}")


def check_size(name: str, value: int | None, most: int = LARGEST_SIZE, reason: str = "") -> None:
    """Refuse a size below 1 or above `most`; None is one that is yet to be derived."""
    if value is None:
        return
    if value < 1:
        raise ValueError(f"`{name}` is {value}, expected at least 1")
    if value > most:
        raise ValueError(f"`{name}` is {value}, expected 1 to {most:,}" + (f": {reason}" if reason else ""))


def check_sizes(config, prefix: str = "", *more: str) -> None:
    """Refuse sizes of a model that are not positive or larger than anything that can be built; `more` may be missing or None."""
    for name in ("vocab_size", "hidden_size", "num_attention_heads", "max_position_embeddings", "num_labels"):
        check_size(prefix + name, getattr(config, name))
    for name in ("intermediate_size", *more):
        check_size(prefix + name, getattr(config, name, None))
    check_size(prefix + "num_hidden_layers", config.num_hidden_layers, MOST_LAYERS, "each layer is a module of its own")


def check_window(name: str, window: int) -> None:
    """Refuse a window that is not positive, or whose state could not be held."""
    reason = "the state of a layer holds every token of its window; let the layer look at all tokens instead"
    check_size(name, window, LONGEST_WINDOW, reason)


def check_head_size(config, even: bool = False) -> None:
    """Refuse sizes that `check_sizes` refuses, and heads that do not divide the width (or leave an odd head size to rotary)."""
    check_sizes(config)
    width, heads = config.hidden_size, config.num_attention_heads
    if width % heads:
        fitting = [h for h in range(1, width + 1) if width % h == 0 and abs(h - heads) <= heads][:8]
        raise ValueError(
            f"`hidden_size` {width} is not a multiple of `num_attention_heads` {heads}; near values that divide it: {fitting}"
        )
    if even and (width // heads) % 2:
        raise ValueError(
            f"rotary positions turn features in pairs, but the head size {width} / {heads} = {width // heads} is odd: choose "
            "another `hidden_size` or `num_attention_heads`"
        )


def check_probabilities(config, *names: str) -> None:
    """Refuse what is no probability; NaN is none."""
    for name in names:
        if not 0 <= getattr(config, name) <= 1:
            raise ValueError(f"`{name}` is {getattr(config, name)}, expected a probability, 0 to 1")


def check_numbers(config, *positive: str) -> None:
    """Refuse numbers outside their range (NaN is), those named `positive` too, and an activation that does not exist."""
    check_probabilities(config, "hidden_dropout_prob", "attention_dropout")
    for name in ("layer_norm_eps", *positive):
        if not 0 < getattr(config, name) < math.inf:
            raise ValueError(f"`{name}` is {getattr(config, name)}, expected a positive number")
    if not 0 <= config.initializer_range < math.inf:
        raise ValueError(f"`initializer_range` is {config.initializer_range}, expected a standard deviation, 0 or more")
    check_choice("hidden_act", config.hidden_act, tuple(ACT2FN))


class LayerKind(NamedTuple):
    """What mixes the tokens of a layer.

    name: of LEAP "mean" (weighted means), "decay" (weighted means whose weights fade) or "softmax"; of DANet a code of its
        `layer_pattern`.
    window: tokens that are seen, the token itself included; None for all so far.
    """

    name: str
    window: int | None = None


def layer_kind(entry: int | str | None) -> LayerKind:
    """The kind that an entry of `layer_windows` names: 8 -> mean of 8 tokens, None -> of all, "decay", "softmax", "softmax:128".

    Raises:
        ValueError: a word that names no kind.
    """
    if not isinstance(entry, str):
        return LayerKind("mean", entry)
    if entry in ("decay", "softmax"):
        return LayerKind(entry)
    name, colon, width = entry.partition(":")
    if name == "softmax" and colon and width.isdecimal() and len(width) <= 10:
        return LayerKind(name, int(width))
    raise ValueError(
        f"{entry!r} names no kind of layer, expected a number of tokens, None or 'global', 'decay', 'softmax', or 'softmax:W' "
        "with W tokens, such as 'softmax:128'"
    )


def check_kinds(config) -> list[LayerKind]:
    """The kind of each layer; refuses what `check_windows` refuses, softmax windows below 2, and a model of softmax alone."""
    kinds = []
    for i, entry in enumerate(config.layer_windows):
        try:
            kinds.append(layer_kind(entry))
        except ValueError as error:
            raise ValueError(f"`layer_windows[{i}]` {error}") from None
    check_windows(config, [kind.window for kind in kinds])
    for i, (name, window) in enumerate(kinds):
        if name == "softmax" and window is not None and window < 2:
            raise ValueError(
                f"`layer_windows[{i}]` is 'softmax:{window}', expected at least 2 tokens: a token and the one before it"
            )
    if all(kind == LayerKind("softmax") for kind in kinds):
        raise ValueError(
            f"`layer_windows` {config.layer_windows} is softmax over all tokens throughout, a Transformer: let at least one "
            "layer be of another kind"
        )
    return kinds


def check_half_lives(config, needed: bool) -> None:
    """Fill in the `half_lives` that are `needed` and not given; refuse those that are not positive, one for each head."""
    heads = config.num_attention_heads
    if needed and config.half_lives is None:
        config.half_lives = [2.0 * 256.0 ** (i / (heads - 1)) for i in range(heads)] if heads > 1 else [32.0]
    if config.half_lives is None:
        return
    wrong = [life for life in config.half_lives if not 0 < life < math.inf]
    if wrong or len(config.half_lives) != heads:
        found = f"holds {wrong[0]}" if wrong else f"has {len(config.half_lives)} entries"
        raise ValueError(
            f"`half_lives` {found}, expected a positive number of tokens for each of `num_attention_heads`={heads} heads"
        )


LONGEST_CONVOLUTION = 64  # taps


def check_taps(config) -> None:
    """Refuse a short convolution that has no tap, or is not short."""
    check_size(
        "conv_kernel", config.conv_kernel, LONGEST_CONVOLUTION, "of taps; a longer past is what the layer itself sees"
    )


def softmax_heads(config) -> tuple[int, int]:
    """Heads of queries, and of keys and values, in the softmax layers of a family.

    Raises:
        ValueError: numbers that do not divide the width, or leave an odd head size to rotary positions.
    """
    heads = config.softmax_attention_heads
    groups = heads if config.softmax_key_value_heads is None else config.softmax_key_value_heads
    check_choice("softmax_positions", config.softmax_positions, ("rotary", "none"))
    rotary = config.softmax_positions == "rotary"
    check_heads("softmax_attention_heads", heads, "hidden_size", config.hidden_size, rotary)
    check_heads("softmax_key_value_heads", groups, "softmax_attention_heads", heads)
    return heads, groups


def check_heads(name: str, value: int | None, of_name: str, of: int, even: bool = False) -> None:
    """Refuse a number of heads that does not divide `of`, or (`even`) leaves an odd head size to rotary positions."""
    if value is None or value < 1 or of % value or (even and (of // value) % 2):
        size = " into heads of even size" if even else ""
        raise ValueError(f"`{name}` is {value}, expected a number that divides `{of_name}` {of}{size}")


def check_windows(config, windows: list[int | None] | None = None) -> None:
    """Refuse a list of windows of another length than the layers, and windows that are not positive."""
    windows, layers = config.layer_windows if windows is None else windows, config.num_hidden_layers
    if len(windows) != layers:
        raise ValueError(
            f"`layer_windows` has {len(windows)} entries, expected one for each of `num_hidden_layers`={layers} layers: "
            "a positive number of tokens, or None for all tokens so far"
        )
    for i, window in enumerate(windows):
        if window is not None and window < 1:
            raise ValueError(
                f"`layer_windows[{i}]` is {window}, expected at least 1 token, or None for all tokens so far"
            )
        if window is not None:
            check_window(f"layer_windows[{i}]", window)
