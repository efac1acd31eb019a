"""The legal range of a number that a user gives, and the words that name it."""

import math
from dataclasses import dataclass

LARGEST_INT = 2**31 - 1  # what every library below takes


@dataclass(frozen=True)
class NumberRange:
    """Numbers from `least` or beyond `above`, up to `most` or under `below`. Infinity and NaN are in no range."""

    least: float | None = None
    above: float | None = None
    most: float | None = None
    below: float | None = None
    reason: str = ""

    def problem(self, value: float) -> str | None:
        """What is wrong with a value, as in "must be at least 1, got 0"; None if nothing is."""
        inside = (
            math.isfinite(value)
            and (self.least is None or value >= self.least)
            and (self.above is None or value > self.above)
            and (self.most is None or value <= self.most)
            and (self.below is None or value < self.below)
        )
        return None if inside else f"must be {self}, got {_shown(value)}"

    def __str__(self) -> str:
        low = [f"at least {self.least:,}"] if self.least is not None else []
        low += [f"greater than {self.above:,}"] if self.above is not None else []
        high = [f"at most {self.most:,}"] if self.most is not None else []
        high += [f"less than {self.below:,}"] if self.below is not None else []
        why = f" ({self.reason})" if self.reason else ""
        return " and ".join([*low, *high]) + ("" if high else " and finite") + why


def _shown(value: float) -> str:
    text = str(value)
    return text if len(text) <= 30 else f"{text[:27]}..."


COUNT = NumberRange(least=1, most=LARGEST_INT)
POSITIVE = NumberRange(above=0)
NOT_NEGATIVE = NumberRange(least=0)
SHARE = NumberRange(least=0, below=1)
SEED = NumberRange(least=0, most=2**32 - 1)  # of NumPy
THREADS = NumberRange(least=1, most=1024)
VOCABULARY = NumberRange(least=259, most=2**20, reason="256 bytes and 3 special tokens at least")
EPOCHS = NumberRange(above=0, most=1_000_000)
