"""The chat page, driven in a headless browser as a person uses it."""

import json
import shutil
import threading

import pytest

from common.conversation.turns import Turn
from common.engine import sampling
from common.engine.batcher import Batcher
from common.engine.request import Part
from common.inference.answerer import Sampling
from common.serving import app
from common.serving.server import Server
from gemma_sft.ft_gemma import predict
from gemma_sft.ft_gemma.config import Config

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def browser():
    if BROWSER is None:
        pytest.skip("there is no Chromium: apt-get install chromium")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def batcher(small_gemma):
    answer = predict.load_answer(Config(path_model_pretrain=str(small_gemma), model_save_dir="/nowhere"), base=True)
    batcher = Batcher(answer, {"tuned": None, "base": None})  # two names of one model: the page only passes them on
    yield batcher
    batcher.close()


@pytest.fixture(scope="module")
def service(batcher):
    return app.Service("m", "tuned", batcher)


@pytest.fixture(scope="module")
def url(service):
    server = Server(app.create_app(service), "127.0.0.1", 0, 16)
    yield server.address
    server.close()


@pytest.fixture
def page_of(browser, url):
    """page_of(**context) opens the page; nothing may come from elsewhere, and no script may fail."""
    opened, problems = [], []

    def make(**context):
        opened.append(browser.new_context(locale="zh-CN", **context))
        page = opened[-1].new_page()
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", lambda request: request.url.startswith(url) or problems.append(request.url))
        page.goto(url + "/")
        page.wait_for_selector("#models label", state="attached")
        return page

    yield make
    for context in opened:
        context.close()
    assert problems == []


@pytest.fixture
def page(page_of):
    return page_of(viewport={"width": 1280, "height": 800})


def slide(page, name, value):
    page.evaluate(
        "([name, value]) => { const one = document.getElementById(name); one.value = value; one.oninput() }",
        [name, value],
    )


def send(page, text):
    page.fill("#question", text)
    page.press("#question", "Enter")


def until(page, condition):
    """The page's own security policy forbids Playwright's wait_for_function."""
    for _ in range(600):
        if condition():
            return
        page.wait_for_timeout(50)
    raise AssertionError("waited for nothing")


def last_answer(page):
    """The text of the last answer, once it is whole."""
    page.wait_for_selector(".turn.assistant:last-child:not(.running)")
    return page.text_content(".turn.assistant:last-child p")


def test_a_conversation(page, batcher):
    """Answers are the model's, the history goes along, what a model says is never markup."""
    slide(page, "temperature", 0)
    slide(page, "max_tokens", 16)
    send(page, "有<b>问</b>")
    first = last_answer(page)
    turns = [Turn("user", "有<b>问</b>")]
    expected = batcher.answer([turns], Sampling(max_new_tokens=16))[0].text
    assert first == expected and page.text_content(".turn.user p") == "有<b>问</b>"
    slide(page, "repetition_penalty", 1.5)
    send(page, "他")
    turns += [Turn("assistant", first)] if first else []
    turns = [*turns, Turn("user", "他")] if first else [Turn("user", "他")]
    assert last_answer(page) == batcher.answer([turns], Sampling(max_new_tokens=16, repetition_penalty=1.5))[0].text
    assert "到了长度上限" in page.text_content("#log") or expected == ""


def test_streaming_and_the_stop_button(page, batcher, monkeypatch):
    """Text appears before the answer is over; stop frees the slot; the conversation can go on."""
    gate, next_ids, count = threading.Event(), sampling.next_ids, []

    def slow(*args):
        count.append(1)
        if len(count) > 30:
            gate.wait(0.05)
        return next_ids(*args)

    monkeypatch.setattr(sampling, "next_ids", slow)
    slide(page, "temperature", 2)
    slide(page, "max_tokens", 896)
    monkeypatch.setattr(batcher, "stop_ids", set())  # it goes on until it is stopped
    send(page, "有")
    until(page, lambda: len(page.text_content(".turn.running p")) > 5)
    assert page.text_content("#send") == "停止"
    page.click("#send")
    page.wait_for_selector(".turn.assistant:not(.running)")
    assert "已停止" in page.text_content(".turn.assistant small") and page.text_content("#send") == "发送"
    page.wait_for_timeout(600)
    assert batcher.active_count == 0
    gate.set()


def test_thought_is_folded_away(page, batcher, monkeypatch):
    """It comes as it is thought, apart from the answer, and goes back apart with the next question."""
    gate, bodies = threading.Event(), []

    class Thinking:
        model, rows, tokens, started, created, first = "tuned", (), 3, 0.0, 0.0, 0.0

        def parts(self, gone):
            yield [Part(0, "", [], None, "想<b>一</b>")]
            gate.wait(30)
            yield [Part(0, "答", [], "stop", "想")]

        def cancel(self):
            pass

    monkeypatch.setattr(batcher, "submit", lambda *rest: Thinking())
    page.on("request", lambda request: bodies.append(request.post_data_json) if request.method == "POST" else None)
    send(page, "有")
    until(page, lambda: page.locator(".turn details p").count() == 1)
    assert page.text_content(".turn.running details p") == "想<b>一</b>"
    assert page.text_content(".turn.running > p") == "" and not page.is_visible(".turn details p")
    gate.set()
    page.wait_for_selector(".turn.assistant:not(.running)")
    assert page.text_content(".turn.assistant > p") == "答" and page.text_content("details p") == "想<b>一</b>想"
    page.click("summary:has-text('思考')")
    assert page.is_visible(".turn details p")
    send(page, "他")
    until(page, lambda: len(bodies) == 2)
    sent = bodies[1]["messages"][1]
    assert sent == {"role": "assistant", "content": "答", "reasoning_content": "想<b>一</b>想"}


def test_models_and_languages(page, monkeypatch, batcher):
    asked, submit = [], batcher.submit
    monkeypatch.setattr(batcher, "submit", lambda model, *rest: asked.append(model) or submit(model, *rest))
    slide(page, "max_tokens", 16)
    send(page, "有")
    last_answer(page)
    page.click("#models label:has-text('base')")
    page.click("#language")
    assert page.text_content("h1") == "Chat" and page.get_attribute("html", "lang") == "en"
    page.click("#send:has-text('Send')")
    assert page.locator(".turn").count() == 2  # nothing was typed, nothing is sent
    send(page, "问")
    last_answer(page)
    assert asked == ["tuned", "base"]


def test_a_reload_keeps_nothing(page):
    page.fill("#key", "secret")
    page.fill("#system", "你是谁")
    send(page, "有")
    last_answer(page)
    page.reload()
    page.wait_for_selector("#models label", state="attached")
    assert page.locator(".turn").count() == 0 and page.is_visible("#hello")
    assert page.input_value("#key") == page.input_value("#system") == page.input_value("#question") == ""
    assert page.evaluate("localStorage.length + sessionStorage.length + document.cookie.length") == 0
    send(page, "有")
    page.click("#fresh")
    assert page.locator(".turn").count() == 0


OWN = Sampling(1500, True, temperature=2.5, top_p=0.333, top_k=0, min_p=0.1, repetition_penalty=0.9)
SLIDERS = ("temperature", "top_p", "top_k", "repetition_penalty", "max_tokens")


def test_sliders_begin_where_the_service_is(page_of, service, monkeypatch):
    """One that is not moved leaves its value to the service: what no slider can show is not lost."""
    assert [page_of().input_value(f"#{name}") for name in SLIDERS] == ["0", "1", "0", "1", "256"], "greedy"
    monkeypatch.setattr(service, "defaults", OWN)
    page, bodies = page_of(), []
    page.on("request", lambda request: bodies.append(request.post_data_json) if request.method == "POST" else None)
    assert [page.input_value(f"#{name}") for name in SLIDERS] == ["2.5", "0.33", "0", "0.9", "1500"]
    assert page.locator("#top_p").evaluate("slider => slider.closest('label').innerText").split()[-1] == "0.33"
    send(page, "有")
    last_answer(page)
    slide(page, "top_p", 0.5)
    slide(page, "max_tokens", 16)
    send(page, "他")
    until(page, lambda: len(bodies) == 2)
    assert [body.keys() & {*SLIDERS} for body in bodies] == [set(), {"top_p", "max_tokens"}]
    assert (bodies[1]["top_p"], bodies[1]["max_tokens"]) == (0.5, 16)
    last_answer(page)


def test_the_page_is_given_the_services_settings(service, monkeypatch):
    monkeypatch.setattr(service, "defaults", OWN)
    text = app.create_app(service).test_client().get("/").text
    assert f"const DEFAULTS = {json.dumps(vars(OWN))}\n" in text and "{{" not in text


@pytest.mark.parametrize("language", ["zh", "en"])
def test_the_hint_fits_a_narrow_phone(page_of, language):
    page = page_of(viewport={"width": 320, "height": 640})
    if language == "en":
        page.click("#language")
    hint = """() => {
        const box = document.getElementById('question'), pen = document.createElement('canvas').getContext('2d')
        const style = getComputedStyle(box)
        pen.font = style.font
        return pen.measureText(box.placeholder).width / (box.clientWidth - 2 * parseFloat(style.paddingLeft))
    }"""
    assert 0.1 < page.evaluate(hint) < 1


def test_a_key_and_an_error(page, service, monkeypatch):
    monkeypatch.setattr(service, "api_key", ("k",))
    send(page, "有")
    assert "Authorization: Bearer" in last_answer(page)
    assert page.locator(".turn.failed").count() == 1
    page.fill("#key", "k")
    page.press("#key", "Tab")
    send(page, "有")
    last_answer(page)
    assert page.locator(".turn.failed").count() == 1


def test_composing_chinese_does_not_send(page):
    """Enter that ends an input method's composition belongs to it."""
    page.fill("#question", "ni")
    page.dispatch_event("#question", "keydown", {"key": "Enter", "isComposing": True})
    assert page.locator(".turn").count() == 0 and page.input_value("#question") == "ni"


def test_on_a_phone(page_of):
    """Nothing is wider than the screen; settings open over the chat; buttons are as large as a finger."""
    page = page_of(viewport={"width": 360, "height": 740}, has_touch=True)
    assert not page.is_visible("#temperature")
    page.click("#settings")
    assert page.is_visible("#temperature")
    slide(page, "max_tokens", 16)
    page.click("#settings")
    send(page, "很长的一句话" * 30 + "a" * 200)
    last_answer(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    assert all(box["height"] >= 40 for box in (page.locator(f"#{name}").bounding_box() for name in ("send", "fresh")))


def test_the_api_page(page_of, url):
    page = page_of(viewport={"width": 900, "height": 800})
    page.goto(url + "/docs")
    page.wait_for_selector("section")
    assert page.locator("section").count() == 6
    section = page.locator("section", has_text="/health")
    section.locator("button").click()
    until(page, lambda: '"status": "ok"' in section.locator("pre").text_content())
