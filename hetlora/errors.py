"""The error of the federated package. It stands below `config`, whose parts raise it too; all others take it from there."""

from __future__ import annotations


class ConfigError(ValueError):
    """A setting, a file or a data set that the run cannot use; the message is one line that says what, where and what to do.

    >>> import hetlora
    >>> try:
    ...     hetlora.Config.create("my settings", ranks="powerlaw:50:5")
    ... except hetlora.ConfigError as error:
    ...     print(error)
    my settings: ranks: expected 1 <= MIN <= MAX, got 'powerlaw:50:5'
    """
