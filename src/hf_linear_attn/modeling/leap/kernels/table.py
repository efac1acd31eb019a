"""LEAP's fast paths, best first: of a block, of its feed-forward layer, of the mechanism."""

from functools import partial

from ...kernels.fast_paths import FastPath
from .block_step import is_step, step_block, step_covers
from .block_training import in_training, training_block, training_covers
from .eager_backward import eager_covers, eager_mechanism, runs_backward
from .folded_norms import GELU, both_halves_cover, first_half_covers, folded_block, second_half_covers
from .mechanism_path import is_long, kernel_covers, kernel_mechanism

# For `LeapBlock.forward(block, hidden_states, call)`.
BLOCK: tuple[FastPath, ...] = (
    FastPath("one decoding step in four kernels", step_block, step_covers, is_step),
    FastPath("all after the projections as one step", training_block, training_covers, in_training, traceable=True),
    FastPath("norms folded into the projections", folded_block, both_halves_cover, in_training, traceable=True),
    FastPath(
        "norm folded into the mechanism's projections",
        partial(folded_block, second=False),
        first_half_covers,
        in_training,
        traceable=True,
    ),
    FastPath(
        "norm folded into the feed-forward layer",
        partial(folded_block, first=False),
        second_half_covers,
        in_training,
        traceable=True,
    ),
)

# For `LeapMLP.forward(mlp, hidden_states)`.
FEED_FORWARD: tuple[FastPath, ...] = (GELU,)

# For `leap_mechanism`.
MECHANISM: tuple[FastPath, ...] = (
    FastPath("the mechanism's kernels", kernel_mechanism, kernel_covers, is_long, traceable=True),
    FastPath("backward written out", eager_mechanism, eager_covers, runs_backward, backend="torch"),
)
