"""The Markdown of the chat page in headless Chromium: what it shows, also while it grows, and that it is safe."""

import mimetypes
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, Route

STATIC = Path(str(resources.files("ds4jax.server"))) / "static"

# What the functions of this file do in the browser. `shown` leaves the copy buttons out.
HELPERS = """
window.MarkdownView = (await import("/static/markdown.js")).MarkdownView;
window.view = (...texts) => {
  const view = new MarkdownView(document.createElement("div"));
  for (const text of texts) view.show(text);
  return view.node;
};
window.shown = (node) => {
  for (const button of node.querySelectorAll("button")) button.remove();
  return node.innerHTML;
};
"""

ALLOWED = {
    *("P", "H3", "H4", "H5", "H6", "UL", "OL", "LI", "BLOCKQUOTE", "HR", "PRE", "CODE", "DIV", "SPAN", "BUTTON"),
    *("TABLE", "THEAD", "TBODY", "TR", "TH", "TD", "STRONG", "EM", "DEL", "A"),
}
ATTRIBUTES = {"class", "start", "tabindex", "type", "href", "title", "target", "rel"}


@pytest.fixture(scope="module")
def page(browser: Browser) -> Iterator[Page]:
    def serve(route: Route) -> None:
        path = route.request.url.removeprefix("http://page")
        if path == "/":
            route.fulfill(content_type="text/html", body="<!doctype html><title>empty</title>")
        else:
            kind = mimetypes.guess_type(path)[0]
            route.fulfill(content_type=kind, body=(STATIC / path.removeprefix("/static/")).read_text())

    context = browser.new_context()
    page = context.new_page()
    page.route("http://page/**", serve)
    page.goto("http://page/")
    page.evaluate(f"async () => {{ {HELPERS} }}")
    yield page
    context.close()


def shown(page: Page, text: str) -> str:
    html: str = page.evaluate("text => shown(view(text))", text)
    return html.replace(' target="_blank" rel="noopener noreferrer"', "")


def link(address: str, text: str) -> str:
    return f'<a href="{address}" title="{address}">{text}</a>'


MARKED = {"{b}": "<strong>b</strong>", "{i}": "<em>i</em>", "{m}": '<span class="math">', "{/}": "</span>"}


@pytest.mark.parametrize(
    ("text", "html"),
    [
        ("**b** *i* ***bi*** __b__ _i_ ~~d~~", "{b} {i} <strong><em>bi</em></strong> {b} {i} <del>d</del>"),
        ("**a *b* c** and *a **b** c*", "<strong>a <em>b</em> c</strong> and <em>a <strong>b</strong> c</em>"),
        ("2 * 3 * 4, snake_case_name, __init__.py, 5*", "2 * 3 * 4, snake_case_name, __init__.py, 5*"),
        ("*a `*` b* and **open", "<em>a <code>*</code> b</em> and **open"),
        (r"\*a\* \\ \`x\` \q", r"*a* \ `x` \q"),
        ("`` a`b `` and `c", "<code>a`b</code> and `c"),
        (r"\(a_1 * b_2\) and \[x\] and $$y_1$$", "{m}\\(a_1 * b_2\\){/} and {m}\\[x\\]{/} and {m}$$y_1$${/}"),
        ("[a *b*](https://x.org/(y)_z)", link("https://x.org/(y)_z", "a <em>b</em>")),
        ("https://x.org/a_b_c, (http://y.org/).", f"{link('https://x.org/a_b_c', 'https://x.org/a_b_c')}, ("
         f"{link('http://y.org/', 'http://y.org/')})."),
        ("<https://x.org/>", link("https://x.org/", "https://x.org/")),
        ("![cat](https://x.org/c.png)", link("https://x.org/c.png", "cat")),
        ("[a](javascript:alert(1)) [b](data:text/html,x) [c](/v1/models)", None),
        ("<b>x</b> &amp; <!-- y -->", "&lt;b&gt;x&lt;/b&gt; &amp;amp; &lt;!-- y --&gt;"),
        ("line\nnext  \nthird\\\nfourth", "line\nnext\nthird\nfourth"),
        ("It was\n1984. Then\n# not", None),
    ],
)  # fmt: skip
def test_inline(page: Page, text: str, html: str | None) -> None:
    if html is None:
        assert "<a" not in shown(page, text) and "<ol" not in shown(page, text)
        return
    for key, value in MARKED.items():
        html = html.replace(key, value)
    assert shown(page, text) == f"<p>{html}</p>"


def code(language: str, text: str) -> str:
    bar = f'<div class="code-bar"><span>{language}</span></div>'
    return f'<div class="code">{bar}<pre tabindex="0"><code>{text}</code></pre></div>'


TABLE = "| a | b |\n|:-:|--:|\n| `x` | 1 \\| 2 | more |\n| y |\nend"
TABLE_HTML = (
    '<div class="table" tabindex="0"><table><thead><tr><th class="center">a</th><th class="right">b</th></tr></thead>'
    '<tbody><tr><td class="center"><code>x</code></td><td class="right">1 | 2</td></tr>'
    '<tr><td class="center">y</td></tr></tbody></table></div><p>end</p>'
)


@pytest.mark.parametrize(
    ("text", "html"),
    [
        ("# A *b* #\n## C\ntext\n####### no", "<h3>A <em>b</em></h3><h4>C</h4><p>text\n####### no</p>"),
        ("a\n\n\nb\n***\nc", "<p>a</p><p>b</p><hr><p>c</p>"),
        ("```python title\n  x < 1\n\n*y*\n```\nafter", code("python", "  x &lt; 1\n\n*y*") + "<p>after</p>"),
        ("````\n```\n````", code("", "```")),
        ("~~~\nopen", code("", "open")),
        ("> a\n> > b\n\nc", "<blockquote><p>a</p><blockquote><p>b</p></blockquote></blockquote><p>c</p>"),
        ("- a\n- b\n  more\n\n* c\n\nd", "<ul><li>{a}</li><li><p>b\nmore</p></li><li><p>c</p></li></ul><p>d</p>"),
        ("3. a\n4. b\n- c", '<ol start="3"><li>{a}</li><li><p>b</p></li></ol><ul><li><p>c</p></li></ul>'),
        ("1. a\n  - b\n    - c\n2. d", '<ol start="1"><li>{a}<ul><li><p>b</p><ul><li><p>c</p></li></ul></li></ul></li>'
         "<li><p>d</p></li></ol>"),
        ("1. a\n\n   ```\n   x\n     y\n   ```\n2. b", f'<ol start="1"><li>{{a}}{code("", "x" + chr(10) + "  y")}</li>'
         "<li><p>b</p></li></ol>"),
        ("- [ ] a\n- [x] b", "<ul><li><p>☐ a</p></li><li><p>☑ b</p></li></ul>"),
        ("text:\n- a", "<p>text:</p><ul><li>{a}</li></ul>"),
        (TABLE, TABLE_HTML),
        ("a | b\nc", "<p>a | b\nc</p>"),
        ("\\[\na_1 < b\n\\]\nc", '<div class="math" tabindex="0">\\[\na_1 &lt; b\n\\]</div><p>c</p>'),
    ],
)  # fmt: skip
def test_blocks(page: Page, text: str, html: str) -> None:
    assert shown(page, text) == html.replace("{a}", "<p>a</p>")


HOSTILE = [
    "<script>window.ran = 1</script><img src=x onerror='window.ran = 1'>",
    "<svg onload=window.ran=1><iframe src=javascript:window.ran=1></iframe><style>*{}</style>",
    "[x](javascript:window.ran=1) [x](  JaVaScRiPt:window.ran=1) [x](vbscript:x) [x](data:text/html,<script>)",
    '[x](https://e.org/"onmouseover="window.ran=1) [x](https://e.org \'t" onclick="window.ran=1\') <https://e.org/">',
    "![x](https://e.org/x.png) ![x](x onerror=window.ran=1) [![a](https://e.org/a.png)](javascript:window.ran=1)",
    '```"><script>window.ran=1</script>\n</code></pre><script>window.ran=1</script>\n```',
    "| <b onclick=x> | [a](javascript:window.ran=1) |\n|--|--|\n| <script>window.ran=1</script> | ![](javascript:x) |",
    "# <img src=x onerror=window.ran=1>\n> <script>window.ran=1</script>\n1. <b>\n\n<!-- --><?x?><![CDATA[",
    "[a]: javascript:window.ran=1\n\n[a][a] [a] &lt;script&gt; &#x6a;avascript:",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_nothing_becomes_markup(page: Page, text: str) -> None:
    requests: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    found: dict[str, Any] = page.evaluate(
        """async text => {
          const node = view(text);
          document.body.replaceChildren(node);
          for (const link of node.querySelectorAll("a")) link.dispatchEvent(new MouseEvent("mouseover"));
          await new Promise((done) => setTimeout(done, 50));
          const all = [...node.querySelectorAll("*")];
          return {
            tags: all.map((one) => one.tagName),
            attributes: all.flatMap((one) => one.getAttributeNames()),
            links: all.filter((one) => one.href).map((one) => [one.protocol, one.rel]),
            ran: window.ran,
          };
        }""",
        text,
    )
    assert set(found["tags"]) <= ALLOWED and set(found["attributes"]) <= ATTRIBUTES
    assert all(link == ["https:", "noopener noreferrer"] for link in found["links"])
    assert (found.get("ran"), requests) == (None, [])


EVERYTHING = "\n".join(
    ["# Title", "", "Some *text* with `code`", "over lines", "", "- one", "  - two", "", "  more", "- three", "", TABLE,
     "", "```py", "a = 1", "", "b = 2", "```", "> quote", "", "$$", "x", "$$", "", "1. a", "2. b", "", "***end***"]
)  # fmt: skip


def test_a_growing_answer_looks_as_if_it_had_come_at_once(page: Page) -> None:
    differing = page.evaluate(
        """text => {
          const prefixes = [...text].map((_, i) => text.slice(0, i + 1));
          return prefixes.filter((prefix, i) => shown(view(...prefixes.slice(0, i + 1))) !== shown(view(prefix)));
        }""",
        EVERYTHING,
    )
    assert differing == []


def test_what_is_finished_stays(page: Page) -> None:
    """So that a selection in it is not lost while the answer grows."""
    kept = page.evaluate(
        """() => {
          const node = document.createElement("div");
          const growing = new MarkdownView(node);
          growing.show("# a\\n\\nb");
          const [title, text] = node.childNodes;
          growing.show("# a\\n\\nb c");
          return [node.firstChild === title, node.lastChild === text, node.textContent];
        }"""
    )
    assert kept == [True, False, "ab c"]


def test_a_paragraph_of_unusual_length_is_shown_as_written(page: Page) -> None:
    assert shown(page, "*a* " * 6000) == f"<p>{('*a* ' * 6000).strip()}</p>"


@pytest.mark.parametrize(
    "unit",
    ["*", "**a", "_a ", "*a_", "[", "[a](", "![", "`", "` `` ", "\\(", "\\[", "$$", "<http://", "~~a", "|", "- ", "> ",
     "1. ", " ", "#", "# ", "\n", "-|", "| - ", "```", "\t", "***a ", "*_a*", "[a](b (", "\\"],
)  # fmt: skip
def test_repetition(page: Page, unit: str) -> None:
    """A model that repeats itself must not make the page hang: then this would run into the browser's time limit."""
    for text in (unit * 20_000, f"{unit * 9000}x", "\n".join([unit * 10] * 2000), f"# {unit * 20_000}x"):
        assert page.evaluate("text => view(text).textContent.length >= 0", text)
