"""molae makes mixture-of-experts models smaller by shared latent factors.

`convert` turns a checkpoint into a smaller one, `heal` trains that to answer as the
original does, `materialize` turns it into an ordinary checkpoint again, `plan` and
`inspect` say what there is and what would come of it. `fit` has the factorizations on
arrays, `ops` the layers of experts, forward and backward.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from molae import _blas
from molae._version import __version__

_core, _CORE_CHOICE = _blas.load_core()

from molae import errors  # noqa: E402
from molae.threads import get_num_threads, num_threads, set_num_threads  # noqa: E402

if TYPE_CHECKING:
    from molae import fit as fit
    from molae import ops as ops
    from molae.config import ConvertConfig as ConvertConfig
    from molae.config import HealConfig as HealConfig
    from molae.convert import Report as Report
    from molae.convert import convert as convert
    from molae.convert import heal as heal
    from molae.convert import inspect as inspect
    from molae.convert import materialize as materialize
    from molae.convert import plan as plan
    from molae.info import show_config as show_config

__all__ = [
    "ConvertConfig",
    "HealConfig",
    "Report",
    "__version__",
    "convert",
    "errors",
    "fit",
    "get_num_threads",
    "heal",
    "inspect",
    "materialize",
    "num_threads",
    "ops",
    "plan",
    "set_num_threads",
    "show_config",
]

# Loaded at first use, so that `import molae` stays quick: name -> (module, attribute in it).
_LAZY: dict[str, tuple[str, str | None]] = {
    "ConvertConfig": ("molae.config", "ConvertConfig"),
    "HealConfig": ("molae.config", "HealConfig"),
    "Report": ("molae.convert", "Report"),
    "convert": ("molae.convert", None),  # a package that can be called
    "fit": ("molae.fit", None),
    "heal": ("molae.convert", "heal"),
    "inspect": ("molae.convert", "inspect"),
    "materialize": ("molae.convert", "materialize"),
    "ops": ("molae.ops", None),
    "plan": ("molae.convert", "plan"),
    "show_config": ("molae.info", "show_config"),
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'molae' has no attribute {name!r}")
    module_name, attribute = _LAZY[name]
    module = importlib.import_module(module_name)
    value = module if attribute is None else getattr(module, attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
