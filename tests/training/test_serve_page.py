"""The search page in a real browser, headless: what it shows against the API, keys, pictures, contrast, hostile titles."""

from __future__ import annotations

import json
import shutil
import socket
import threading
import time
import urllib.parse
import urllib.request

import pytest

from tests.training.serving_files import HOSTILE, SLASHED, write

pytest.importorskip("fastapi", reason="the search page needs fastapi")
uvicorn = pytest.importorskip("uvicorn", reason="the search page needs uvicorn")
playwright = pytest.importorskip(
    "playwright.sync_api", reason="the page is tested with playwright: pip install playwright"
)

from gcl_kernels.training.serve import parser, state_of  # noqa: E402
from gcl_kernels.training.serving.app import create_app  # noqa: E402

SEARCHED = "document.getElementById('status').textContent.includes(' ms')"


CARDS = "[...document.querySelectorAll('section:first-child .card')].map(card => card.dataset.id).join()"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="module")
def site(files):
    """The address of a server that runs in a thread."""
    options = [f"--model={files / 'one.pt'}", f"--model={files / 'two.pt'}", f"--corpus={files / 'corpus.json'}",
               f"--judged={files / 'judged.json'}", "--show=brand", f"--folder={files / 'vectors'}"]  # fmt: skip
    app = create_app(state_of(parser().parse_args(options)))
    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        server.should_exit = True
        thread.join(20)


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as of:
        chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
        try:
            browser = of.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        except playwright.Error as error:
            pytest.skip(f"no Chromium, neither installed nor of playwright: {str(error).splitlines()[0]}")
        yield browser
        browser.close()


@pytest.fixture
def opened(browser, site):
    """Opens pages; at the end none has said an error, run a title's script, or asked another host."""
    contexts, faults = [], []

    def opened(query="", **options):
        contexts.append(browser.new_context(**options))
        page = contexts[-1].new_page()
        page.set_default_timeout(10_000)
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on(
            "console", lambda line: faults.append(line.text) if "Failed to load resource" not in line.text else None
        )
        page.on("request", lambda asked: None if asked.url.startswith((site, "blob:")) else faults.append(asked.url))
        page.goto(f"{site}/?{urllib.parse.urlencode({'q': query})}" if query else site)
        until(page, SEARCHED if query else "document.getElementById('about').textContent")
        return page

    yield opened
    for context in contexts:
        for page in context.pages:
            assert page.title() == "corpus.json – search"
        context.close()
    assert faults == []


def answer(site, **query):
    with urllib.request.urlopen(f"{site}/api/search?{urllib.parse.urlencode(query, doseq=True)}") as response:
        return json.load(response)


def shown(page, model):
    return page.eval_on_selector_all(
        f"section[aria-labelledby=model-{model}] .card", "cards => cards.map(card => card.dataset.id)"
    )


def until(page, expression):
    """Wait until it is true; `Page.wait_for_function` evaluates text in the page, which the page's policy forbids."""
    end = time.monotonic() + 10
    while not page.evaluate(expression):
        assert time.monotonic() < end, expression
        page.wait_for_timeout(10)


def test_a_typed_query_shows_both_models_and_what_moved(opened, site):
    page = opened()
    page.keyboard.type("red shoe")  # the box has the focus
    page.keyboard.press("Enter")
    until(page, SEARCHED)
    a, b = (answer(site, q="red shoe", model=key)["results"] for key in "ab")
    assert (shown(page, "a"), shown(page, "b")) == ([of["id"] for of in a], [of["id"] for of in b])
    assert shown(page, "a") != shown(page, "b")
    before = {of["id"]: of["rank"] for of in a}
    for of, card in zip(b, page.locator("section[aria-labelledby=model-b] .card").all(), strict=True):
        by = before[of["id"]] - of["rank"]
        words = card.inner_text()
        assert (f"▲ {by}" if by > 0 else f"▼ {-by}" if by < 0 else "=") in words
        assert f"{of['score']:.3f}" in words
        assert (f"grade {of['grade']}" if of["grade"] else "grade –") in words
    assert "with grades" in page.inner_text("#status")
    assert "ms to embed" in page.inner_text("#models")
    assert page.url.endswith("?q=red+shoe")


def test_titles_queries_and_ids_are_text_and_nothing_else(opened):
    page = opened(HOSTILE)
    assert HOSTILE in page.locator(".title").all_inner_texts()
    assert page.locator("main script, img[src=x]").count() == 0
    until(page, "[...document.images].every(image => image.complete)")
    for identity in ("1", SLASHED):  # their pictures came, whatever the id is made of
        assert (
            page.eval_on_selector(f"section .card[data-id={json.dumps(identity)}] img", "image => image.naturalWidth")
            == 32
        )
    assert page.locator("section .card[data-id='4'] img").count() == 0  # the file is no picture
    page.click("summary")
    assert HOSTILE in page.locator("#filters option").all_inner_texts()


def test_a_slider_searches_again_with_its_weight_and_can_be_set_back(opened, site):
    page = opened("hat")
    usual = shown(page, "a")
    page.click("summary")
    with page.expect_response(lambda response: "weights" in response.url):
        page.get_by_role("slider", name="image").fill("0")
    expected = [of["id"] for of in answer(site, q="hat", weights=["title=0.3", "image=0"])["results"]]
    until(page, f"{CARDS} == {json.dumps(','.join(expected))}")
    assert shown(page, "a") == expected != usual
    page.get_by_role("button", name="As trained").click()
    until(page, f"{CARDS} == {json.dumps(','.join(usual))}")
    assert shown(page, "a") == usual
    page.get_by_role("slider", name="title").fill("0")
    page.get_by_role("slider", name="image").fill("0")
    assert "not all 0" in page.get_by_role("alert").inner_text()


def test_a_filter_keeps_the_documents_of_its_value(opened):
    page = opened("hat")
    page.click("summary")
    with page.expect_response(lambda response: "where" in response.url):
        page.get_by_label("brand").select_option("other")
    until(page, "document.querySelectorAll('.card').length == 2")
    assert shown(page, "a") == ["2"]


def test_keys_reach_everything(opened):
    page = opened("red shoe")
    focused = """(of => of.closest('section')?.getAttribute('aria-labelledby') + ' ' + of.dataset.id)(document.activeElement)"""
    a, b = shown(page, "a"), shown(page, "b")
    page.evaluate("document.activeElement.blur()")
    page.keyboard.press("/")
    assert page.evaluate("document.activeElement.id") == "query"
    assert page.input_value("#query") == "red shoe"
    page.keyboard.press("ArrowDown")
    assert page.evaluate(focused) == f"model-a {a[0]}"
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowRight")
    assert page.evaluate(focused) == f"model-b {b[1]}"
    page.keyboard.press("Enter")
    assert page.get_by_role("dialog").is_visible()
    assert b[1] in page.get_by_role("dialog").inner_text()
    page.keyboard.press("Escape")
    assert not page.get_by_role("dialog").is_visible()
    assert page.evaluate(focused) == f"model-b {b[1]}"
    page.keyboard.press("ArrowUp")
    page.keyboard.press("ArrowUp")
    assert page.evaluate("document.activeElement.id") == "query"


def test_a_picture_is_searched_by_when_chosen_and_when_dropped(opened, files):
    page = opened()
    page.set_input_files("#file", files / "blue.png")
    until(page, SEARCHED)
    page.click("summary")
    page.get_by_role("slider", name="title").fill("0")
    until(page, "document.querySelector('.score')?.textContent.startsWith('1.000')")
    assert shown(page, "a")[0] == "2"
    page.get_by_role("button", name="Remove the picture").click()
    until(page, "document.querySelectorAll('.card').length == 0")
    drop = """async text => {
        const data = new DataTransfer();
        const canvas = new OffscreenCanvas(32, 32);
        canvas.getContext('2d').fillStyle = 'red';
        canvas.getContext('2d').fillRect(0, 0, 32, 32);
        const type = text ? 'text/html' : 'image/png';
        data.items.add(new File([text || await canvas.convertToBlob()], 'dropped', {type}));
        document.body.dispatchEvent(new DragEvent('drop', {dataTransfer: data, bubbles: true, cancelable: true}));
    }"""
    page.evaluate(drop, "<b>")
    assert page.get_by_role("alert").inner_text() == "Expected a picture."
    page.evaluate(drop, "")
    until(page, "document.querySelector('.score')?.textContent.startsWith('1.000')")
    assert shown(page, "a")[0] in ("1", SLASHED)
    page.fill("#query", "hat")
    page.get_by_label("Text against picture").fill("0")
    until(page, "!document.querySelector('.score')?.textContent.startsWith('1.000')")


def test_what_a_server_says_that_has_gone_is_shown(opened):
    page = opened()
    page.route("**/api/search*", lambda route: route.fulfill(status=200, content_type="application/json", body="{"))
    page.fill("#query", "x")
    page.get_by_role("alert").wait_for()
    page.unroute("**/api/search*")
    page.fill("#query", "y")
    until(page, SEARCHED)
    assert not page.get_by_role("alert").is_visible()


def luminance(colour):
    channels = [of / 255 for of in colour]
    linear = [of / 12.92 if of <= 0.04045 else ((of + 0.055) / 1.055) ** 2.4 for of in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


COLOURS = """() => [...document.querySelectorAll('body *')].filter(of =>
    of.checkVisibility() && [...of.childNodes].some(node => node.nodeType === 3 && node.textContent.trim())).map(of => {
        let behind = of;
        while (getComputedStyle(behind).backgroundColor === 'rgba(0, 0, 0, 0)') behind = behind.parentElement;
        return [of.className, getComputedStyle(of).color, getComputedStyle(behind).backgroundColor];
    })"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1200])
def test_text_can_be_read_fits_and_has_names_for_those_who_cannot_see(opened, scheme, width):
    page = opened("red shoe", color_scheme=scheme, viewport={"width": width, "height": 800})
    page.click("summary")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    colours = page.evaluate(COLOURS)
    assert len(colours) > 20
    for name, *pair in colours:
        ink, paper = (luminance([int(of) for of in colour[4:-1].split(",")[:3]]) for colour in pair)
        assert (max(ink, paper) + 0.05) / (min(ink, paper) + 0.05) >= 4.5, (name, pair)
    assert (ink < paper) == (scheme == "light")
    nameless = """() => [...document.querySelectorAll('input, select, button')].filter(of => of.checkVisibility() &&
        !of.labels?.length && !of.getAttribute('aria-label') && !of.textContent.trim()).map(of => of.outerHTML)"""
    assert page.evaluate(nameless) == []
    assert page.evaluate("[...document.images].every(image => image.hasAttribute('alt'))")


def test_fast_typing_shows_the_last_query(opened, site):
    page = opened()
    held = []
    page.route("**/api/search*q=hat*", lambda route: held.append(route))
    page.fill("#query", "hat")
    page.keyboard.press("Enter")
    page.fill("#query", "blue shoe")
    page.keyboard.press("Enter")
    until(page, SEARCHED)
    assert len(held) == 2
    for route in held:
        route.fulfill(json=answer(site, q="hat"))
    page.wait_for_timeout(200)
    assert shown(page, "a") == [of["id"] for of in answer(site, q="blue shoe")["results"]]
