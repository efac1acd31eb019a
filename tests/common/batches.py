"""Token batches, with padding wherever it may stand."""

import torch

from .families import VOCAB


def tokens(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    """Random ids (batch, length), none of them the padding id."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB, (batch, length), generator=generator)


def place(rows: list[torch.Tensor], columns: list[list[int]], length: int, garbage: int = 0):
    """Put each text at its columns of a row of `length`: `(ids, mask)`; padding holds the id `garbage`."""
    ids = torch.full((len(rows), length), garbage)
    mask = torch.zeros(len(rows), length, dtype=torch.long)
    for i, (row, where) in enumerate(zip(rows, columns)):
        ids[i, where], mask[i, where] = row, 1
    return ids, mask


def left_padded(rows: list[torch.Tensor], garbage: int = 0):
    """Texts of several lengths with padding on the left: `(ids, mask)`."""
    length = max(len(row) for row in rows)
    return place(rows, [list(range(length - len(row), length)) for row in rows], length, garbage)


# Where `count` tokens may stand: name -> function of count, giving their columns and the length of the row.
LAYOUTS = {
    "left": lambda count: (list(range(5, 5 + count)), count + 5),
    "right": lambda count: (list(range(count)), count + 5),
    "both": lambda count: (list(range(3, 3 + count)), count + 7),
    "inside": lambda count: ([*range(count // 2), *range(count // 2 + 4, count + 4)], count + 4),
    "everywhere": lambda count: ([2 * i + 1 for i in range(count)], 2 * count + 2),
}
