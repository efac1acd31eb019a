"""The output folder of a run: which run it holds, where it goes on, and how a new run takes the place of an earlier one.

Nothing is removed before what replaces it is complete. A checkpoint is written in a folder of its own and moved to its name
when it is on the disk. A run that overwrites another one leaves it alone until its own first checkpoint is there; one renamed
file, the options with the mark of their run, then decides whose folder it is.
"""

import json
import os
import re
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import TrainerState

from ..modeling.shared.files.whole_files import flush
from .checkpoints import CarriedOver, checkpoint_damage, checkpoints
from .distill_options import DistillOptions
from .files import WEIGHTS, WEIGHTS_INDEX, damage, model_files
from .measuring import peak_memory_mb
from .options import TrainingOptions

UNFINISHED = ".unfinished"
KINDS = (TrainingOptions, DistillOptions)


class RunFolder(CarriedOver):
    """Folder of the run that `options` describe, and the callback that moves its checkpoints into place.

    Constructing it changes nothing. It refuses a folder that cannot be written (OSError), and to mix two runs: ValueError for an
    earlier run where neither resume nor overwrite is given, for a folder with a model that no run wrote, and for a run to resume
    of which no checkpoint is whole.

    Args:
        options: of the run.
        report_file: name of the report, the last file that a run writes.
        sources: models and tokenizers that the run reads; they must not be what it would replace.
    """

    def __init__(self, options: TrainingOptions | DistillOptions, report_file: str, sources: Iterable[str | None] = ()):
        self.options, self.report_file = options, report_file
        self.path = Path(options.output)
        self.unfinished = self.path / UNFINISHED
        self.run_id: str | None = uuid.uuid4().hex
        self.seconds, self.peak_memory_mb = 0.0, 0.0
        self.checkpoint: Path | None = None  # where a resumed run goes on
        self._started: float | None = None
        self._holds_ours = options.resume
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"output={options.output!r} is a file, not a folder")
        if not options.resume:
            _refuse_unwritable(self.path)
        if options.resume:
            self.run_id = type(options).load_marked(self.path)[1]
            self.checkpoint = self._whole_checkpoint()
        else:
            self._check_free(sources)

    @property
    def step(self) -> int:
        """Steps that are done at `checkpoint`."""
        return 0 if self.checkpoint is None else int(self.checkpoint.name.removeprefix("checkpoint-"))

    def finished_report(self) -> dict[str, Any] | None:
        """Report of the run to resume if it has ended and its model is there, with a line that says so; else None."""
        if not self.options.resume or damage(self.path, [*model_files(self.path), self.report_file]):
            return None
        report = json.loads((self.path / self.report_file).read_text(encoding="utf-8"))
        told, free = report.get("options") or {}, self.options.free_on_resume - {"final_eval_tokens"}
        if any(told.get(name) != value for name, value in asdict(self.options).items() if name not in free):
            return None
        print(f"the run in {self.path} is finished after {report.get('steps')} steps: nothing is left to do")
        return report

    def start(self) -> None:
        """Claim the folder. Call it when everything is checked: what an earlier run left stays until `on_save`, unless that was
        nothing to go on from.
        """
        if self._started is not None:
            return
        self._started = time.perf_counter()
        if os.environ.get("RANK", "0") != "0":  # of several processes the first one claims it
            return
        self.path.mkdir(parents=True, exist_ok=True)
        if not self.options.resume and (self.path / self.options.file_name).exists():
            self._adopt_unfinished(_mark_of_options(self.path / self.options.file_name))
        shutil.rmtree(self.unfinished, ignore_errors=True)
        if not self._holds_ours and not checkpoints(self.path) and not _has_model(self.path):
            self._claim()

    def withdraw(self) -> None:
        """After an error: leave no trace of a run that has saved nothing, so that the next start is not refused."""
        if self._started is None:
            return
        shutil.rmtree(self.unfinished, ignore_errors=True)
        if self.options.resume or not self._holds_ours or checkpoints(self.path):
            return
        (self.path / self.options.file_name).unlink(missing_ok=True)
        if not any(self.path.iterdir()):
            self.path.rmdir()

    def values(self) -> dict[str, Any]:
        """Mark of the run, seconds and memory so far."""
        now = 0.0 if self._started is None else time.perf_counter() - self._started
        return {
            "run_id": self.run_id,
            "seconds": self.seconds + now,
            "peak_memory_mb": max(self.peak_memory_mb, peak_memory_mb()),
        }

    def take_over(self, values: dict[str, Any]) -> None:
        """Seconds and memory of the sessions before; the mark is that of the options."""
        super().take_over({name: value for name, value in values.items() if name != "run_id"})

    def on_train_begin(self, args, state: TrainerState, control, **kwargs):
        """Let Trainer write checkpoints where a half-written one is in no one's way, in the interval that is asked for now: it
        would keep that of the checkpoint.
        """
        super().on_train_begin(args, state, control, **kwargs)
        self._started = time.perf_counter()
        args.output_dir = str(self.unfinished)
        state.save_steps = args.save_steps

    def on_train_end(self, args, state: TrainerState, control, **kwargs):
        """From here on the folder itself is the one to write into."""
        args.output_dir = str(self.path)

    def on_save(self, args, state: TrainerState, control, **kwargs):
        """Move the checkpoint, when it is on the disk, to its name; then remove what is not kept."""
        PartialState().wait_for_everyone()
        written = self.unfinished / f"checkpoint-{state.global_step}"
        if not state.is_world_process_zero or not written.is_dir():
            return
        flush([*written.rglob("*"), written])
        if not self._holds_ours:
            # Without its report the earlier run is one that has yet to end; with the new options it is gone.
            (self.path / self.report_file).unlink(missing_ok=True)
            self._claim()
            self._remove_earlier()
        self._publish(written)
        older = [path for step, path in checkpoints(self.path) if step <= state.global_step]
        newer = [
            path for step, path in checkpoints(self.path) if step > state.global_step
        ]  # not whole: we began before them
        for path in newer + older[self.options.keep_checkpoints :]:
            shutil.rmtree(path, ignore_errors=True)
        shutil.rmtree(self.unfinished, ignore_errors=True)

    def _claim(self) -> None:
        self.options.save(self.path, self.run_id)
        self._holds_ours = True

    def _publish(self, written: Path) -> Path:
        place = self.path / written.name
        if place.exists():
            shutil.rmtree(place)
        os.replace(written, place)
        flush([self.path])
        return place

    def _remove_earlier(self) -> None:
        """Remove what could be taken for the new run's: checkpoints, weights, curve. Everything else stays."""
        for _, path in checkpoints(self.path):
            shutil.rmtree(path)
        names = [WEIGHTS, WEIGHTS_INDEX, "learning_curve.json", "learning_curve.png"]
        names += [
            path.name for path in self.path.iterdir() if re.fullmatch(r"model-\d+-of-\d+\.safetensors", path.name)
        ]
        for name in names:
            (self.path / name).unlink(missing_ok=True)

    def _check_free(self, sources: Iterable[str | None]) -> None:
        """Refuse to mix two runs, or to replace what no run wrote or what this one reads."""
        output = self.options.output
        for kind in KINDS:
            if kind is not type(self.options) and (self.path / kind.file_name).exists():
                raise ValueError(f"output={output!r} holds a run of `{kind.command}`: name another folder")
        if (self.path / self.options.file_name).exists():
            if not self.options.overwrite:
                raise ValueError(
                    f"output={output!r} holds an earlier run: continue it with --resume, replace it with --overwrite, or name "
                    "another folder"
                )
        elif _has_model(self.path) or checkpoints(self.path):
            raise ValueError(
                f"output={output!r} holds a model or checkpoints, and no {self.options.file_name}, so they are not those of an "
                f"earlier `{self.options.command}`: name another folder"
            )
        for source in filter(None, sources):
            place, here = Path(source).resolve(), self.path.resolve()
            inside = place.relative_to(here).parts if place.is_relative_to(here) else None
            if inside == () or (inside and re.fullmatch(r"checkpoint-\d+", inside[0])):
                raise ValueError(
                    f"{source!r} is what the run in output={output!r} would replace: name another output folder"
                )

    def _whole_checkpoint(self) -> Path | None:
        """Newest whole checkpoint of this run, with a line for each one that is passed over; None if it never saved one."""
        self._adopt_unfinished(self.run_id)
        ours = [path for _, path in checkpoints(self.path) if _bears(path, self.run_id)]
        float16 = self.options.precision == "float16" and not self.options.cpu
        wrong: dict[Path, str] = {}
        for path in ours:
            reason = checkpoint_damage(path, with_scaler=float16)
            if reason is None:
                for passed, why in wrong.items():
                    print(f"{passed} is incomplete ({why}): going back to the one before")
                return path
            wrong[path] = reason
        if wrong:
            told = "; ".join(f"{path.name}: {why}" for path, why in wrong.items())
            raise ValueError(
                f"no checkpoint of the run in {str(self.path)!r} is whole ({told}): start it again from its first step with "
                "overwrite instead of resume"
            )
        return None

    def _adopt_unfinished(self, run_id: str | None) -> None:
        """Take over a whole checkpoint of the run with that mark that a kill kept from its name."""
        for step, path in checkpoints(self.unfinished):
            known = [number for number, there in checkpoints(self.path) if _bears(there, run_id)]
            if checkpoint_damage(path) is None and _bears(path, run_id) and step > max(known, default=0):
                self._publish(path)


def _refuse_unwritable(folder: Path) -> None:
    """OSError, before the text is read and the model built, where a run could not make its folder."""
    there = next(each for each in (folder, *folder.absolute().parents) if each.exists())
    try:
        tempfile.TemporaryDirectory(dir=there).cleanup()
    except OSError as error:
        raise OSError(f"output={str(folder)!r} cannot be written: {there}: {error.strerror}") from None


def _bears(checkpoint: Path, run_id: str | None) -> bool:
    """Whether the checkpoint bears the mark of a run; one that cannot be read does, and is found to be damaged later."""
    try:
        callbacks = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))["stateful_callbacks"]
        marks = callbacks.get(RunFolder.__name__, {})
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return True
    return run_id is None or marks.get("attributes", {}).get("run_id") == run_id


def _mark_of_options(file: Path) -> str | None:
    try:
        return json.loads(file.read_text(encoding="utf-8")).get("run_id")
    except (ValueError, AttributeError):
        return None


def _has_model(folder: Path) -> bool:
    return any(
        (folder / name).exists() for name in (WEIGHTS, WEIGHTS_INDEX, "pytorch_model.bin", "adapter_model.safetensors")
    )
