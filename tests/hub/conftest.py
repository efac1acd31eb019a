"""A Hub on this machine, and this process talking to it instead of to huggingface.co."""

import pytest
import transformers.utils.hub
from common.tiny import word_tokenizer
from hub.fake_hub import FakeHub
from huggingface_hub import constants, hf_api


def point_to(hub: FakeHub, monkeypatch: pytest.MonkeyPatch, cache) -> None:
    """Make the Hub's client in this process, whose addresses were read at import, use `hub` with the right token."""
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(hf_api.api, "endpoint", hub.url)
    monkeypatch.setattr(transformers.utils.hub, "_hf_api", None)
    monkeypatch.setenv("HF_TOKEN", hub.token)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """An empty Hub that this process is logged in to."""
    with FakeHub() as running:
        point_to(running, monkeypatch, tmp_path / "hub-cache")
        yield running


@pytest.fixture
def tokenizer():
    """Words of one vocabulary, as a real tokenizer object."""
    return word_tokenizer()
