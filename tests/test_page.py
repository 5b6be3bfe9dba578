"""The chat page in headless Chromium, against a server of the demonstration model."""

import dataclasses
import json
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, Route, expect
from serving import KEY, SETTINGS, Serving, eventually

from ds4jax.engine_session import Sessions

CHAT = "**/v1/chat/completions"
expect.set_options(timeout=30_000)  # milliseconds
PHONE = {"viewport": {"width": 360, "height": 640}, "has_touch": True, "is_mobile": True}


@pytest.fixture
def visit(browser: Browser, server: Serving) -> Iterator[Callable[..., Page]]:
    """Opens the page. What the browser complains about, and requests to elsewhere, fail the test."""
    contexts: list[BrowserContext] = []
    complaints: list[str] = []

    def open_page(url: str = server.url, expected: str = "nothing", **options: Any) -> Page:
        context = browser.new_context(**options)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: re.search(expected, message.text) or complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("dialog", lambda dialog: complaints.append(dialog.message))
        page.on("request", lambda request: request.url.startswith(url) or complaints.append(request.url))
        page.goto(url)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not complaints


def write(page: Page, text: str) -> None:
    page.get_by_label("Message").fill(text)
    page.get_by_label("Message").press("Enter")


def set_up(page: Page, **values: str) -> None:
    page.get_by_role("button", name="Settings").click()
    for label, value in values.items():
        field = page.get_by_label(label.replace("_", " "))
        field.select_option(value) if label in ("Thinking", "Appearance") else field.fill(value)
    page.keyboard.press("Escape")


def answer(page: Page) -> str:
    """Text of the last answer, once it is whole."""
    expect(page.locator(".answer").last).to_have_attribute("aria-busy", "false")
    return page.locator(".answer .markdown").last.inner_text()


def alter(page: Page, **fields: Any) -> None:
    """Adds fields to the requests that the page sends."""

    def more(route: Route) -> None:
        route.continue_(post_data=json.dumps({**route.request.post_data_json, **fields}))

    page.route(CHAT, more)


def script(page: Page, *pieces: dict[str, Any], end: str = "stop") -> None:
    """Gives the page an answer that the model would not come up with; the texts of `pieces` are deltas."""
    chunks: list[Any] = [{"choices": [{"index": 0, "delta": delta, "finish_reason": None}]} for delta in pieces]
    chunks.append({"choices": [{"index": 0, "delta": {}, "finish_reason": end}]})
    usage = {"prompt_tokens": 20, "completion_tokens": 12, "prompt_tokens_details": {"cached_tokens": 15}}
    speed = {"tokens_per_second": 41.26, "time_to_first_token_s": 0.125, "drafted": 12, "accepted": 9}
    chunks.append({"choices": [], "usage": usage, "ds4jax": speed})
    stream(page, *chunks, "[DONE]")


def stream(page: Page, *events: Any) -> None:
    """Answers the page's requests with these events."""
    texts = [event if isinstance(event, str) else json.dumps(event) for event in events]
    body = "".join(f": keep-alive\n\ndata: {text}\n\n" for text in texts)
    page.unroute(CHAT)
    page.route(CHAT, lambda route: route.fulfill(content_type="text/event-stream", body=body))


def test_conversation(visit: Callable[..., Page]) -> None:
    page = visit()
    expect(page).to_have_title("stories · ds4jax")
    expect(page.locator("#model")).to_have_text(re.compile(r"stories · \d+ tokens"))
    set_up(page, Token_limit="12", Seed="3")
    write(page, "Once upon a time")
    first = answer(page)
    assert first
    figures = r"[\d.]+ tokens/s · first token after [\d.]+ s · 12 tokens · prompt \d+ tokens, \d+ cached"
    expect(page.locator(".stats")).to_have_text(re.compile(figures.replace(" ", r"\s")))
    expect(page.locator(".note")).to_have_text("Cut off: the limit of tokens is reached.")
    page.get_by_role("button", name="Regenerate").click()
    assert answer(page) == first
    set_up(page, Seed="4")
    page.get_by_role("button", name="Regenerate").click()
    other = answer(page)
    assert other != first
    page.get_by_role("button", name="Continue").click()
    expect(page.locator(".stats")).to_have_text(re.compile(r"prompt\s\d\d\stokens,\s[1-9]\d*\scached"))
    longer = answer(page)
    assert longer.startswith(other) and len(longer) > len(other)
    write(page, "And then?")
    answer(page)
    assert page.locator("article").count() == 4
    assert page.get_by_role("button", name="Regenerate").count() == 1
    page.reload()
    expect(page.locator(".answer .markdown").first).to_have_text(longer, use_inner_text=True)
    expect(page.get_by_label("Seed")).to_have_value("4")
    page.get_by_role("button", name="New chat").click()
    expect(page.get_by_text("Write a message to begin.")).to_be_visible()
    assert page.locator("article").count() == 0


def test_stop(visit: Callable[..., Page], server: Serving) -> None:
    page = visit()
    alter(page, logit_bias={str(server.service.tokenizer.eos_id): -100})
    for stop in (lambda: page.keyboard.press("Escape"), lambda: page.get_by_role("button", name="Stop").click()):
        write(page, "Once upon a time")
        expect(page.locator(".answer .markdown").last).not_to_be_empty()
        stop()
        assert answer(page)
        expect(page.locator(".note").last).to_have_text("Stopped.")
        expect(page.get_by_role("button", name="Send")).to_be_visible()
        assert eventually(server.idle)
    write(page, "Once upon a time")
    expect(page.locator(".answer .markdown").last).not_to_be_empty()
    page.reload()
    expect(page.locator(".note")).to_have_text(["Stopped."] * 3)
    assert answer(page) and eventually(server.idle)
    write(page, "Once upon a time")
    page.get_by_role("button", name="New chat").click()
    assert eventually(server.idle)
    assert page.locator("article").count() == 0


def test_reasoning_is_folded(visit: Callable[..., Page]) -> None:
    page = visit()
    set_up(page, Thinking="high", Token_limit="8")
    write(page, "Once upon a time")
    assert answer(page) == ""
    thought = page.locator(".reasoning .plain")
    assert thought.text_content()
    expect(thought).to_be_hidden()
    page.locator("summary").focus()
    page.keyboard.press("Enter")
    expect(thought).to_be_visible()


def test_settings_go_with_the_request(visit: Callable[..., Page]) -> None:
    page = visit()
    script(page, {"content": "ok"})
    with page.expect_request(CHAT) as bare:
        write(page, "first")
    answer(page)
    user = {"role": "user", "content": "first"}
    streamed = {"model": "stories", "stream": True, "stream_options": {"include_usage": True}}
    assert bare.value.post_data_json == {**streamed, "messages": [user]}
    numbers = {"Temperature": "0.5", "Top-p": "0.9", "Top-k": "40", "Min-p": "0.05", "Token limit": "100", "Seed": "-1"}
    set_up(page, System_prompt="Be kind.", Thinking="max", **numbers)
    with page.expect_request(CHAT) as full:
        write(page, "second")
    assert full.value.post_data_json == {
        **streamed,
        **{"temperature": 0.5, "top_p": 0.9, "top_k": 40, "min_p": 0.05, "max_tokens": 100, "seed": -1},
        **{"thinking": {"type": "enabled"}, "reasoning_effort": "max"},
        "messages": [
            {"role": "system", "content": "Be kind."},
            *(user, {"role": "assistant", "content": "ok"}, {"role": "user", "content": "second"}),
        ],
    }
    answer(page)
    set_up(page, Temperature="3")
    write(page, "third")
    expect(page.get_by_role("dialog", name="Settings")).to_be_visible()
    assert page.locator("article").count() == 4
    page.get_by_role("button", name="Reset all").click()
    expect(page.get_by_label("System prompt")).to_have_value("")


def test_an_answer_with_everything(visit: Callable[..., Page]) -> None:
    page = visit()
    script(
        page,
        {"role": "assistant", "content": ""},
        {"reasoning_content": "Hm <b>"},
        {"content": "A **b"},
        {"content": "**"},
    )
    write(page, "<i>hello</i>\n  you")
    assert answer(page) == "A b"
    assert page.locator(".question .plain").inner_text() == "<i>hello</i>\n  you"
    assert page.locator(".reasoning .plain").text_content() == "Hm <b>"
    expect(page.locator(".stats")).to_have_text(
        "41.3 tokens/s · first token after 0.13 s · 12 tokens · 9 of 12 drafts accepted (75%) · "
        "prompt 20 tokens, 15 cached"
    )


def test_the_view_follows_the_answer_unless_the_reader_looks_elsewhere(
    visit: Callable[..., Page], server: Serving
) -> None:
    page = visit(viewport={"width": 500, "height": 400})
    script(page, {"content": "a\n" * 40})
    write(page, "first")
    answer(page)
    page.unroute(CHAT)
    alter(page, logit_bias={str(server.service.tokenizer.eos_id): -100})
    write(page, "Once upon a time")
    main, growing = page.locator("main"), page.locator(".answer .markdown").last
    below = "main => main.scrollHeight - main.scrollTop - main.clientHeight"
    for position in ("at the end", "above"):
        before = growing.evaluate("node => node.clientHeight")
        assert eventually(lambda before=before: growing.evaluate("node => node.clientHeight") > before + 50)
        assert (main.evaluate(below) < 5) == (position == "at the end")
        main.evaluate("main => main.scrollTop = 0")
    page.keyboard.press("Escape")
    assert eventually(server.idle)


def test_copies(visit: Callable[..., Page]) -> None:
    page = visit(permissions=["clipboard-read", "clipboard-write"])
    script(page, {"content": "A\n```\n<b> 1\n```\n*B*"})
    write(page, "the question")
    answer(page)
    copies = page.get_by_role("button", name=re.compile("^Cop(y|ied)$"))
    for n, text in enumerate(["the question", "<b> 1", "A\n```\n<b> 1\n```\n*B*"]):
        copies.nth(n).click()
        expect(copies.nth(n)).to_have_text("Copied")
        assert page.evaluate("navigator.clipboard.readText()") == text
    expect(copies.last).to_have_text("Copy")


def test_keys(visit: Callable[..., Page]) -> None:
    page = visit()
    script(page, {"content": "ok"})
    text = page.get_by_label("Message")
    expect(text).to_be_focused()
    low = text.bounding_box()
    page.keyboard.type("one")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    assert text.bounding_box()["height"] > low["height"]
    page.keyboard.press("Enter")
    answer(page)
    assert page.locator(".question .plain").inner_text() == "one\ntwo"
    assert text.bounding_box() == low
    page.keyboard.press("ArrowUp")
    expect(text).to_have_value("one\ntwo")
    assert page.locator("article").count() == 0
    page.keyboard.press("ArrowUp")  # moves in a text that is not empty
    page.keyboard.type("!")
    page.keyboard.press("Enter")
    answer(page)
    page.get_by_role("button", name="Edit").click()
    expect(text).to_have_value("one!\ntwo")
    page.get_by_role("button", name="Settings").focus()
    page.keyboard.press("Enter")
    expect(page.get_by_label("System prompt")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.get_by_label("System prompt")).to_be_hidden()
    expect(page.get_by_role("button", name="Settings")).to_be_focused()


def test_faults(visit: Callable[..., Page], server: Serving) -> None:
    page = visit(expected="Failed to load resource")
    fault = page.get_by_role("alert")
    write(page, "many words " * server.service.context)
    expect(fault).to_contain_text(f"together may have {server.service.context}")
    assert page.locator("article").count() == 1
    page.get_by_role("button", name="Edit").click()
    expect(fault).to_be_hidden()
    page.route(CHAT, lambda route: route.abort())
    write(page, "hello")
    expect(fault).to_contain_text("The server cannot be reached.")
    begun = {"choices": [{"index": 0, "delta": {"content": "begun"}, "finish_reason": None}]}
    for rest, words in (
        ([{"error": {"message": "the server is shutting down"}}], "the server is shutting down"),
        ([], "The connection ended before the answer did."),
    ):
        stream(page, begun, *rest)
        page.get_by_role("button", name="Try again").click()
        expect(fault).to_contain_text(words)
        assert answer(page) == "begun"
        expect(page.locator(".note")).to_have_text("Broken off.")
    script(page, {"content": "well"})
    page.get_by_role("button", name="Try again").click()
    assert answer(page) == "well"
    expect(fault).to_be_hidden()


def test_key(visit: Callable[..., Page], sessions: Sessions) -> None:
    with Serving(sessions, dataclasses.replace(SETTINGS, key=KEY)) as server:
        page = visit(server.url, expected="401")
        asked = page.get_by_role("dialog", name="API key")
        for key in ("wrong", KEY):
            expect(asked).to_be_visible()
            asked.get_by_label("Key", exact=True).fill(key)
            asked.get_by_role("button").click()
        expect(page).to_have_title("stories · ds4jax")
        set_up(page, Token_limit="3")
        write(page, "Once upon a time")
        assert answer(page)
        page.context.close()


def test_appearance_and_phone(visit: Callable[..., Page]) -> None:
    paper = "getComputedStyle(document.body).backgroundColor"
    light, dark = visit(color_scheme="light"), visit(color_scheme="dark")
    day, night = light.evaluate(paper), dark.evaluate(paper)
    assert (day, night) == ("rgb(255, 255, 255)", "rgb(22, 24, 29)")
    set_up(light, Appearance="dark")
    set_up(dark, Appearance="light")
    assert (light.evaluate(paper), dark.evaluate(paper)) == (night, day)
    phone = visit(**PHONE)
    wide = "word" * 60
    table = f"|{'a|' * 30}\n|{'-|' * 30}\n|{'long cell|' * 30}\n"
    script(
        phone,
        {"content": f"{wide}\n\n```\n{wide}\n```\n\n{table}\n`{wide}` $$ {wide} $$\n\n$$\n{wide}\n$$\n\n# {wide}"},
    )
    phone.get_by_label("Message").fill(wide)
    phone.get_by_label("Message").press("Enter")  # on the keyboard of a phone that begins a line
    assert phone.locator("article").count() == 0
    phone.get_by_role("button", name="Send").click()
    assert wide in answer(phone)
    assert phone.evaluate(
        "[document.documentElement, document.querySelector('main')].map(n => n.scrollWidth <= 360)"
    ) == [
        True,
        True,
    ]
    for name in ("Send", "Settings", "New chat"):
        expect(phone.get_by_role("button", name=name)).to_be_in_viewport(ratio=1)
    phone.get_by_role("button", name="Settings").click()
    assert phone.evaluate("document.querySelector('#settings').scrollWidth <= 360")


def test_policy(visit: Callable[..., Page]) -> None:
    """Even if the page made a mistake, nothing would run and nothing would be loaded from elsewhere."""
    page = visit(expected="requires 'Trusted|Content Security Policy")
    attempts = {
        "markup": "document.body.innerHTML = '<b>x</b>'",
        "script": "document.body.append(Object.assign(document.createElement('script'), {text: 'window.ran = 1'}))",
        "request": "fetch('https://example.org/')",
    }
    for code in attempts.values():
        caught = page.evaluate(
            f"async () => {{ try {{ await ({code}); return null; }} catch (e) {{ return e.name; }} }}"
        )
        assert caught == "TypeError"
    assert page.evaluate("window.ran") is None
