import pytest
import torch
import torch.nn.functional as F

from hf_linear_attn.modeling.sea.estimator import (
    BidirectionalCellNetwork,
    CausalCellNetwork,
    interpolated_identity,
    rows_to_image,
)


def test_interpolated_identity_is_a_hat_whose_rows_sum_to_one():
    rows = interpolated_identity(torch.tensor([3, 5, 1, 0]), 6, 3, torch.float64)
    torch.testing.assert_close(rows[0, :3], torch.eye(3, dtype=torch.float64))
    torch.testing.assert_close(rows[1, 1], torch.tensor([0.5, 0.5, 0.0], dtype=torch.float64))
    for sample, n in ((0, 3), (1, 5), (2, 1)):
        torch.testing.assert_close(rows[sample, :n].sum(-1), torch.ones(n, dtype=torch.float64), atol=1e-7, rtol=0)
    assert rows.isfinite().all()


def test_slices_of_a_row_become_channels_of_its_head():
    rows = torch.arange(2 * 3 * 8).view(1, 2, 3, 8)
    image = rows_to_image(rows, 2)
    assert image.shape == (1, 4, 3, 4)
    assert torch.equal(image[0, 3, 1], rows[0, 1, 1, 4:])


@pytest.mark.parametrize("length", [1, 2, 3, 9, 10])
def test_bidirectional_network_equals_plain_convolutions_and_ignores_padding(length):
    torch.manual_seed(0)
    network = BidirectionalCellNetwork(2, 8).double()
    rows = torch.randn(1, 2, length, 16, dtype=torch.float64)
    image = F.relu(network.conv1(rows_to_image(rows, 4)))
    image = F.relu(network.conv2(image)).repeat_interleave(2, dim=2)
    expected = F.interpolate(network.conv3(image), size=(length, 8), mode="bilinear", align_corners=False)
    torch.testing.assert_close(network(rows, torch.tensor([length])), expected)
    padded = torch.cat([rows, torch.full((1, 2, 5, 16), 1e3, dtype=torch.float64)], dim=2)
    torch.testing.assert_close(network(padded, torch.tensor([length]))[:, :, :length], expected)


def test_causal_network_equals_the_published_order_of_its_layers():
    torch.manual_seed(0)
    network, length = CausalCellNetwork(2, 16).double(), 11
    rows = torch.randn(1, 2, length, 8, dtype=torch.float64)
    image = network.norm_in(rows_to_image(rows, 2))
    for conv in (network.conv1, network.conv2):
        image = F.relu(F.conv2d(F.pad(image, (2, 2, 4, 0)), conv.weight, conv.bias, dilation=2))
    image = F.pad(image.repeat_interleave(4, dim=-1), (1, 1))
    image = F.conv2d(image, network.conv3.weight, network.conv3.bias)  # M + 2 columns, the outer ones of padding
    expected = network.norm_out(F.adaptive_avg_pool2d(image, (length, 16)))
    torch.testing.assert_close(network(rows, torch.tensor([length]))[0], expected)


def test_causal_network_sees_nine_rows_at_even_offsets_and_none_later():
    torch.manual_seed(0)
    network = CausalCellNetwork(1, 16).double()
    with torch.no_grad():
        network.conv1.bias.add_(2.0)  # ReLUs open: the whole receptive field shows
        network.conv2.bias.add_(2.0)
    rows = torch.randn(1, 1, 20, 8, dtype=torch.float64, requires_grad=True)
    logits, _ = network(rows, torch.tensor([20]))
    gradient = torch.autograd.grad((logits[0, 0, 12] * torch.randn(16)).sum(), rows)[0]
    assert gradient.abs().sum((0, 1, 3)).nonzero().flatten().tolist() == [4, 6, 8, 10, 12]


def test_causal_network_continues_from_its_history():
    torch.manual_seed(0)
    network = CausalCellNetwork(2, 16).double()
    rows = torch.randn(2, 2, 15, 8, dtype=torch.float64)
    whole, final = network(rows, torch.tensor([15, 15]))
    history, pieces = None, []
    for part in (slice(0, 3), slice(3, 4), slice(4, 5), slice(5, 15)):
        count = torch.full((2,), part.stop - part.start)
        logits, history = network(rows[:, :, part], count, history)
        pieces.append(logits)
    torch.testing.assert_close(torch.cat(pieces, 2), whole)
    torch.testing.assert_close(history, final)
    _, short = network(rows, torch.tensor([15, 9]))
    _, expected = network(rows[1:, :, :9], torch.tensor([9]))
    torch.testing.assert_close(tuple(x[1:] for x in short), expected)


def test_networks_compile_without_graph_breaks():
    torch.manual_seed(0)
    for network, width in ((BidirectionalCellNetwork(1, 8), 16), (CausalCellNetwork(1, 8), 4)):
        rows, lengths = torch.randn(1, 1, 6, width), torch.tensor([6])
        expected, result = (
            f(rows, lengths) for f in (network, torch.compile(network, fullgraph=True, backend="aot_eager"))
        )
        torch.testing.assert_close(result, expected)
