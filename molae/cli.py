"""The command ``molae``.

Exit codes: 0 done, 1 failed, 2 bad usage, 130 interrupted (the journal stays, and the same
command goes on). Tables and ``--json`` go to standard output, all else to standard error.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import signal
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from molae._version import __version__

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["main"]

DONE, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130

#: Stands for a calibration text that needs no file.
BUILTIN = "builtin"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    parser = _parser()
    args = parser.parse_args(argv)
    if args.run is None:
        parser.print_help(sys.stderr)
        return USAGE
    debug = args.debug or os.environ.get("MOLAE_DEBUG", "") not in ("", "0")
    try:
        with _terminate_as_interrupt(), _threads(getattr(args, "threads", None)):
            args.run(args)
        sys.stdout.flush()
        return DONE
    except BrokenPipeError:
        _drop_stdout()
        return FAILED
    except KeyboardInterrupt:
        print("molae: " + _interrupted(args), file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        if debug:
            raise
        print(f"molae: {_message(error)}", file=sys.stderr)
        return USAGE if isinstance(error, _UsageError) else FAILED


class _UsageError(Exception):
    """Options that make no sense, whatever the checkpoint."""


# ----------------------------------------------------------------- the commands


def _inspect(args: argparse.Namespace) -> None:
    from molae.convert import inspect

    found = inspect(args.path, family=_family(args))
    if args.json:
        _print_json(found.to_dict())
    else:
        from molae.report.tables import inspect_view

        _console(sys.stdout).print(inspect_view(found))


def _convert(args: argparse.Namespace) -> None:
    from molae.convert import convert, plan

    config = _config(args)
    if args.dst is None and not args.dry_run:
        raise _UsageError("convert: DST is missing (only --dry-run goes without)")
    if args.dry_run:
        with _calibration(args) as calibration:
            found = plan(
                args.src, config, calibration=calibration, stats=args.stats, family=_family(args)
            )
        _show_plan(args, found)
        return
    with _calibration(args) as calibration, _watcher(args) as watcher:
        report = convert(
            args.src,
            args.dst,
            config,
            calibration=calibration,
            stats=args.stats,
            family=_family(args),
            overwrite=args.overwrite,
            watcher=watcher,
        )
    _show_report(args, report)


@contextlib.contextmanager
def _calibration(args: argparse.Namespace) -> Iterator[Any]:
    """The text that was given, ready to be run through the checkpoint; or None."""
    if args.calibration is None:
        yield None
        return
    from molae.errors import CalibrationWarning
    from molae.hf import hide_progress
    from molae.hf.calibrate import Calibration, read_calibration_text

    def progress(done: int, total: int, what: str) -> None:
        if not args.quiet:
            _say(f"calibration, {done} of {total} layers: {what}")

    hide_progress()
    if args.calibration == BUILTIN:
        from molae.demo.corpus import builtin_text

        text, name = builtin_text()
    else:
        text, name = read_calibration_text(args.calibration), Path(args.calibration).name
    with (
        warnings.catch_warnings(),
        Calibration(
            args.src,
            text,
            name=name,
            sequences=args.calibration_sequences,
            length=args.calibration_length,
            family=_family(args),
            folder=args.scratch,
            progress=progress,
        ) as calibration,
    ):
        warnings.simplefilter("ignore", CalibrationWarning)  # the report has it too
        yield calibration


def _materialize(args: argparse.Namespace) -> None:
    from molae.convert import materialize, plan_materialize

    if args.dry_run:
        _show_plan(args, plan_materialize(args.src, family=_family(args)))
        return
    if args.dst is None:
        raise _UsageError("materialize: DST is missing (only --dry-run goes without)")
    with _watcher(args) as watcher:
        report = materialize(
            args.src, args.dst, family=_family(args), overwrite=args.overwrite, watcher=watcher
        )
    _show_report(args, report)


def _eval(args: argparse.Namespace) -> None:
    from molae.hf import hide_progress
    from molae.hf.compare import compare_paths
    from molae.hf.evaluate import evaluate_path, peak_memory
    from molae.hf.opening import use_threads
    from molae.report.evaluation import comparison_view, evaluation_view, windows_progress

    hide_progress()
    use_threads(args.threads)
    text = Path(args.text)
    given = {"window": args.window, "stride": args.stride, "batch_size": args.batch_size}
    options: dict[str, Any] = {name: x for name, x in given.items() if x is not None}
    options |= {"dtype": args.dtype, "device": args.device}
    score: Any
    with windows_progress(None if args.quiet or args.json else _console(sys.stderr)) as progress:
        if args.against is None:
            score = evaluate_path(args.path, text, progress=progress, **options)
        else:
            score = compare_paths(args.path, args.against, text, progress=progress, **options)
    peak = peak_memory()
    if args.json:
        facts = {"path": args.path, "against_path": args.against, "text": args.text}
        _print_json(facts | {"dtype": args.dtype, "peak_memory": peak} | dataclasses.asdict(score))
    elif args.against is None:
        _console(sys.stdout).print(evaluation_view(args.path, score, peak))
    else:
        _console(sys.stdout).print(comparison_view(args.path, args.against, score, peak))


def _generate(args: argparse.Namespace) -> None:
    from molae.hf import hide_progress
    from molae.hf.generate import generate_path
    from molae.hf.opening import use_threads

    hide_progress()
    use_threads(args.threads)
    found = generate_path(
        args.path,
        args.prompt,
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        seed=args.seed,
        dtype=args.dtype,
        device=args.device,
    )
    if args.json:
        _print_json({"path": args.path, **dataclasses.asdict(found)})
    else:
        print(found.prompt + found.text)
        rate = found.tokens / found.seconds
        _say(f"{found.tokens} tokens in {found.seconds:.1f} s ({rate:.3g} a second)")


def _demo(args: argparse.Namespace) -> None:
    from molae.demo.run import run
    from molae.report.demo import demo_view

    say = _silent if args.quiet or args.json else _say
    result = run(out=args.out, say=say)
    if args.json:
        _print_json(result.to_dict())
    else:
        _console(sys.stdout).print(demo_view(result))


# -------------------------------------------------------------------- arguments


def _parser() -> argparse.ArgumentParser:
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
        "--family", metavar="FILE", help="JSON description of a family that molae does not know"
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

    inspect = commands.add_parser(
        "inspect", parents=[every, source], help="say what a checkpoint is"
    )
    inspect.add_argument("path", metavar="PATH", help="folder of a checkpoint, or hub id")
    inspect.set_defaults(run=_inspect)

    convert = commands.add_parser(
        "convert",
        parents=[every, source, running],
        help="make a smaller checkpoint",
        description="Make a smaller checkpoint from SRC in DST. Interrupted, the same command "
        "goes on where it stopped.",
    )
    _add_convert_options(convert)
    convert.set_defaults(run=_convert)

    materialize = commands.add_parser(
        "materialize",
        parents=[every, source, running],
        help="make an ordinary checkpoint from a converted one, of the original's full size",
        description="Multiply the factors of SRC out to an ordinary checkpoint in DST. It has "
        "the original's full size.",
    )
    materialize.add_argument("src", metavar="SRC", help="folder of a converted checkpoint")
    materialize.add_argument("dst", metavar="DST", nargs="?", help="folder of the result")
    materialize.set_defaults(run=_materialize)

    _add_model_commands(commands, every)

    demo = commands.add_parser(
        "demo", parents=[every], help="convert the checkpoint that comes with molae"
    )
    demo.add_argument("--out", metavar="DIR", help="keep the results in this folder")
    demo.add_argument("--quiet", action="store_true", help="print only the result")
    demo.set_defaults(run=_demo)
    return parser


def _add_model_commands(commands: Any, every: argparse.ArgumentParser) -> None:
    """Commands that run a model; they need the extra [hf]."""
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
    evaluate.set_defaults(run=_eval)

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
    generate.set_defaults(run=_generate)


def _add_convert_options(convert: argparse.ArgumentParser) -> None:
    from molae.config import ConvertConfig, field_help

    def text(name: str) -> str:
        return field_help(ConvertConfig, name).replace("%", "%%")

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
    text_options.add_argument(
        "--calibration",
        metavar="FILE",
        help="a text, or .jsonl, that is run through the model: the fit then knows what the "
        f"experts read; '{BUILTIN}' takes English that comes with Python",
    )
    text_options.add_argument(
        "--calibration-sequences", type=_count, default=128, metavar="N",
        help="at most so many sequences (128)",
    )  # fmt: skip
    text_options.add_argument(
        "--calibration-length", type=_count, default=2048, metavar="N",
        help="tokens of each, at most (2048, or what the model takes)",
    )  # fmt: skip
    text_options.add_argument(
        "--scratch", metavar="DIR",
        help="folder for temporary files: hidden states, and what a refit keeps of a layer",
    )  # fmt: skip
    text_options.add_argument("--flops", type=float, metavar="SHARE", help=text("flops"))
    text_options.add_argument("--uniform", action="store_true", help=text("uniform"))
    text_options.add_argument("--one-shot", action="store_true", help=text("one_shot"))
    text_options.add_argument("--drop-idle", action="store_true", help=text("drop_idle"))
    text_options.add_argument(
        "--no-refit", action="store_true", help="leave out the last step: " + text("refit")
    )
    text_options.add_argument(
        "--compressed-experts", type=int, default=0, metavar="N", help=text("compressed_experts")
    )
    text_options.add_argument(
        "--light-module", default="vectors", metavar="FORM", help=text("light_module")
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


def _config(args: argparse.Namespace) -> Any:
    from molae.config import ConvertConfig
    from molae.errors import ArgumentError

    try:
        config = ConvertConfig(
            method=args.method,
            size=args.size,
            group_size=args.group_size,
            rank=args.rank,
            flops=args.flops,
            uniform=args.uniform,
            one_shot=args.one_shot,
            drop_idle=args.drop_idle,
            refit=not args.no_refit,
            compressed_experts=args.compressed_experts,
            light_module=args.light_module,
            max_memory=args.max_memory,
        )
    except ArgumentError as error:
        raise _UsageError(str(error)) from error
    if args.calibration is None:
        for name in (
            "flops",
            "uniform",
            "one_shot",
            "drop_idle",
            "no_refit",
            "compressed_experts",
            "max_memory",
            "stats",
        ):
            if getattr(args, name):
                option = "--" + name.replace("_", "-")
                raise _UsageError(f"{option}: only with --calibration FILE")
    return config


def _family(args: argparse.Namespace) -> Any:
    if args.family is None:
        return None
    from molae.arch import load_family

    return load_family(args.family)


# ----------------------------------------------------------------------- output


def _watcher(args: argparse.Namespace) -> Any:
    """Who is told of the plan and the progress."""
    if args.quiet:
        from molae.convert import Watcher

        return contextlib.nullcontext(Watcher())
    from molae.report.progress import RunWatcher

    return RunWatcher(None if args.json else _console(sys.stdout), _console(sys.stderr))


def _show_plan(args: argparse.Namespace, plan: Any) -> None:
    if args.json:
        _print_json(plan.to_dict())
    elif not args.quiet:
        from molae.report.tables import plan_view

        _console(sys.stdout).print(plan_view(plan))


def _show_report(args: argparse.Namespace, report: Any) -> None:
    if args.json:
        _print_json(report.to_dict())
    elif not args.quiet:
        from molae.report.tables import report_view

        console = _console(sys.stdout)
        console.print(report_view(report))
        console.print(f"Written to {args.dst}", soft_wrap=True, highlight=False)


def _console(stream: Any) -> Console:
    from rich.console import Console

    terminal = stream.isatty()
    return Console(file=stream, width=None if terminal else 120, highlight=False)


def _print_json(value: Any) -> None:
    json.dump(value, sys.stdout, indent=2)
    sys.stdout.write("\n")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _silent(text: str) -> None:
    pass


# ----------------------------------------------------------------------- trouble


@contextlib.contextmanager
def _terminate_as_interrupt() -> Iterator[None]:
    """SIGTERM ends a run as Ctrl-C does: what is written stays usable."""

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    try:
        before = signal.signal(signal.SIGTERM, interrupt)
    except ValueError:  # not the main thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _threads(count: int | None) -> Iterator[None]:
    if count is None:
        yield
        return
    from molae.threads import num_threads

    with num_threads(count):
        yield


def _interrupted(args: argparse.Namespace) -> str:
    if getattr(args, "dst", None) is None:
        return "interrupted"
    return f"interrupted; the same command goes on where it stopped ({args.dst})"


def _message(error: Exception) -> str:
    from molae.errors import MolaeError

    if isinstance(error, (MolaeError, _UsageError)):
        return str(error)
    if isinstance(error, MemoryError):
        return "not enough memory; try fewer --threads"
    if isinstance(error, OSError):
        return str(error)
    return f"{type(error).__name__}: {error} (--debug shows where)"


def _drop_stdout() -> None:
    """The reader is gone; let the interpreter's last flush go nowhere."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    sys.exit(main())
