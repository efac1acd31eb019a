"""What sharding and device maps read of a model: the blocks that stay whole, and the layers of the FSDP plan."""

import fnmatch
import re

import pytest
from common.families import ROWS
from sea.hosts import HOSTS, host_config, make_student
from transformers import PreTrainedModel


def blocks_that_stay_whole(model) -> list[str]:
    """Names of the modules whose classes `_no_split_modules` lists."""
    return [name for name, module in model.named_modules() if type(module).__name__ in (model._no_split_modules or ())]


every_row = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)


@every_row
def test_every_layer_is_a_block(row):
    """One block a layer, and no parameter of a layer outside of them."""
    model = row.build("AutoModel")
    blocks = blocks_that_stay_whole(model)
    layers = [block for block in blocks if block[-1].isdigit()]  # BERT keeps its embeddings whole, too
    assert len(layers) == model.config.num_hidden_layers
    inside = [name for name, _ in model.named_parameters() if any(name.startswith(f"{b}.") for b in blocks)]
    outside = [name for name, _ in model.named_parameters() if name not in inside]
    assert not [name for name in outside if re.search(r"\.\d+\.", name)]


@every_row
def test_blocks_are_of_classes_that_there_are(row):
    """Accelerate's FSDP refuses a name that it does not find, such as that of a hybrid's softmax block without one."""
    for model in (row.build("AutoModel"), row.build("AutoModelForSequenceClassification")):
        assert set(model._no_split_modules) <= {type(module).__name__ for module in model.modules()}


@every_row
def test_the_plan_names_what_there_is(row):
    """Transformers' own FSDP2 shards by the configuration's plan: every layer, and only modules that exist."""
    model = row.build("AutoModel")
    check_plan(model, [pattern for pattern in model.config.base_model_fsdp_plan if isinstance(pattern, str)])


@pytest.mark.skipif(not hasattr(PreTrainedModel, "_fsdp_plan"), reason="this transformers gathers no plan on models")
@pytest.mark.parametrize("task", [None, "AutoModel"])
@pytest.mark.parametrize("host", HOSTS)
def test_sea_models_gather_the_plan_of_their_host(host, task):
    """Where the layers lie depends on the host and on whether it has a head: what a model gathers fits all of them."""
    model = make_student(host, task)
    check_plan(model, model._fsdp_plan)


@pytest.mark.parametrize("host", HOSTS)
def test_sea_changes_no_other_models_plan(host):
    """The host's plan is corrected in the copy that SEA holds, not for its class."""
    before = dict(type(host_config(host)).base_model_fsdp_plan)
    config = make_student(host).config
    assert type(config.host_config).base_model_fsdp_plan == before
    assert "base_model_fsdp_plan" not in str(config.to_dict())


def check_plan(model, patterns) -> None:
    """Every pattern names a module, and every block is named by one."""
    names = [name for name, _ in model.named_modules()]
    assert not [pattern for pattern in patterns if not fnmatch.filter(names, pattern)]
    assert all(any(fnmatch.fnmatch(block, pattern) for pattern in patterns) for block in blocks_that_stay_whole(model))


@pytest.mark.parametrize("host", HOSTS)
def test_sea_keeps_its_hosts_blocks_whole(host):
    """SEA's parameters lie in the host's blocks, which stay whole."""
    model = make_student(host)
    blocks = blocks_that_stay_whole(model)
    cores = [name for name, module in model.named_modules() if type(module).__name__ == "SeaAttentionCore"]
    assert len(cores) == model.config.num_hidden_layers
    assert all(sum(name.startswith(f"{block}.") for block in blocks) == 1 for name in cores)
