"""The methods, by name. A new one is a file beside `latent` and a line here."""

from __future__ import annotations

from molae.convert import latent, molae
from molae.convert.fitting import Method
from molae.errors import ArgumentError

__all__ = ["METHODS", "find_method"]

METHODS: dict[str, Method] = {method.name: method for method in (latent.METHOD, molae.METHOD)}


def find_method(name: str) -> Method:
    """The method of that name.

    Raises
    ------
    ArgumentError
        There is none; the message lists those there are.
    """
    if name not in METHODS:
        raise ArgumentError(f"method: unknown {name!r}; known are {', '.join(METHODS)}")
    return METHODS[name]
