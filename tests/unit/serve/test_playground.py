"""The playground in a browser: chatting, stopping, keys, gauges, steps, themes and a phone's width."""

from __future__ import annotations

import re
import shutil
import urllib.error
import urllib.request
from html.parser import HTMLParser
from pathlib import Path

import pytest
from playground_server import PlaygroundServer

from millstream.serve.playground import HEADERS, pages

FOLDER = Path(__file__).parents[3] / "src" / "millstream" / "serve" / "playground"
CHROMIUM = next((path for name in ("chromium", "chromium-browser") if (path := shutil.which(name))), None)
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed: the playground is not tested")


@pytest.fixture(scope="module")
def server():
    one = PlaygroundServer()
    yield one
    one.close()


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        one = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield one
        one.close()


@pytest.fixture
def visit(browser):
    """Opens a page in a context of its own. At the end, nothing may have gone wrong in it, and nothing been fetched
    from anywhere but the server."""
    contexts, troubles = [], []

    def open_page(url: str, ready: bool = True, **context):
        contexts.append(browser.new_context(**{"viewport": {"width": 1280, "height": 860}, **context}))
        page = contexts[-1].new_page()
        page.set_default_timeout(15_000)
        page.on("pageerror", lambda error: troubles.append(f"error: {error}"))
        page.on("console", lambda line: troubles.append(line.text) if line.type == "error" else None)
        page.on("request", lambda asked: None if asked.url.startswith(url) else troubles.append(f"from {asked.url}"))
        page.goto(url)
        if ready:
            page.wait_for_selector("#status[data-state=ready]")
        return page

    open_page.troubles = troubles
    yield open_page
    for context in contexts:
        context.close()
    assert not troubles


def ask(page, text: str) -> None:
    page.fill("#prompt", text)
    page.press("#prompt", "Enter")


def answered(page, count: int = 1) -> str:
    # By selectors: to wait for a function needs eval, which the page's own policy forbids.
    page.locator(".turn.answer:not(.busy) .acts").nth(count - 1).wait_for()
    return page.locator(".turn.answer .text").nth(count - 1).inner_text()


# -- without a browser


def test_pages_have_their_types_and_tags():
    found = pages()
    assert {"index.html", "app.js", "style.css", "icon.svg"} <= set(found) and "__init__.py" not in found
    assert all(page.body and page.etag.startswith('"') for page in found.values())
    assert {page.content_type.split(";")[0] for page in found.values()} == {
        "text/html", "text/css", "text/javascript", "image/svg+xml",
    }  # fmt: skip


def test_files_are_served_with_a_policy_and_asked_for_again_cheaply(server):
    with urllib.request.urlopen(server.url) as answer:
        assert answer.headers["Content-Type"].startswith("text/html")
        for name, value in HEADERS.items():
            assert answer.headers[name] == value
        tag = answer.headers["ETag"]
    again = urllib.request.Request(server.url, headers={"If-None-Match": tag})
    with pytest.raises(urllib.error.HTTPError) as same:
        urllib.request.urlopen(again)
    assert same.value.code == 304


@pytest.mark.parametrize("path", ["playground/__init__.py", "playground/..%2f__init__.py", "playground/none.js"])
def test_only_the_files_of_the_playground_are_served(server, path):
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(server.url + path)
    assert refused.value.code == 404


def test_routes_say_what_they_have_and_metrics_are_among_them(server):
    with urllib.request.urlopen(f"{server.url}metrics") as answer:
        assert answer.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
        text = answer.read().decode()
    assert 'millstream_engine_up{engine="0",model_name="tiny"} 1.0' in text
    assert 'millstream_ready{engine="0",model_name="tiny"} 1.0' in text
    for path in ("v1/requests/chatcmpl-none/timeline", "v1/requests/%00/timeline"):
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(server.url + path)
        assert refused.value.code == 404


@pytest.mark.parametrize("since", ["-1", "x", "1e3", "9" * 40, "%F0%9F%98%80"])
def test_a_step_that_is_no_number_is_a_bad_request(server, since):
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(f"{server.url}playground/state?since={since}")
    assert refused.value.code == 400


def test_the_page_needs_nothing_from_elsewhere_and_has_nothing_inline():
    for path in FOLDER.iterdir():
        if path.suffix in (".html", ".css", ".js"):
            text = path.read_text()
            assert not re.search(r"""(?:src|href|url|import|from|fetch)\s*[=(]?\s*["'(]?(?:https?:)?//""", text), (
                path.name
            )
            assert "eval(" not in text and "innerHTML" not in text, path.name
    html = (FOLDER / "index.html").read_text()
    assert " style=" not in html and "<style" not in html and not re.search(r"\son\w+=", html)
    assert not re.search(r"<script(?![^>]*\ssrc=)", html)


class _Ids(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.fields: list[tuple[str, dict[str, str | None]]] = []
        self.labels: set[str] = set()
        self.referred: list[str] = []

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        if "id" in given:
            self.ids.append(given["id"])
        if tag in ("input", "textarea", "select"):
            self.fields.append((tag, given))
        if tag == "label" and given.get("for"):
            self.labels.add(given["for"])
        for name in ("aria-labelledby", "aria-describedby", "for"):
            self.referred += (given.get(name) or "").split()


def test_every_field_has_a_label_and_every_reference_a_target():
    parser = _Ids()
    parser.feed((FOLDER / "index.html").read_text())
    assert len(parser.ids) == len(set(parser.ids))
    assert set(parser.referred) <= set(parser.ids)
    for tag, given in parser.fields:
        assert given["id"] in parser.labels or given.get("aria-label"), f"{tag} {given['id']}"
    scripts = "".join(path.read_text() for path in FOLDER.glob("*.js"))
    for name in re.findall(r'find\("([\w-]+)"\)', scripts):
        assert name in parser.ids, f"a script looks for #{name}"


def luminance(color: str) -> float:
    parts = [int(color[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_colors_have_the_contrast_that_reading_needs_in_both_themes():
    css = (FOLDER / "style.css").read_text()
    blocks = re.findall(r"color-scheme: (light|dark);(.*?)\}", css, re.DOTALL)
    themes = [dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", block)) for _, block in blocks]
    assert [name for name, _ in blocks] == ["light", "dark", "dark"] and themes[1] == themes[2]
    for theme in themes:
        for ground in ("page", "surface", "sunken"):
            for text in ("text", "muted", "accent", "bad"):
                assert contrast(theme[text], theme[ground]) >= 4.5, (text, ground)
        assert contrast(theme["text"], theme["accent-soft"]) >= 4.5
        assert contrast(theme["accent"], theme["accent-soft"]) >= 4.5
        assert contrast(theme["accent-text"], theme["accent"]) >= 4.5
        assert contrast(theme["bad"], theme["bad-soft"]) >= 4.5
        for mark in ("prefill", "decode", "line-strong"):
            assert contrast(theme[mark], theme["surface"]) >= 3, mark


# -- in a browser


@needs_browser
def test_an_answer_streams_and_says_what_it_took(server, visit):
    page = visit(server.url)
    assert page.evaluate("document.activeElement.id") == "prompt"
    server.asked.clear()
    page.fill("#max_tokens", "12")
    page.fill("#system", "Be brief.")
    ask(page, "one two three")
    text = answered(page)
    assert text.split() == [f"word{place}" for place in range(12)]
    facts = page.locator(".turn.answer .facts").inner_text()
    assert re.search(r"TTFT [\d.]+ m?s", facts) and re.search(r"speed [\d.,]+ tok/s", facts)
    assert "output 12" in facts and "prompt 5" in facts and "ended by length" in facts
    (body,) = server.asked
    assert body["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "one two three"},
    ]
    assert body["stream"] and body["stream_options"] == {"include_usage": True} and body["model"] == "tiny"
    assert body["max_tokens"] == 12 and body["temperature"] == 0.7 and "seed" not in body
    assert page.locator("#announce").inner_text().startswith("Answer complete: word0")


@needs_browser
def test_a_conversation_goes_on_is_asked_again_and_begins_anew(server, visit):
    page = visit(server.url)
    page.fill("#max_tokens", "3")
    ask(page, "first")
    answered(page)
    server.asked.clear()
    ask(page, "second")
    answered(page, 2)
    assert [turn["role"] for turn in server.asked[0]["messages"]] == ["user", "assistant", "user"]
    assert page.locator(".acts >> text=Again").count() == 1
    page.click(".acts >> text=Again")
    page.locator(".turn.answer.busy").wait_for(state="detached")
    answered(page, 2)
    assert server.asked[1]["messages"] == server.asked[0]["messages"]
    page.click("#new-chat")
    assert page.locator(".turn").count() == 0 and page.locator("#empty").is_visible()
    page.click("#ideas button >> nth=0")
    answered(page)
    assert len(server.asked[-1]["messages"]) == 1


@needs_browser
@pytest.mark.parametrize("how", ["button", "escape"])
def test_stopping_ends_the_request_in_the_engine(server, visit, how):
    page = visit(server.url)
    server.runner.step_s = 0.1
    try:
        page.fill("#max_tokens", "50")
        ask(page, "a long answer please")
        page.locator(".turn.answer .text", has_text="word2").wait_for()
        page.click("#stop") if how == "button" else page.keyboard.press("Escape")
        answered(page)
        assert "ended by you" in page.locator(".turn.answer .facts").inner_text()
        assert page.locator("#send").is_visible() and page.evaluate("document.activeElement.id") == "prompt"
        page.locator("#running", has_text=re.compile("^0$")).wait_for()
    finally:
        server.runner.step_s = 0.01
    assert server.watched.metrics.requests.total("chat", "499") >= 1


@needs_browser
def test_enter_with_shift_starts_a_line_and_nothing_is_sent_empty(server, visit):
    page = visit(server.url)
    server.asked.clear()
    page.press("#prompt", "Enter")
    page.fill("#prompt", "a")
    page.press("#prompt", "Shift+Enter")
    page.type("#prompt", "b")
    assert page.input_value("#prompt") == "a\nb" and not server.asked


@needs_browser
def test_what_a_model_or_a_user_says_never_becomes_markup(server, visit):
    page = visit(server.url)
    page.fill("#max_tokens", "2")
    evil = "<img src=x onerror=\"document.title='owned'\"> <b>bold</b> ```\n<script>1</script>\n```"
    ask(page, evil)
    answered(page)
    assert page.locator(".turn.user .text").inner_text() == evil
    assert page.locator(".turn img, .turn script, .turn b:not(.facts b)").count() == 0
    assert page.title() == "Millstream playground"


@needs_browser
def test_a_refusal_is_told_in_the_servers_words(server, visit):
    page = visit(server.url)
    server.refuse = (429, "the queue is full")
    try:
        ask(page, "hello")
        page.locator(".turn .fault", has_text="the queue is full Try again in 7 s.").wait_for()
        assert page.locator(".fault").get_attribute("role") == "alert"
    finally:
        server.refuse = None
        visit.troubles[:] = [line for line in visit.troubles if "429" not in line]
    page.click(".acts >> text=Again")
    answered(page)
    assert page.locator(".fault").count() == 0


@needs_browser
def test_gauges_and_steps_show_prompts_and_answers_in_one_step(server, visit):
    page = visit(server.url)
    page.click("#burst")
    page.locator("#running", has_text=re.compile(r"^([2-9]|1\d)$")).wait_for()
    page.locator("#chart g.bar:has(.prefill):has(.decode)").first.wait_for()
    page.locator("#burst-hint", has_text="12 of 12 answered.").wait_for()
    page.locator("#running", has_text=re.compile("^0$")).wait_for()
    assert re.search(r"In [1-9]\d* of the last", page.locator("#chart-note").inner_text())
    assert "computed together" in page.locator("#chart-summary").inner_text()
    assert re.search(r"[\d,]+ kept, of 2,048", page.locator("#kv-text").inner_text())
    assert re.search(r"\d+ % of [\d,]+ tokens", page.locator("#prefix-text").inner_text())
    box = page.locator("#chart").bounding_box()
    page.mouse.move(box["x"] + box["width"] - 20, box["y"] + 20)
    page.locator("#chart-note", has_text=re.compile(r"^Step [\d,]+: .*running")).wait_for()
    assert page.locator("#chart g.bar.on").count() == 1


@needs_browser
def test_an_answer_has_its_timeline(server, visit):
    page = visit(server.url)
    page.fill("#max_tokens", "4")
    ask(page, " ".join(f"w{place}" for place in range(90)))
    answered(page)
    page.click(".acts >> text=Timeline")
    page.locator("#timeline-rows tr", has_text="finished").wait_for()
    told = page.locator("#timeline-rows tr td:nth-child(2)").all_inner_texts()
    assert told[:2] == ["queued", "admitted"] and told[-2:] == ["decode", "finished"]
    assert told.count("prefill") == 3  # of 32 tokens and less
    assert page.locator("#timeline-chart rect").count() >= 3
    page.keyboard.press("Escape")
    assert not page.locator("#timeline").is_visible()


@needs_browser
def test_a_server_with_keys_is_asked_with_one(browser, visit):
    server = PlaygroundServer(key="sk-right")
    try:
        page = visit(server.url, ready=False)
        page.locator("#key-form").wait_for()
        assert page.locator("#status-text").inner_text() == "Key needed"
        page.fill("#key", "sk-wrong")
        page.press("#key", "Enter")
        page.locator("#key-hint.wrong").wait_for()
        page.fill("#key", "sk-right")
        page.press("#key", "Enter")
        page.wait_for_selector("#status[data-state=ready]")
        assert not page.locator("#key-form").is_visible()
        page.fill("#max_tokens", "2")
        ask(page, "hello")
        assert answered(page).split() == ["word0", "word1"]
        page.click(".acts >> text=Timeline")
        page.locator("#timeline-rows tr", has_text="finished").wait_for()
        assert page.evaluate("localStorage.getItem('millstream-key')") is None
        assert "sk-right" not in page.content()
        page.reload()
        page.wait_for_selector("#status[data-state=ready]")
    finally:
        visit.troubles[:] = [line for line in visit.troubles if "401" not in line]
        server.close()


@needs_browser
def test_a_server_that_goes_away_is_seen_and_seen_again(visit):
    server = PlaygroundServer()
    page = visit(server.url)
    server.close()
    page.wait_for_selector("#status[data-state=down]")
    assert page.locator("#status-text").inner_text() == "Not answering"
    visit.troubles[:] = [line for line in visit.troubles if "ERR_" not in line]
    page.close()
    visit.troubles[:] = [line for line in visit.troubles if "ERR_" not in line]


@needs_browser
def test_themes_follow_the_system_until_one_is_chosen_and_the_choice_stays(server, visit):
    def ground(page):
        return page.evaluate("getComputedStyle(document.body).backgroundColor")

    light, dark = visit(server.url, color_scheme="light"), visit(server.url, color_scheme="dark")
    assert ground(light) == "rgb(247, 247, 245)" and ground(dark) == "rgb(20, 22, 26)"
    assert dark.get_attribute("#theme", "aria-pressed") == "true"
    dark.click("#theme")
    assert ground(dark) == ground(light) and dark.get_attribute("#theme", "aria-pressed") == "false"
    dark.reload()
    assert ground(dark) == ground(light)


@needs_browser
def test_settings_are_kept_and_what_is_out_of_bounds_is_left_to_the_server(server, visit):
    page = visit(server.url)
    page.fill("#temperature", "0.3")
    page.fill("#seed", "7")
    page.fill("#top_p", "5")
    page.fill("#max_tokens", "2")
    page.fill("#stop_text", "END\\n")
    page.reload()
    page.wait_for_selector("#status[data-state=ready]")
    server.asked.clear()
    ask(page, "hello")
    answered(page)
    body = server.asked[0]
    assert body["temperature"] == 0.3 and body["seed"] == 7 and body["stop"] == ["END\n"] and "top_p" not in body
    page.click("#reset")
    assert page.input_value("#temperature") == "0.7" and page.input_value("#seed") == ""


@needs_browser
def test_on_a_phone_one_view_is_shown_and_nothing_is_wider_than_the_screen(server, visit):
    page = visit(server.url, viewport={"width": 360, "height": 740}, has_touch=True, is_mobile=True)
    for view, shown in (("Chat", "#prompt"), ("Engine", "#chart"), ("Settings", "#system")):
        page.click(f".views >> text={view}")
        assert page.locator(shown).is_visible()
        assert [other for other in ("#prompt", "#chart", "#system") if page.locator(other).is_visible()] == [shown]
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        assert page.locator(".views [aria-current=true]").inner_text() == view
    page.click(".views >> text=Chat")
    page.fill("#prompt", "hello " * 60)
    page.click("#send")
    answered(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    assert page.locator("#send").bounding_box()["height"] >= 44


@needs_browser
def test_everything_can_be_reached_by_keyboard_in_order(server, visit):
    page = visit(server.url)
    page.focus(".skip")
    assert page.locator(".skip").bounding_box()["x"] >= 0, "the way past the header is seen once it has the focus"
    reached = []
    for _ in range(24):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.id"))
    wanted = ["new-chat", "theme", "log", "prompt", "send", "burst", "system", "temperature", "max_tokens", "reset"]
    assert [name for name in reached if name in wanted][: len(wanted)] == wanted
