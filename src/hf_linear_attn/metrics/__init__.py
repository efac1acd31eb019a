"""Metric scripts for `evaluate`, which loads them by path: `evaluate.load(metric_path("bits_per_byte"))`."""

from pathlib import Path

NAMES = ("bits_per_byte", "recall_at_k")


def metric_path(name: str) -> str:
    """Path of one of our metric scripts.

    Args:
        name (`str`): `"bits_per_byte"` or `"recall_at_k"`.

    Raises:
        ValueError: another name.
    """
    if name not in NAMES:
        raise ValueError(f"`name` is {name!r}, expected one of {', '.join(map(repr, NAMES))}")
    return str(Path(__file__).with_name(f"{name}.py"))
