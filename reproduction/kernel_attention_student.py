"""The baseline of SEA: a student whose layers are kernel attention (FAVOR+, Performer) alone, without a sparse part."""

import torch
from torch import nn

from hf_linear_attn.modeling.sea.attention import SeaAttentionCore, SeaCoreOutput, SeaOptions
from hf_linear_attn.modeling.sea.kernel_attention import (
    bidirectional_kernel_attention,
    causal_kernel_attention,
    relu_features,
    softmax_key_features,
    softmax_query_features,
)
from hf_linear_attn.modeling.sea.modeling_sea import SeaPreTrainedModel


class KernelAttentionCore(nn.Module):
    """Takes the place of a `SeaAttentionCore` in whole sequences (no cache): softmax or, causal, ReLU features."""

    def __init__(self, options: SeaOptions, random_features: torch.Tensor):
        super().__init__()
        self.options = options
        self.register_buffer("random_features", random_features)

    redraw_features = SeaAttentionCore.redraw_features

    def forward(self, q, k, v, *, layout, scaling=None, key_cache=None, **_) -> SeaCoreOutput:
        """Q (N, H, T, D), k and v (N, G, T, D) -> a context (N, T, H D); nothing is compared with a teacher's layer."""
        if key_cache is not None:
            raise ValueError("the baseline has no cache: call with use_cache=False")
        groups = q.shape[1] // k.shape[1]
        q, k, v = (layout.compact(x) for x in (q, k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)))
        keep = layout.keep
        with torch.autocast(q.device.type, enabled=False):
            if self.options.causal:
                q = q if scaling is None else q * scaling
                features = relu_features(q, self.random_features), relu_features(k, self.random_features, keep)
                context, _ = causal_kernel_attention(*features, v.float())
            else:
                features = (
                    softmax_query_features(q, self.random_features),
                    softmax_key_features(k, self.random_features, keep),
                )
                context = bidirectional_kernel_attention(*features, v.float())
        context = context.masked_fill(~keep[:, None, :, None], 0.0).transpose(1, 2).flatten(2).to(v.dtype)
        return SeaCoreOutput(layout.restore(context, dim=1), None, {}, None, None, None, None, None)


def keep_kernel_attention_alone(student: SeaPreTrainedModel) -> SeaPreTrainedModel:
    """Replace every SEA core of a converted model, in place; its projections and features stay."""
    for module in student.modules():
        if isinstance(getattr(module, "sea", None), SeaAttentionCore):
            module.sea = KernelAttentionCore(module.sea.options, module.sea.random_features)
    return student
