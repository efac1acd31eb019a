"""Every family and head goes to the Hub and comes back the same, with everything `push_to_hub` offers."""

import json
import re

import pytest
import torch
import transformers
from common.tiny import FAMILY_ROWS, first_output, one_row_a_family, some_ids, two_heads_often
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError
from transformers import AutoConfig, AutoModel, AutoTokenizer, Trainer, TrainingArguments

from hf_linear_attn.families import FAMILIES
from hf_linear_attn.hub import PushCodeCallback

pytestmark = pytest.mark.long


def auto(head):
    """The Auto class of this name."""
    return getattr(transformers, head)


@two_heads_often
def test_every_head_comes_back_with_its_tokenizer(hub, tokenizer, row, head):
    """Equal outputs, equal ids, the same classes; and no code is downloaded where this package is imported."""
    model = row.build(head)
    model.push_to_hub("user/model")
    tokenizer.push_to_hub("user/model")
    loaded = auto(head).from_pretrained("user/model").eval()
    assert type(loaded) is type(model)
    torch.testing.assert_close(first_output(loaded), first_output(model), rtol=0, atol=0)
    assert AutoTokenizer.from_pretrained("user/model")("w5 w9").input_ids == tokenizer("w5 w9").input_ids
    assert not [path for method, path, _ in hub.log if method == "GET" and path.endswith(".py")]


@one_row_a_family
def test_the_repository_holds_code_and_a_complete_map(hub, row):
    """`auto_map` names the configuration, and every head of the family's row in the registration table."""
    row.build("AutoModel").push_to_hub("user/model")
    files = hub.files("user/model")
    auto_map = json.loads(files["config.json"])["auto_map"]
    assert set(auto_map) == {"AutoConfig", *FAMILIES[row.family].heads}
    for reference in auto_map.values():
        file, name = reference.split(".")
        assert re.search(rf"^(class {name}\(|    {name},$)", files[f"{file}.py"].decode(), re.MULTILINE), reference


@one_row_a_family
def test_a_body_is_found_in_a_headed_checkpoint(hub, row):
    """The body of a headed checkpoint loads by itself, with the same hidden states."""
    model = row.build("AutoModelForSequenceClassification")
    model.push_to_hub("user/model")
    body = AutoModel.from_pretrained("user/model").eval()
    torch.testing.assert_close(first_output(body), first_output(model.base_model), rtol=0, atol=0)


@one_row_a_family
def test_branch_tag_and_commit(hub, row):
    """A push to a branch leaves main alone; branch, tag and commit id all name their own weights."""
    first, second = row.build("AutoModel", seed=1), row.build("AutoModel", seed=2)
    commit = first.push_to_hub("user/model")
    HfApi().create_tag("user/model", tag="v1", revision=commit.oid)
    second.push_to_hub("user/model", revision="trial")
    for revision, expected in (("main", first), ("v1", first), (commit.oid, first), ("trial", second)):
        loaded = AutoModel.from_pretrained("user/model", revision=revision).eval()
        torch.testing.assert_close(first_output(loaded), first_output(expected), rtol=0, atol=0)


@one_row_a_family
def test_pull_request(hub, row):
    """`create_pr=True` leaves main alone; the request's own revision loads."""
    first, second = row.build("AutoModel", seed=1), row.build("AutoModel", seed=2)
    first.push_to_hub("user/model")
    opened = second.push_to_hub("user/model", create_pr=True)
    assert len(hub.commits("user/model")) == 2
    loaded = AutoModel.from_pretrained("user/model", revision=opened.pr_revision).eval()
    torch.testing.assert_close(first_output(loaded), first_output(second), rtol=0, atol=0)


@one_row_a_family
def test_private(hub, row, tmp_path):
    """A private repository loads with its token, and is not found without."""
    row.build("AutoModel").push_to_hub("user/secret", private=True)
    AutoModel.from_pretrained("user/secret")
    with pytest.raises(OSError, match="user/secret"):
        AutoModel.from_pretrained("user/secret", token=False, cache_dir=tmp_path / "of somebody else")


@one_row_a_family
def test_pushing_the_same_again_makes_no_commit(hub, row):
    """Nothing changed, nothing committed; one changed weight, one commit."""
    model = row.build("AutoModel")
    model.push_to_hub("user/model")
    before = len(hub.commits("user/model"))
    model.push_to_hub("user/model")
    assert len(hub.commits("user/model")) == before
    with torch.no_grad():
        next(model.parameters()).add_(1)
    model.push_to_hub("user/model")
    assert len(hub.commits("user/model")) == before + 1


@one_row_a_family
def test_several_shards(hub, row):
    """A checkpoint in several safetensors files comes back whole."""
    model = row.build("AutoModel")
    model.push_to_hub("user/model", max_shard_size="4KB")
    files = hub.files("user/model")
    assert "model.safetensors.index.json" in files
    assert sum(name.endswith(".safetensors") for name in files) > 1
    loaded = AutoModel.from_pretrained("user/model").eval()
    torch.testing.assert_close(first_output(loaded), first_output(model), rtol=0, atol=0)


def test_a_wrong_token_is_refused(hub):
    """The Hub's refusal arrives, and nothing is made."""
    model = first_row().build("AutoModel")
    with pytest.raises(HfHubHTTPError, match="401"):
        model.push_to_hub("user/model", token="hf_wrong")
    assert not hub.repos


def test_a_missing_repository_is_named(hub):
    """The name that was asked for is in the message."""
    with pytest.raises(OSError, match="user/nothing"):
        AutoModel.from_pretrained("user/nothing")
    first_row().build("AutoModel").push_to_hub("user/model")
    with pytest.raises(OSError, match="no-such-branch"):
        AutoConfig.from_pretrained("user/model", revision="no-such-branch")


def test_trainer_pushes_each_save_with_its_code(hub, tokenizer, tmp_path):
    """`Trainer(push_to_hub=True)`: pushes while training are complete with our callback, the last one also without."""
    row = first_row()
    data = [{"input_ids": some_ids()[0], "labels": some_ids()[0]} for _ in range(4)]

    def train(name, callbacks):
        arguments = TrainingArguments(
            str(tmp_path / name), push_to_hub=True, hub_model_id=f"user/{name}", max_steps=2, save_steps=1, use_cpu=True,
            disable_tqdm=True, hub_always_push=True,
        )  # fmt: skip
        trainer = Trainer(
            row.causal_lm(), arguments, train_dataset=data, processing_class=tokenizer, callbacks=callbacks
        )
        trainer.train()
        return trainer

    train("during", [PushCodeCallback()])
    for commit in hub.commits("user/during"):
        if "config.json" in commit["files"]:
            assert f"code/modeling_{row.family}.py" in commit["files"], commit["title"]
    trainer = train("after", [])
    trainer.push_to_hub()
    files = hub.files("user/after")
    assert {"README.md", "tokenizer.json", "model.safetensors", f"code/modeling_{row.family}.py"} <= set(files)
    loaded = auto("AutoModelForCausalLM").from_pretrained("user/after").eval()
    torch.testing.assert_close(first_output(loaded), first_output(trainer.model.eval()), rtol=0, atol=0)


def first_row():
    """Any causal family: for what does not depend on it."""
    return next(row for row in FAMILY_ROWS if row.causal)
