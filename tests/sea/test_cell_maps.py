import pytest
import torch

from hf_linear_attn.modeling.sea.cells import (
    cell_budget,
    cell_start,
    cell_widths,
    key_to_cell,
    keys_per_cell,
    rounded_ratio,
    select_cells,
    within_cell_limit,
)


@pytest.mark.parametrize(
    ("length", "cells", "starts"), [(5, [0, 1, 1, 2, 3], [0, 1, 3, 4, 5]), (3, [0, 1, 3], [0, 1, 2, 2, 3])]
)
def test_maps_give_the_numbers_of_the_specification(length, cells, starts):
    assert key_to_cell(torch.arange(length), torch.tensor(length), 4).tolist() == cells
    assert cell_start(torch.arange(5), torch.tensor(length), 4).tolist() == starts


@pytest.mark.parametrize("num_cells", [4, 16, 64, 128, 256])
def test_every_visible_key_lies_in_exactly_the_cell_that_covers_it(num_cells):
    for lengths in torch.arange(1, 2049).split(256):
        rank = torch.arange(2048)
        cell = key_to_cell(rank, lengths[:, None], num_cells)
        inside = (cell_start(cell, lengths[:, None], num_cells) <= rank) & (
            rank < cell_start(cell + 1, lengths[:, None], num_cells)
        )
        assert inside[rank < lengths[:, None]].all()
        assert torch.equal(cell_widths(lengths, num_cells).sum(-1), lengths)


def test_a_limited_cell_hands_out_that_many_evenly_spaced_keys():
    for length in (7, 40, 97, 130):
        for limit in (1, 3, 5):
            rank, total = torch.arange(length), torch.tensor(length)
            cell = key_to_cell(rank, total, 8)
            kept = within_cell_limit(rank, cell, total, 8, limit)
            counts = torch.zeros(8, dtype=torch.long).index_add(0, cell, kept.long())
            assert torch.equal(counts, keys_per_cell(total, 8, limit))
            for m in range(8):  # the definition, key by key
                start, end = (int(cell_start(torch.tensor(x), total, 8)) for x in (m, m + 1))
                width, count = end - start, min(end - start, limit)
                expected = sorted(end - 1 - (i * width) // count for i in range(count))
                assert rank[kept & (cell == m)].tolist() == expected


def test_ratios_are_rounded_half_to_even():
    denominators = torch.arange(1, 200)
    for numerator in (1, 5, 64, 127, 4096):
        expected = [round(numerator / d) for d in denominators.tolist()]
        assert rounded_ratio(numerator, denominators).tolist() == expected


@pytest.mark.parametrize("group", ["batch", "head", "query", "causal_batch"])
@pytest.mark.parametrize("k", [1, 3, 50])
def test_each_group_keeps_its_budget_of_largest_cells(group, k):
    heads, time, cells, length = 3, 11, 16, 11
    probs = torch.rand(2, heads, time, cells, generator=torch.Generator().manual_seed(k)).softmax(-1)
    visible = torch.full((2, time), length)
    kept = select_cells(probs, visible, k, group)
    axes = {"batch": (1, 2, 3), "head": (2, 3), "query": (3,), "causal_batch": (1, 3)}[group]
    ratio = {"batch": heads * k * cells, "head": k * cells, "query": k * cells / length}
    ratio["causal_batch"] = heads * k * cells / length
    size = {"batch": heads * time * cells, "head": time * cells, "query": cells, "causal_batch": heads * cells}[group]
    assert (kept.sum(axes) == min(max(round(ratio[group]), 1), size)).all()
    smallest_kept = torch.where(kept, probs, torch.inf).amin(axes, keepdim=True)
    assert (torch.where(kept, -torch.inf, probs) <= smallest_kept).all()


def test_ties_take_the_first_cells_and_padded_rows_nothing():
    probs = torch.full((1, 2, 3, 4), 0.25)
    keep = torch.tensor([[True, True, False]])
    kept = select_cells(probs, torch.full((1, 3), 4), 2, "query", keep)
    assert kept[0, :, :2].tolist() == [[[True, True, False, False]] * 2] * 2
    assert not kept[0, :, 2].any()
    crowded = select_cells(probs, torch.full((1, 3), 4), 1, "head", keep)
    assert crowded[0, :, 2].sum() == 0
    assert crowded.sum() == 2 * 4


@pytest.mark.parametrize("group", ["head", "batch"])
def test_published_padded_rows_take_what_the_budget_leaves_over(group):
    probs, keep = torch.tensor([[[[0.1, 0.2, 0.3, 0.4], [0.4, 0.3, 0.2, 0.1]]]]), torch.tensor([[False, True]])
    lengths = torch.ones(1, 2, dtype=torch.long)
    for k, rows in ((1, 1), (2, 2)):  # k M cells of a head, of which the real row has M
        assert select_cells(probs, lengths, k, group, keep, official=True).sum() == 4 * rows
        assert select_cells(probs, lengths, k, group, keep).sum() == 4


def test_an_unknown_group_is_refused():
    with pytest.raises(ValueError, match="`topk_group` is 'rows', expected one of"):
        cell_budget(torch.tensor([3]), 1, 1, 4, "rows")
