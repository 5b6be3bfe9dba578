"""Prompts against those of DeepSeek's own script, text and ids, and what a client can get wrong."""

import json
from pathlib import Path
from typing import Any

import pytest
from ds4jax.chat import render
from test_tokenizer import real  # noqa: F401
CASES = json.loads((Path(__file__).parent / "data" / "text" / "chat_cases.json").read_text())

def test_cases(real):
    for case in CASES["cases"]:
        print(case["name"])
        messages = []
        schema=None
        for m in case["messages"]:
            m=dict(m)
            m["prefix"] = m.pop("wo_eos", m.get("prefix"))
            schema = m.pop("response_format", schema)
            messages.append(m)
        keep = {False: True, True: False, None: None}[case.get("drop_thinking")]
        if case["name"]=="tools_removed_later": keep=False
        p = render(messages, tools=case.get("tools") or (), thinking=case["thinking"], effort=case["reasoning_effort"], profile=case["profile"], keep_reasoning=keep, schema=schema)
        if p.text != case["prompt"] or p.encode(real) != case["ids"]:
            print("FAIL", p.text==case["prompt"]); print(repr(p.text)); print(repr(case["prompt"]))
