"""Mixing methods by the name that a command line gives, and their configs from NAME=VALUE.

recipes/aioli.py calls it. Aioli's own config is parsed with the other flags.
"""

from argparse import ArgumentTypeError
from collections.abc import Sequence
from typing import Any

from llmmix.command_line.values import hints_of, value_of
from llmmix.mixing.doge import DoGEConfig
from llmmix.mixing.doremi import DoReMiConfig
from llmmix.mixing.odm import ODMConfig
from llmmix.mixing.skillit import SkillItConfig

METHODS = ("aioli", "skillit", "doremi", "doge", "odm", "stratified", "fixed")
CONFIGS: dict[str, Any] = {
    "skillit": SkillItConfig,
    "doremi": DoReMiConfig,
    "doge": DoGEConfig,
    "odm": ODMConfig,
}


def config_of(method: str, given: Sequence[str]) -> Any:
    """The config of a method from NAME=VALUE options; None for a method that takes none.

    Raises:
        ValueError: The method is unknown or takes no options, or an option is not NAME=VALUE, is
            none of the method's, or has a bad value.
    """
    if method not in METHODS:
        raise ValueError(f"`method` must be one of {METHODS}, got {method!r}.")
    if bad := [option for option in given if "=" not in option]:
        raise ValueError(f"`method_options`: {bad} must be NAME=VALUE.")
    if given and method not in CONFIGS:
        raise ValueError(
            f"`method_options` are for the methods {list(CONFIGS)}; {method!r} takes none."
        )
    if method not in CONFIGS:
        return None
    hints, options = hints_of((CONFIGS[method],)), {}
    for name, _, text in (option.partition("=") for option in given):
        if name not in hints:
            raise ValueError(f"`method_options`: {method} has no {name!r}, but {', '.join(hints)}.")
        try:
            options[name] = value_of(name, text, hints[name])
        except (ArgumentTypeError, ValueError) as error:
            raise ValueError(f"`method_options`: `{name}` {error}") from error
    return CONFIGS[method](**options)
