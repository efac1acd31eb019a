"""Saving over a checkpoint: stopped or read at any moment, the folder holds the old one or the new one, never a mixture."""

import errno
import json
import os
import shutil
import signal
import threading
import time

import pytest
import torch
from common.tiny import FAMILY_ROWS, some_ids, word_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from hf_linear_attn import FastformerConfig, FastformerModel, LeapConfig, LeapForCausalLM, LeapModel
from hf_linear_attn.hub import add_code
from hf_linear_attn.modeling.shared.files import whole_files
from hf_linear_attn.modeling.shared.files.whole_files import write_whole

SMALL, WHOLE = {"max_shard_size": "2KB"}, {}
link = os.link


def numbered(number: int, width: int = 8, kind=LeapForCausalLM, **fields):
    """A model that has its number in configuration, weights and generation settings."""
    sizes = {"vocab_size": 31, "hidden_size": width, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = kind.config_class(**sizes, initializer_range=float(number), pad_token_id=0, **fields)
    model = kind(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float(number))
    if kind is LeapForCausalLM:
        model.generation_config.update(do_sample=True, temperature=1.0 + number)
    return model


def number_of(model) -> int:
    """The number of a model of `numbered`; a mixture fails."""
    number = model.config.initializer_range
    assert {float(x) for p in model.parameters() for x in p.detach().unique()} == {number}
    if model.can_generate():
        assert model.generation_config.temperature == 1.0 + number
    return int(number)


def number_in(folder, auto_class=AutoModelForCausalLM) -> int:
    """The number of the model in a folder."""
    return number_of(auto_class.from_pretrained(folder))


@pytest.fixture
def after_each_operation(monkeypatch):
    """Call a function after each change of a file's name in this process; the test begins by setting it."""
    hook = {"call": None}

    def hooked(original):
        def operate(*args, **kwargs):
            result = original(*args, **kwargs)
            if hook["call"] is not None:
                hook["call"]()
            return result

        return operate

    for name in ("replace", "link", "unlink", "rmdir"):
        monkeypatch.setattr(os, name, hooked(getattr(os, name)))
    return hook


def states_of(folder, hook, save) -> list:
    """Copies of `folder` as it is after the operations of `save()`: what a kill would leave, files of nobody included.

    Operations that change nothing but a staging folder to which nothing points are left out.
    """
    copies, seen = [], []

    def keep():
        config = (folder / "config.json").read_text()
        entries = [path for path in folder.iterdir() if path.is_file()]
        entries += [path for used in folder.iterdir() if used.name in config for path in used.rglob("*")]
        state = sorted((str(path), path.stat().st_ino) for path in entries)
        if not seen or state != seen[-1]:
            seen.append(state)
            hook["call"] = None
            copies.append(folder.with_name(f"{folder.name}-{len(copies)}"))
            shutil.copytree(folder, copies[-1], copy_function=link)
            hook["call"] = keep

    hook["call"] = keep
    save()
    hook["call"] = None
    return copies


CHANGES = {
    "same sizes": (8, WHOLE, WHOLE),
    "another width": (16, WHOLE, WHOLE),
    "whole to shards": (16, WHOLE, SMALL),
    "shards to whole": (16, SMALL, WHOLE),
    "shards to shards": (8, SMALL, SMALL),
}


@pytest.mark.parametrize(
    "change",
    ["another width", "whole to shards", "shards to whole", pytest.param("shards to shards", marks=pytest.mark.slow)],
)
def test_killed_after_any_operation(tmp_path, after_each_operation, change):
    """Each state that a kill can leave loads as one of the two, and the next save leaves nothing of the killed one."""
    width, before, after = CHANGES[change]
    folder = tmp_path / "model"
    numbered(1).save_pretrained(folder, **before)
    newer = numbered(2, width)
    states = states_of(folder, after_each_operation, lambda: newer.save_pretrained(folder, **after))
    found = [number_in(state) for state in states]
    assert found == sorted(found)
    assert {1, 2} == set(found)
    assert number_in(folder) == 2
    switched = found.index(2)
    for state in (states[switched - 1], states[switched], states[switched + 2]):
        numbered(3).save_pretrained(state)
        assert number_in(state) == 3
        names = {path.name for path in state.iterdir()}
        assert names == {"code", "config.json", "generation_config.json", "model.safetensors"}


@pytest.mark.parametrize(("change", "auto"), [("same sizes", True), ("same sizes", False), ("whole to shards", False)])
def test_read_at_any_moment(tmp_path, monkeypatch, auto, change):
    """A load between whose configuration and weights a save goes on, by one operation or to its end, mixes nothing."""
    width, before, after = CHANGES[change]
    folder, found, refused = tmp_path / "model", [], []
    replace, from_dict = os.replace, LeapConfig.from_dict.__func__
    may_go, went = threading.Semaphore(0), threading.Semaphore(0)
    state = {"saver": None, "pending": 0}

    def one_at_a_time(*args):
        if threading.current_thread() is state["saver"]:
            went.release()
            may_go.acquire()
        return replace(*args)

    def save(model):
        model.save_pretrained(folder, **after)
        state["done"] = True
        went.release()

    def advance():
        if not state["done"]:
            may_go.release()
            went.acquire()

    def read_then_let_save(cls, *args, **kwargs):
        made = from_dict(cls, *args, **kwargs)
        while threading.current_thread() is not state["saver"] and state["pending"]:
            state["pending"] -= 1
            advance()
        return made

    monkeypatch.setattr(os, "replace", one_at_a_time)
    monkeypatch.setattr(LeapConfig, "from_dict", classmethod(read_then_let_save))
    for count in (1, 100):
        numbered(1).save_pretrained(folder, **before)
        state |= {"done": False, "saver": threading.Thread(target=save, args=(numbered(2, width),))}
        state["saver"].start()
        went.acquire()
        while not state["done"]:
            state["pending"] = count
            try:
                found.append(number_in(folder, AutoModelForCausalLM if auto else LeapForCausalLM))
            except OSError as error:
                refused.append(str(error))
            if state["pending"] == count:  # refused before it read
                advance()
        state["saver"].join()
        state["pending"] = 0
        assert number_in(folder) == 2
    assert set(found) == {2}  # each load was overtaken
    assert all("load both again" in text for text in refused)
    assert bool(refused) == auto


def test_a_safetensors_file_replaced_between_its_two_openings(tmp_path, monkeypatch):
    """The reader of safetensors opens a name more than once: where another file came between, loading begins again."""
    numbered(1).save_pretrained(tmp_path)
    newer, original = numbered(1), LeapForCausalLM._load_pretrained_model
    with torch.no_grad():
        newer.lm_head.weight.fill_(5.0)
    loads = []

    def load(*args, **kwargs):
        loads.append(1)
        result = original(*args, **kwargs)
        if len(loads) == 1:
            newer.save_pretrained(tmp_path)
        return result

    monkeypatch.setattr(LeapForCausalLM, "_load_pretrained_model", load)
    assert float(LeapForCausalLM.from_pretrained(tmp_path).lm_head.weight[0, 0]) == 5.0
    assert len(loads) == 2


def test_a_configuration_of_ones_own_is_taken(tmp_path):
    """One that was changed, copied or read elsewhere is the caller's business; one of a checkpoint since replaced is not."""
    numbered(1).save_pretrained(tmp_path / "a")
    numbered(2).save_pretrained(tmp_path / "b")
    config = AutoConfig.from_pretrained(tmp_path / "a")
    AutoModelForCausalLM.from_pretrained(tmp_path / "b", config=config)
    config.attention_dropout = 0.5
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "a", config=config).config.attention_dropout == 0.5
    numbered(3).save_pretrained(tmp_path / "a")
    with pytest.raises(OSError, match="saved over after its configuration was read"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "a", config=config)


class TestErrorsAtAnyOperation:
    """An operation that fails: the message says which checkpoint is there, and it is; nothing is left lying about."""

    def test_one_failure(self, tmp_path, monkeypatch):
        """Every operation of the replacement in turn."""
        new, outcomes, countdown = numbered(2, 16), set(), [0]
        numbered(1).save_pretrained(tmp_path / "old")

        def failing(original):
            def operate(*args, **kwargs):
                countdown[0] -= 1
                if countdown[0] == 0:
                    raise OSError(errno.EIO, "made to fail")
                return original(*args, **kwargs)

            return operate

        for name in ("replace", "link", "fsync"):
            monkeypatch.setattr(os, name, failing(getattr(os, name)))
        for n in range(1, 100, 2):
            folder = tmp_path / f"copy-{n}"
            shutil.copytree(tmp_path / "old", folder, copy_function=link)
            countdown[0], text = n, ""
            try:
                new.save_pretrained(folder, **SMALL)
            except OSError as error:
                text = str(error)
            if countdown[0] > 0:
                break
            found = number_in(folder)
            assert found == (1 if "unchanged" in text else 2), text
            assert not list(folder.glob("*saving*"))
            outcomes.add((found, bool(text)))
        assert outcomes == {(1, True), (2, True)}
        assert not text

    def test_a_folder_in_the_way(self, tmp_path):
        """Nothing is touched."""
        numbered(2).save_pretrained(tmp_path / "shards", **SMALL)
        numbered(1).save_pretrained(tmp_path)
        (tmp_path / min(path.name for path in (tmp_path / "shards").glob("*.safetensors"))).mkdir()
        with pytest.raises(OSError, match="unchanged"):
            numbered(2).save_pretrained(tmp_path, **SMALL)
        assert number_in(tmp_path) == 1


class TestWhatStays:
    """Files of the earlier checkpoint go, others stay."""

    def test_another_family_and_own_files(self, tmp_path):
        """No code, weights or generation settings of the earlier one; everything else as it was."""
        numbered(1).save_pretrained(tmp_path, **SMALL)
        own = {
            "notes.txt": "x",
            "own.py": "y",
            "model_card.md": "z",
            "other.safetensors": "w",
            "code/own.py": "u",
            "extra/model.safetensors": "v",
        }
        (tmp_path / "extra").mkdir()
        for name, text in own.items():
            (tmp_path / name).write_text(text)
        word_tokenizer().save_pretrained(tmp_path)
        sizes = {"vocab_size": 31, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
        FastformerModel(FastformerConfig(**sizes)).save_pretrained(tmp_path)
        fresh = tmp_path / "fresh"
        FastformerModel(FastformerConfig(**sizes)).save_pretrained(fresh)
        tokenizer = {"tokenizer.json", "tokenizer_config.json"}
        files = whole_files.files_in(tmp_path)
        assert files - tokenizer == whole_files.files_in(fresh) | {n for n in own if not n.startswith("extra/")}
        assert {name: (tmp_path / name).read_text() for name in own} == own

    def test_over_a_checkpoint_of_transformers(self, tmp_path, after_each_operation):
        """A Llama in the folder is replaced in the same way."""
        sizes = {"vocab_size": 31, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
        LlamaForCausalLM(LlamaConfig(**sizes, intermediate_size=8)).save_pretrained(tmp_path / "model")
        states = states_of(
            tmp_path / "model", after_each_operation, lambda: numbered(2).save_pretrained(tmp_path / "model")
        )
        states = [*states[:3], *states[3:-3:8], *states[-3:]]  # most move one file of code
        types = [AutoModelForCausalLM.from_pretrained(state).config.model_type for state in states]
        assert types == sorted(types, reverse=True)
        assert set(types) == {"llama", "leap"}
        assert number_in(tmp_path / "model") == 2

    def test_variants_stay_apart(self, tmp_path):
        """Weights of a variant and those without one are files of their own, in shards or not."""
        numbered(1).save_pretrained(tmp_path)
        numbered(1).save_pretrained(tmp_path, variant="other", **SMALL)
        numbered(1).save_pretrained(tmp_path, variant="other")
        weights = {path.name for path in tmp_path.iterdir() if path.suffix == ".safetensors" or "index" in path.name}
        assert weights == {"model.safetensors", "model.other.safetensors"}

    def test_a_body_over_a_language_model(self, tmp_path):
        """Its generation settings were the earlier one's."""
        numbered(1).save_pretrained(tmp_path)
        numbered(2, kind=LeapModel).save_pretrained(tmp_path)
        assert not (tmp_path / "generation_config.json").exists()

    def test_equal_files_are_not_written_again(self, tmp_path):
        """The same model again replaces its weights alone, by one rename."""
        numbered(1).save_pretrained(tmp_path)
        before = {path.name: path.stat().st_ino for path in tmp_path.iterdir()}
        numbered(1).save_pretrained(tmp_path)
        after = {path.name: path.stat().st_ino for path in tmp_path.iterdir()}
        assert {name for name in before if after[name] != before[name]} == {"model.safetensors"}

    @pytest.mark.parametrize("place", ["relative", "link", "current"])
    def test_other_ways_to_name_a_folder(self, tmp_path, monkeypatch, place):
        """A relative path, a symbolic link, the current folder."""
        (tmp_path / "real").mkdir()
        (tmp_path / "link").symlink_to(tmp_path / "real")
        monkeypatch.chdir(tmp_path / "real" if place == "current" else tmp_path)
        named = {"relative": "real", "link": str(tmp_path / "link"), "current": "."}[place]
        for number in (1, 2):
            numbered(number).save_pretrained(named, **(SMALL if number == 2 else WHOLE))
            assert number_in(tmp_path / "real") == number_in(named) == number
        assert (tmp_path / "link").is_symlink()


class TestLeftovers:
    """What killed saves left is removed, what living ones are at is not."""

    def test_swept_unless_its_process_lives(self, tmp_path):
        """Also that of release 0.1.0."""
        numbered(1).save_pretrained(tmp_path)
        for name in (".saving-abcd_123", "saving-in-progress-01234567", "saving-in-progress-kept"):
            (tmp_path / name).mkdir()
        with whole_files.staging_folder(tmp_path) as living:
            numbered(2).save_pretrained(tmp_path)
            names = {path.name for path in tmp_path.iterdir() if path.is_dir()}
            assert names == {"code", living.name, "saving-in-progress-kept"}  # the last is nobody's name

    def test_a_killed_process(self, tmp_path):
        """SIGKILL while it saves, again and again: one of the two, and nothing left after the next save."""
        numbered(1).save_pretrained(tmp_path)
        ends = []
        for delay in (0.0, 0.01, 0.03):
            start, started = os.pipe()
            process = os.fork()
            if process == 0:
                while True:
                    for number in (1, 2):
                        os.write(started, b"x")
                        numbered(number, 8 * number).save_pretrained(tmp_path)
            os.read(start, 1), os.read(start, 1)
            time.sleep(delay)
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
            ends.append(number_in(tmp_path))
        assert set(ends) <= {1, 2}
        numbered(3).save_pretrained(tmp_path)
        assert number_in(tmp_path) == 3
        assert not list(tmp_path.glob("*saving*"))

    def test_two_at_once(self, tmp_path):
        """Savers of one folder take turns."""
        numbered(1).save_pretrained(tmp_path)
        models = [numbered(2, 8), numbered(3, 16)]
        threads = [
            threading.Thread(target=lambda m=m: [m.save_pretrained(tmp_path, max_shard_size="2KB") for _ in range(3)])
            for m in models
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert number_in(tmp_path) in (2, 3)
        assert not list(tmp_path.glob("*saving*"))


def test_pushing_while_saving(hub, tmp_path):
    """`push_to_hub=True` uploads what was saved, its code too, and a push that fails leaves the saved model."""
    folder = tmp_path / "model"
    numbered(1).save_pretrained(folder)
    (folder / "notes.txt").write_text("my own")
    numbered(2).save_pretrained(folder, push_to_hub=True, repo_id="user/model", commit_message="second")
    files = hub.files("user/model")
    assert {"config.json", "model.safetensors", "code/modeling_leap.py", "README.md"} <= set(files)
    assert "notes.txt" not in files
    assert hub.commits("user/model")[-1]["title"] == "second"
    assert number_in("user/model") == number_in(folder) == 2
    hub.failures = [("POST", "/commit/")]
    with pytest.raises(Exception, match=r"500|commit"):
        numbered(3).save_pretrained(folder, push_to_hub=True, repo_id="user/model")
    assert number_in(folder) == 3


def test_code_is_completed_at_one_stroke(tmp_path, after_each_operation):
    """`add_code` killed at any moment leaves a checkpoint that loads, and no code of another release is half replaced."""
    folder = tmp_path / "model"
    numbered(1).save_pretrained(folder)
    for path in (folder / "code").glob("*.py"):
        path.write_text("raise ImportError('of an older release')\n" + path.read_text())
    states = states_of(folder, after_each_operation, lambda: add_code(folder))
    kinds = []
    assert {number_in(state) for state in (*states[:3], *states[-3:])} == {1}
    for state in states:
        file = json.loads((state / "config.json").read_text())["auto_map"]["AutoModelForCausalLM"].partition(".")[0]
        code = (state / f"{file}.py").parent
        kinds.append({path.read_text().startswith("raise") for path in code.glob("*.py")})
    assert kinds[0] == {True}
    assert kinds[-1] == {False}
    assert all(len(kind) == 1 for kind in kinds)


class TestOneFile:
    """`write_whole`."""

    def test_an_error_leaves_the_old_one(self, tmp_path):
        """And no part of the new one."""
        path = tmp_path / "file.txt"
        path.write_text("old")

        def write(part):
            part.write_text("half")
            raise ValueError

        with pytest.raises(ValueError, match=r"^$"):
            write_whole(path, write)
        assert path.read_text() == "old"
        assert os.listdir(tmp_path) == ["file.txt"]

    def test_links_modes_and_pipes(self, tmp_path):
        """As writing in place treats them."""
        path, link, pipe = tmp_path / "file.txt", tmp_path / "link", tmp_path / "pipe"
        path.write_text("old")
        path.chmod(0o640)
        link.symlink_to(path)
        write_whole(link, lambda part: part.write_text("new"))
        assert link.is_symlink()
        assert path.read_text() == "new"
        assert path.stat().st_mode & 0o777 == 0o640
        os.mkfifo(pipe)
        reader = threading.Thread(target=lambda: got.append(pipe.read_text()))
        got = []
        reader.start()
        write_whole(pipe, lambda part: part.write_text("through"))
        reader.join()
        assert got == ["through"]


def test_states_are_replaced_whole(tmp_path, monkeypatch):
    """A conversation saved over an earlier one: an error in the middle leaves that."""
    row = next(row for row in FAMILY_ROWS if row.causal)
    model = row.causal_lm().eval()
    cache = model(some_ids(), use_cache=True).cache
    cache.save(tmp_path / "state")
    before = (tmp_path / "state").read_bytes()
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
    with pytest.raises(OSError, match="full"):
        cache.save(tmp_path / "state")
    assert (tmp_path / "state").read_bytes() == before
    assert os.listdir(tmp_path) == ["state"]
