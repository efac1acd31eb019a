"""What sharding and device maps read of a model: the blocks that stay whole, and the layers of the FSDP plan."""

import fnmatch

import pytest
from common.families import ROWS
from sea.hosts import HOSTS, make_student


def blocks_that_stay_whole(model) -> list[str]:
    """Names of the modules whose classes `_no_split_modules` lists."""
    return [name for name, module in model.named_modules() if type(module).__name__ in (model._no_split_modules or ())]


# SEA's layers are its host's, under the host's names: see the last test.
own_layers = pytest.mark.parametrize("row", [row for row in ROWS if row.family != "sea"], ids=lambda row: row.name)


@own_layers
def test_every_layer_is_a_block(row):
    """One block a layer, and no parameter of a layer outside of them."""
    model = row.build("AutoModel")
    blocks = blocks_that_stay_whole(model)
    assert len(blocks) == model.config.num_hidden_layers
    inside = [name for name, _ in model.named_parameters() if any(name.startswith(f"{b}.") for b in blocks)]
    outside = [name for name, _ in model.named_parameters() if name not in inside]
    assert not [name for name in outside if "layers." in name]


@own_layers
def test_the_plan_names_what_there_is(row):
    """Transformers' own FSDP2 shards by the configuration's plan: every layer, and only modules that exist."""
    model = row.build("AutoModel")
    names = [name for name, _ in model.named_modules()]
    for pattern in model.config.base_model_fsdp_plan:
        if isinstance(pattern, str):
            assert fnmatch.filter(names, pattern), pattern
    layers = [f"layers.{i}" for i in range(model.config.num_hidden_layers)]
    patterns = [pattern for pattern in model.config.base_model_fsdp_plan if isinstance(pattern, str)]
    assert all(any(fnmatch.fnmatch(layer, pattern) for pattern in patterns) for layer in layers)


@pytest.mark.parametrize("host", HOSTS)
def test_sea_keeps_its_hosts_blocks_whole(host):
    """SEA's parameters lie in the host's blocks, which stay whole."""
    model = make_student(host)
    blocks = blocks_that_stay_whole(model)
    cores = [name for name, module in model.named_modules() if type(module).__name__ == "SeaAttentionCore"]
    assert len(cores) == model.config.num_hidden_layers
    assert all(sum(name.startswith(f"{block}.") for block in blocks) == 1 for name in cores)
