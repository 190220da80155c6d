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
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from molae.arguments import BUILTIN, ROUTER_RATE, ROUTER_STEPS, make_parser

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["main"]

DONE, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    parser = make_parser(
        {
            "inspect": _inspect,
            "convert": _convert,
            "heal": _heal,
            "materialize": _materialize,
            "report": _report,
            "eval": _eval,
            "generate": _generate,
            "finetune": _finetune,
            "demo": _demo,
        }
    )
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
    from molae.convert import inspect, plan
    from molae.convert.inspection import inspect_config
    from molae.convert.sketch import plan_config
    from molae.io import lone_config, read_config

    if args.draft is not None:
        _draft(args)
        return
    settings = _inspect_settings(args)
    family = _family(args)
    asked: dict[str, Any] = {
        "compressed_experts": args.compressed_experts, "light_module": args.light_module,
    }  # fmt: skip
    planned = None
    if (path := lone_config(args.path)) is not None:
        config = read_config(path)
        given: dict[str, Any] = {"family": family}
        tensors, given["unknown"] = _tensors(config, family)
        found = inspect_config(args.path, config, tensors, **given, **asked)
        if settings is not None:
            planned = plan_config(args.path, config, tensors, settings, **given)
    else:
        found = inspect(args.path, family=family, **asked)
        if settings is not None:
            planned = plan(args.path, settings, family=family)
    if args.json:
        _print_json(found.to_dict() | ({"plan": planned.to_dict()} if planned else {}))
    else:
        from molae.report.tables import inspect_view, plan_view

        _console(sys.stdout).print(inspect_view(found))
        if planned is not None:
            _console(sys.stdout).print(plan_view(planned))


def _draft(args: argparse.Namespace) -> None:
    """Write a description of a family that molae does not know."""
    from molae.arch import describe, draft_family, load_family
    from molae.errors import CheckpointError, UnknownFamilyError
    from molae.io import open_checkpoint

    for name in ("arch", "size", "compressed_experts"):
        if getattr(args, name):
            raise _UsageError(f"--{name.replace('_', '-')}: not with --draft")
    path = Path(args.draft)
    if path.exists():
        raise _UsageError(f"--draft: {path} is there already; name another file or remove it")
    with open_checkpoint(args.path) as checkpoint:
        draft = draft_family(checkpoint.config, checkpoint.tensors)
        text = json.dumps(draft.description, indent=2) + "\n"
        try:
            path.write_text(text, encoding="utf-8")
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be written: {error.strerror}") from error
        fault = None
        try:
            describe(checkpoint, family=load_family(path), converted=True)
        except (CheckpointError, UnknownFamilyError) as error:
            fault = str(error)
    if args.json:
        facts = {"draft": draft.description, "found": draft.found, "missing": draft.missing}
        _print_json({**facts, "written": str(path), "fault": fault})
        return
    from molae.report.tables import draft_view

    _console(sys.stdout).print(draft_view(draft, str(path), fault))


def _inspect_settings(args: argparse.Namespace) -> Any:
    """The conversion to plan; None where none was asked for."""
    from molae.config import ConvertConfig

    if args.size is None:
        if args.method != "latent" or args.group_size != "auto":
            raise _UsageError("--method, --group-size: only with --size")
        return None
    return _checked(ConvertConfig, method=args.method, size=args.size, group_size=args.group_size)


def _tensors(config: dict[str, Any], family: Any) -> tuple[Any, str]:
    """What Transformers builds of a config; None, and why, where it does not."""
    from molae.arch import find_family
    from molae.errors import CheckpointError, UnknownFamilyError

    family = family or find_family(config)
    family.read_letters(config)  # whose complaints say more than those of Transformers
    family.read_moe_layers(config)
    try:
        from molae.hf.shapes import tensors_of
    except ModuleNotFoundError as error:
        if error.name not in ("torch", "transformers"):
            raise
        return None, f"{error.name} is not installed (pip install 'molae[hf]')"
    from molae.hf import hide_progress

    hide_progress()
    try:
        return tensors_of(config, known_as=family.transformers), ""
    except (CheckpointError, UnknownFamilyError) as error:
        return None, str(error)


def _convert(args: argparse.Namespace) -> None:
    from molae.convert import check_divisible, convert, plan

    config = _config(args)
    if args.dst is None and not args.dry_run:
        raise _UsageError("convert: DST is missing (only --dry-run goes without)")
    if args.dry_run:
        with _calibration(args, args.src) as calibration:
            found = plan(
                args.src, config, calibration=calibration, stats=args.stats, family=_family(args)
            )
        _show_plan(args, found)
        return
    if args.scheduler is not None:  # before it is waited for
        check_divisible(config, args.calibration is not None)
    with (
        _executor(args) as executor,
        _calibration(args, args.src) as calibration,
        _watcher(args) as watcher,
    ):
        report = convert(
            args.src,
            args.dst,
            config,
            calibration=calibration,
            stats=args.stats,
            family=_family(args),
            overwrite=args.overwrite,
            watcher=watcher,
            executor=executor,
        )
    _show_result(args, report)


@contextlib.contextmanager
def _executor(args: argparse.Namespace) -> Iterator[Any]:
    """The workers that a run is shared among; or None."""
    if args.scheduler is None:
        if args.allow_mixed_workers:
            raise _UsageError("--allow-mixed-workers: only with --scheduler")
        if args.scheduler_timeout is not None:
            raise _UsageError("--scheduler-timeout: only with --scheduler")
        yield None
        return
    from molae.cluster import Workers
    from molae.cluster.client import hide_logs

    hide_logs()
    timeout = {} if args.scheduler_timeout is None else {"timeout": args.scheduler_timeout}
    with Workers(
        args.scheduler, threads=args.threads, allow_mixed=args.allow_mixed_workers, **timeout
    ) as workers:
        yield workers


@contextlib.contextmanager
def _calibration(args: argparse.Namespace, src: str) -> Iterator[Any]:
    """The text that was given, ready to be run through a checkpoint; or None."""
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
            src,
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


def _heal(args: argparse.Namespace) -> None:
    from molae.config import HealConfig
    from molae.convert import heal, plan_heal

    if args.dst is None and not args.dry_run:
        raise _UsageError("heal: DST is missing (only --dry-run goes without)")
    if args.router:
        _heal_routers(args)
        return
    if args.teacher_top_k is not None:
        raise _UsageError("--teacher-top-k: only with --router")
    config = _checked(
        HealConfig,
        passes=HealConfig.passes if args.passes is None else args.passes,
        steps=args.steps,
        rate=HealConfig.rate if args.rate is None else args.rate,
        weight_decay=args.weight_decay,
        max_norm=args.max_norm,
        anchored=args.anchored,
        seed=args.seed,
    )
    given: dict[str, Any] = {"family": _family(args)}
    with _calibration(args, args.teacher) as calibration:
        given["calibration"] = calibration
        if args.dry_run:
            _show_plan(args, plan_heal(args.src, args.teacher, config, **given))
            return
        with _watcher(args) as watcher:
            report = heal(
                args.src,
                args.dst,
                args.teacher,
                config,
                overwrite=args.overwrite,
                watcher=watcher,
                **given,
            )
    _show_result(args, report)


def _heal_routers(args: argparse.Namespace) -> None:
    from molae.train import FinetuneConfig, check_same_model

    for name in ("passes", "max_norm", "anchored", "dry_run"):
        if getattr(args, name):
            raise _UsageError(f"--{name.replace('_', '-')}: not with --router")
    check_same_model(args.src, args.teacher)
    with _text_file(args.calibration) as data:
        config = _checked(
            FinetuneConfig,
            train="router",
            steps=args.steps or ROUTER_STEPS,
            learning_rate=ROUTER_RATE if args.rate is None else args.rate,
            weight_decay=args.weight_decay,
            teacher_top_k=args.teacher_top_k,
            seed=args.seed,
        )
        _train(args, args.src, data, config, dtype="float32")


@contextlib.contextmanager
def _text_file(given: str) -> Iterator[str]:
    """The built-in text as a file, or the one that was given."""
    if given != BUILTIN:
        yield given
        return
    from molae.demo.corpus import builtin_text

    with tempfile.TemporaryDirectory(prefix="molae-") as folder:
        path = Path(folder, "text.txt")
        path.write_text(builtin_text()[0], encoding="utf-8")
        yield str(path)


def _materialize(args: argparse.Namespace) -> None:
    from molae.convert import materialize, plan_materialize

    if args.dry_run:
        _show_plan(args, plan_materialize(args.src, family=_family(args)))
        return
    if args.dst is None:
        raise _UsageError("materialize: DST is missing (only --dry-run goes without)")
    with _executor(args) as executor, _watcher(args) as watcher:
        report = materialize(
            args.src,
            args.dst,
            family=_family(args),
            overwrite=args.overwrite,
            watcher=watcher,
            executor=executor,
        )
    _show_result(args, report)


def _report(args: argparse.Namespace) -> None:
    from molae.convert import Report

    path = Path(args.dst)
    report = Report.from_file(path)
    page = Path(args.out) if args.out else path if path.is_dir() else path.parent
    _show_report(args, report, _page(report, page))


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


def _finetune(args: argparse.Namespace) -> None:
    from molae.train import FinetuneConfig

    names = [entry.name for entry in dataclasses.fields(FinetuneConfig)]
    config = _checked(FinetuneConfig, **{name: getattr(args, name) for name in names})
    if args.teacher is None and args.distill != FinetuneConfig.distill:
        raise _UsageError("--distill: only with --teacher")
    if args.teacher is None and args.teacher_top_k is not None:
        raise _UsageError("--teacher-top-k: only with --teacher")
    if args.lora is None and args.lora_alpha != FinetuneConfig.lora_alpha:
        raise _UsageError("--lora-alpha: only with --lora")
    _train(args, args.path, args.data, config, dtype=args.dtype)


def _train(args: argparse.Namespace, path: str, data: str, config: Any, *, dtype: str) -> None:
    from molae.hf import hide_progress
    from molae.hf.opening import use_threads
    from molae.report.evaluation import finetuned_view, steps_progress
    from molae.train import finetune
    from molae.train.finetune import leave_processes

    hide_progress()
    use_threads(args.threads)
    shown = None if args.quiet or args.json else _console(sys.stderr)
    with steps_progress(shown) as progress:
        found = finetune(
            path,
            args.dst,
            data,
            config,
            teacher=args.teacher,
            dtype=dtype,
            device=args.device,
            overwrite=args.overwrite,
            progress=progress,
        )
    leave_processes()
    if os.environ.get("RANK", "0") != "0":
        return  # of several processes the first tells
    if args.json:
        _print_json(dataclasses.asdict(found))
    elif not args.quiet:
        console = _console(sys.stdout)
        console.print(finetuned_view(found))
        console.print(f"Written to {args.dst}", soft_wrap=True, highlight=False)


def _demo(args: argparse.Namespace) -> None:
    from molae.demo.run import run
    from molae.report.demo import demo_view

    say = _silent if args.quiet or args.json else _say
    result = run(out=args.out, say=say)
    if args.json:
        _print_json(result.to_dict())
    else:
        _console(sys.stdout).print(demo_view(result))


def _checked(made: Callable[..., Any], **settings: Any) -> Any:
    """A configuration; what makes no sense in it is bad usage."""
    from molae.errors import ArgumentError

    try:
        return made(**settings)
    except ArgumentError as error:
        raise _UsageError(str(error)) from error


def _config(args: argparse.Namespace) -> Any:
    from molae.config import ConvertConfig

    config = _checked(
        ConvertConfig,
        method=args.method,
        size=args.size,
        group_size=args.group_size,
        rank=args.rank,
        flops=args.flops,
        uniform=args.uniform,
        one_shot=args.one_shot,
        drop_idle=args.drop_idle,
        refit=not args.no_refit,
        heal=args.heal,
        compressed_experts=args.compressed_experts,
        light_module=args.light_module,
        max_memory=args.max_memory,
    )
    if args.calibration is None:
        for name in (
            "flops",
            "uniform",
            "one_shot",
            "drop_idle",
            "no_refit",
            "heal",
            "compressed_experts",
            "light_module",
            "max_memory",
            "stats",
        ):
            default = "auto" if name == "light_module" else None
            if getattr(args, name) and getattr(args, name) != default:
                option = "--" + name.replace("_", "-")
                raise _UsageError(f"{option}: only with --calibration FILE")
    return config


def _family(args: argparse.Namespace) -> Any:
    if args.arch is None:
        return None
    from molae.arch import load_family

    return load_family(args.arch)


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


def _page(report: Any, path: Path) -> Path:
    from molae.report.page import write_page

    return write_page(report, path)


def _show_result(args: argparse.Namespace, report: Any) -> None:
    """Of a run that has written to DST: its page there, and its tables."""
    _show_report(args, report, _page(report, Path(args.dst)), f"Written to {args.dst}")


def _show_report(args: argparse.Namespace, report: Any, page: Path, *said: str) -> None:
    if args.json:
        _print_json(report.to_dict())
    elif not args.quiet:
        from molae.report.tables import report_view

        console = _console(sys.stdout)
        console.print(report_view(report))
        for line in (*said, f"To look at: {page}"):
            console.print(line, soft_wrap=True, highlight=False, markup=False)


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
