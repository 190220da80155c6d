"""What the command ``molae`` may be told."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from molae._version import __version__

__all__ = ["BUILTIN", "ROUTER_RATE", "ROUTER_STEPS", "make_parser"]

#: Stands for a calibration text that needs no file.
BUILTIN = "builtin"

#: Of the distillation of routers, as published.
ROUTER_STEPS, ROUTER_RATE = 375, 5e-5

Run = Callable[[argparse.Namespace], None]


def make_parser(run: Mapping[str, Run]) -> argparse.ArgumentParser:
    """The parser of the command, which calls these functions by the names of its commands."""
    parser = argparse.ArgumentParser(
        prog="molae", description="Makes mixture-of-experts models smaller."
    )
    parser.add_argument("--version", action="version", version=f"molae {__version__}")
    parser.set_defaults(run=None, debug=False)
    commands = parser.add_subparsers(metavar="COMMAND", title="commands")

    every = argparse.ArgumentParser(add_help=False)
    every.add_argument("--json", action="store_true", help="print the facts as JSON")
    every.add_argument(
        "--debug", action="store_true", help="show where an error came from (or MOLAE_DEBUG=1)"
    )
    source = argparse.ArgumentParser(add_help=False)
    source.add_argument(
        "--arch", metavar="FILE", help="JSON description of a family that molae does not know"
    )
    running = argparse.ArgumentParser(add_help=False)
    running.add_argument("--dry-run", action="store_true", help="print the plan, write nothing")
    running.add_argument(
        "--overwrite",
        action="store_true",
        help="replace a finished result, or an unfinished run with other settings",
    )
    running.add_argument("--threads", type=_count, metavar="N", help="threads to compute with")
    running.add_argument("--quiet", action="store_true", help="print nothing but errors")

    sharing = argparse.ArgumentParser(add_help=False)
    others = sharing.add_argument_group(
        "several machines", "Needs the extra [distributed] and a file system that all share."
    )
    others.add_argument(
        "--scheduler", metavar="ADDRESS",
        help="a Dask scheduler, such as tcp://HOST:8786, or the file that it writes with "
        "--scheduler-file: its workers compute, a layer each at a time, with --threads threads "
        "each (as many as Dask gives them)",
    )  # fmt: skip
    others.add_argument(
        "--allow-mixed-workers",
        action="store_true",
        help="take workers whose BLAS, instruction set, NumPy or extension differ: the result may "
        "then differ in its last bits, and the report says so",
    )
    others.add_argument(
        "--scheduler-timeout", type=float, metavar="SECONDS",
        help="wait so long for the scheduler, and for a worker while there is none (60)",
    )  # fmt: skip

    inspect = commands.add_parser(
        "inspect", parents=[every, source], help="say what a checkpoint is"
    )
    inspect.add_argument(
        "path",
        metavar="PATH",
        help="folder of a checkpoint, or hub id; or a config.json alone, or its folder (with the "
        "extra [hf] all is counted, else the experts)",
    )
    inspect.add_argument(
        "--draft", metavar="FILE",
        help="write a draft of a family's description for --arch, from the tensors' names and "
        "shapes and the config",
    )  # fmt: skip
    _add_inspect_plan(inspect)
    inspect.add_argument(
        "--compressed-experts", type=_count, default=0, metavar="N",
        help="count also what would be active if so many of a token's experts did not run",
    )  # fmt: skip
    inspect.add_argument(
        "--light-module", default="vectors", metavar="FORM",
        help="what would act in their place, as of convert (vectors)",
    )  # fmt: skip
    inspect.set_defaults(run=run["inspect"])

    convert = commands.add_parser(
        "convert",
        parents=[every, source, running, sharing],
        help="make a smaller checkpoint",
        description="Make a smaller checkpoint from SRC in DST. Interrupted, the same command "
        "goes on where it stopped.",
    )
    _add_convert_options(convert)
    convert.set_defaults(run=run["convert"])

    materialize = commands.add_parser(
        "materialize",
        parents=[every, source, running, sharing],
        help="make an ordinary checkpoint from a converted one, of the original's full size",
        description="Multiply the factors of SRC out to an ordinary checkpoint in DST. It has "
        "the original's full size.",
    )
    materialize.add_argument("src", metavar="SRC", help="folder of a converted checkpoint")
    materialize.add_argument("dst", metavar="DST", nargs="?", help="folder of the result")
    materialize.set_defaults(run=run["materialize"])

    report = commands.add_parser(
        "report",
        parents=[every],
        help="show what a run reported, and make its page again",
        description="Show the tables of the report in DST, and write it as one HTML page that "
        "needs no network: charts of sizes, ranks, errors, spectra, routing and time.",
    )
    report.add_argument("dst", metavar="DST", help="folder of a result, or its molae-report.json")
    report.add_argument(
        "--out", metavar="FILE", help="the page; by default molae-report.html in the folder"
    )
    report.add_argument("--quiet", action="store_true", help="print nothing but errors")
    report.set_defaults(run=run["report"])

    _add_heal(commands, [every, source, running], run)
    _add_model_commands(commands, every, run)

    demo = commands.add_parser(
        "demo", parents=[every], help="convert the checkpoint that comes with molae"
    )
    demo.add_argument("--out", metavar="DIR", help="keep the results in this folder")
    demo.add_argument("--quiet", action="store_true", help="print only the result")
    demo.set_defaults(run=run["demo"])
    return parser


def _add_inspect_plan(inspect: argparse.ArgumentParser) -> None:
    """Which conversion to plan beside the facts."""
    from molae.config import ConvertConfig

    inspect.add_argument(
        "--size", type=float, metavar="SHARE",
        help="show also the plan of a conversion to this share of the experts' numbers",
    )  # fmt: skip
    inspect.add_argument(
        "--method", default="latent", metavar="NAME",
        help="with --size: " + _setting(ConvertConfig, "method"),
    )  # fmt: skip
    inspect.add_argument(
        "--group-size", type=_group_size, default="auto", metavar="K",
        help="with --size: 'auto', a number, or gate=8,up=8,down=4",
    )  # fmt: skip


def _add_model_commands(
    commands: Any, every: argparse.ArgumentParser, run: Mapping[str, Run]
) -> None:
    """Commands that run or train a model; they need the extra [hf]."""
    running = argparse.ArgumentParser(add_help=False)
    running.add_argument("path", metavar="PATH", help="folder of a checkpoint, or hub id")
    running.add_argument("--device", default="cpu", help="where to compute, such as cuda:0")
    running.add_argument("--threads", type=_count, metavar="N", help="threads to compute with")

    evaluate = commands.add_parser(
        "eval",
        parents=[every, running],
        help="measure a checkpoint on a text, alone or against another",
        description="Perplexity of PATH, ordinary or converted, on a text; with --against also "
        "how far its next-token distributions are from those of another checkpoint.",
    )
    evaluate.add_argument("--text", required=True, metavar="FILE", help="the text, UTF-8")
    evaluate.add_argument(
        "--against", metavar="PATH2", help="the reference, such as the original; also in memory"
    )
    evaluate.add_argument("--window", type=_count, metavar="N", help="tokens a window (512)")
    evaluate.add_argument(
        "--stride", type=_count, metavar="N", help="tokens between windows (half a window)"
    )
    evaluate.add_argument("--batch-size", type=_count, metavar="N", help="windows at a time (8)")
    evaluate.add_argument(
        "--dtype",
        default="float32",
        help="type to compute in; float32 tells checkpoints apart by their weights alone, "
        "'auto' takes that of the files and less memory",
    )
    evaluate.add_argument("--quiet", action="store_true", help="show no progress")
    evaluate.set_defaults(run=run["eval"])

    generate = commands.add_parser(
        "generate", parents=[every, running], help="let a checkpoint go on with a prompt"
    )
    generate.add_argument("prompt", metavar="PROMPT", help="the text to go on with")
    generate.add_argument(
        "--max-new-tokens", type=_count, default=50, metavar="N", help="at most so many (50)"
    )
    generate.add_argument(
        "--temperature", type=float, default=0.0, metavar="T",
        help="0, the default, takes the most likely token each time; above it tokens are drawn",
    )  # fmt: skip
    generate.add_argument("--seed", type=int, default=0, help="of the drawing (0)")
    generate.add_argument("--dtype", default="auto", help="type to compute in (the files' own)")
    generate.set_defaults(run=run["generate"])

    tune = commands.add_parser(
        "finetune",
        parents=[every, running],
        help="train a checkpoint further, on a text, conversations, or a teacher's answers",
        description="Train PATH, ordinary or converted, further, and write it to DST. Interrupted, "
        "the same command goes on from its last checkpoint. Needs the extra [train].",
    )
    _add_finetune_options(tune)
    tune.set_defaults(run=run["finetune"])


def _add_heal(
    commands: Any, parents: Sequence[argparse.ArgumentParser], run: Mapping[str, Run]
) -> None:
    heal = commands.add_parser(
        "heal",
        parents=parents,
        help="train a converted checkpoint to answer as its original does",
        description="Train the factors of each layer of PATH to answer as the experts of the "
        "original do on a text; or, with --router, its routers so that the model's next-token "
        "distributions are those of the original. Interrupted, the same command goes on where it "
        "stopped.",
    )
    from molae.config import HealConfig

    heal.add_argument("src", metavar="PATH", help="folder of a converted checkpoint")
    heal.add_argument("dst", metavar="DST", nargs="?", help="folder of the result")
    heal.add_argument(
        "--teacher", required=True, metavar="SRC", help="the original, of which PATH was made"
    )
    _add_text(heal, sequences=512)
    heal.add_argument(
        "--router",
        action="store_true",
        help="train nothing but the routers, in the whole model (needs the extra [train]); "
        f"--steps are then {ROUTER_STEPS}, and --rate is {ROUTER_RATE:g} (arXiv 2603.02217)",
    )
    heal.add_argument("--device", default="cpu", help="with --router: where to compute")
    _add_teacher_top_k(heal, "with --router: ")
    heal.add_argument(
        "--passes", type=_count, metavar="N",
        help=f"{_setting(HealConfig, 'passes')} ({HealConfig.passes})",
    )  # fmt: skip
    heal.add_argument("--steps", type=_count, metavar="N", help=_setting(HealConfig, "steps"))
    heal.add_argument(
        "--rate", type=float, metavar="RATE",
        help=f"{_setting(HealConfig, 'rate')} ({HealConfig.rate})",
    )  # fmt: skip
    heal.add_argument(
        "--weight-decay", type=float, default=0.0, metavar="RATE",
        help=_setting(HealConfig, "weight_decay"),
    )  # fmt: skip
    heal.add_argument(
        "--max-norm", type=float, metavar="NORM", help=_setting(HealConfig, "max_norm")
    )
    heal.add_argument("--anchored", action="store_true", help=_setting(HealConfig, "anchored"))
    heal.add_argument("--seed", type=int, default=0, help=_setting(HealConfig, "seed"))
    heal.set_defaults(run=run["heal"])


def _add_teacher_top_k(parser: argparse.ArgumentParser, when: str = "") -> None:
    parser.add_argument(
        "--teacher-top-k", type=_count, metavar="N",
        help=f"{when}keep the N likeliest tokens of each of the teacher's distributions in files, "
        "and the mass of the rest, so that the teacher is not in memory with the model (both are)",
    )  # fmt: skip


def _add_finetune_options(tune: argparse.ArgumentParser) -> None:
    tune.add_argument("dst", metavar="DST", help="folder of the result")
    tune.add_argument(
        "--data",
        required=True,
        metavar="FILE",
        help="a text, or .jsonl with prompt and completion, messages, or text in each line",
    )
    tune.add_argument(
        "--train",
        choices=("all", "experts", "router", "light"),
        default="all",
        help="which weights: all, the routed experts, their routers, or only what acts in the "
        "place of compressed experts (all)",
    )
    tune.add_argument(
        "--teacher",
        metavar="PATH2",
        help="learn the next-token distributions of this checkpoint, such as the original",
    )
    tune.add_argument(
        "--distill", type=float, default=1.0, metavar="SHARE",
        help="of the teacher in the loss; the rest is the data's own (1)",
    )  # fmt: skip
    _add_teacher_top_k(tune)
    tune.add_argument(
        "--lora", type=_count, metavar="RANK",
        help="train low-rank adapters on all or on the experts, and merge them in the end; they "
        "want a higher --learning-rate",
    )  # fmt: skip
    tune.add_argument(
        "--lora-alpha", type=float, default=16.0, metavar="A",
        help="what an adapter adds is scaled by A/RANK (16)",
    )  # fmt: skip
    tune.add_argument("--epochs", type=float, default=2.0, help="passes over the data (2)")
    tune.add_argument("--steps", type=_count, metavar="N", help="so many steps instead")
    tune.add_argument(
        "--learning-rate", type=float, default=2e-5, metavar="RATE", help="the highest (2e-5)"
    )
    tune.add_argument(
        "--warmup", type=float, default=0.03, metavar="SHARE", help="of the steps (0.03)"
    )
    tune.add_argument("--weight-decay", type=float, default=0.0, metavar="RATE", help="(0)")
    tune.add_argument("--batch-size", type=_count, default=8, metavar="N", help="rows a step (8)")
    tune.add_argument(
        "--length", type=_count, default=1024, metavar="N", help="tokens of a row (1024)"
    )
    tune.add_argument("--seed", type=int, default=0, help="of the order of the data (0)")
    tune.add_argument(
        "--save-every", type=_count, default=100, metavar="N",
        help="steps between checkpoints to go on from (100)",
    )  # fmt: skip
    tune.add_argument("--dtype", default="float32", help="type to train in (float32)")
    tune.add_argument("--overwrite", action="store_true", help="replace a result")
    tune.add_argument("--quiet", action="store_true", help="print nothing but errors")


def _setting(config: type, name: str) -> str:
    from molae.config import field_help

    return field_help(config, name).replace("%", "%%")


def _add_text(parser: Any, default: str | None = BUILTIN, sequences: int = 128) -> None:
    """The text that is run through the model."""
    parser.add_argument(
        "--calibration",
        metavar="FILE",
        default=default,
        help="a text, or .jsonl, that is run through the model: the fit then knows what the "
        f"experts read; '{BUILTIN}' takes English that comes with Python"
        + (" (that)" if default else ""),
    )
    parser.add_argument(
        "--calibration-sequences", type=_count, default=sequences, metavar="N",
        help=f"at most so many sequences ({sequences})",
    )  # fmt: skip
    parser.add_argument(
        "--calibration-length", type=_count, default=2048, metavar="N",
        help="tokens of each, at most (2048, or what the model takes)",
    )  # fmt: skip
    parser.add_argument(
        "--scratch", metavar="DIR",
        help="folder for temporary files: hidden states, and what a fit keeps of a layer",
    )  # fmt: skip


def _add_convert_options(convert: argparse.ArgumentParser) -> None:
    from molae.config import ConvertConfig

    def text(name: str) -> str:
        return _setting(ConvertConfig, name)

    convert.add_argument("src", metavar="SRC", help="folder of a checkpoint, or hub id")
    convert.add_argument("dst", metavar="DST", nargs="?", help="folder of the result")
    convert.add_argument("--method", default="latent", metavar="NAME", help=text("method"))
    convert.add_argument("--size", type=float, metavar="SHARE", help=text("size"))
    convert.add_argument(
        "--group-size",
        type=_group_size,
        default="auto",
        metavar="K",
        help="'auto', a number, or gate=8,up=8,down=4. " + text("group_size"),
    )
    convert.add_argument("--rank", type=int, metavar="R", help=text("rank"))
    text_options = convert.add_argument_group(
        "calibration", "Needs the extra [hf] and the checkpoint's tokenizer."
    )
    _add_text(text_options, None)
    text_options.add_argument("--flops", type=float, metavar="SHARE", help=text("flops"))
    text_options.add_argument("--uniform", action="store_true", help=text("uniform"))
    text_options.add_argument("--one-shot", action="store_true", help=text("one_shot"))
    text_options.add_argument("--drop-idle", action="store_true", help=text("drop_idle"))
    text_options.add_argument(
        "--no-refit", action="store_true", help="leave out the last step: " + text("refit")
    )
    text_options.add_argument("--heal", type=int, default=0, metavar="N", help=text("heal"))
    text_options.add_argument(
        "--compressed-experts", type=int, default=0, metavar="N", help=text("compressed_experts")
    )
    text_options.add_argument(
        "--light-module", default="auto", metavar="FORM", help=text("light_module")
    )
    text_options.add_argument("--max-memory", metavar="SIZE", help=text("max_memory"))
    text_options.add_argument(
        "--stats",
        metavar="FILE",
        help="keep what the first pass measures there, or take it from there: another size of the "
        "same checkpoint with the same text then costs less",
    )


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return value


def _group_size(text: str) -> Any:
    if text == "auto":
        return text
    try:
        if "=" not in text:
            return int(text)
        pairs = (part.split("=") for part in text.split(","))
        return {name.strip(): int(size) for name, size in pairs if size.strip() != "auto"}
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"expected 'auto', a number, or gate=8,up=8,down=4, got {text!r}"
        ) from None
