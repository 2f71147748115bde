"""The error of the federated package, and its hint at a name that comes near. Both stand below `config`, whose parts raise the error too."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ConfigError(ValueError):
    """A setting, a file or a data set that the run cannot use; the message is one line that says what, where and what to do.

    >>> import hetlora
    >>> try:
    ...     hetlora.Config.create("my settings", ranks="powerlaw:50:5")
    ... except hetlora.ConfigError as error:
    ...     print(error)
    my settings: ranks: expected 1 <= MIN <= MAX, got 'powerlaw:50:5'
    """


def nearest(name: str, known: Iterable[str], otherwise: str = "") -> str:
    """ " (did you mean 'x'?)", or `otherwise` where none of the `known` names comes near.

    >>> nearest("flod", ["hetlora", "fold"])
    " (did you mean 'fold'?)"
    """
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else otherwise
