"""One SEA layer from the published configuration and plain parameter names."""

import torch

from ..modeling.sea.attention import SeaAttentionCore, SeaOptions
from .published import load_exactly

PUBLISHED_FIELDS = ("causal", "T", "M", "k", "group", "nbf", "H", "D", "N")


def from_published(family: str, config: dict, state_dict: dict[str, torch.Tensor]) -> SeaAttentionCore:
    """Build a layer's core in the official form, in eval mode, with the dense backend.

    Args:
        family: `"sea"`.
        config: `H` heads, `D` head size, `M` compressed width, `k`, `group` (top-k grouping), `nbf` (divides the
            number of features) and `causal`; `N` and `T` (batch and length of an example) are read and not needed.
        state_dict: `random_features`, `encoder.linear/norm`, `row_decoder`, `scaler`, `cnn.conv1` to `conv3`; causal
            layers also `cnn.norm_in/norm_out` and `position_table`.

    Raises:
        ValueError: an unknown or missing field, a missing or unexpected parameter, a wrong shape.
    """
    unknown = sorted(set(config) - set(PUBLISHED_FIELDS))
    missing = sorted({"causal", "M", "k", "group", "nbf", "H", "D"} - set(config))
    if unknown or missing:
        raise ValueError(f"`config` of a published SEA layer: unknown fields {unknown}, missing fields {missing}")
    if config["causal"] and "position_table" not in state_dict:
        raise ValueError("`state_dict` lacks position_table, which a causal layer needs")
    options = SeaOptions(
        num_heads=config["H"],
        head_dim=config["D"],
        causal=config["causal"],
        k=config["k"],
        predictor_length=config["M"],
        feature_factor=config["nbf"],
        topk_group=config["group"],
        max_positions=state_dict["position_table"].shape[0] if config["causal"] else 1,
        official=True,
        backend="dense",
    )
    core = SeaAttentionCore(options)
    load_exactly(core, state_dict)
    return core.eval()
