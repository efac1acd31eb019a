"""Whether a block's layers are LEAP's own, which fast paths read instead of calling them."""

from ...kernels.conditions import without


def own_layers(*layers) -> str | None:
    """None, or the reason why not: a layer was wrapped, subclassed or replaced."""
    from ..modeling_leap import LeapAttention, LeapMLP  # which imports the table that leads here

    for layer in layers:
        if type(layer) not in (LeapAttention, LeapMLP):
            return f"a layer of the block is a {type(layer).__name__}, not LEAP's own"
        if type(layer) is LeapAttention and layer.options:
            return without(layer.options)
    return None
