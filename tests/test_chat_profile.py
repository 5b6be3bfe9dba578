"""Profiles of checkpoints, and what requests of the APIs say about thinking."""

from typing import Any

import pytest

from ds4jax.chat_profile import Thinking, check_profile, detect_profile, effort_level, thinking_of
from ds4jax.errors import ConfigError, RequestError


@pytest.mark.parametrize(
    ("metadata", "file_name", "profile"),
    [
        ({}, "", "preview"),
        ({"general.name": "DeepSeek-V4-Flash"}, "DeepSeek-V4-Flash-IQ2XXS-00001-of-00003.gguf", "preview"),
        ({"general.name": "DeepSeek V4 Flash 0731"}, "", "0731"),
        ({"general.base_model.0.name": "DeepSeek-V4-Flash-Vision-Exp"}, "model.gguf", "0731"),
        ({"general.version": "2026-08"}, "", "0731"),
        ({"general.version": "v4-0424"}, "", "preview"),
        ({}, "DeepSeek-V4-Flash-0731-Q2_K.gguf", "0731"),
        ({}, "deepseek-v4-flash-20260815.gguf", "0731"),
        ({}, "deepseek-v4-flash-20260424-ctx1024.gguf", "preview"),
        ({"tokenizer.chat_template": "{% if x %}Reasoning Effort: Beyond maximum{% endif %}"}, "", "0731"),
    ],
)
def test_detection(metadata: dict[str, Any], file_name: str, profile: str) -> None:
    assert detect_profile(metadata, file_name) == profile


def test_override() -> None:
    assert check_profile("0731") == "0731"
    with pytest.raises(ConfigError, match="prompt profile 'august', expected one of preview, 0731"):
        check_profile("august")


@pytest.mark.parametrize(
    ("name", "preview", "refresh"),
    [
        ("none", None, None),
        ("minimal", "high", "low"),
        ("low", "high", "low"),
        ("medium", "high", "high"),
        ("high", "high", "high"),
        ("xhigh", "high", "high"),
        ("max", "max", "max"),
        ("ultra", "max", "max"),
    ],
)
def test_names_of_effort(name: str, preview: str | None, refresh: str | None) -> None:
    assert (effort_level(name, "preview"), effort_level(name, "0731")) == (preview, refresh)


ON, OFF = Thinking(True, "high"), Thinking(False, "high")


@pytest.mark.parametrize(
    ("request_", "default", "expected"),
    [
        ({}, ON, ON),
        ({}, OFF, OFF),
        ({"reasoning_effort": "none", "thinking": True}, ON, Thinking(False, None)),
        ({"reasoning_effort": "max"}, ON, Thinking(True, "max")),
        ({"reasoning_effort": "max"}, OFF, Thinking(True, "max")),
        ({"reasoning": {"effort": "low"}}, ON, Thinking(True, "low")),
        ({"output_config": {"effort": "max"}}, ON, Thinking(True, "max")),
        ({"thinking": {"type": "disabled"}, "think": True}, ON, OFF),
        ({"thinking": {"type": "adaptive"}}, OFF, ON),
        ({"thinking": False}, ON, OFF),
        ({"think": False, "enable_thinking": True}, ON, OFF),
        ({"enable_thinking": False, "model": "deepseek-reasoner"}, ON, OFF),
        ({"chat_template_kwargs": {"thinking": False}}, ON, OFF),
        ({"chat_template_kwargs": {"enable_thinking": True, "reasoning_effort": "low"}}, OFF, Thinking(True, "low")),
        ({"model": "deepseek-chat"}, ON, OFF),
        ({"model": "deepseek-reasoner"}, OFF, ON),
        ({"model": ["x"], "thinking": None, "reasoning": None}, ON, ON),
    ],
)
def test_switches(request_: dict[str, Any], default: Thinking, expected: Thinking) -> None:
    assert thinking_of(request_, default, "0731") == expected


@pytest.mark.parametrize(
    ("request_", "error"),
    [
        ({"reasoning_effort": "hard"}, "reasoning effort 'hard', expected one of none, minimal, low"),
        ({"reasoning_effort": 3}, "reasoning effort 3, expected a string"),
        ({"reasoning": "high"}, "reasoning = 'high', expected an object"),
        ({"thinking": {"type": "maybe"}}, "thinking.type = 'maybe', expected enabled, disabled or adaptive"),
        ({"thinking": "on"}, "thinking = 'on', expected true or false"),
    ],
)
def test_bad_switches(request_: dict[str, Any], error: str) -> None:
    with pytest.raises(RequestError, match=error):
        thinking_of(request_, ON, "preview")
