"""The fast paths of DANet by what they stand for, best first."""

from .attention_step import STEP
from .between_blocks import BETWEEN_BLOCKS
from .causal import CAUSAL, SLIDING
from .folded import FOLDED_FEED_FORWARD, FOLDED_QUERIES
from .gram import SYMMETRIC
from .head_by_head import LINEAR_BY_HEAD, QUADRATIC_BY_HEAD
from .max_norm import MAX_NORM
from .relu_feed_forward import RELU, STEP_FEED_FORWARD
from .self_attention import SELF_ATTENTION

BODY = (BETWEEN_BLOCKS,)  # all layers and the final norm
MIX = (FOLDED_FEED_FORWARD,)  # attention and feed-forward layer of a block
ATTENTION = (STEP, FOLDED_QUERIES, SELF_ATTENTION)
FEED_FORWARD = (STEP_FEED_FORWARD, RELU)
NORM = (MAX_NORM,)  # VectorNorm
LINEAR_PRODUCT, QUADRATIC_PRODUCT = (LINEAR_BY_HEAD, SYMMETRIC), (QUADRATIC_BY_HEAD,)  # bidirectional
CAUSAL_PRODUCT, SLIDING_PRODUCT = (CAUSAL,), (SLIDING,)
