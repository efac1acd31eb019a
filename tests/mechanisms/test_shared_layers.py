"""Layers that families share: softmax attention and its windows, the short convolution, what stands behind the heads."""

import pytest
import torch
from transformers import LlamaConfig

from hf_linear_attn import RecurrentCache
from hf_linear_attn.modeling.leap.configuration_leap import LeapConfig
from hf_linear_attn.modeling.leap.modeling_leap import LeapForCausalLM
from hf_linear_attn.modeling.shared.call import Call
from hf_linear_attn.modeling.shared.layers import softmax_attention as module
from hf_linear_attn.modeling.shared.layers.gated_output import GatedOutput
from hf_linear_attn.modeling.shared.layers.recent_tokens import behind_the_past
from hf_linear_attn.modeling.shared.layers.short_convolution import ShortConvolution, convolution_reference
from hf_linear_attn.modeling.shared.layers.softmax_attention import SoftmaxAttention
from hf_linear_attn.modeling.shared.layers.swiglu import SwiGLU
from hf_linear_attn.modeling.shared.token_order import token_layout

WIDTH = 16


def told(length, masked=False, packed=False):
    """A mask and document numbers (2, T) or None."""
    generator = torch.Generator().manual_seed(length)
    mask = torch.rand(2, length, generator=generator) < 0.6 if masked else None
    documents = (torch.rand(2, length, generator=generator) < 0.15).long().cumsum(1) if packed else None
    return mask, documents


def inputs(length):
    return torch.randn(2, length, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(length))


class TestSoftmax:
    """Softmax attention against the definition, token by token."""

    @pytest.fixture(autouse=True)
    def _short_blocks(self, monkeypatch):
        monkeypatch.setattr(module, "SHORTEST_BLOCK", 4)

    def layer(self, window, implementation="sdpa", theta=100.0):
        torch.manual_seed(0)
        config = LlamaConfig(hidden_size=WIDTH, num_attention_heads=4, attn_implementation=implementation)
        return SoftmaxAttention(config, 0, 4, 2, window=window, rope_theta=theta).double().eval()

    def by_hand(self, layer, x, mask=None, documents=None):
        """Token by token: positions count real tokens of the document, which the window counts, too."""
        batch, length, _ = x.shape
        out = torch.zeros_like(x)
        heads = layer.num_heads, layer.head_dim
        for b in range(batch):
            keys, values, document = [], [], None
            for i in range(length):
                if mask is not None and not mask[b, i]:
                    continue
                if documents is not None and documents[b, i] != document:
                    keys, values, document = [], [], documents[b, i]
                position = torch.tensor(float(len(keys)), dtype=torch.float64)
                keys.append(self.turned(layer.k_proj(x[b, i]).view(2, -1), position, layer.rope_theta))
                values.append(layer.v_proj(x[b, i]).view(2, -1))
                query = self.turned(layer.q_proj(x[b, i]).view(heads), position, layer.rope_theta)
                seen = slice(max(0, len(keys) - (layer.window or length)), None)
                key, value = (torch.stack(t[seen]).repeat_interleave(2, dim=1) for t in (keys, values))  # (n, H, D)
                weights = (torch.einsum("hd,nhd->hn", query, key) * layer.head_dim**-0.5).softmax(-1)
                out[b, i] = layer.o_proj(torch.einsum("hn,nhd->hd", weights, value).flatten())
        return out

    def turned(self, x, position, theta):
        if theta is None:
            return x
        half = x.shape[-1] // 2
        angle = position * theta ** -(torch.arange(half, dtype=torch.float64) / half)
        first, second = x[..., :half], x[..., half:]
        cos, sin = angle.cos(), angle.sin()
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)

    @pytest.mark.parametrize("packed", [False, True], ids=["one", "packed"])
    @pytest.mark.parametrize("masked", [False, True], ids=["full", "masked"])
    @pytest.mark.parametrize("window", [None, 2, 3, 7, 40])
    def test_equals_definition(self, window, masked, packed):
        for length in (1, 5, 21):
            x, (mask, documents) = inputs(length), told(length, masked, packed)
            layer = self.layer(window)
            found = layer(x, attention_mask=mask, segment_ids=documents).hidden_states
            real = torch.ones(2, length, dtype=torch.bool) if mask is None else mask
            torch.testing.assert_close(found[real], self.by_hand(layer, x, mask, documents)[real], atol=1e-10, rtol=0)

    @pytest.mark.parametrize("implementation", ["eager", "sdpa", "flash_attention_2"])
    @pytest.mark.parametrize("theta", [None, 100.0], ids=["no-positions", "rotary"])
    def test_every_attention_function_sees_the_window(self, implementation, theta):
        """Flash kernels know no masked blocks: there sdpa takes their place."""
        x, layer = inputs(21), self.layer(5, "eager", theta)
        layer.config._attn_implementation_internal = implementation
        assert layer.config._attn_implementation == implementation
        torch.testing.assert_close(layer(x).hidden_states, self.by_hand(layer, x), atol=1e-10, rtol=0)

    @pytest.mark.parametrize("masked", [False, True], ids=["full", "masked"])
    @pytest.mark.parametrize("window", [2, 7])
    def test_pieces_equal_whole(self, window, masked):
        """Through the state, padding inside or not; the state is that of the real tokens alone."""
        layer, x, (mask, _) = self.layer(window), inputs(21), told(21, masked)
        positions = None if mask is None else (mask.cumsum(1) - 1).clamp(min=0)
        positions = torch.arange(21)[None] if positions is None else positions
        whole = layer(x, attention_mask=mask, position_ids=positions, return_state=True)
        for step in (1, 4, 10):
            state, pieces = None, []
            for start in range(0, 21, step):
                part = slice(start, start + step)
                given = {} if mask is None else {"attention_mask": mask[:, part]}
                output = layer(x[:, part], position_ids=positions[:, part], state=state, return_state=True, **given)
                state = output.state
                pieces.append(output.hidden_states)
            torch.testing.assert_close(torch.cat(pieces, 1), whole.hidden_states, atol=1e-10, rtol=0)
            for ours, theirs in zip(state, whole.state):
                torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=0)

    def test_control_a_window_that_counts_columns_is_seen(self, monkeypatch):
        x, (mask, _), layer = inputs(21), told(21, masked=True), self.layer(3)
        monkeypatch.setattr(
            Call,
            "layout",
            lambda self, batch, length, device: token_layout(batch, length, device, None, self.segment_ids),
        )
        found = layer(x, attention_mask=mask).hidden_states
        with pytest.raises(AssertionError):
            torch.testing.assert_close(found[mask], self.by_hand(layer, x, mask)[mask])

    @pytest.mark.parametrize("window", [None, 4])
    def test_maps(self, window):
        """They are what the values are weighted with, whatever the attention function."""
        x, (mask, documents), layer = inputs(21), told(21, True, True), self.layer(window)
        output = layer(x, attention_mask=mask, segment_ids=documents, output_attentions=True)
        value = layer.v_proj(x).unflatten(-1, (2, -1)).repeat_interleave(2, dim=2)
        mixed = torch.einsum("bhij,bjhd->bihd", output.attentions, value).flatten(2)
        torch.testing.assert_close(output.hidden_states[mask], layer.o_proj(mixed)[mask], atol=1e-10, rtol=0)
        shown = output.attentions.sum(-1).transpose(1, 2)
        torch.testing.assert_close(shown, mask[..., None].expand_as(shown).double(), atol=1e-10, rtol=0)

    def test_refusals(self):
        x, full = inputs(5), self.layer(None)
        with pytest.raises(ValueError, match=r"layer 0 is softmax attention over all tokens.*not `state`"):
            full(x, return_state=True)
        windowed = self.layer(4)
        state = windowed(x, return_state=True).state
        with pytest.raises(ValueError, match=r"state of layer 0.*another batch size"):
            windowed(x[:1], state=state, position_ids=torch.arange(5)[None])
        with pytest.raises(ValueError, match="position_ids"):
            windowed(x, state=state)
        with pytest.raises(ValueError, match="output_attentions"):
            windowed(x, state=state, position_ids=torch.arange(5)[None], output_attentions=True)


class TestConvolution:
    """The short convolution against its definition."""

    def layer(self, taps):
        layer = ShortConvolution(WIDTH, taps).double()
        with torch.no_grad():
            layer.weight.normal_(generator=torch.Generator().manual_seed(taps))
        return layer

    @pytest.mark.parametrize("packed", [False, True], ids=["one", "packed"])
    @pytest.mark.parametrize("masked", [False, True], ids=["full", "masked"])
    @pytest.mark.parametrize("taps", [1, 4])
    def test_equals_definition(self, taps, masked, packed):
        for length in (1, 3, 21):
            x, (mask, documents), layer = inputs(length), told(length, masked, packed), self.layer(taps)
            found = layer(x, Call(mask, None, documents).layout(2, length, x.device))
            expected = convolution_reference(x, layer.weight, mask, documents)
            real = torch.ones(2, length, dtype=torch.bool) if mask is None else mask
            torch.testing.assert_close(found[real], expected[real], atol=1e-12, rtol=0)

    @pytest.mark.parametrize("masked", [False, True], ids=["full", "masked"])
    def test_pieces_equal_whole(self, masked):
        layer, x, (mask, _) = self.layer(4), inputs(21), told(21, masked)
        whole = layer(x, Call(mask, None).layout(2, 21, x.device))
        real = torch.ones(2, 21, dtype=torch.bool) if mask is None else mask
        for step in (1, 2, 8):
            past, pieces = None, []
            for start in range(0, 21, step):
                part = x[:, start : start + step]
                layout = Call(None if mask is None else mask[:, start : start + step], None).layout(
                    2, part.shape[1], x.device
                )
                pieces.append(layer(part, layout, past))
                past = layer.state_after(part, layout, past)
            torch.testing.assert_close(torch.cat(pieces, 1)[real], whole[real], atol=1e-12, rtol=0)

    def test_control_a_state_in_columns_is_seen(self, monkeypatch):
        def last_columns(self, x, layout, past=None):
            return behind_the_past(x, past, 3)[:, -3:]

        monkeypatch.setattr(ShortConvolution, "state_after", last_columns)
        with pytest.raises(AssertionError):
            self.test_pieces_equal_whole(masked=True)

    def test_half_precision_sums_in_float32(self):
        layer, x = self.layer(4).bfloat16(), inputs(50).bfloat16()
        layout = Call(None, None).layout(2, 50, x.device)
        wide = self.layer(4)
        with torch.no_grad():
            wide.weight.copy_(layer.weight)
        found = layer(x, layout)
        assert found.dtype == torch.bfloat16
        assert layer.state_after(x, layout).dtype == torch.float32
        torch.testing.assert_close(found, wide(x.double(), layout).bfloat16())

    def test_begins_as_the_identity(self):
        x, layout = inputs(9), Call(None, None).layout(2, 9, torch.device("cpu"))
        assert torch.equal(ShortConvolution(WIDTH, 4).double()(x, layout), x)


def test_what_stands_behind_the_heads():
    torch.manual_seed(0)
    layer, mixed, x = (
        GatedOutput(WIDTH, 2, True, True, True, eps=1e-6),
        torch.randn(2, 5, 2, 8),
        torch.randn(2, 5, WIDTH),
    )
    normed = mixed / (mixed.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    expected = layer.o_proj(torch.sigmoid(layer.gate_proj(x)) * normed.flatten(2))
    torch.testing.assert_close(layer(mixed, x), expected)
    assert torch.equal(GatedOutput(WIDTH, 2, False, False, False)(mixed, x), mixed.flatten(2))


def test_swiglu():
    layer, x = SwiGLU(WIDTH, 24), torch.randn(2, 5, WIDTH)
    gate, up = layer.gate_up_proj.weight.chunk(2)
    expected = (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ layer.down_proj.weight.T
    torch.testing.assert_close(layer(x), expected)


def test_a_cache_counts_all_that_it_keeps():
    """Bytes of a hybrid's cache: the keys of softmax layers too, which grow; a window's do not."""
    config = {"hidden_size": 64, "num_attention_heads": 2, "vocab_size": 30, "num_hidden_layers": 3, "conv_kernel": 4}
    sizes = {}
    for kind in ("softmax", "softmax:8"):
        model = LeapForCausalLM(LeapConfig(**config, layer_windows=["decay", kind, 4])).eval()
        for length in (20, 40):
            cache = RecurrentCache(config=model.config)
            with torch.no_grad():
                model(torch.ones(1, length, dtype=torch.long), cache=cache)
            sizes[kind, length] = cache.state_size()
    counts, taps = 3 * 8, 2 * 3 * 64 * 4  # int64 numbers of tokens; inputs of two convolutions
    means = 4 * (2 * 64 + 2) + 4 * 3 * (2 * 64 + 2)  # sums of all tokens; three tokens of a window
    assert sizes["softmax:8", 20] == sizes["softmax:8", 40] == counts + taps + means + 4 * 7 * (2 * 64 + 1)
    assert sizes["softmax", 20] == counts - 8 + taps + means + 4 * 20 * 2 * 64
    assert sizes["softmax", 40] - sizes["softmax", 20] == 4 * 20 * 2 * 64
