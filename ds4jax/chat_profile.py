"""What prompts of one model name differ in: the checkpoint's profile, whether to think, and how hard.

The April 2026 checkpoint ("preview") and the refresh of 31 July ("0731") share vocabulary and layout, but in the second
the texts that ask for more effort moved down by one level.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Any, Literal, get_args

from ds4jax.errors import ConfigError, RequestError

Profile = Literal["preview", "0731"]
Effort = Literal["low", "high", "max"]

_THOROUGH = """\
Reasoning Effort: Absolute maximum with no shortcuts permitted.
You MUST be very thorough in your thinking and comprehensively decompose the problem to resolve the root cause, \
rigorously stress-testing your logic against all potential paths, edge cases, and adversarial scenarios.
Explicitly write out your entire deliberation process, documenting every intermediate step, considered alternative, \
and rejected hypothesis to ensure absolutely no assumption is left unchecked.

"""
_BEYOND = """\
Reasoning Effort: Beyond maximum — exhaustive, relentless, and uncompromising.
You MUST reason with the utmost depth and rigor, leaving absolutely nothing to chance: exhaustively decompose the \
problem into its most fundamental components, trace every causal chain to its root, and resolve the underlying cause \
rather than any surface symptom.
Do not stop reasoning until you have independently verified the solution from multiple angles and are certain that no \
assumption remains unchecked and no error remains undiscovered.

"""
_PREFIXES: dict[Profile, dict[Effort, str]] = {
    "preview": {"max": _THOROUGH},
    "0731": {"high": _THOROUGH, "max": _BEYOND},
}

# Levels by the names that clients send, as DeepSeek's hosted API read them while it served the checkpoint.
_MOST: dict[str, Effort] = {"max": "max", "ultra": "max"}
_LEVELS: dict[Profile, dict[str, Effort]] = {
    "preview": {"minimal": "high", "low": "high", "medium": "high", "high": "high", "xhigh": "high", **_MOST},
    "0731": {"minimal": "low", "low": "low", "medium": "high", "high": "high", "xhigh": "high", **_MOST},
}

# The refresh and what came later carry a date in their names: 0731, or with its year 2026-07-31, 20260731.
_LATER = re.compile(r"0731|vision-exp|(?<!\d)0[89][0-3]\d(?!\d)|2026-?(07-?31|0[89]|1[0-2])|20(2[7-9]|[3-9]\d)-?[01]\d")
_NAME_KEYS = ("general.name", "general.base_model.0.name", "general.version")


@dataclasses.dataclass(frozen=True)
class Thinking:
    """Whether the model thinks before it answers, and how hard; no effort means no prefix."""

    on: bool = True
    effort: Effort | None = "high"


def check_profile(name: str) -> Profile:
    """The profile of this name. Raises `ConfigError` if there is none."""
    for profile in get_args(Profile):
        if name == profile:
            return profile
    raise ConfigError(f"prompt profile {name!r}, expected one of {', '.join(get_args(Profile))}")


def detect_profile(metadata: Mapping[str, Any], file_name: str = "") -> Profile:
    """The profile of a checkpoint, from the names and the chat template in its GGUF metadata and its file name.

    No key states it; where nothing points to the refresh, the answer is "preview".
    """
    names = (file_name, *(str(metadata.get(key, "")) for key in _NAME_KEYS))
    later = any(_LATER.search(name.lower()) for name in names)
    template = str(metadata.get("tokenizer.chat_template", ""))
    return "0731" if later or "Beyond maximum" in template else "preview"


def effort_prefix(effort: Effort | None, profile: Profile) -> str:
    """Text between BOS and the system text of a thinking prompt."""
    return "" if effort is None else _PREFIXES[profile].get(effort, "")


def effort_level(name: str, profile: Profile) -> Effort | None:
    """The level that a client's name for it stands for; None for "none", which switches thinking off.

    Raises `RequestError` for a name that no API knows.
    """
    if name == "none":
        return None
    if name not in _LEVELS[profile]:
        raise RequestError(f"reasoning effort {name!r}, expected one of none, {', '.join(_LEVELS[profile])}")
    return _LEVELS[profile][name]


def thinking_of(request: Mapping[str, Any], default: Thinking, profile: Profile) -> Thinking:
    """What a request body of any of the APIs says about thinking; the first switch found decides.

    An effort other than "none" switches thinking on where nothing else says a word. Raises `RequestError` for a value
    of the wrong kind.
    """
    template = _table(request, "chat_template_kwargs")
    places = (
        request.get("reasoning_effort"),
        _table(request, "reasoning").get("effort"),
        _table(request, "output_config").get("effort"),
        template.get("reasoning_effort"),
    )
    name = next((place for place in places if place is not None), None)
    if name is not None and not isinstance(name, str):
        raise RequestError(f"reasoning effort {name!r}, expected a string")
    effort = default.effort if name is None else effort_level(name, profile)
    if name == "none":
        return Thinking(False, None)
    switch = next(_switches(request, template), default.on or name is not None)
    return Thinking(switch, effort)


def _switches(request: Mapping[str, Any], template: Mapping[str, Any]) -> Iterator[bool]:
    """Every switch that a request sets, the deciding one first."""
    thinking = request.get("thinking")
    if isinstance(thinking, Mapping):
        kind = thinking.get("type")
        if kind not in ("enabled", "disabled", "adaptive"):
            raise RequestError(f"thinking.type = {kind!r}, expected enabled, disabled or adaptive")
        yield kind != "disabled"
    elif thinking is not None:
        yield _boolean("thinking", thinking)
    for table, key in (
        (request, "think"),
        (request, "enable_thinking"),
        (template, "thinking"),
        (template, "enable_thinking"),
    ):
        if table.get(key) is not None:
            yield _boolean(key, table[key])
    for alias, on in (("deepseek-chat", False), ("deepseek-reasoner", True)):
        if request.get("model") == alias:
            yield on


def _table(request: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = request.get(key)
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise RequestError(f"{key} = {value!r}, expected an object")
    return value


def _boolean(key: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise RequestError(f"{key} = {value!r}, expected true or false")
    return value
