"""GPTQModel's `dynamic`: rules for single modules, by regular expressions over their names.

The first rule that matches a module's name decides: with `-:` before the expression the module was left in full
precision; with `+:` or nothing it has settings of its own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from qwenspec.hf.config import Config, shown
from qwenspec.hf.patterns import compiled

# How a module was quantised, not how it is stored.
_RECORDS = ("act_group_aware", "damp_auto_increment", "damp_percent", "hessian_chunk_size", "mock_quantization", "mse")


def excluded(config: Config, modules: Sequence[str], common: Mapping[str, Any]) -> list[str]:
    """Those of `modules` that were left in full precision.

    Reports settings of a module that are not those that all have, `common`: what is stored would have another shape.
    """
    rules = config.child("dynamic")
    if rules is None:
        return []
    patterns = [(rule, found) for rule in rules.tree if (found := compiled(rules, rule, _expression(rule)))]
    deciding = {module: rule for module in modules if (rule := _deciding(patterns, module))}
    for rule in rules.tree:
        decided = [module for module in modules if deciding.get(module) == rule]
        settings = rules.get(rule)
        if decided and not rule.startswith("-:"):
            _check(rules, rule, settings, decided[0], common)
    return [module for module in modules if deciding.get(module, "").startswith("-:")]


def rules(skip: Sequence[str]) -> dict[str, Any]:
    """`dynamic` for modules that are in full precision."""
    return {f"-:^{re.escape(module)}$": {} for module in skip}


def _expression(rule: str) -> str:
    return rule.removeprefix("-:") if rule.startswith("-:") else rule.removeprefix("+:")


def _deciding(patterns: Sequence[tuple[str, re.Pattern[str]]], module: str) -> str | None:
    return next((rule for rule, pattern in patterns if pattern.match(module)), None)


def _check(rules: Config, rule: str, settings: Any, module: str, common: Mapping[str, Any]) -> None:
    if not isinstance(settings, Mapping):
        rules.error("wrong-type", f"`{rule}` is {shown(settings)}, not an object", rule)
        return
    for key, value in settings.items():
        if key in common and (value != common[key] or isinstance(value, bool) != isinstance(common[key], bool)):
            message = f"`{rule}` gives {module} `{key}` {shown(value)}, where the others have {shown(common[key])}"
            hint = "all quantised modules must be stored alike; quantise these alike, or leave them out with `-:`"
            rules.error("unsupported-value", message, rule, hint)
        elif key not in common and key not in _RECORDS:
            message = f"nothing reads `{key}` that `{rule}` gives {module}, and it may change what the model computes"
            rules.error("unread-key", message, rule)
