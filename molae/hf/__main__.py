"""Run a program that knows nothing of molae, with converted checkpoints known to Transformers.

    python -m molae.hf PROGRAM [ARGUMENTS]

PROGRAM is the name of an installed command (such as ``lm_eval``), a module as after
``python -m`` (such as ``trl.scripts.sft``), or a file ending in ``.py``. It runs in this
process, after ``import molae.hf``. Processes that it starts itself are on their own: put the
launcher inside, as in ``accelerate launch --module molae.hf PROGRAM ...``.
"""

from __future__ import annotations

import runpy
import sys
from collections.abc import Sequence
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path

__all__ = ["main"]

USAGE = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program named by the first argument; returns its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print((__doc__ or "").strip(), file=sys.stderr if not arguments else sys.stdout)
        return 0 if arguments else USAGE
    program, rest = arguments[0], arguments[1:]
    if program.endswith(".py"):
        sys.argv = [program, *rest]
        sys.path.insert(0, str(Path(program).resolve().parent))  # as python itself does
        runpy.run_path(program, run_name="__main__")
        return 0
    commands = [e for e in entry_points(group="console_scripts") if e.name == program]
    if commands:
        sys.argv = [program, *rest]
        return _exit_code(commands[0].load()())
    if not _is_module(program):
        print(
            f"molae: {program}: neither an installed command nor a module; is it installed in "
            f"this environment ({sys.prefix})?",
            file=sys.stderr,
        )
        return USAGE
    sys.argv = [program, *rest]  # the first is replaced by the module's file
    runpy.run_module(program, run_name="__main__", alter_sys=True)
    return 0


def _exit_code(value: object) -> int:
    """What ``sys.exit(value)`` would make of a command's result."""
    if value is None:
        return 0
    if isinstance(value, int):
        return value
    print(value, file=sys.stderr)
    return 1


def _is_module(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except (ImportError, ValueError):
        return False


if __name__ == "__main__":
    sys.exit(main())
