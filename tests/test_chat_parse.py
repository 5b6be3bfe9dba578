"""Answers taken apart: every case in one piece, in all kinds of pieces and from ids; stop strings; hostile input."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_chat import real

from ds4jax.chat_parse import Call, Content, Event, Message, Parser, Reasoning
from ds4jax.errors import RequestError

DATA = json.loads((Path(__file__).parent / "data" / "text" / "parse_cases.json").read_text())
CASES = {case["name"]: case for case in DATA["cases"]}


def parser(case: dict[str, Any], **options: Any) -> Parser:
    schemas = DATA["meta"]["tool_schemas"]
    tools = [{"function": {"name": name, "parameters": schemas[name]}} for name in case["tools"]]
    return Parser(tools, reasoning=case["start"] == "reasoning", **options)


def as_case(message: Message) -> dict[str, Any]:
    calls = [{"name": call.name, "arguments": call.arguments} for call in message.calls]
    return {
        "reasoning": message.reasoning,
        "content": message.content,
        "tool_calls": calls,
        "finish_reason": message.finish_reason,
    }


def joined(events: Iterable[Event]) -> list[dict[str, Any]]:
    """Events as the cases write them: neighbours of a kind are one."""
    result: list[dict[str, Any]] = []
    for event in events:
        if isinstance(event, Call):
            result.append({"type": "tool_call", "index": event.index, "name": event.name, "arguments": event.arguments})
            continue
        kind = "reasoning" if isinstance(event, Reasoning) else "content"
        if result and result[-1]["type"] == kind:
            result[-1]["text"] += event.text
        else:
            result.append({"type": kind, "text": event.text})
    return result


def parse(case: dict[str, Any], pieces: Iterable[str]) -> list[Event]:
    """Events of a case in pieces; the result is checked."""
    reader = parser(case)
    events = [event for piece in pieces for event in reader.feed(piece)] + reader.finish(case["ended_by"])
    assert as_case(reader.message) == case["expect"]
    assert joined(events) == case["events"]
    return events


@pytest.mark.parametrize("name", CASES)
def test_whole(name: str) -> None:
    parse(CASES[name], [CASES[name]["raw"]])


@pytest.mark.parametrize("name", CASES)
def test_character_by_character(name: str) -> None:
    case = CASES[name]
    parse(case, case["raw"])
    reader, events, checkpoints = parser(case), [], {c["fed"]: c for c in case["held_back_checkpoints"]}
    for fed, character in enumerate(["", *case["raw"]]):
        events += reader.feed(character)
        if fed in checkpoints:
            sent, most = reader.message, checkpoints[fed]
            assert most["reasoning"].startswith(sent.reasoning) and most["content"].startswith(sent.content)
            assert len(sent.calls) <= most["n_tool_calls"]


@given(data=st.data())
def test_random_cuts(data: st.DataObject) -> None:
    case = CASES[data.draw(st.sampled_from(sorted(CASES)))]
    raw = case["raw"]
    cuts = sorted(data.draw(st.sets(st.integers(0, len(raw)), max_size=12)) | {0, len(raw)})
    parse(case, [raw[start:end] for start, end in zip(cuts, cuts[1:], strict=False)])


@pytest.mark.parametrize("name", CASES)
def test_ids(name: str) -> None:
    case = CASES[name]
    for parse_special in (True, False) if "think>" not in case["raw"] else (True,):
        reader = parser(case, tokenizer=real())
        events = []
        for token in real().encode(case["raw"], parse_special=parse_special):
            events += reader.feed_ids([token])
        events += reader.finish(case["ended_by"])
        assert as_case(reader.message) == case["expect"]


def test_tags_spelled_out_in_other_tokens_are_text() -> None:
    reader = Parser(reasoning=True, tokenizer=real())
    reader.feed_ids(real().encode("the tag </think> ends it"))
    assert reader.state == "reasoning"
    ids = real().encode("é🙂")
    reader.feed_ids([*ids[:-1], real().special_ids["</think>"], *real().encode("ok")])
    reader.finish("stop")
    assert reader.message == Message("the tag </think> ends it" + "é\ufffd", "ok", (), "stop")
    assert reader.reasoning_tokens == len(real().encode("the tag </think> ends it")) + len(ids)


def test_state_and_end() -> None:
    case = CASES["think_call"]
    reader, seen = parser(case), []
    for character in case["raw"]:
        seen.append((reader.state, reader.complete))
        reader.feed(character)
    assert list(dict.fromkeys(seen)) == [(state, False) for state in ("reasoning", "content", "calls")]
    assert reader.complete and reader.state == "content"


def test_everything_but_a_possible_tag_is_handed_out_at_once() -> None:
    reader = parser(CASES["one_call"])
    assert reader.feed("a < b and <thi") == [Content("a < b and ")]
    assert reader.feed("s> is\n") == [Content("<this> is")]
    assert reader.feed("\nx <｜DSML｜tool") == [Content("\n\nx ")]
    assert reader.feed("s") == [Content("<｜DSML｜tools")]
    assert reader.feed('<｜DSML｜invoke name="ba') == []
    assert reader.feed("r") == [Content('<｜DSML｜invoke name="bar')]


STOPS = ("STOP", "TO END")


@given(
    cuts=st.sets(st.integers(0, 60)),
    text=st.sampled_from(["to STOP here", "STO STOP", "S TO EN TO END STOP", "SSTOSTOP<x STOP", "STO", "abSTOPTO END"]),
)
def test_stop_strings(cuts: set[int], text: str) -> None:
    raw = f"think STOP</think>{text}"
    places = sorted({min(cut, len(raw)) for cut in cuts} | {0, len(raw)})
    reader = Parser(reasoning=True, stop=STOPS)
    events = [event for start, end in zip(places, places[1:], strict=False) for event in reader.feed(raw[start:end])]
    events += reader.finish("stop")
    found = {stop: text.find(stop) for stop in STOPS if stop in text}
    end = min(found.values(), default=len(text))
    assert reader.message == Message("think STOP", text[:end], (), "stop")
    assert reader.complete == bool(found)
    assert reader.stop_sequence == (min(found, key=lambda stop: found[stop]) if found else None)
    assert "".join(event.text for event in events if isinstance(event, Content)) == text[:end]


def test_stop_strings_spare_arguments_and_end_what_follows() -> None:
    raw = CASES["one_call"]["raw"]
    reader = parser(CASES["one_call"], stop=["Beijing", "done"])
    events = reader.feed(f"ok do{raw}then done{raw}") + reader.finish("stop")
    assert [type(event) for event in events] == [Content, Call, Content]
    assert reader.message.content == "ok dothen " and reader.stop_sequence == "done"
    with pytest.raises(RequestError, match="expected strings that are not empty"):
        Parser(reasoning=False, stop=[""])


def test_white_space_around_calls_is_not_content() -> None:
    block = CASES["one_call"]["raw"]
    for raw, content in (
        (f" \n{block}Done.", "Done."),
        (f"Text.{block}\n \n", "Text."),
        (f"Text.{block}\n.", "Text.\n."),
    ):
        reader = parser(CASES["one_call"])
        reader.feed(raw)
        reader.finish("stop")
        assert (reader.message.content, len(reader.message.calls)) == (content, 1)


PIECES = [
    *(
        "<｜DSML｜tool_calls>",
        "</｜DSML｜tool_calls>",
        '<｜DSML｜invoke name="bash">',
        "</｜DSML｜invoke>",
        "\n\n",
        "\n",
        " ",
    ),
    *(
        '<｜DSML｜parameter name="command" string="true">',
        "</｜DSML｜parameter>",
        "<think>",
        "</think>",
        "text",
        '{"a": 1}',
    ),
    *(
        '<｜DSML｜invoke name="',
        '"',
        ">",
        "<",
        "</",
        "｜DSML｜",
        "<tool_calls>",
        '<invoke name="now">',
        "<|DSML|invoke",
        "STOP",
    ),
]


@given(
    pieces=st.lists(st.sampled_from(PIECES), max_size=25),
    sizes=st.lists(st.integers(1, 9), min_size=1),
    reasoning=st.booleans(),
    natural=st.booleans(),
)
def test_any_text_parses_alike_however_it_is_cut(
    pieces: list[str], sizes: list[int], reasoning: bool, natural: bool
) -> None:
    raw, case = "".join(pieces), CASES["one_call"] | {"start": "reasoning" if reasoning else "content"}
    whole, cut, at = parser(case, stop=["STOP"]), parser(case, stop=["STOP"]), 0
    whole.feed(raw)
    whole.finish("stop" if natural else "length")
    for i in range(len(raw)):
        if at < len(raw):
            cut.feed(raw[at : at + sizes[i % len(sizes)]])
            at += sizes[i % len(sizes)]
    cut.finish("stop" if natural else "length")
    assert cut.message == whole.message
    assert cut.stop_sequence == whole.stop_sequence
    for call in whole.message.calls:
        assert isinstance(json.loads(call.arguments), dict)


@pytest.mark.parametrize(
    "unit",
    [
        "<",
        "\n",
        '<｜DSML｜invoke name="bash"',
        "<｜DSML｜tool_calls>\n",
        '<｜DSML｜invoke "',
        "</think>",
        '<invoke name="now">',
        " ",
    ],
)
@pytest.mark.parametrize("start", ["", "<｜DSML｜tool_calls>", '<｜DSML｜tool_calls><｜DSML｜invoke name="bash">'])
def test_work_does_not_grow_with_what_is_held(unit: str, start: str) -> None:
    """A model that repeats itself for ever must not slow the server down: what is searched again stays short."""
    reader = parser(CASES["one_call"])
    reader.feed(start)
    for _ in range(3000):
        reader.feed(unit)
    assert len(reader._held) <= 2 * 1024 + 100
    reader.finish("length")


@pytest.mark.parametrize(
    ("body", "arguments"),
    [
        ('<｜DSML｜parameter name="command" string="true">a</｜DSML｜parameter>stray', {"command": "a"}),
        ('<｜DSML｜parameter string="true">nameless</｜DSML｜parameter>', {}),
        (f'<｜DSML｜parameter name="x" string="false">{"[" * 50_000}</｜DSML｜parameter>', {"x": "[" * 50_000}),
        ('<｜DSML｜parameter name="x" string="false">NaN</｜DSML｜parameter>', {"x": "NaN"}),
        ('<｜DSML｜parameter name="x" string="false">None</｜DSML｜parameter>', {"x": None}),
        ('<｜DSML｜parameter name="a" string="maybe">1</｜DSML｜parameter>', {"a": 1}),
        ("[1, 2]", {}),
    ],
)
def test_bodies(body: str, arguments: dict[str, Any]) -> None:
    reader = parser(CASES["one_call"])
    reader.feed(f'<｜DSML｜tool_calls>\n<｜DSML｜invoke name="bash">\n{body}\n</｜DSML｜invoke>\n</｜DSML｜tool_calls>')
    reader.finish("stop")
    (call,) = reader.message.calls
    assert json.loads(call.arguments) == arguments
