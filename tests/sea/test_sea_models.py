import json
import pickle
from pathlib import Path
from threading import Thread
from unittest.mock import patch

import pytest
import torch
from torch.utils._pytree import tree_flatten, tree_unflatten
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, T5Config

import hf_linear_attn
from hf_linear_attn import SeaConfig
from hf_linear_attn.cli.main import main
from hf_linear_attn.conversion import linearize
from hf_linear_attn.modeling.sea import pretrained
from hf_linear_attn.modeling.sea.host_attention import Distillation
from hf_linear_attn.modeling.sea.hosts import padding_known
from hf_linear_attn.modeling.sea.losses import TeacherTargets
from hf_linear_attn.modeling.shared.configuration import FORMAT_FIELD
from hf_linear_attn.modeling.shared.files.exporter import export_code
from hf_linear_attn.pipelines import QuestionAnsweringPipeline

from .hosts import HOSTS, host_config, make_ids, make_student, make_teacher

TASKS = {
    "bert": [
        "AutoModel",
        "AutoModelForMaskedLM",
        "AutoModelForSequenceClassification",
        "AutoModelForTokenClassification",
        "AutoModelForQuestionAnswering",
    ],
    "llama": [
        "AutoModel",
        "AutoModelForCausalLM",
        "AutoModelForSequenceClassification",
        "AutoModelForTokenClassification",
        "AutoModelForQuestionAnswering",
    ],
    "opt": ["AutoModel", "AutoModelForCausalLM", "AutoModelForSequenceClassification", "AutoModelForQuestionAnswering"],
    "gpt2": [
        "AutoModel",
        "AutoModelForCausalLM",
        "AutoModelForSequenceClassification",
        "AutoModelForTokenClassification",
        "AutoModelForQuestionAnswering",
    ],
}
EVERY = [(host, task) for host, tasks in TASKS.items() for task in tasks]


def results(output):
    """The tensors of an output that a task is about."""
    names = ("logits", "start_logits", "end_logits", "last_hidden_state", "pooler_output")
    return {name: output[name] for name in names if output.get(name) is not None}


@pytest.mark.parametrize(("host", "task"), EVERY)
def test_with_everything_kept_and_gates_open_it_is_the_teacher(host, task):
    teacher = make_teacher(host, task)
    student = make_student(host, task, k=64, open_gates=True)
    ids, mask = make_ids(), torch.ones(2, 20, dtype=torch.long)
    mask[1, 15:] = 0
    ids[1, 15:] = 0
    for arguments in ({"input_ids": ids[:, :15]}, {"input_ids": ids, "attention_mask": mask}):
        ours, theirs = results(student(**arguments)), results(teacher(**arguments))
        assert ours.keys() == theirs.keys() != set()
        for name, value in theirs.items():
            if value.dim() == 3 or name.endswith("_logits"):  # a prediction a token: padded ones do not count
                real = arguments.get("attention_mask", torch.ones_like(arguments["input_ids"])).bool()
                value, ours[name] = value[real], ours[name][real]
            torch.testing.assert_close(ours[name], value, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(("host", "task"), EVERY)
def test_every_weight_of_the_host_is_carried_over_and_tied_ones_stay_tied(host, task):
    teacher = make_teacher(host, task)
    student = linearize(teacher, "sea", k=4, predictor_length=16)
    ours, theirs = student.host_model.state_dict(), teacher.state_dict()
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())
    extra = set(ours) - set(theirs)
    assert extra
    assert all(".sea." in name for name in extra)
    assert teacher.config._attn_implementation != student.config.host_config._attn_implementation
    if teacher.get_output_embeddings() is not None and teacher.config.tie_word_embeddings:
        assert student.get_output_embeddings().weight is student.get_input_embeddings().weight


@pytest.mark.parametrize("host", HOSTS)
def test_saved_models_load_through_the_auto_classes(host, tmp_path):
    student = make_student(host, softmax_layers=[1])
    student.save_pretrained(tmp_path)
    auto = AutoModelForMaskedLM if host == "bert" else AutoModelForCausalLM
    loaded, info = auto.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is type(student)
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ids = make_ids()
    assert torch.equal(loaded.eval()(ids).logits, student(ids).logits)
    configs = [AutoConfig.from_pretrained(tmp_path).to_dict(), student.config.to_dict()]
    for config in configs:
        assert config.pop("architectures") == [type(student).__name__]
        config.pop("_name_or_path")
        config.pop("auto_map", None)  # a checkpoint names the code that it carries
        config.pop(FORMAT_FIELD, None)
    assert configs[0] == configs[1]
    body, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not [name for name in info["missing_keys"] if "pooler" not in name]
    hidden = student(ids, output_hidden_states=True).hidden_states
    torch.testing.assert_close(body.eval()(ids, output_hidden_states=True).hidden_states[1], hidden[1])
    path_twin = linearize_from_disk(make_teacher(host), tmp_path / "teacher")
    assert type(path_twin) is type(student)


@pytest.mark.parametrize(
    "published",
    [{"temperature": 0.9, "top_p": 0.6}, {"pad_token_id": -1}, {"max_length": 40, "eos_token_id": [1, 2]}],
)
@pytest.mark.parametrize("where", ["generation_config.json", "config.json"])
def test_generation_settings_of_a_published_host_are_kept_and_can_be_saved(published, where, tmp_path):
    """Vicuna 1.5 and LLaMA 1 hold what Transformers would refuse in a new configuration."""
    make_teacher("llama").save_pretrained(tmp_path)
    fields = json.loads((tmp_path / where).read_text()) if where == "config.json" else {}
    if where == "config.json":
        (tmp_path / "generation_config.json").unlink()
    (tmp_path / where).write_text(json.dumps(fields | published))
    teacher = AutoModelForCausalLM.from_pretrained(tmp_path)
    student = linearize(teacher, "sea", k=4, predictor_length=16)
    for name, model in (("teacher", teacher), ("student", student)):
        model.save_pretrained(tmp_path / name)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    again.save_pretrained(tmp_path / "again")
    wanted = AutoModelForCausalLM.from_pretrained(tmp_path / "teacher").generation_config
    assert again.generation_config.to_diff_dict() == wanted.to_diff_dict()
    kept = again.generation_config.to_diff_dict()
    assert {name: kept[name] for name in published} == published
    assert main(["convert", "--to", "sea", str(tmp_path), str(tmp_path / "command")]) == 0
    assert (tmp_path / "command" / "model.safetensors").is_file()


def linearize_from_disk(teacher, path):
    teacher.save_pretrained(path)
    return linearize(path, "sea", k=4, predictor_length=16)


@pytest.mark.parametrize("host", HOSTS)
def test_fresh_models_draw_the_initial_values_of_the_design(host):
    teacher = make_teacher(host)
    student = linearize(teacher, "sea", k=4, predictor_length=16)
    for core in student.sea_layers().values():
        assert (core.scaler.bias == 4).all()
        assert (core.scaler.weight == 0).all()
        assert (core.encoder.norm.weight == 1).all()
        assert 0.5 < core.random_features.norm(dim=-1).mean() / core.random_features.shape[1] ** 0.5 < 2
        if host != "bert":
            assert 0.8 < core.position_table.std() < 1.2
    official = linearize(teacher, "sea", k=4, predictor_length=16, official=True)
    assert (official.sea_layers()[0].scaler.bias == 0).all()


@pytest.mark.parametrize("host", HOSTS)
def test_chosen_layers_keep_softmax_attention(host):
    teacher, ids = make_teacher(host), make_ids()
    both = linearize(teacher, "sea", k=4, predictor_length=16, softmax_layers=[0, 1])
    assert not both.sea_layers()
    torch.testing.assert_close(both(ids).logits, teacher(ids).logits, atol=2e-5, rtol=1e-4)
    one = make_student(host, softmax_layers=[0])
    assert list(one.sea_layers()) == [1]
    hidden = one(ids, output_hidden_states=True, output_attentions=True)
    expected = teacher(ids, output_hidden_states=True)
    torch.testing.assert_close(hidden.hidden_states[1], expected.hidden_states[1], atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(hidden.attentions[0].sum(-1), torch.ones(2, hidden.attentions[0].shape[1], 20))
    looked = one(ids, output_attentions=True, output_sea=True)
    assert [x is None for x in looked.estimated_attentions] == [x is None for x in looked.kept_keys] == [True, False]


@pytest.mark.parametrize("host", HOSTS)
def test_attention_estimate_and_cells_can_be_looked_at(host):
    student, ids = make_student(host), make_ids()
    output = student(ids, output_attentions=True, output_sea=True)
    heads = student.config.num_attention_heads
    assert len(output.attentions) == len(output.estimated_attentions) == len(output.kept_cells) == 2
    assert output.attentions[0].shape == (2, heads, 20, 20)
    assert output.estimated_attentions[0].shape == output.kept_cells[0].shape == (2, heads, 20, 16)
    assert (output.attentions[0] >= 0).all()
    assert (output.attentions[0].sum(-1) <= 1 + 1e-5).all()
    plain = student(ids)
    torch.testing.assert_close(plain.logits, output.logits, atol=1e-5, rtol=1e-4)
    assert plain.get("attentions") is None
    assert "estimated_attentions" not in plain


@pytest.mark.parametrize("host", HOSTS)
def test_outputs_can_be_taken_apart_and_built_again(host):
    """DistributedDataParallel does that with every output."""
    output = make_student(host)(make_ids(), output_sea=True)
    leaves, structure = tree_flatten(output)
    again = tree_unflatten(leaves, structure)
    assert type(again) is type(output)
    assert list(again) == list(output)
    assert again.kept_cells[1] is output.kept_cells[1]


def test_targets_give_a_loss_for_each_layer():
    student, ids = make_student("llama"), make_ids()
    heads = {i: TeacherTargets(scores=torch.randn(2, 4, 20, 20), context=torch.randn(2, 20, 16)) for i in (0, 1)}
    output = student(ids, distillation=Distillation(heads, measure=True))
    assert [sorted(terms) for terms in output.attention_losses] == [
        ["context_mse", "estimate_kl", "estimate_mse", "student_kl", "student_mse"]
    ] * 2
    assert student(ids, distillation=Distillation({1: heads[1]})).attention_losses[0] == {}
    assert 0 < output.fidelity[0]["top_k_recall"] < 1


def test_sparsity_can_change_after_training():
    student, ids = make_student("bert", k=2), make_ids()
    few = student(ids, output_sea=True).kept_cells[0].sum()
    student.set_sparsity(5)
    assert student(ids, output_sea=True).kept_cells[0].sum() > few
    assert student.config.k == 5


NOT_SEA = ("sdpa", "flex_attention", "paged|eager", {"host_config": "sdpa"}, {"": "sdpa"})


@pytest.mark.parametrize("host", HOSTS)
def test_no_switch_of_transformers_makes_the_attention_dense(host, tmp_path):
    """Users set "eager" to get maps; whatever they set, and wherever, it stays SEA or is refused."""
    ids, expected = make_ids(), make_student(host)(make_ids()).logits
    make_student(host).save_pretrained(tmp_path, include_code=False)
    auto = AutoModelForMaskedLM if host == "bert" else AutoModelForCausalLM

    def configured(model, config, asked):
        config._attn_implementation = asked
        return model

    def switched(model, part, asked):
        part.set_attn_implementation(asked)
        return model

    def ways(asked):
        model = make_student(host)
        yield lambda: switched(model, model, asked)
        yield lambda: configured(model, model.config, asked)
        if not isinstance(asked, dict):
            yield lambda: switched(model, model.host_model, asked)
            yield lambda: configured(model, model.config.host_config, asked)
        if asked != {"host_config": "sdpa"}:  # says nothing but what the host's own configuration may say
            yield lambda: auto.from_pretrained(tmp_path, attn_implementation=asked).eval()

    for way in ways("eager"):
        assert torch.equal(way()(ids).logits, expected)
    assert make_student(host).host_model.config._attn_implementation == "hf_linear_attn_sea"
    for asked in NOT_SEA:
        for way in ways(asked):
            with pytest.raises(ValueError, match=r"attn_implementation|does not support"):
                way()(ids)
    model = make_student(host)
    for asked in ("eager", "sdpa"):
        model.host_model.set_attn_implementation(asked)
        with pytest.raises(ValueError, match="belongs to a SEA model"):
            model.host_model(ids)
    model.set_attn_implementation("eager")
    assert torch.equal(model(ids).logits, expected)


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("of_host", [False, True])
def test_maps_and_hidden_states_are_switched_on_in_either_configuration(host, of_host):
    student, ids = make_student(host), make_ids()
    config = student.config.host_config if of_host else student.config
    if of_host:
        config._attn_implementation = "eager"  # Transformers lets nobody ask for maps under another name
    config.output_attentions = config.output_hidden_states = True
    output = student(ids)
    assert [len(output.attentions), len(output.hidden_states)] == [2, 3]
    without = student(ids, output_attentions=False, output_hidden_states=False)
    assert without.get("attentions") is without.get("hidden_states") is None
    torch.testing.assert_close(without.logits, output.logits, atol=1e-5, rtol=1e-4)


def test_a_dtype_in_the_hosts_configuration_does_not_mix_two():
    """A host's config.json names the dtype that its weights had; a new model has one dtype throughout."""
    for dtype in (torch.float32, torch.bfloat16):
        config = hf_linear_attn.SeaConfig(host_config=host_config("llama", dtype="bfloat16"), predictor_length=16)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert {p.dtype for p in hf_linear_attn.SeaForCausalLM(config).parameters()} == {torch.float32}


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("pad", [0, 2, None])
def test_a_classifier_reads_each_text_at_its_end(host, pad):
    """Padding on any side, ids or embeddings, a text that ends with the padding id, and no padding id at all."""
    student = make_student(host, "AutoModelForSequenceClassification")
    student.config.pad_token_id = pad
    text, gap = make_ids(1, 9), torch.full((1, 4), pad or 0)
    text[0, -1] = 2
    expected = student(text, attention_mask=torch.ones(1, 9)).logits.expand(3, -1)
    batch = [[gap, text], [text, gap], [text[:, :3], gap, text[:, 3:]]]
    ids = torch.cat([torch.cat(row, 1) for row in batch])
    mask = torch.ones(3, 13)
    mask[0, :4] = mask[1, 9:] = mask[2, 3:7] = 0
    embeds = student.get_input_embeddings()(ids)
    for given in ({"input_ids": ids}, {"inputs_embeds": embeds}):
        output = student(**given, attention_mask=mask, labels=torch.tensor([1, 0, 1]), output_sea=True)
        torch.testing.assert_close(output.logits, expected, atol=1e-5, rtol=1e-4)
        wanted = torch.nn.functional.cross_entropy(expected, torch.tensor([1, 0, 1]))
        torch.testing.assert_close(output.loss, wanted, atol=1e-5, rtol=1e-4)
        assert len(output.kept_cells) == 2


def test_a_resized_host_is_a_resized_model(tmp_path):
    student = make_student("llama")
    student.host_model.resize_token_embeddings(44)
    student.save_pretrained(tmp_path, include_code=False)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.vocab_size == student.config.vocab_size == 44
    assert loaded(make_ids() + 4).logits.shape[-1] == 44


def test_number_of_labels_follows_the_host_and_the_keyword():
    config = hf_linear_attn.SeaConfig(host_config=host_config("bert", num_labels=5))
    assert config.num_labels == 5
    config = hf_linear_attn.SeaConfig(host_config=host_config("bert"), num_labels=3)
    assert config.num_labels == config.host_config.num_labels == 3
    config.pad_token_id = 7
    assert config.host_config.pad_token_id == 7


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"host_config": T5Config()},
            r"cannot be put into a model of type 't5'; supported hosts: bert, gpt2, llama, opt",
        ),
        ({"host_config": host_config("llama"), "predictor_length": 18}, "multiple of 4"),
        ({"host_config": host_config("llama"), "topk_group": "batch"}, "`topk_group` is 'batch', expected one of"),
        ({"host_config": host_config("llama"), "k": 0}, "`k` is 0, expected a positive"),
        ({"host_config": host_config("bert"), "softmax_layers": [2]}, "layers 0 to 1"),
        ({"host_config": host_config("bert", is_decoder=True)}, "is_decoder=True"),
        ({"host_config": host_config("gpt2", add_cross_attention=True)}, "add_cross_attention"),
        ({"host_config": {"hidden_size": 4}}, "must name its `model_type`"),
        ({"host_config": host_config("bert"), "feature_redraw_interval": -1}, "feature_redraw_interval"),
    ],
)
def test_configurations_that_cannot_work_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        hf_linear_attn.SeaConfig(**options)


def test_inputs_that_cannot_work_are_refused():
    student, ids = make_student("gpt2"), make_ids()
    with pytest.raises(TypeError, match="atention_mask"):
        student(ids, atention_mask=torch.ones(2, 20))
    with pytest.raises(ValueError, match="is_causal=False"):
        student(ids, is_causal=False)
    with pytest.raises(ValueError, match="exactly one of"):
        student(ids, inputs_embeds=torch.zeros(2, 20, 16))
    with pytest.raises(ValueError, match="attention_mask"):
        student(ids, attention_mask=torch.ones(2, 1, 20, 20))
    with pytest.raises(ValueError, match="70 tokens"):
        student(make_ids(1, 70))
    with pytest.raises(ValueError, match="vocabulary has ids 0 to 39"):
        student(ids + 30)
    with pytest.raises(ValueError, match="SEA model: call that model"):
        student.host(ids)
    with pytest.raises(ValueError, match="cannot generate"):
        hf_linear_attn.SeaForCausalLM(hf_linear_attn.SeaConfig(host_config=host_config("bert")))
    with pytest.raises(ValueError, match="no ForTokenClassification model for the host 'opt'"):
        hf_linear_attn.SeaForTokenClassification(hf_linear_attn.SeaConfig(host_config=host_config("opt")))
    with pytest.raises(ValueError, match="unknown option"):
        linearize(make_teacher("bert"), "sea", windows=3)
    with pytest.raises(ValueError, match="turned into sea, hedgehog only"):
        linearize(make_teacher("bert"), "leap")
    with pytest.raises(ValueError, match="leave them out"):
        linearize(make_teacher("bert"), "sea", dtype=torch.float16)
    with pytest.raises(ValueError, match="`model` is a Linear"):
        linearize(torch.nn.Linear(2, 2), "sea")
    with pytest.raises(ValueError, match="`hidden_size` belongs to the host"):
        hf_linear_attn.SeaConfig(hidden_size=32)
    with pytest.raises(TypeError, match="encoder_hidden_states"):
        student(ids, encoder_hidden_states=torch.zeros(2, 3, 16))
    with pytest.raises(ValueError, match="the teacher's `scores`"):
        student(ids, distillation=Distillation({0: TeacherTargets(scores=torch.zeros(2, 2, 9, 9))}))
    batch, length = ids.shape
    fit = {0: TeacherTargets(scores=torch.zeros(batch, 2, length, length))}
    with pytest.raises(ValueError, match=r"layers \[2\], but the student has 0 to 1"):
        student(ids, distillation=Distillation(fit | {2: fit[0]}))
    for rows in ([length], [-1], []):
        with pytest.raises(ValueError, match="loss_rows"):
            student(ids, distillation=Distillation(fit, torch.tensor(rows, dtype=torch.long)))
    student.set_sparsity(3)
    with pytest.raises(ValueError, match="`k` is 0, expected a positive integer"):
        student.set_sparsity(0)
    assert student.config.k == 3


def test_another_thread_pools_its_own_rows():
    """A server's threads share a model: one call's padding says nothing about the rows of another."""
    student = make_student("bert", "AutoModelForSequenceClassification").eval()
    row, mask, found = make_ids()[:1], torch.ones(2, 20, dtype=torch.bool), []
    mask[:, :5] = False
    expected = student(row).logits
    with padding_known(mask):
        other = Thread(target=lambda: found.append(student(row).logits))
        other.start()
        other.join()
    assert torch.equal(found[0], expected)


def test_a_pickled_bert_student_still_knows_its_padding():
    """What its modules know of padding lies in their classes, and goes where the model goes."""
    student = make_student("bert", "AutoModelForSequenceClassification").eval()
    ids, mask = make_ids(), torch.ones(2, 20, dtype=torch.long)
    mask[0, :7] = mask[1, 12:] = 0
    again = pickle.loads(pickle.dumps(student))
    assert torch.equal(again(ids, attention_mask=mask).logits, student(ids, attention_mask=mask).logits)
    alone = again(ids[:1, 7:]).logits
    torch.testing.assert_close(again(ids, attention_mask=mask).logits[:1], alone, atol=1e-5, rtol=1e-4)


def test_the_code_of_an_encoder_generates_nothing(tmp_path):
    """What only a causal language model needs travels with that alone."""
    needed = {}
    for host in ("bert", "llama"):
        entry = SeaConfig(host_config=host_config(host)).modeling_file
        needed[entry] = {
            path.stem for path in export_code(Path(pretrained.__file__).with_name(f"{entry}.py"), tmp_path)
        }
    generating = {"shared_causal_lm", "shared_states_generation", "shared_kernels_decoding_graph"}
    assert not generating & needed["modeling_sea"]
    assert generating <= needed["modeling_sea_causal"]


@pytest.mark.parametrize("host", ["opt", "gpt2"])
def test_hosts_that_run_all_their_layers_write_no_draft_with_the_first(host):
    student = make_student(host)
    with pytest.raises(ValueError, match="assistant_early_exit"):
        student.generate(make_ids(1, 6), max_new_tokens=3, assistant_early_exit=1)
    assert student.config.num_hidden_layers == 2


def test_pickled_weights_of_a_host_are_never_opened(tmp_path, capsys):
    host, named = tmp_path / "host", "pickled weights (pytorch_model.bin)"
    teacher = make_teacher("llama")
    teacher.save_pretrained(host)
    (host / "model.safetensors").unlink()
    torch.save(teacher.state_dict(), host / "pytorch_model.bin")
    opened = patch("torch.load", side_effect=AssertionError("a pickle was opened"))
    with opened, pytest.raises(OSError, match=r"only pickled weights \(pytorch_model\.bin\).*save_pretrained"):
        linearize(host, "sea", k=4, predictor_length=16)
    calls = [
        ["convert", "--to", "sea", str(host), str(tmp_path / "converted")],
        ["convert", "--to", "onnx", str(host), str(tmp_path / "step")],
        ["distill", "--teacher", str(host), "--data", str(host / "config.json"), "--output", str(tmp_path / "student")],
        ["generate", str(host), "x"],
        ["evaluate", str(host)],
        ["bench", str(host)],
    ]
    for call in calls:
        with opened:
            assert main(call) == 1, call
        assert named in "".join(capsys.readouterr()), call
    with opened, pytest.raises(ValueError, match="use_safetensors=False"):
        QuestionAnsweringPipeline.from_pretrained(host, use_safetensors=False)
