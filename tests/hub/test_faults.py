"""Damaged files, foreign configurations, a full disk, a broken push, pickles and code that nobody asked for."""

import json
import pickle
import resource
import signal
from pathlib import Path

import pytest
import torch
from common.tiny import FAMILY_ROWS, first_output, one_row_a_family
from hub.fresh_process import run_without_package
from huggingface_hub.errors import HfHubHTTPError
from transformers import AutoConfig, AutoModel


@pytest.fixture
def saved(row, tmp_path):
    """A model and the folder it was saved in."""
    model = row.build("AutoModel")
    model.save_pretrained(tmp_path / "saved")
    return model, tmp_path / "saved"


class TestDamagedWeights:
    """Weights that are not what was saved are an OSError that names the folder."""

    @one_row_a_family
    @pytest.mark.parametrize("kept", [0, 4, 0.5, 0.999], ids=["empty", "length only", "half", "nearly all"])
    def test_truncated(self, saved, kept):
        """A file cut anywhere."""
        weights = saved[1] / "model.safetensors"
        data = weights.read_bytes()
        weights.write_bytes(data[: kept if isinstance(kept, int) else int(kept * len(data))])
        with pytest.raises(OSError, match=r"damaged or cut short"):
            AutoModel.from_pretrained(saved[1])

    @one_row_a_family
    @pytest.mark.parametrize("place", [0, 8, 40], ids=["length", "brace", "header"])
    def test_corrupted_header(self, saved, place):
        """Bytes overwritten in the header."""
        weights = saved[1] / "model.safetensors"
        data = bytearray(weights.read_bytes())
        data[place : place + 8] = b"\xff" * 8
        weights.write_bytes(data)
        with pytest.raises(OSError, match=r"damaged or cut short"):
            AutoModel.from_pretrained(saved[1])

    @one_row_a_family
    def test_missing_shard(self, row, tmp_path):
        """One of several files gone."""
        row.build("AutoModel").save_pretrained(tmp_path, max_shard_size="4KB")
        sorted(tmp_path.glob("*.safetensors"))[1].unlink()
        with pytest.raises(OSError, match="00002-of"):
            AutoModel.from_pretrained(tmp_path)


class TestConfigurations:
    """What this release cannot read is refused, not half understood."""

    def _change(self, folder, **fields):
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    @one_row_a_family
    @pytest.mark.parametrize("version", [3, 0, "1", 1.5])
    def test_another_format(self, saved, version):
        """A newer (or nonsensical) format number names the way out."""
        self._change(saved[1], hf_linear_attn_format=version)
        with pytest.raises(ValueError, match=r"hf_linear_attn_format.*pip install -U"):
            AutoModel.from_pretrained(saved[1])

    @one_row_a_family
    def test_no_format(self, saved):
        """Folders saved without code have no number: they are of the first format."""
        saved[0].save_pretrained(saved[1], include_code=False)
        assert "hf_linear_attn_format" not in json.loads((saved[1] / "config.json").read_text())
        torch.testing.assert_close(first_output(AutoModel.from_pretrained(saved[1]).eval()), first_output(saved[0]))

    @one_row_a_family
    def test_unknown_family(self, saved):
        """A model type that neither Transformers nor this package has."""
        self._change(saved[1], model_type="leapfrog", auto_map=None)
        path = saved[1] / "config.json"
        path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "auto_map"}))
        with pytest.raises(ValueError, match="leapfrog"):
            AutoConfig.from_pretrained(saved[1])

    @one_row_a_family
    def test_not_json(self, saved):
        """A configuration cut short."""
        path = saved[1] / "config.json"
        path.write_text(path.read_text()[:40])
        with pytest.raises(OSError, match=r"config\.json.*valid JSON"):
            AutoModel.from_pretrained(saved[1])


def contents(folder):
    """Every file of a folder, and what is in it."""
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class TestFullDisk:
    """A save that cannot finish leaves the checkpoint that was there."""

    @staticmethod
    def save_with_little_room(model, folder, **options):
        """Save while no file may grow beyond 2 KB, as if the disk were full."""
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2048, hard))
        try:
            model.save_pretrained(folder, **options)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            signal.signal(signal.SIGXFSZ, handler)

    @one_row_a_family
    @pytest.mark.parametrize("options", [{}, {"include_code": False}, {"max_shard_size": "4KB"}], ids=str)
    def test_previous_checkpoint_survives(self, saved, row, options):
        """The error says so, nothing of the attempt stays, and the old weights load."""
        before = contents(saved[1])
        with pytest.raises(OSError, match=r"could not be written.*unchanged"):
            self.save_with_little_room(row.build("AutoModel", seed=1), saved[1], **options)
        assert contents(saved[1]) == before
        torch.testing.assert_close(first_output(AutoModel.from_pretrained(saved[1]).eval()), first_output(saved[0]))

    @one_row_a_family
    def test_whole_and_sharded_replace_each_other(self, saved, row):
        """No file of an earlier save is left to be loaded in place of the new one's."""
        for seed, size in ((1, "4KB"), (2, "1GB"), (3, "4KB")):
            newer = row.build("AutoModel", seed=seed)
            newer.save_pretrained(saved[1], max_shard_size=size)
            torch.testing.assert_close(first_output(AutoModel.from_pretrained(saved[1]).eval()), first_output(newer))


class TestBrokenPush:
    """A push that fails leaves the repository as it was; trying again gives one commit."""

    @one_row_a_family
    @pytest.mark.parametrize(
        "failure",
        [("PUT", "/_lfs/"), ("POST", "/_lfs/verify"), ("POST", "/preupload/"), ("POST", "/commit/")],
        ids=["upload", "verification", "announcement", "commit"],
    )
    def test_retry_gives_one_commit(self, hub, row, failure):
        """Whichever request breaks."""
        first, second = row.build("AutoModel", seed=1), row.build("AutoModel", seed=2)
        first.push_to_hub("user/model")
        before = hub.commits("user/model")[:]
        hub.failures = [failure]
        with pytest.raises((HfHubHTTPError, RuntimeError)):
            second.push_to_hub("user/model")
        assert not hub.failures
        assert hub.commits("user/model") == before
        second.push_to_hub("user/model")
        assert len(hub.commits("user/model")) == len(before) + 1
        loaded = AutoModel.from_pretrained("user/model").eval()
        torch.testing.assert_close(first_output(loaded), first_output(second), rtol=0, atol=0)


class Bomb:
    """An object whose unpickling leaves a file behind."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (open, (self.path, "w"))


class TestPickle:
    """Pickled weights are never opened."""

    @one_row_a_family
    @pytest.mark.parametrize("options", [{}, {"use_safetensors": False}, {"weights_only": False}], ids=str)
    def test_never_loaded(self, saved, tmp_path, options):
        """A folder that has nothing else is refused, however one asks."""
        (saved[1] / "model.safetensors").unlink()
        (saved[1] / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(tmp_path / "ran")))
        with pytest.raises((OSError, ValueError), match="never loaded"):
            AutoModel.from_pretrained(saved[1], **options)
        assert not (tmp_path / "ran").exists()

    def test_never_fetched(self, hub, monkeypatch):
        """Nor is one downloaded from a repository that has nothing else."""
        monkeypatch.setenv("DISABLE_SAFETENSORS_CONVERSION", "1")
        FAMILY_ROWS[0].build("AutoModel").push_to_hub("user/model")
        files = hub.commits("user/model")[-1]["files"]
        files["pytorch_model.bin"] = files.pop("model.safetensors")
        with pytest.raises(OSError, match="safetensors"):
            AutoModel.from_pretrained("user/model")
        assert not [path for _, path, _ in hub.log if path.endswith("pytorch_model.bin")]


class TestUnwantedCode:
    """Code in a checkpoint runs only for who asked for it."""

    def _spoil(self, folder, marker):
        files = list((folder / "code").glob("*.py"))
        assert files
        for path in files:
            path.write_text(f"open({str(marker)!r}, 'w')\n" + path.read_text())

    @one_row_a_family
    @pytest.mark.parametrize("trust", [None, False, True])
    def test_installed_package_wins(self, saved, tmp_path, trust):
        """With the package imported the carried copy is never run, even with `trust_remote_code=True`."""
        self._spoil(saved[1], tmp_path / "ran")
        loaded = AutoModel.from_pretrained(saved[1], trust_remote_code=trust).eval()
        assert type(loaded) is type(saved[0])
        assert not (tmp_path / "ran").exists()

    def test_refused_unless_trusted(self, tmp_path):
        """Without the package, and without being asked, nothing runs: the error tells what to set."""
        folder = tmp_path / "saved"
        FAMILY_ROWS[0].build("AutoModel").save_pretrained(folder)
        self._spoil(folder, tmp_path / "ran")
        script = Path(__file__).with_name("untrusting_loader.py")
        done = run_without_package(script, folder, folder=tmp_path)
        lines = [line for line in done.stdout.splitlines() if "outcome: " in line]
        assert len(lines) == 4, done.stderr[-2000:]
        assert all("outcome: ValueError" in line and "trust_remote_code=True" in line for line in lines), lines
        assert not (tmp_path / "ran").exists()
