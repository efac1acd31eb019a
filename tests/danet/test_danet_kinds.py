"""DANet's kinds of layer, its options and its presets: terms that fade against a loop over tokens, widths, what a file holds."""

import itertools
import json
import math

import pytest
import torch
from common.families import DANET_MODERN
from danet.brute_force import brute_force
from danet.models import VOCAB, build, config, tokens
from danet.test_dense_attention import MASKS, SEGMENTS, TOL, run_in_pieces, tensors
from transformers import AutoConfig, AutoModelForCausalLM

from hf_linear_attn import DanetConfig, DanetForCausalLM, RecurrentCache, explain_paths, use_backend
from hf_linear_attn.modeling.danet import dense_attention as mechanism
from hf_linear_attn.modeling.danet.block import DanetBlock, DenseAttention
from hf_linear_attn.modeling.danet.dense_attention import dense_attention, dense_attention_reference
from hf_linear_attn.modeling.danet.fading import fading_factors
from hf_linear_attn.modeling.danet.modeling_danet import DanetModel
from hf_linear_attn.modeling.shared.configuration import FORMAT_FIELD, LayerKind
from hf_linear_attn.modeling.shared.layers import decayed_sum
from hf_linear_attn.modeling.shared.layers.short_convolution import convolution_reference
from hf_linear_attn.modeling.shared.layers.softmax_attention import SoftmaxAttention
from hf_linear_attn.training.model_choice import build_config
from hf_linear_attn.training.options import TrainingOptions

RATES = torch.tensor([0.05, 1.3], dtype=torch.float64)  # a head that remembers many chunks, one that forgets at once
FADING = {"pattern": "g", "is_causal": True, "decay": RATES}
DECODER = {"is_causal": True, "softmax_attention_heads": 2, "num_attention_heads": 2}
KINDS = {**DECODER, "layer_pattern": "softmax:5_decay_sw:6"}


def decoder(dtype=torch.float64, **options):
    """A model none of whose parts is left at 0, where it changes nothing."""
    model = build(DanetForCausalLM, dtype=dtype, **{**DECODER, **options})
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.3)
    return model


class TestTermsThatFade:
    """The chunked sums against the definition, token by token."""

    @pytest.fixture(autouse=True, params=[2, 64], ids=["sums2", "sums64"])
    def _short_sums(self, request, monkeypatch):
        """Sums of two chunks at a time make short rows run through all levels."""
        monkeypatch.setattr(decayed_sum, "CHUNK", request.param)

    @pytest.mark.parametrize("packed", [False, True], ids=["one", "packed"])
    @pytest.mark.parametrize("side", [None, *MASKS])
    @pytest.mark.parametrize("chunk", [1, 2, 4, 16])
    def test_equals_the_definition(self, chunk, side, packed):
        q, k, v = tensors()
        mask = None if side is None else torch.tensor(MASKS[side])
        segments = torch.tensor(SEGMENTS) if packed else None
        out, _ = dense_attention(q, k, v, chunk_size=chunk, attention_mask=mask, segment_ids=segments, **FADING)
        torch.testing.assert_close(out, brute_force(q, k, v, "g", None, True, mask, segments, RATES), **TOL)

    @pytest.mark.parametrize("side", [None, *MASKS])
    @pytest.mark.parametrize("cuts", [[0, 5, 11], [0, 1, 3, 9, 10, 11], list(range(12))])
    def test_pieces_through_the_state_equal_the_whole(self, cuts, side):
        q, k, v = tensors()
        mask = None if side is None else torch.tensor(MASKS[side])
        out, state = run_in_pieces(q, k, v, cuts, mask, chunk_size=2, decay=RATES)
        torch.testing.assert_close(out, brute_force(q, k, v, "g", None, True, mask, None, RATES), **TOL)
        _, whole = run_in_pieces(q, k, v, [0, 11], mask, chunk_size=2, decay=RATES)
        torch.testing.assert_close(state.memory, whole.memory, **TOL)
        assert torch.equal(state.count, whole.count)

    @pytest.mark.parametrize("cut", [1, 4, 7, 10])
    def test_documents_go_on_from_a_state_only_where_they_continue(self, cut):
        q, k, v = tensors()
        segments = torch.tensor(SEGMENTS)
        options = {**FADING, "chunk_size": 2, "output_final_state": True}
        whole, end = dense_attention(q, k, v, segment_ids=segments, **options)
        first, state = dense_attention(q[:, :cut], k[:, :cut], v[:, :cut], segment_ids=segments[:, :cut], **options)
        rest = segments[:, cut:] - segments[:, cut - 1 : cut]
        second, state = dense_attention(
            q[:, cut:], k[:, cut:], v[:, cut:], segment_ids=rest, initial_state=state, **options
        )
        torch.testing.assert_close(torch.cat((first, second), dim=1), whole, **TOL)
        torch.testing.assert_close(state.memory, end.memory, **TOL)

    def test_control_padding_that_ages_is_seen(self, monkeypatch):
        real = mechanism.final_state
        monkeypatch.setattr(mechanism, "final_state", lambda *x: real(*x[:4], torch.full((2,), x[0].shape[1]), *x[5:]))
        with pytest.raises(AssertionError):
            self.test_pieces_through_the_state_equal_the_whole([0, 5, 11], "inside")

    def test_gradcheck(self):
        """Also of the rates, which half-lives are learned through, and of the state."""
        q, k, v = tensors(batch=1, length=9)
        mask = torch.tensor([[1, 1, 0, 1, 1, 1, 1, 0, 1]])
        _, state = dense_attention(q[:, :4], k[:, :4], v[:, :4], output_final_state=True, **FADING)

        def run(q, k, v, rates, memory):
            before = state._replace(memory=memory)
            options = {"attention_mask": mask, "chunk_size": 2, "initial_state": before, "output_final_state": True}
            out, after = dense_attention(q, k, v, **{**FADING, "decay": rates}, **options)
            return out, after.memory

        inputs = [x.detach().clone().requires_grad_() for x in (q, k, v, RATES, state.memory)]
        torch.autograd.gradcheck(run, inputs, fast_mode=True)

    def test_scores_and_reference(self):
        q, k, v = tensors()
        factors = fading_factors(torch.arange(11)[None], RATES)
        expected = brute_force(q, k, v, "g", None, True, decay=RATES)
        torch.testing.assert_close(dense_attention_reference(q, k, v, factors), expected, **TOL)


def test_a_long_text_in_half_precision():
    """64 thousand tokens in bfloat16 and float16: M stays a mean, in float32, and close to float64."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(1, 1 << 16, 2, 4, generator=generator) * 2 - 1
    rates = math.log(2) / torch.tensor([2.0, 1e6])
    for dtype in (torch.bfloat16, torch.float16):
        rough = x.to(dtype)
        options = {"is_causal": True, "output_final_state": True}
        found, state = dense_attention(rough, rough, rough, decay=rates, **options)
        wide, exact = dense_attention(rough.double(), rough.double(), rough.double(), decay=rates.double(), **options)
        assert (found.dtype, state.memory.dtype) == (dtype, torch.float32)
        assert state.memory.abs().max() <= 1
        torch.testing.assert_close(state.memory.double(), exact.memory, atol=1e-6, rtol=1e-4)
        assert (found.double() - wide).abs().max() < 0.01 * wide.abs().max()


@pytest.mark.slow
def test_fading_compiles_to_one_graph_of_any_length():
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x: dense_attention(x, x, x, chunk_size=4, **FADING)[0], backend="eager", fullgraph=True
    )
    for length in (70, 130, 600):
        x = tensors(length=length)[0]
        torch.testing.assert_close(compiled(x), dense_attention(x, x, x, chunk_size=4, **FADING)[0])
    torch._dynamo.reset()


class TestLayers:
    """Whole layers against their formulas, in float64."""

    def test_a_block_is_its_formula(self):
        """Convolution, queries, terms that fade, norm, gate and projection of heads, each written out; padding inside."""
        model = decoder(**{**DANET_MODERN, "layer_pattern": "decay", "position_embedding_type": "none"})
        block, mask = model.model.layers[0], torch.tensor([[1, 1, 0, 1, 1, 1, 1, 0, 1], [1] * 9])
        attention, h = block.attention, torch.randn(2, 9, 16, dtype=torch.float64)
        norm = block.pre_norm.weight
        x = norm * h / (h.square().mean(-1, keepdim=True) + 1e-12).sqrt() * mask[..., None]
        y = convolution_reference(x, attention.convolution.weight, mask) * mask[..., None]
        heads = y.unflatten(-1, (2, 8))
        query = (y @ attention.query_proj.weight.T).unflatten(-1, (2, 8))
        lives = torch.tensor(model.config.half_lives) * 2**attention.half_life_shift
        o = brute_force(query, heads, heads, "g", None, True, mask, None, math.log(2) / lives)
        output = attention.output
        o = output.norm.weight * o / (o.square().mean(-1, keepdim=True) + 1e-12).sqrt()
        o = (torch.sigmoid(y @ output.gate_proj.weight.T) * o.flatten(2)) @ output.o_proj.weight.T
        added = torch.relu(o @ block.mlp.up_proj.weight.T) @ block.mlp.down_proj.weight.T
        added = added / (added.abs().amax(-1, keepdim=True) + 1e-3)
        found = block(h, attention_mask=mask)
        torch.testing.assert_close(found[mask.bool()], (h + added)[mask.bool()])

    @pytest.mark.parametrize("code", ["sw", "l", "sl"])
    def test_a_width_of_its_own_is_that_of_a_model(self, code):
        """Beside layers of another width: as if `window_size` were that of the layer."""
        ids = tokens(2, 23)
        own = decoder(layer_pattern=f"{code}:6_g", num_hidden_layers=2, window_size=4)
        general = decoder(layer_pattern=f"{code}_g", num_hidden_layers=2, window_size=6)
        torch.testing.assert_close(own(ids).logits, general(ids).logits, **TOL)
        other = decoder(layer_pattern=f"{code}_g", num_hidden_layers=2, window_size=4)
        assert not torch.allclose(own(ids).logits, other(ids).logits)
        two = decoder(layer_pattern=f"{code}:6_{code}", num_hidden_layers=2, window_size=4).model.layers
        assert [layer.attention.window for layer in two] == [6, 4]

    @pytest.mark.parametrize(
        ("code", "other", "window"), [("softmax:6", "swa@softmax", 6), ("softmax", "swa@softmax", 40)]
    )
    def test_shared_softmax_layers_are_those_of_masks(self, code, other, window):
        """The layer that families share, and Transformers' masks over DANet's own, with grouped keys or not."""
        for groups in (1, 2):
            options = {"softmax_key_value_heads": groups, "window_size": window}
            first, second = (decoder(layer_pattern=f"{name}_g", **options) for name in (code, other))
            assert type(first.model.layers[0].attention) is SoftmaxAttention
            second.load_state_dict(first.state_dict())
            torch.testing.assert_close(first(tokens(2, 23)).logits, second(tokens(2, 23)).logits, **TOL)

    def test_blocks_alone_go_on_from_their_states(self):
        x, mask = torch.randn(2, 12, 16, dtype=torch.float64), torch.tensor([[1, 0] + [1] * 10, [1] * 12])
        made = config(**{**KINDS, **DANET_MODERN, "layer_pattern": "sl:6_decay_sw:6_g", "num_hidden_layers": 4})
        for i, (cut, more) in itertools.product(range(4), [(7, 12), (11, 12)]):
            torch.manual_seed(i)
            block = DanetBlock(made, i).double()
            torch.nn.init.normal_(block.attention.convolution.weight)
            whole = block(x, attention_mask=mask)
            torch.testing.assert_close(whole[:1, mask[0] > 0], block(x[:1, mask[0] > 0]), **TOL)
            first, state = block(x[:, :cut], attention_mask=mask[:, :cut], return_state=True)
            positions = torch.arange(cut, more).expand(2, -1) - torch.tensor([[1], [0]])
            second = block(x[:, cut:more], position_ids=positions, state=state)
            torch.testing.assert_close(torch.cat([first, second], 1)[:, 2:], whole[:, 2:], **TOL)
            with pytest.raises(ValueError, match=rf"layer {i} has 2 tensors.*expected 3"):
                block(x, state=state[:2])

    def test_control_a_convolution_without_its_taps_is_seen(self, monkeypatch):
        monkeypatch.setattr(
            "hf_linear_attn.modeling.shared.layers.short_convolution.last_tokens",
            lambda x, kept, *more: torch.zeros_like(x[:, :kept]),
        )
        with pytest.raises(AssertionError):
            self.test_blocks_alone_go_on_from_their_states()

    def test_maps_stand_at_their_layers(self):
        """Of a shared softmax layer under any attention function; of one through masks under "eager" alone."""
        body = build(DanetModel, **DECODER, layer_pattern="softmax:5_swa@softmax_decay")
        maps = body(tokens(1, 9), use_cache=False, output_attentions=True).attentions
        assert [x is None for x in maps] == [False, True, False]
        torch.testing.assert_close(maps[0].sum(-1), torch.ones(1, 2, 9, dtype=torch.float64))

    def test_autocast_keeps_sums_in_float32(self):
        model = decoder(torch.float32, **{**DANET_MODERN, "layer_pattern": "softmax:5_decay_decay"})
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            output = model(tokens(2, 70), use_cache=True)
            stepped = model(tokens(2, 1), cache=output.cache).logits
        assert output.cache.layers[1].get_state()[0].dtype == torch.float32
        assert output.cache.layers[1].get_state()[0].abs().max() > 0
        assert stepped.isfinite().all()


class TestHalfLives:
    """What is learned of how fast terms fade."""

    def test_they_learn_and_keep_their_place(self, tmp_path):
        """A gradient reaches them; at 0 they are those of the configuration; files keep them, new ones begin at 0."""
        model = build(DanetForCausalLM, dtype=torch.float32, **{**KINDS, "half_lives": [3, 8.0], "conv_kernel": 4})
        attention = model.model.layers[1].attention
        torch.testing.assert_close(attention.decay(), math.log(2) / torch.tensor([3.0, 8.0]))
        model(tokens(2, 40), labels=tokens(2, 40)).loss.backward()
        assert (attention.half_life_shift.grad != 0).all()
        with torch.no_grad():
            for far in (1000.0, -1000.0):
                attention.half_life_shift.fill_(far)
                assert model(tokens(2, 40)).logits.isfinite().all()
            attention.half_life_shift.fill_(1.5)
        model.save_pretrained(tmp_path)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert torch.equal(loaded(tokens(1, 9)).logits, model(tokens(1, 9)).logits)
        more = DanetForCausalLM.from_pretrained(tmp_path, layer_pattern="softmax:5_decay_decay")
        assert not more.model.layers[2].attention.half_life_shift.any()
        assert (more.model.layers[1].attention.half_life_shift == 1.5).all()

    def test_one_head_remembers_a_middle_distance(self):
        assert config(is_causal=True, num_attention_heads=1, layer_pattern="decay").half_lives == [32.0]
        assert config(is_causal=True, num_attention_heads=4, layer_pattern="decay").half_lives[-1] == pytest.approx(512)


class TestConfiguration:
    """What may be said, and what is filled in."""

    def test_kinds_by_code(self):
        made = config(**KINDS, num_hidden_layers=4)
        assert made.layer_kinds == [
            LayerKind("softmax", 5),
            LayerKind("decay"),
            LayerKind("sw", 6),
            LayerKind("softmax", 5),
        ]
        assert made.layer_types == ["hf_linear_attn_state"] * 4
        assert config(layer_pattern="l_g").layer_kinds[:2] == [LayerKind("l", 4), LayerKind("g")]

    def test_todays_configurations_are_as_they_were(self, tmp_path):
        """What is read from a file of before, and which parameters there are."""
        plain = config(is_causal=True, layer_pattern="sw_softmax_g", softmax_attention_heads=2)
        fields = plain.to_dict()
        new = {"half_lives", "conv_kernel", "output_gate", "head_norm", "output_projection"}
        new |= {"softmax_key_value_heads", "softmax_positions"}
        (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in fields.items() if k not in new}))
        assert AutoConfig.from_pretrained(tmp_path).to_dict() | {"_name_or_path": ""} == fields
        names = {name for name, _ in DanetForCausalLM(plain).named_parameters()}
        assert not any(part in name for name in names for part in ("half_life", "convolution", "output"))

    @pytest.mark.parametrize(
        ("options", "version"),
        [
            ({"layer_pattern": "sw_softmax_g"}, 1),
            ({"layer_pattern": "sw:4_g"}, 2),
            ({"layer_pattern": "decay"}, 2),
            ({"layer_pattern": "g", "output_gate": True}, 2),
            ({"layer_pattern": "g", "final_norm": "rmsnorm"}, 2),
            ({"layer_pattern": "g_softmax", "softmax_key_value_heads": 1}, 2),
        ],
        ids=["published", "width", "decay", "gate", "norm", "groups"],
    )
    def test_the_format_number_tells_older_releases(self, options, version, tmp_path):
        build(DanetForCausalLM, **DECODER, **options).save_pretrained(tmp_path)
        assert json.loads((tmp_path / "config.json").read_text())[FORMAT_FIELD] == version
        assert AutoConfig.from_pretrained(tmp_path).layer_kinds == config(**DECODER, **options).layer_kinds

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"layer_pattern": "decoy_g"}, r"'decoy'.*'decay'"),
            ({"layer_pattern": "g:4"}, r"'g:4'.*'sw', 'softmax'.*`window_size`"),
            ({"layer_pattern": "decay:4"}, r"'decay:4'.*have a width"),
            ({"layer_pattern": "swa@softmax:4_g"}, r"'swa@softmax:4'.*'softmax:128'"),
            ({"layer_pattern": "sw:_g"}, r"'sw:'.*'sw:128'"),
            ({"layer_pattern": "sw:-4_g"}, r"'sw:-4'.*'sw:128'"),
            ({"layer_pattern": "sw:5_g"}, r"layer_pattern: sw:5` is 5.*even"),
            ({"layer_pattern": "l:0_g"}, r"layer_pattern: l:0` is 0.*positive"),
            ({"layer_pattern": "sw:99999998_g"}, r"layer_pattern: sw:99999998.*262,144"),
            ({"layer_pattern": "softmax:1_g"}, r"softmax:1` is 1.*at least 2"),
            ({"layer_pattern": "softmax:9"}, "Transformer"),
            ({"layer_pattern": "softmax:9_g", "softmax_attention_heads": None}, r"softmax_attention_heads.*None"),
            ({"layer_pattern": "softmax:9_g", "is_causal": False}, r"'softmax:9' is a causal window"),
            ({"layer_pattern": "decay", "is_causal": False}, r"'decay'.*is_causal"),
            ({"layer_pattern": "decay", "half_lives": [3.0, 0.0]}, r"half_lives.*0.0.*positive"),
            ({"layer_pattern": "decay", "half_lives": [3.0]}, r"half_lives.*1 entries.*=2 heads"),
            ({"conv_kernel": 0}, r"conv_kernel.*0.*at least 1"),
            ({"conv_kernel": 65}, r"conv_kernel.*65.*1 to 64"),
            ({"conv_kernel": 4, "is_causal": False}, r"`conv_kernel` is 4.*is_causal"),
            ({"output_gate": True, "is_causal": False}, r"`output_gate` is True.*is_causal"),
            ({"layer_pattern": "softmax_g", "softmax_key_value_heads": 3}, r"softmax_key_value_heads.*3.*heads` 2"),
            ({"softmax_positions": "learned"}, r"softmax_positions.*'learned'.*'rotary'"),
        ],
    )
    def test_what_cannot_be_built_is_refused(self, options, words):
        with pytest.raises(ValueError, match=words):
            config(**{**DECODER, **options})

    def test_a_decay_of_other_patterns_is_refused(self):
        with pytest.raises(ValueError, match=r"`decay` is of causal global.*'sw'"):
            dense_attention(*tensors(), pattern="sw", window_size=4, is_causal=True, decay=RATES)


class TestPresets:
    """`DanetConfig.preset`, and the command line's."""

    SIZE = {"vocab_size": VOCAB, "hidden_size": 128, "num_hidden_layers": 4}

    @pytest.mark.parametrize("name", ["published", "fixed-state", "hybrid"])
    def test_presets_run(self, name):
        made = DanetConfig.preset(name, **self.SIZE, window_size=16)
        model = DanetForCausalLM(made).eval()
        with torch.no_grad():
            sizes = [model(tokens(1, n), use_cache=True).cache.state_size() for n in (200, 400)]
        assert (sizes[0] == sizes[1]) == (name != "hybrid")

    def test_heads_of_64_features_in_any_width(self):
        made = DanetConfig.preset("hybrid", **{**self.SIZE, "hidden_size": 384})
        assert (made.num_attention_heads, made.softmax_attention_heads) == (6, 6)
        assert (made.initializer_range, made.layer_codes) == (0.05, ["sw", "sw", "sw", "softmax"])
        assert DanetConfig.preset("fixed-state", hidden_size=200).num_attention_heads == 2
        assert DanetConfig.preset("fixed-state", hidden_size=34, num_hidden_layers=2).num_attention_heads == 1
        assert DanetConfig.preset("hybrid", hidden_size=128, num_attention_heads=4).num_attention_heads == 4

    def test_command_line(self):
        def built(**options):
            return build_config(TrainingOptions(family="danet", **options), _Tokenizer())

        made = built(causal=True, preset="hybrid", hidden_size=128, block_length=256)
        assert (made.layer_codes[3], made.window_size, made.scale_length) == ("softmax", 16, 256)
        assert built(causal=True, preset="published").layer_codes == ["sw", "sw", "g", "sw"]
        assert built(causal=True, preset="fixed-state", config=("conv_kernel=4",)).conv_kernel == 4
        with pytest.raises(ValueError, match="preset hybrid of danet is a decoder: give causal"):
            built(preset="hybrid", task="classification")


class _Tokenizer:
    pad_token_id = bos_token_id = eos_token_id = 0

    def __len__(self):
        return 64


def test_a_cache_counts_all_that_it_keeps():
    """Bytes: memories, rings, taps, keys in windows and in Transformers' own layers, counts; only the last grow."""
    sizes = {}
    for last, length in itertools.product(("softmax", "softmax:8"), (20, 40)):
        options = {"layer_pattern": f"decay_sw:6_{last}", "conv_kernel": 4, "softmax_key_value_heads": 1}
        model = decoder(torch.float32, **options)
        cache = RecurrentCache(config=model.config)
        with torch.no_grad():
            model(tokens(1, length), cache=cache)
        sizes[last, length] = cache.state_size()
    dense = (
        4 * (2 * 8 * 8 + 2 * 6 * 16 + 2 * 3 * 16) + 2 * 2 * 8
    )  # a memory, a ring, two times three taps; two counts each
    assert sizes["softmax:8", 20] == sizes["softmax:8", 40] == dense + 4 * 7 * (2 * 8 + 1) + 8
    assert sizes["softmax", 20] == dense + 4 * 20 * 2 * 8
    assert sizes["softmax", 40] - sizes["softmax", 20] == 4 * 20 * 2 * 8


class TestFastPaths:
    """The step kernel was made for the published layer: the others say so, and never run by it."""

    @pytest.mark.parametrize(
        ("options", "reason"),
        [
            ({"layer_pattern": "decay"}, "no terms that fade"),
            ({"layer_pattern": "g", "conv_kernel": 4}, "no short convolution"),
            ({"layer_pattern": "g", "output_gate": True}, "no norm, gate or projection behind the heads"),
        ],
    )
    def test_steps_say_why_not(self, options, reason):
        model = decoder(torch.float32, **options)
        cache = RecurrentCache(config=model.config)
        with torch.no_grad():
            model(tokens(2, 9), cache=cache)
        table = explain_paths(model, {"input_ids": tokens(2, 1), "cache": cache}, False)
        rows = [row for row in table if row.function == "DenseAttention.attend"]
        assert {row.path for row in rows} == {"plain PyTorch"}
        assert len(rows) == 3
        assert all(any(reason in why for why in row.reasons.values()) for row in rows), rows[0].reasons
        with torch.no_grad(), use_backend("triton"), pytest.raises(ValueError, match=reason):
            model.model.layers[0].attention(torch.randn(2, 1, 16), cache=cache, position_ids=torch.tensor([[9]]))

    def test_rows_of_tokens_take_no_kernel_of_sums(self):
        table = explain_paths(decoder(torch.float32, layer_pattern="decay"), {"input_ids": tokens(2, 9)}, training=True)
        assert not [row for row in table if row.function == "causal_attention"]
        assert isinstance(DenseAttention(config(**DECODER, layer_pattern="decay")).decay(), torch.Tensor)
