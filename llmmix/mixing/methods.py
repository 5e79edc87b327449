"""Mixing methods by the name that a command line gives, and their configs from NAME=VALUE.

recipes/aioli.py calls it. Aioli's own config is parsed with the other flags.
"""

from collections.abc import Sequence
from typing import Any

import yaml

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
        ValueError: The method is unknown, an option is not NAME=VALUE or has a bad value, or the
            method takes no options.
        TypeError: The method has no option of that name.
    """
    if method not in METHODS:
        raise ValueError(f"`method` must be one of {METHODS}, got {method!r}.")
    if bad := [option for option in given if "=" not in option]:
        raise ValueError(f"`method_options`: {bad} must be NAME=VALUE.")
    if given and method not in CONFIGS:
        raise ValueError(
            f"`method_options` are for the methods {list(CONFIGS)}; {method!r} takes none."
        )
    options = dict(option.split("=", 1) for option in given)
    options = {name: yaml.safe_load(value) for name, value in options.items()}
    return CONFIGS[method](**options) if method in CONFIGS else None
