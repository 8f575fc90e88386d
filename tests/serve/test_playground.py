"""The playground in a real browser: what it shows, what it sends, and what it never does."""

import json
import os
import re
import subprocess
import sys
from importlib.resources import files
from pathlib import Path
from types import SimpleNamespace

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from coterie.routers.fixed import FixedRouter
from coterie.serve.playground.pages import routes
from pretend_answers import ANSWER, EXPERTS, pretend_app, running, weights
from served import QUESTION

CHROMIUM = Path("/usr/bin/chromium")
WAIT = 60_000  # ms
needs_browser = pytest.mark.skipif(not CHROMIUM.exists(), reason=f"there is no browser at {CHROMIUM}")


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def pretend():
    app = pretend_app()
    with running(app) as url:
        app.state.url = url
        yield app


@pytest.fixture
def opened(browser, pretend):
    """Open the page; give it with the application, and fail where a script of it failed."""
    contexts, wrong = [], []
    pretend.state.asked.clear()
    pretend.state.fail = None

    def opened(app=pretend, *, width: int = 1280, height: int = 860, **options):
        contexts.append(browser.new_context(viewport={"width": width, "height": height}, **options))
        contexts[-1].set_default_timeout(WAIT)
        page = contexts[-1].new_page()
        page.on("pageerror", lambda error: wrong.append(error))
        page.clock.install(time=0)  # before the page sets its first timer, which would go by the machine's time
        page.goto(app.state.url)
        return page

    yield opened
    for context in contexts:
        context.close()
    assert wrong == []


def ask(page, question: str, answers: int = 1) -> None:
    page.locator("#send:enabled").wait_for()
    page.fill("#question", question)
    page.press("#question", "Enter")
    page.locator(".answer[aria-busy=false]").nth(answers - 1).wait_for()


def stop_clock(page) -> None:
    """From here on, the page's time goes by as it is told to; it would go on while a busy machine types and clicks."""
    page.clock.pause_at(3600)


def sent(app, kind: str) -> list[dict]:
    return [body for sort, body in app.state.asked if sort == kind]


def move(page, name: str, value: float) -> None:
    page.locator(f"input[data-expert={name}]").first.fill(str(value))


# ------------------------------------------------------------------------------------------------ what it is made of


def test_the_page_may_load_and_run_nothing_from_elsewhere():
    app = FastAPI()
    app.include_router(routes)
    with TestClient(app) as client:
        page = client.get("/")
        policy = dict(part.split(" ", 1) for part in page.headers["Content-Security-Policy"].split("; "))
        assert policy.pop("default-src") == "'none'"
        assert {name: value for name, value in policy.items() if name.endswith("-src")} == {
            "script-src": "'self'",
            "style-src": "'self'",
            "connect-src": "'self'",
            "img-src": "data:",
        }
        parts = re.findall(r'(?:src|href)="(playground/[^"]+)"', page.text)
        assert len(parts) == 2
        for part in parts:
            assert client.get(f"/{part}").headers["Content-Security-Policy"] == page.headers["Content-Security-Policy"]
        for name in ("pages.py", "__init__.py", "..%2f__init__.py", "nothing.js"):
            assert client.get(f"/playground/{name}").status_code == 404
        assert app.openapi()["paths"] == {}


def test_no_script_writes_markup_or_names_another_place():
    parts = [file for file in files("coterie.serve.playground").iterdir() if file.name.endswith(("js", "css", "html"))]
    assert len(parts) >= 8
    for file in parts:
        found = re.search(
            r"https?:|[\"'(]//|innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|@import|\burl\(",
            file.read_text("utf-8"),
        )
        assert found is None, (file.name, found)


def test_experts_have_the_colours_of_the_report():
    report = files("coterie.report").joinpath("style.css").read_text("utf-8")
    page = files("coterie.serve.playground").joinpath("style.css").read_text("utf-8")
    light, dark = report.split("prefers-color-scheme: dark", 1)
    colours = lambda text: dict(re.findall(r"--(k\d+): (#[0-9a-f]{6})", text))  # noqa: E731
    ours = {name: (a, b) for name, a, b in re.findall(r"--(k\d+): light-dark\((#\w{6}), (#\w{6})\)", page)}
    assert ours == {name: (colours(light)[name], colours(dark)[name]) for name in colours(light)}
    assert len(ours) == 13


# ------------------------------------------------------------------------------------------------ in the browser


@needs_browser
def test_every_token_has_the_colour_of_its_leading_expert(opened):
    page = opened()
    ask(page, "Why is the sky blue?")
    found = page.locator(".token").evaluate_all("all => all.map(one => [one.textContent, one.parentNode.className])")
    leaders = [max(range(len(EXPERTS)), key=list(weights(number).values()).__getitem__) for number in range(len(found))]
    assert "".join(text for text, _ in found) == ANSWER
    assert [kind for _, kind in found] == [f"run k{leader}" for leader in leaders]
    assert len(set(leaders)) == 5
    assert page.locator(".run > .badge").first.text_content() == str(leaders[0] + 1)


@needs_browser
def test_a_token_tells_its_weights_when_it_is_pointed_at_and_by_the_keyboard(opened):
    page = opened()
    ask(page, "Why is the sky blue?")
    values = page.locator(".bars .number")
    mean = [sum(weights(number)[name] for number in range(54)) / 54 for name in EXPERTS]
    assert values.all_text_contents() == [f"{value:.2f}" for value in mean]
    page.locator(".token").nth(5).hover()
    assert values.all_text_contents() == [f"{value:.2f}" for value in weights(5).values()]
    assert "cluster-3 0.46" in page.locator(".token").nth(5).get_attribute("aria-description")
    page.mouse.move(0, 0)
    assert values.all_text_contents() == [f"{value:.2f}" for value in mean]
    page.locator(".token").first.focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert page.locator(".token:focus").text_content() == " all"
    assert values.all_text_contents() == [f"{value:.2f}" for value in weights(2).values()]
    assert page.locator(".caption", has_text="token 3").count() == 1


@needs_browser
def test_all_of_it_is_reached_by_the_keyboard_alone(opened):
    page = opened()
    page.locator("#send:enabled").wait_for()
    reached = []
    for _ in range(40):
        page.keyboard.press("Tab")
        focused = page.locator(":focus").evaluate("one => one.id || one.dataset.expert || one.dataset.field")
        reached.append(focused)
        if focused == "question":
            break
    assert [name for name in reached if name] == [
        "key", "theme", "compare", "model", "combiner", "top_k", "every", "temperature", "max_tokens",
        *EXPERTS, "question",
    ]  # fmt: skip
    page.keyboard.type("Say: done")
    page.keyboard.press("Enter")
    page.locator(".answer[aria-busy=false]").wait_for()
    assert page.locator(".words .token").all_text_contents() == ["done"]
    assert page.evaluate("document.activeElement.id") == "question"


@needs_browser
def test_a_weight_that_is_moved_asks_the_last_question_again_under_it(opened, pretend):
    page = opened()
    ask(page, "Say: first")
    ask(page, "Say: second thoughts", 2)
    assert "weights" not in sent(pretend, "chat")[-1]["coterie"]
    for name in EXPERTS:
        move(page, name, 0.6 if name == "cluster-1" else 0.2 if name == "base" else 0)
    page.locator(".answer").nth(1).locator(".run.k2").wait_for()
    page.locator(".answer[aria-busy=false]").nth(1).wait_for()
    last = sent(pretend, "chat")[-1]
    assert last["coterie"]["weights"] == {"base": 0.2, "cluster-1": 0.6}
    assert [message["content"] for message in last["messages"]] == ["Say: first", "first", "Say: second thoughts"]
    assert page.locator(".answer").count() == 2
    assert page.locator(".answer").nth(1).locator(".bars .number").first.text_content() == "0.25"
    page.get_by_role("button", name="Let the router weigh").click()
    page.locator(".answer").nth(1).locator(".run.k1").first.wait_for()
    assert "weights" not in sent(pretend, "chat")[-1]["coterie"]


@needs_browser
def test_weights_that_were_moved_for_an_answer_that_is_gone_ask_nothing(opened, pretend):
    page = opened()
    ask(page, "Say: first")
    stop_clock(page)
    move(page, "cluster-1", 0.6)
    page.click("#clear")
    ask(page, "Say: second")
    move(page, "cluster-1", 0.7)
    ask(page, "Say: third", 2)
    page.clock.run_for(1000)
    ask(page, "Say: last", 3)
    assert [body["messages"][-1]["content"] for body in sent(pretend, "chat")] == [
        "Say: first", "Say: second", "Say: third", "Say: last",
    ]  # fmt: skip


@needs_browser
def test_weights_that_are_moved_in_both_settings_ask_both_again(opened, pretend):
    page = opened()
    page.click("#compare")
    ask(page, "Say: one", 2)
    stop_clock(page)
    for place in (0, 1):
        page.locator("input[data-expert=cluster-2]").nth(place).fill("0.5")
    page.clock.run_for(400)
    page.locator(".answer[aria-busy=false]").nth(1).wait_for()
    assert [body["coterie"].get("weights", {}).get("cluster-2") for body in sent(pretend, "chat")[2:]] == [0.5, 0.5]


@needs_browser
def test_weights_that_are_all_zero_are_refused_before_anything_is_sent(opened, pretend):
    page = opened()
    page.locator("#send:enabled").wait_for()
    move(page, "base", 0.5)
    move(page, "base", 0)
    page.fill("#question", "Say: no")
    page.press("#question", "Enter")
    assert "all weights are 0" in page.locator("#trouble").text_content()
    assert page.locator("#question").input_value() == "Say: no"
    assert sent(pretend, "chat") == []


@needs_browser
def test_a_question_that_is_asked_before_the_models_are_known_is_not_lost(opened, pretend):
    page = opened()
    held = []
    page.route("**/v1/models", lambda route: held.append(route))
    page.reload()
    page.fill("#question", "Say: early")
    page.press("#question", "Enter")
    assert page.locator("#question").input_value() == "Say: early"
    held[0].continue_()
    page.locator("#send:enabled").click()
    page.locator(".answer[aria-busy=false]").wait_for()
    assert page.locator(".token").all_text_contents() == ["early"]


@needs_browser
def test_a_page_that_is_opened_while_the_server_loads_says_so_and_goes_on_by_itself(opened, pretend):
    page = opened()
    page.locator("#send:enabled").wait_for()
    pretend.state.fail = "loading"
    page.clock.install()
    page.reload()
    page.locator("#trouble:visible").wait_for()
    assert page.locator("#trouble").text_content() == "the server is still loading. This page goes on by itself."
    assert page.locator("#send").is_disabled()
    pretend.state.fail = None
    page.clock.run_for(5000)
    ask(page, "Say: there")
    assert page.locator("#trouble").is_hidden()
    assert page.locator(".token").all_text_contents() == ["there"]


@needs_browser
def test_two_settings_answer_side_by_side_and_go_on_with_their_own_answers(opened, pretend):
    page = opened()
    page.click("#compare")
    page.locator("select[data-field=model]").nth(1).select_option("cluster-0")
    page.locator("input[data-field=temperature]").nth(1).fill("0.7")
    ask(page, "Say: one", 2)
    a, b = sorted(sent(pretend, "chat"), key=lambda body: body["temperature"])
    assert (a["model"], b["model"], b["temperature"]) == ("elrea", "cluster-0", 0.7)
    boxes = [page.locator(".answer").nth(number).bounding_box() for number in (0, 1)]
    assert boxes[0]["y"] == boxes[1]["y"] and boxes[0]["x"] + boxes[0]["width"] < boxes[1]["x"]
    assert page.locator(".answer h3").all_text_contents() == ["A: elrea", "B: cluster-0"]


@needs_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_shows_all_of_it_within_its_width(opened, scheme):
    page = opened(width=375, height=720, color_scheme=scheme)
    page.locator("#send:enabled").wait_for()
    page.click("#compare")
    page.locator(".setting > summary").first.click()
    ask(page, "Say: " + "unbreakable" * 40 + " and more", 2)
    page.locator(".code > summary").first.click()
    assert page.evaluate("document.documentElement.scrollWidth") == 375
    boxes = [page.locator(".answer").nth(number).bounding_box() for number in (0, 1)]
    assert boxes[0]["x"] == boxes[1]["x"] and boxes[0]["y"] + boxes[0]["height"] <= boxes[1]["y"]
    small = page.locator("button:visible, select:visible, input:visible").evaluate_all(
        "all => all.filter(one => one.getBoundingClientRect().height < 24).map(one => one.outerHTML)"
    )
    assert [one for one in small if "range" not in one] == []


@needs_browser
def test_the_routing_is_shown_while_one_types_once_fingers_rest(opened, pretend):
    page = opened()
    page.locator("#send:enabled").wait_for()
    stop_clock(page)
    page.locator("#question").press_sequentially("Why blue")
    page.clock.run_for(250)
    assert sent(pretend, "route") == []
    page.clock.run_for(100)
    page.locator(".preview").wait_for()
    assert [body["messages"] for body in sent(pretend, "route")] == [[{"role": "user", "content": "Why blue"}]]
    shown = page.locator(".preview .split").get_attribute("aria-label")
    assert shown == ", ".join(f"{name} {value:.2f}" for name, value in weights(len("Why blue")).items())
    assert page.locator("input[data-expert]").evaluate_all("all => all.map(one => +one.value)") == [
        pytest.approx(value, abs=0.006) for value in weights(len("Why blue")).values()
    ]


@needs_browser
def test_curl_and_python_ask_what_the_page_asked(opened, pretend):
    page = opened()
    question = 'Say: it\'s "$HOME" `id` \\n {true} \u2713\nnext'
    page.locator("#send:enabled").wait_for()
    move(page, "cluster-2", 0.5)
    page.fill("#question", question)
    page.press("#question", "Enter")
    page.locator(".answer[aria-busy=false]").wait_for()
    asked = sent(pretend, "chat")[-1]
    asked = {name: value for name, value in asked.items() if not name.startswith("stream")}
    curl, python = page.locator("pre code").evaluate_all("codes => codes.map(code => code.textContent)")
    told = subprocess.run(["bash", "-c", f"{curl} --silent --noproxy '*'"], capture_output=True, text=True, check=True)
    assert sent(pretend, "chat")[-1] == asked
    assert json.loads(told.stdout)["choices"][0]["message"]["content"] == question.removeprefix("Say: ")
    told = subprocess.run(
        [sys.executable, "-c", python], capture_output=True, text=True, check=True, env={**os.environ, "NO_PROXY": "*"}
    )
    assert sent(pretend, "chat")[-1] == asked
    assert told.stdout == f"{question.removeprefix('Say: ')}\n{weights(0)}\n"


@needs_browser
def test_what_models_and_users_write_stays_text(opened):
    page = opened()
    evil = "<img/src=x/onerror=alert(1)><b>bold</b></span>"
    ask(page, f"Say: {evil}")
    assert page.locator(".words .token").all_text_contents() == [evil]
    assert page.locator(".question").text_content() == f"Say: {evil}"
    assert page.locator("#thread img, #thread .token b, pre b").count() == 0


@needs_browser
def test_nothing_is_asked_of_anybody_else(opened, pretend, browser):
    page = opened()
    addresses = []
    page.on("request", lambda request: addresses.append(request.url))
    page.reload()
    ask(page, "Why?")
    assert len(addresses) > 8
    strangers = [url for url in addresses if not url.startswith((f"{pretend.state.url}/", "data:"))]
    assert strangers == []


@needs_browser
def test_a_key_is_asked_for_and_kept_in_the_tab_alone(opened):
    app = pretend_app(key="secret-of-the-tab")
    with running(app) as app.state.url:
        page = opened(app)
        page.locator("#trouble:visible").wait_for()
        assert page.locator("#trouble").text_content() == "the API key is wrong. Type a key above."
        assert page.evaluate("document.activeElement.id") == "key"
        page.fill("#key", "secret-of-the-tab")
        page.keyboard.press("Enter")
        ask(page, "Say: in")
        assert page.locator(".words").text_content().endswith("in")
        assert "secret" not in page.content() and "$COTERIE_API_KEY" in page.locator("pre").first.text_content()
        assert page.evaluate("[Object.values(sessionStorage), Object.values(localStorage), document.cookie]") == [
            ["secret-of-the-tab"], [], "",
        ]  # fmt: skip


@needs_browser
@pytest.mark.parametrize(
    ("fail", "told"),
    [
        ("busy", "too many requests wait. Try again in 7 s."),
        ("midway", "the expert cluster-1 gave no number"),
        ("gone", "The server does not answer. Is it still running?"),
        ("cut", "The connection broke off before the answer ended."),
    ],
)
def test_what_goes_wrong_is_told_where_the_answer_would_be(opened, pretend, fail, told):
    page = opened()
    page.locator("#send:enabled").wait_for()
    pretend.state.fail = fail
    if fail == "gone":
        page.route("**/v1/chat/completions", lambda route: route.abort())
    if fail == "cut":
        body = 'data: {"choices":[{"delta":{"content":"half"}}]}\n\n'
        page.route("**/v1/chat/completions", lambda route: route.fulfill(content_type="text/event-stream", body=body))
    ask(page, "Why?")
    assert page.locator(".answer .trouble").text_content() == told
    assert page.locator("#send").is_visible() and page.locator("#stop").is_hidden()
    pretend.state.fail = None
    page.unroute_all()
    ask(page, "Say: well again", 2)
    assert page.locator(".answer").nth(1).locator(".token").all_text_contents() == ["well", " again"]


def begun(page):
    """Ask, and wait until an answer is on its way."""
    page.locator("#send:enabled").wait_for()
    page.fill("#question", "Why?")
    page.press("#question", "Enter")
    page.locator(".token").nth(2).wait_for()
    return page


@needs_browser
def test_stop_ends_an_answer_and_keeps_what_came(opened):
    app = pretend_app(pause=0.05)
    with running(app) as app.state.url:
        page = begun(opened(app))
        page.click("#stop")
        page.locator(".answer[aria-busy=false]").wait_for()
        text = "".join(page.locator(".token").all_text_contents())
        assert page.locator(".answer .caption").first.text_content() == "Stopped."
        assert ANSWER.startswith(text) and 0 < len(text) < len(ANSWER)


@needs_browser
def test_an_answer_that_is_asked_again_while_it_comes_can_still_be_stopped(opened):
    app = pretend_app(pause=0.05)
    with running(app) as app.state.url:
        page = begun(opened(app))
        for name in EXPERTS:
            move(page, name, 1 if name == "cluster-1" else 0)
        page.locator(".run.k2 .token").nth(9).wait_for()
        assert page.locator("#stop").is_visible() and page.locator("#send").is_hidden()
        page.click("#stop")
        page.locator(".answer[aria-busy=false]").wait_for()
        assert page.locator(".answer").count() == page.locator(".run").count() == 1
        assert page.locator("#send").is_visible()


@needs_browser
def test_the_look_follows_the_system_unless_one_is_chosen(opened):
    page = opened(color_scheme="dark")
    paper = lambda: page.evaluate("getComputedStyle(document.body).backgroundColor")  # noqa: E731
    assert paper() == "rgb(20, 23, 26)"
    page.emulate_media(color_scheme="light")
    assert paper() == "rgb(253, 253, 252)"
    page.select_option("#theme", "dark")
    assert paper() == "rgb(20, 23, 26)"
    page.reload()
    assert paper() == "rgb(20, 23, 26)"
    page.select_option("#theme", "")
    assert paper() == "rgb(253, 253, 252)"


# ------------------------------------------------------------------------------------------- before the real server


@pytest.fixture
def real(opened, server):
    page = opened(SimpleNamespace(state=server))
    page.locator("#send:enabled").wait_for()
    page.fill("[data-field=max_tokens]", "8")
    return page


def shown(page) -> str:
    return "".join(page.locator(".answer .token").all_text_contents())


def told(weights: dict[str, float]) -> list[str]:
    """Shares as the page writes those above 0."""
    return [f"{weight / sum(weights.values()):.2f}" for weight in weights.values() if weight]


@needs_browser
def test_what_the_page_shows_is_what_the_mixture_answers_and_how_it_routes(real, mixture):
    wanted = mixture.generate(QUESTION, max_new_tokens=8)[0]
    routed = mixture.route(QUESTION).row(0)
    real.fill("#question", QUESTION)
    real.locator(".preview .split").wait_for()
    ask(real, QUESTION)
    assert shown(real) == wanted.text
    leading = list(routed).index(max(routed, key=routed.get))
    assert real.locator(".run").evaluate_all("all => all.map(one => one.className)") == [f"run k{leading}"]
    assert real.locator(".bars .number").all_text_contents() == told(routed)
    assert real.locator(".answer .caption").first.text_content().startswith(f"{len(wanted.token_ids)} tokens, ")


@needs_browser
def test_weights_by_hand_and_weights_that_change_are_those_of_the_mixture(real, mixture):
    ask(real, QUESTION)
    for name in ("base", "cluster-0", "cluster-1", "cluster-2"):
        move(real, name, {"base": 0.3, "cluster-2": 0.9}.get(name, 0))
    real.locator(".bars .number", has_text="0.75").wait_for()
    real.locator(".answer[aria-busy=false]").wait_for()
    by_hand = mixture.replace(router=FixedRouter({"base": 0.3, "cluster-2": 0.9}))
    assert shown(real) == by_hand.generate(QUESTION, max_new_tokens=8)[0].text
    real.get_by_role("button", name="Let the router weigh").click()
    real.select_option("[data-field=combiner]", "layers")
    real.fill("[data-field=every]", "1")
    real.click("#clear")
    ask(real, QUESTION)
    wanted = list(mixture.rerouted(1, combiner="layers").stream(QUESTION, max_new_tokens=8))
    assert shown(real) == "".join(token.text for token in wanted)
    first = wanted[0].weights
    words = ", ".join(f"{name} {weight:.2f}" for name, weight in zip(mixture.bank.names, first, strict=True))
    assert real.locator(".token").first.get_attribute("data-weights").startswith(f"token 1: {words}")


@needs_browser
def test_every_model_of_the_list_answers_the_page(real):
    models = real.locator("[data-field=model] option").all_text_contents()
    assert models[0] == "elrea" and {"cluster-0", "cluster-1", "cluster-2", "base"} <= {*models}
    for count, name in enumerate(models, start=1):
        real.select_option("[data-field=model]", name)
        real.fill("[data-field=max_tokens]", "2")
        ask(real, QUESTION, count)
    assert real.locator(".trouble:visible").all_text_contents() == []
    assert real.locator(".answer h3").all_text_contents() == models


@needs_browser
def test_the_code_that_is_shown_gets_the_answer_that_is_shown(real):
    ask(real, QUESTION)
    curl, python = real.locator("pre code").evaluate_all("codes => codes.map(code => code.textContent)")
    answer = subprocess.run(
        ["bash", "-c", f"{curl} --silent --noproxy '*'"], capture_output=True, text=True, check=True
    )
    assert json.loads(answer.stdout)["choices"][0]["message"]["content"] == shown(real)
    code = python.replace("print(choice.message.content)", "print(ascii(choice.message.content))")
    answer = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**os.environ, "NO_PROXY": "*"}
    )
    assert answer.stdout.splitlines()[0] == ascii(shown(real))
