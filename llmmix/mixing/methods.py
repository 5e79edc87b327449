"""The methods that move a mixture by name, for a command line: their configs from NAME=VALUE."""

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
    """The config of a method other than aioli, from NAME=VALUE; None for one without options.

    Raises:
        ValueError: The method is unknown, an option is not NAME=VALUE, or the method takes none.
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
