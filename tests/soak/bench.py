"""The commands that are killed and whose system calls fail, on tiny models and a short text.

All is imported once; each run of a command is a forked child, so that what is broken is the work
and not the imports, and that a run with torch takes a fraction of a second.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from checkpoints import make_checkpoint
from converting import REPORT

from molae import ConvertConfig, cli, convert
from molae.convert import layer_state
from molae.convert.journal import JOURNAL

__all__ = ["Bench"]

#: A run that takes longer hangs.
SECONDS = 300


class Bench:
    """A folder with what the commands read, and where they write.

    Attributes
    ----------
    commands : dict of str to list of str
        What ``molae`` is given.
    src, converted, text, stats, scratch, out, dst : Path
        Folders, each with one kind of files; `dst`, the result, is in `out`.
    """

    def __init__(self, work: Path) -> None:
        layer_state.EVERY, layer_state.SHARE = 0.0, 0.0  # a state after every step
        names = ("src", "converted", "text", "stats", "scratch", "out")
        self.src, self.converted, self.text, self.stats, self.scratch, self.out = (
            work / name for name in names
        )
        self.dst, self._said = self.out / "dst", work / "said"
        sizes = {"L": 2, "E": 4, "D": 16, "F": 8, "V": 40}
        make_checkpoint(self.src, **sizes, dtype="BF16", shards=2, config={"eos_token_id": 2})
        _add_tokenizer(self.src, sizes["V"])
        (self.src / "LICENSE").write_text("The text of a licence.\n")
        convert(self.src, self.converted, ConvertConfig(size=0.6, group_size=2))
        self.text.mkdir()
        words = random.Random("text").choices(range(sizes["V"]), k=200)
        text = self.text / "text.txt"
        text.write_text(" ".join(f"w{word}" for word in words))
        self.clear()
        converting = ["convert", str(self.src), str(self.dst), "--group-size", "2", "--size"]
        reading = ["--calibration", str(text), "--calibration-sequences", "2"]
        reading += ["--calibration-length", "64", "--scratch", str(self.scratch)]
        calibrated = [*converting, "0.7", *reading, "--stats", str(self.stats / "stats.molae")]
        light = ["--compressed-experts", "1", "--light-module", "narrow:2"]
        healing = ["heal", str(self.converted), str(self.dst), "--teacher", str(self.src)]
        training = ["finetune", str(self.src), str(self.dst), "--data", str(text), "--steps", "2"]
        training += ["--batch-size", "2", "--length", "32", "--learning-rate", "0.1"]
        self.commands = {
            "data-free": [*converting, "0.5"],
            "materialize": ["materialize", str(self.converted), str(self.dst)],
            "calibrated": calibrated,
            "compressed experts": [*calibrated, *light],
            "healed": [*calibrated, "--heal", "3"],
            "finetune": [*training, "--save-every", "1", "--dtype", "auto"],
            "heal": [*healing, "--passes", "3", *reading],
        }

    def clear(self) -> None:
        """Nothing was run yet."""
        for folder in (self.out, self.stats, self.scratch):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()

    def run(self, name: str) -> None:
        """In this process, whose children need not import anything after that."""
        if cli.main([*self.commands[name], "--quiet"]) != 0:
            raise RuntimeError(f"{name} does not work")

    def start(self, name: str, before: Callable[[], object] | None = None) -> int:
        """A child that runs a command, after `before`; its exit code is the command's."""
        sys.stdout.flush()
        child = os.fork()
        if child:
            return child
        code = 70  # none of molae's
        try:
            signal.alarm(SECONDS)
            os.dup2(os.open(self._said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
            if before is not None:
                before()
            code = cli.main([*self.commands[name], "--quiet"])
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)

    @property
    def said(self) -> str:
        """What the last child had to say."""
        return self._said.read_text()

    @property
    def done(self) -> bool:
        """Whether the result is whole, by its own account."""
        return (self.dst / REPORT).exists() and not (self.dst / JOURNAL).exists()


def _add_tokenizer(folder: Path, count: int) -> None:
    """One that knows so many words: w0, w1 and so on."""
    try:
        from tokenizers import Tokenizer, models, pre_tokenizers
    except ModuleNotFoundError:  # without it there are no runs with a text
        return
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(count)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    kind = '{"tokenizer_class": "PreTrainedTokenizerFast"}\n'
    (folder / "tokenizer_config.json").write_text(kind)
