"""The network that guesses SEA's compressed attention: encoder, row decoder, and the two convolutional decoders.

B batch, H heads, T time, D head size, M compressed width. A row decoder turns each row into a few channels of reduced width
(M / 2 with 4 channels per head, or M / 4 with 2 in the causal network); the image that the convolutions see has the queries as
its vertical axis, the compressed keys as its horizontal axis and `head * S + channel` as its channels. Rows are real tokens
first, padding after them (see `KeyLayout`). Source: specification, sections 1.1 and 1.3 to 1.5.
"""

import torch
import torch.nn.functional as F
from torch import nn

from ..kernels.fast_paths import fast_paths
from ..kernels.plain_layers import is_plain, weight_dtype
from ..shared.compat import init
from .fast_paths import NARROW_NORM

BIDIRECTIONAL_CHANNELS, BIDIRECTIONAL_REDUCTION = 4, 2
CAUSAL_CHANNELS, CAUSAL_REDUCTION = 2, 4
CONV_HISTORY = 4  # rows above that a causal 3 x 3 convolution of dilation 2 reads
PRIOR_WEIGHT = 0.25  # of what the untrained causal network says beside its prior


def interpolated_identity(lengths: torch.Tensor, time: int, head_dim: int, dtype: torch.dtype) -> torch.Tensor:
    """The D x D identity with its rows stretched to the `n` real tokens of each sample: (B,) -> (B, T, D).

    Token of rank `r` gets the fractional row `p = r / (n - 1) * (D - 1)` and the hat `max(0, 1 - |p - d|)`; each row sums to 1.
    With n = 3, D = 3 that is the identity; with n = 5 rows 1 and 3 lie half way between two of its rows.
    """
    rank = torch.arange(time, device=lengths.device, dtype=dtype)
    last = (lengths[:, None].to(dtype) - 1).clamp_min(0)
    position = rank / (last + 1e-8) * (head_dim - 1)  # (B, T)
    columns = torch.arange(head_dim, device=lengths.device, dtype=dtype)
    return (1 - (position[..., None] - columns).abs()).clamp_min(0)


@fast_paths(*NARROW_NORM)
def narrow_layer_norm(norm: nn.LayerNorm, x: torch.Tensor) -> torch.Tensor:
    """`norm(x)`, of many narrow rows (..., features)."""
    return norm(x)


class SeaEncoder(nn.Module):
    """`GELU(LayerNorm(Linear([P, v])))`: (B, H, T, 3D) -> (B, H, T, 2D), shared by the heads."""

    def __init__(self, head_dim: int):
        super().__init__()
        self.linear = nn.Linear(3 * head_dim, 2 * head_dim)
        self.norm = nn.LayerNorm(2 * head_dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.gelu(narrow_layer_norm(self.norm, self.linear(x.to(weight_dtype(self.linear) or x.dtype))))


def rows_to_image(rows: torch.Tensor, channels: int) -> torch.Tensor:
    """(B, H, T, S w) -> (B, H S, T, w), channel index `head * S + s`."""
    batch, heads, time, features = rows.shape
    image = rows.view(batch, heads, time, channels, features // channels).permute(0, 1, 3, 2, 4)
    return image.reshape(batch, heads * channels, time, features // channels)


class BidirectionalCellNetwork(nn.Module):
    """Three 3 x 3 convolutions, the first of stride 2 in T, then a bilinear resize to (T, M)."""

    def __init__(self, num_heads: int, predictor_length: int):
        super().__init__()
        wide = BIDIRECTIONAL_CHANNELS * num_heads
        self.predictor_length = predictor_length
        self.conv1 = nn.Conv2d(wide, wide, 3, stride=(2, 1), padding=1)
        self.conv2 = nn.Conv2d(wide, wide, 3, padding=1)
        self.conv3 = nn.Conv2d(wide, num_heads, 3, padding=1)

    def forward(self, rows: torch.Tensor, lengths: torch.Tensor, is_padded: bool = True) -> torch.Tensor:
        """Row decoder output (B, H, T, 2M) and the number of rows that count, (B,) -> logits (B, H, T, M).

        Rows from `lengths` on are zeroed before each convolution, exactly as if the image ended there. Without `is_padded` all
        rows count.
        """
        image = rows_to_image(rows, BIDIRECTIONAL_CHANNELS)  # (B, 4H, T, M/2)
        time = image.shape[2]
        halved = (lengths + 1) // 2
        blank = _zero_rows_from if is_padded else _as_it_is
        image = self.conv1(blank(image, lengths)).relu()  # (B, 4H, ceil(T/2), M/2)
        image = self.conv2(blank(image, halved)).relu()
        image = self._at_each_row(blank(image, halved))  # (B, H, 2 ceil(T/2), M/2)
        if is_padded or time % 2:
            image = _resize_rows(image, 2 * halved, lengths, time)
        return F.interpolate(image, size=(time, self.predictor_length), mode="bilinear", align_corners=False)

    def _at_each_row(self, image: torch.Tensor) -> torch.Tensor:
        """The last convolution of the image with each row twice: (B, 4H, R, M/2) -> (B, H, 2R, M/2).

        Of the three rows that it reads two are the same, so it is a convolution of two rows, one for the even results and one
        for the odd: a third less arithmetic, and no copy of the image.
        """
        if not is_plain(self.conv3, nn.Conv2d):
            return self.conv3(image.repeat_interleave(2, dim=2))
        above, here, below = self.conv3.weight.unbind(2)  # (H, 4H, 3) each
        image = F.pad(image, [0, 0, 1, 1])
        even = F.conv2d(image[:, :, :-1], torch.stack([above, here + below], 2), self.conv3.bias, padding=(0, 1))
        odd = F.conv2d(image[:, :, 1:], torch.stack([above + here, below], 2), self.conv3.bias, padding=(0, 1))
        return torch.stack([even, odd], 3).flatten(2, 3)


def dilated(conv: nn.Module, image: torch.Tensor) -> torch.Tensor:
    """A 3 x 3 convolution of dilation 2, causal: (B, C, 4 + T, W), the first four rows past ones -> (B, C, T, W).

    A layer that is more than its weights is called with the image's four parts, every other row and column each, where the
    dilation is 1 (adapters leave a layer's dilation out).
    """
    if is_plain(conv, nn.Conv2d):
        return F.conv2d(image, conv.weight, conv.bias, padding=(0, 2), dilation=2)
    batch, _, height, width = image.shape
    image = F.pad(image, [0, width % 2, 0, height % 2])
    parts = image.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).permute(0, 3, 5, 1, 2, 4)  # (B, 2, 2, C, rows, columns)
    out = conv(parts.flatten(0, 2)).unflatten(0, (batch, 2, 2))  # two rows less
    out = out.permute(0, 3, 4, 1, 5, 2).flatten(4, 5).flatten(2, 3)
    return out[:, :, : height - CONV_HISTORY, :width]


class CausalCellNetwork(nn.Module):
    """Two causal 3 x 3 convolutions of dilation 2 (rows t, t-2, t-4), a 1 x 1 convolution to one channel a head, a LayerNorm."""

    def __init__(self, num_heads: int, predictor_length: int):
        super().__init__()
        wide = CAUSAL_CHANNELS * num_heads
        self.predictor_length = predictor_length
        self.norm_in = nn.LayerNorm(predictor_length // CAUSAL_REDUCTION)
        self.conv1 = nn.Conv2d(wide, wide, 3, padding=(0, 1))  # of every other row and column, see `dilated`
        self.conv2 = nn.Conv2d(wide, wide, 3, padding=(0, 1))
        self.conv3 = nn.Conv2d(wide, num_heads, 1)
        self.norm_out = nn.LayerNorm(predictor_length)

    @torch.no_grad()
    def start_from_prior(self) -> None:
        """Initialise the last norm so that the first estimate is what pretrained language models mostly do: attend to the
        first token and to near ones, the less the farther (weights 1 / (1 + d) for the cell d before the last).

        Without it a fresh estimate is random, and a converted model sees random keys until it has been trained for long.
        """
        distance = torch.arange(self.predictor_length - 1, -1, -1, dtype=torch.float32)
        bias = -torch.log1p(distance)
        bias[0] = 0.0
        init.constant_(self.norm_out.weight, PRIOR_WEIGHT)
        init.copy_(self.norm_out.bias, (bias - bias.mean()).to(self.norm_out.bias))

    def forward(
        self, rows: torch.Tensor, lengths: torch.Tensor, history: tuple[torch.Tensor, torch.Tensor] | None = None
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
        """Row decoder output (B, H, T, M/2) -> logits (B, H, T, M) and the rows that the next call needs.

        `history` holds the last 4 input rows of each of the two convolutions, (B, 2H, 4, M/4); None is the start of a sequence.
        The returned one holds the last 4 real rows: row `lengths - 1` is the newest.
        """
        image = narrow_layer_norm(self.norm_in, rows_to_image(rows, CAUSAL_CHANNELS))  # (B, 2H, T, M/4)
        if history is None:
            batch, channels, _, width = image.shape
            start = image.new_zeros(batch, channels, CONV_HISTORY, width)
            history = (start, start)
        first = torch.cat([history[0].to(image.dtype), image], dim=2)  # (B, 2H, 4 + T, M/4)
        image = dilated(self.conv1, first).relu()
        second = torch.cat([history[1].to(image.dtype), image], dim=2)
        image = dilated(self.conv2, second).relu()
        logits = narrow_layer_norm(self.norm_out, self._widen(*self._join_channels(image)))
        return logits, (_last_rows(first, lengths), _last_rows(second, lengths))

    def _join_channels(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The 1 x 1 convolution of the image, and of a column of zeros beside it, which is its bias."""
        if not is_plain(self.conv3, nn.Conv2d):
            image = self.conv3(F.pad(image, [0, 1]))
            return image[..., :-1], image[..., -1:]
        image = self.conv3(image)
        return image, self.conv3.bias.to(image.dtype)[:, None, None]

    def _widen(self, image: torch.Tensor, outside: torch.Tensor) -> torch.Tensor:
        """(B, H, T, M/4) -> (B, H, T, M): each column four times, one column `outside` at each side, area pooling M+2 -> M.

        The published network repeats the columns before the 1 x 1 convolution, which it gives a zero padding of 1: the two orders
        agree, because a 1 x 1 convolution acts on each column alone and on a zero column gives its bias.
        """
        cells, reduced = self.predictor_length, image.shape[-1]
        first = torch.arange(cells, device=image.device) * (cells + 2) // cells
        pair = torch.stack([first, first + 1])  # the two of the M + 2 columns that a cell averages, (2, M)
        inner = (pair >= 1) & (pair <= cells)
        column = torch.where(inner, (pair - 1) // CAUSAL_REDUCTION, -1)
        # One product with a constant matrix: its gradient is a product, too, and no scattered sum.
        pooling = (column[..., None] == torch.arange(reduced, device=image.device)).to(image.dtype).sum(dim=0) / 2
        border = (~inner).to(image.dtype).sum(dim=0) / 2  # (M,), share of the columns outside
        return image @ pooling.T + outside * border


def _zero_rows_from(image: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    rows = torch.arange(image.shape[2], device=image.device)
    return image.masked_fill((rows >= lengths[:, None])[:, None, :, None], 0.0)


def _as_it_is(image: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    return image


def _resize_rows(image: torch.Tensor, source: torch.Tensor, target: torch.Tensor, time: int) -> torch.Tensor:
    """Linear resize of axis 2 from `source` to `target` rows, one pair per sample, half-pixel centres.

    The weights come from integers: `((2 t + 1) source - target) / (2 target)` is the source row of target row `t`.
    """
    row = torch.arange(time, device=image.device)
    target = target[:, None].clamp_min(1)
    source = source[:, None].clamp_min(1)
    numerator = ((2 * row + 1) * source - target).clamp_min(0)  # (B, T)
    low = (numerator // (2 * target)).minimum(source - 1)
    high = (low + 1).minimum(source - 1)
    weight = ((numerator % (2 * target)).to(image.dtype) / (2 * target))[:, None, :, None].to(image.dtype)

    def rows_at(index: torch.Tensor) -> torch.Tensor:
        return image.gather(2, index[:, None, :, None].expand(-1, image.shape[1], -1, image.shape[3]))

    return torch.lerp(rows_at(low), rows_at(high), weight)


def _last_rows(rows: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """The 4 rows that precede row `lengths` of the new rows; `rows` starts with 4 rows of history."""
    index = lengths[:, None] + torch.arange(CONV_HISTORY, device=rows.device)  # (B, 4)
    return rows.gather(2, index[:, None, :, None].expand(-1, rows.shape[1], -1, rows.shape[3]))
