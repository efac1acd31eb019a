"""A pushed checkpoint needs nothing but Transformers: all heads load from their own code where this package is absent."""

import json
from pathlib import Path

import pytest
import torch
from common.tiny import first_output, some_ids, two_heads_often
from hub.conftest import point_to
from hub.fake_hub import FakeHub
from hub.fresh_process import run_without_package

from hf_linear_attn.families import FAMILIES

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def answers(request, tmp_path_factory):
    """What one fresh process without the package found for every family and head that this run asks about."""
    asked = [item.callspec.params for item in request.session.items if "answers" in getattr(item, "fixturenames", ())]
    folder = tmp_path_factory.mktemp("without-package")
    with FakeHub() as hub:
        requests = []
        with pytest.MonkeyPatch.context() as patch:
            point_to(hub, patch, folder / "cache")
            for row, head in ((params["row"], params["head"]) for params in asked):
                name = f"{row.family}-{head}"
                row.build(head).push_to_hub(f"user/{name}")
                causal = head == "AutoModelForCausalLM"
                # What is saved differs between heads in their weights and map alone: one a family is loaded from it.
                requests.append({"name": name, "repo": f"user/{name}", "head": head, "causal": causal, "again": causal})
        work = {"ids": some_ids().tolist(), "requests": requests}
        (folder / "requests.json").write_text(json.dumps(work))
        script, found = Path(__file__).with_name("remote_loader.py"), folder / "answers.json"
        done = run_without_package(
            script, folder / "requests.json", found, folder=folder, HF_ENDPOINT=hub.url, HF_TOKEN=hub.token
        )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(found.read_text())


@two_heads_often
def test_loads_computes_and_saves_again(answers, row, head):
    """The same outputs and tokens as here, a complete map in what the fresh process saves, and the same again from that."""
    found = answers[f"{row.family}-{head}"]
    assert "error" not in found, found["error"]
    assert found["module"].startswith("transformers_modules.")
    model = row.build(head)
    expected = first_output(model)
    for when in ("loaded", "saved again") if head == "AutoModelForCausalLM" else ("loaded",):
        torch.testing.assert_close(torch.tensor(found[when]["first"]), expected, rtol=1e-5, atol=1e-5)
    if head == "AutoModelForCausalLM":
        tokens = model.generate(some_ids(), max_new_tokens=6, do_sample=False, pad_token_id=0).tolist()
        assert found["loaded"]["generated"] == tokens
        assert found["saved again"]["generated"] == tokens
    heads = set(FAMILIES[row.family].heads)
    if hasattr(model.config, "modeling_file") and not model.config.is_causal:
        heads.remove("AutoModelForCausalLM")  # an encoder's checkpoint does not carry the code of one
    assert set(found["auto_map"]) == {"AutoConfig", *heads}
