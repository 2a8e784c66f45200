"""Errors that a user can act on. Each says what is wrong, where, and what would be valid, in one line.

AutofitError            exit code 1: the run failed
├── UsageError          2: an option, a config file or a model folder is wrong
├── NothingFits         3: no candidate fits the budget
├── OutOfBudget         3: a step of training does not fit, whatever is done that does not change its result
├── DataError           4: the data set is missing, unreadable or empty
└── AccessError         4: a gated or missing model or data set on the hub
"""

from __future__ import annotations


class AutofitError(Exception):
    """The run failed; `exit_code` is what the command line ends with."""

    exit_code = 1


class UsageError(AutofitError):
    exit_code = 2


class NothingFits(AutofitError):
    exit_code = 3


class OutOfBudget(AutofitError):
    exit_code = 3


class DataError(AutofitError):
    exit_code = 4


class AccessError(AutofitError):
    exit_code = 4


BY_NAME: dict[str, type[AutofitError]] = {
    cls.__name__: cls for cls in (AutofitError, UsageError, NothingFits, OutOfBudget, DataError, AccessError)
}
