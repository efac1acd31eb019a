"""LEAP's kinds of layer, its options and its presets: what a configuration may say, what a file holds, and what is learned."""

import json
import math

import pytest
import torch
from common.batches import tokens
from common.families import MODERN, ROWS
from transformers import AutoConfig, AutoModelForCausalLM

from hf_linear_attn import LeapConfig, LeapForCausalLM, RecurrentCache, explain_paths, use_backend
from hf_linear_attn.explain import alignments
from hf_linear_attn.modeling.leap.modeling_leap import LeapAttention, LeapBlock, LeapModel
from hf_linear_attn.modeling.shared.configuration import FORMAT_FIELD, LayerKind
from hf_linear_attn.training.model_choice import build_config
from hf_linear_attn.training.options import TrainingOptions

SIZE = {
    "vocab_size": 64,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "hidden_dropout_prob": 0.0,
}
KINDS = {"layer_windows": ["decay", "softmax:5", "softmax"]}


def config(**options):
    return LeapConfig(**{**SIZE, **options})


def model(dtype=torch.float32, **options):
    torch.manual_seed(0)
    return LeapForCausalLM(config(**options)).eval().to(dtype)


class TestConfiguration:
    """What may be said, and what is filled in."""

    def test_kinds_by_name(self):
        made = config(layer_windows=["global", "decay", "softmax:5"])
        assert made.layer_windows == [None, "decay", "softmax:5"]
        assert made.layer_kinds == [LayerKind("mean"), LayerKind("decay"), LayerKind("softmax", 5)]
        assert made.layer_types == ["hf_linear_attn_state"] * 3
        assert config(**KINDS).layer_types[2] == "full_attention"

    def test_half_lives_span_many_scales(self):
        made = config(num_attention_heads=4, layer_windows=["decay"] * 3)
        assert made.half_lives[0] == 2
        assert made.half_lives[-1] == pytest.approx(512)
        ratios = [b / a for a, b in zip(made.half_lives, made.half_lives[1:])]
        assert ratios == pytest.approx([ratios[0]] * 3)

    def test_todays_configurations_are_as_they_were(self, tmp_path):
        """Defaults, what is read from a file of before, and the format number in a checkpoint."""
        plain = config()
        assert plain.layer_windows == [None, 4, 8]
        assert plain.half_lives is plain.softmax_attention_heads is plain.conv_kernel is None
        fields = plain.to_dict()
        new = {"half_lives", "conv_kernel", "output_gate", "head_norm", "output_projection", "norm_type", "ffn_type"}
        new |= {"softmax_attention_heads", "softmax_key_value_heads", "softmax_positions"}
        (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in fields.items() if k not in new}))
        read = AutoConfig.from_pretrained(tmp_path).to_dict()
        assert read | {"_name_or_path": ""} == fields
        names = {name for name, _ in LeapForCausalLM(plain).named_parameters()}
        assert not any(part in name for name in names for part in ("half_life", "convolution", "output", "q_proj"))

    @pytest.mark.parametrize(
        ("options", "version"),
        [
            ({}, 1),
            ({"layer_windows": [1, 2, 3]}, 1),
            ({"conv_kernel": 4}, 2),
            ({"norm_type": "rmsnorm"}, 2),
            (KINDS, 2),
        ],
        ids=["defaults", "windows", "convolution", "norm", "kinds"],
    )
    def test_the_format_number_tells_older_releases(self, options, version, tmp_path):
        model(**options).save_pretrained(tmp_path)
        assert json.loads((tmp_path / "config.json").read_text())[FORMAT_FIELD] == version
        assert AutoConfig.from_pretrained(tmp_path).layer_kinds == config(**options).layer_kinds

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"layer_windows": [None, "decoy", 4]}, r"layer_windows\[1\].*'decoy'.*'decay'"),
            ({"layer_windows": ["softmax:", 4, 4]}, r"layer_windows\[0\].*'softmax:'.*'softmax:128'"),
            ({"layer_windows": ["softmax:x", 4, 4]}, r"layer_windows\[0\].*'softmax:x'"),
            ({"layer_windows": ["decay:4", 4, 4]}, r"layer_windows\[0\].*'decay:4'"),
            ({"layer_windows": ["softmax:1", 4, 4]}, r"layer_windows\[0\].*softmax:1.*at least 2"),
            ({"layer_windows": [4, "softmax:99999999", 4]}, r"layer_windows\[1\].*262,144"),
            ({"layer_windows": ["decay", 4]}, r"2 entries.*num_hidden_layers"),
            ({"layer_windows": ["softmax"] * 3}, "Transformer"),
            ({"layer_windows": ["decay"] * 3, "half_lives": [3.0, 0.0]}, r"half_lives.*0.0.*positive"),
            ({"layer_windows": ["decay"] * 3, "half_lives": [3.0, float("nan")]}, r"half_lives.*nan.*positive"),
            ({"layer_windows": ["decay"] * 3, "half_lives": [3.0]}, r"half_lives.*1 entries.*=2 heads"),
            ({"conv_kernel": 0}, r"conv_kernel.*0.*at least 1"),
            ({"conv_kernel": 65}, r"conv_kernel.*65.*1 to 64"),
            ({**KINDS, "softmax_attention_heads": 3}, r"softmax_attention_heads.*3.*divides.*hidden_size.*64"),
            ({**KINDS, "softmax_attention_heads": 64}, r"softmax_attention_heads.*64.*even size"),
            ({**KINDS, "softmax_key_value_heads": 4}, r"softmax_key_value_heads.*4.*softmax_attention_heads.*2"),
            ({**KINDS, "softmax_positions": "learned"}, r"softmax_positions.*'learned'.*'rotary'"),
            ({"norm_type": "batchnorm"}, r"norm_type.*'batchnorm'.*'rmsnorm'"),
            ({"ffn_type": "relu"}, r"ffn_type.*'relu'.*'swiglu'"),
        ],
    )
    def test_what_cannot_be_built_is_refused(self, options, words):
        with pytest.raises(ValueError, match=words):
            config(**options)


class TestPresets:
    """`LeapConfig.preset`, and the command line's."""

    def test_published_is_todays_default(self):
        assert LeapConfig.preset("published", **SIZE).to_dict() == config().to_dict()

    @pytest.mark.parametrize("name", ["fixed-state", "hybrid"])
    def test_presets_run(self, name):
        made = LeapConfig.preset(name, **SIZE)
        assert len(made.layer_windows) == 3
        built = LeapForCausalLM(made).eval()
        with torch.no_grad():
            sizes = [built(tokens(1, n), use_cache=True).cache.state_size() for n in (200, 400)]
        assert (sizes[0] == sizes[1]) == (name == "fixed-state")

    def test_overrides(self):
        made = LeapConfig.preset("hybrid", **SIZE, conv_kernel=2, layer_windows=[4, "decay", "softmax"])
        assert (made.conv_kernel, made.layer_windows[0]) == (2, 4)
        assert len(LeapConfig.preset("hybrid", num_hidden_layers=7).layer_windows) == 7
        with pytest.raises(ValueError, match=r"'hybird'.*'fixed-state', 'hybrid'"):
            LeapConfig.preset("hybird")

    def test_command_line(self):
        def built(**options):
            return build_config(TrainingOptions(family="leap", **options), _Tokenizer())

        assert built(preset="hybrid").layer_windows == ["decay", "decay", "softmax", "decay"]
        assert built(preset="published").to_dict() == built(position_embedding="learned").to_dict()
        assert built(windows="decay, 4,softmax:8,global").layer_windows == ["decay", 4, "softmax:8", None]
        assert built(preset="fixed-state", windows="decay,4,8,16").layer_windows == ["decay", 4, 8, 16]
        with pytest.raises(ValueError, match="softmax:one"):
            built(windows="decay,4,softmax:one,global")
        with pytest.raises(ValueError, match="preset hybrid belongs to leap, danet, not to fastformer"):
            build_config(TrainingOptions(family="fastformer", preset="hybrid"), _Tokenizer())
        with pytest.raises(ValueError, match="windows must list"):
            TrainingOptions(family="fastformer", windows="decay,4,8,16")
        with pytest.raises(ValueError, match=r"preset must be one of.*got 'hybird'"):
            TrainingOptions(preset="hybird")


class _Tokenizer:
    pad_token_id = bos_token_id = eos_token_id = 0

    def __len__(self):
        return 64


class TestHalfLives:
    """What is learned of how fast weights fade."""

    def test_a_weight_is_halved_after_its_half_life(self):
        """As the attention rows show it: token 0 seen by tokens a half-life apart."""
        made = config(layer_windows=["decay"], num_hidden_layers=1, half_lives=[3.0, 8.0])
        attention = LeapAttention(made).double().eval()
        with torch.no_grad():
            attention.qfkv_proj.weight[64:128] = 0  # every focus weight is 1
            rows = attention(torch.randn(1, 20, 64, dtype=torch.float64), output_attentions=True).attentions[0]
        for head, life in enumerate((3, 8)):
            shares = rows[head, 19, :20]
            assert shares[19 - life] / shares[19] == pytest.approx(0.5)
            assert shares[19 - 2 * life] / shares[19] == pytest.approx(0.25)

    def test_they_learn_and_keep_their_place(self):
        """A gradient reaches them; at 0 they are those of the configuration; none, however far it goes, gives NaN."""
        built = model(layer_windows=["decay", "decay", 4])
        attention = built.model.layers[1].attention
        torch.testing.assert_close(attention.decay(), math.log(2) / torch.tensor(built.config.half_lives))
        built(tokens(2, 40), labels=tokens(2, 40)).loss.backward()
        assert (attention.half_life_shift.grad != 0).all()
        with torch.no_grad():
            for far in (1000.0, -1000.0):
                attention.half_life_shift.fill_(far)
                assert built(tokens(2, 40)).logits.isfinite().all()

    def test_they_are_loaded_and_new_ones_begin_at_zero(self, tmp_path):
        built = model(layer_windows=["decay", 3, 4], conv_kernel=4)
        with torch.no_grad():
            built.model.layers[0].attention.half_life_shift.fill_(1.5)
            built.model.layers[0].attention.convolution.weight.fill_(0.5)
        built.save_pretrained(tmp_path)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert torch.equal(loaded(tokens(1, 9)).logits, built(tokens(1, 9)).logits)
        wider = LeapForCausalLM.from_pretrained(tmp_path, layer_windows=["decay", "decay", 4])
        assert not wider.model.layers[1].attention.half_life_shift.any()
        assert (wider.model.layers[0].attention.half_life_shift == 1.5).all()


@pytest.mark.parametrize("name", ["leap-decay"])
def test_a_long_text_in_half_precision(name):
    """16 thousand tokens through a whole model in bfloat16: bounded, and as close to float32 as short ones."""
    row = next(row for row in ROWS if row.name == name)
    ids = tokens(1, 1 << 14)
    with torch.no_grad():
        exact = row.causal_lm()(ids, use_cache=False, logits_to_keep=64).logits
        rough = row.causal_lm(torch.bfloat16)(ids, use_cache=False, logits_to_keep=64).logits
        near = (row.causal_lm()(ids[:, :64], use_cache=False).logits, row.causal_lm(torch.bfloat16)(ids[:, :64]).logits)
    assert rough.isfinite().all()
    assert (rough - exact).abs().mean() < 2 * (near[1] - near[0]).abs().mean()


def test_autocast_keeps_sums_in_float32():
    built = model(**MODERN, layer_windows=["decay", "softmax:5", 4])
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        output = built(tokens(2, 70), use_cache=True)
        stepped = built(tokens(2, 1), cache=output.cache).logits
    assert output.cache.layers[0].get_state()[0].dtype == torch.float32
    with torch.no_grad():
        exact = built(tokens(2, 70)).logits
    assert (output.logits.float() - exact).abs().max() < 0.05 * exact.abs().max()
    assert stepped.isfinite().all()


def test_a_block_alone_goes_on_from_its_state():
    made = config(**MODERN, layer_windows=["decay", "softmax:5", 4])
    x, positions = torch.randn(2, 12, 64, dtype=torch.float64), torch.arange(12)[None]
    for i in range(3):
        torch.manual_seed(i)
        block = LeapBlock(made, i).double().eval()
        whole = block(x, position_ids=positions)
        first, state = block(x[:, :7], position_ids=positions[:, :7], return_state=True)
        second = block(x[:, 7:], position_ids=positions[:, 7:], state=state)
        torch.testing.assert_close(torch.cat([first, second], 1), whole)


class TestWhatLayersShow:
    """Maps and weights where some layers are softmax."""

    def test_each_stands_at_its_layer(self):
        body = LeapModel(config(**KINDS)).eval()
        output = body(tokens(1, 9), use_cache=False, output_attentions=True, output_focus_weights=True)
        assert [x is None for x in output.focus_weights] == [False, True, True]
        for rows in output.attentions:
            torch.testing.assert_close(rows.sum(-1), torch.ones(1, 2, 9), atol=1e-4, rtol=0)
        as_tuple = body(tokens(1, 9), use_cache=False, output_focus_weights=True, return_dict=False)
        assert isinstance(as_tuple, tuple)

    def test_softmax_has_no_alignment(self):
        with pytest.raises(ValueError, match=r"layers \[1, 2\].*no alignment"):
            alignments(model(**KINDS), None, "text")


class TestFastPaths:
    """Kernels were made for the published layers: the others say so, and never run by them."""

    @pytest.mark.parametrize(
        ("options", "reason"),
        [
            ({"layer_windows": ["decay"] * 3}, "no weights that fade"),
            ({"conv_kernel": 4}, "no short convolution"),
            ({"output_gate": True}, "no norm, gate or projection behind the heads"),
            ({"layer_windows": ["softmax:5"] * 3}, "SoftmaxAttention, not LEAP's own"),
            ({"ffn_type": "swiglu"}, "SwiGLU, not LEAP's own"),
            ({"norm_type": "rmsnorm"}, "LayerNorm"),
        ],
    )
    def test_blocks_say_why_not(self, options, reason):
        built = model(**options)
        for training in (True, False):
            batch = {"input_ids": tokens(2, 9)}
            if not training:
                cache = RecurrentCache(config=built.config)
                with torch.no_grad():
                    built(tokens(2, 9), cache=cache)
                batch = {"input_ids": tokens(2, 1), "cache": cache}
            rows = [row for row in explain_paths(built, batch, training) if row.function == "LeapBlock.forward"]
            told = [why for row in rows for why in row.reasons.values()]
            assert len(rows) == 3
            assert {row.path for row in rows} == {"plain PyTorch"}
            assert any(reason in why for why in told), told

    def test_the_mechanism_says_why_not(self):
        table = explain_paths(model(layer_windows=["decay"] * 3), {"input_ids": tokens(2, 9)}, training=True)
        rows = [row for row in table if row.function == "leap_mechanism"]
        assert {row.path for row in rows} == {"plain PyTorch"}
        assert all("no weights that fade" in why for row in rows for why in row.reasons.values())

    def test_asking_for_kernels_is_refused(self):
        with use_backend("triton"), pytest.raises(ValueError, match="no weights that fade"):
            model(layer_windows=["decay"] * 3)(tokens(2, 9))
