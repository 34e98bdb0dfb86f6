"""The page at /, in a real browser: what a user types, sees, stops, edits and finds again."""

import pytest

pytest.importorskip("starlette")  # the headers and the reader of requests are the server's own

from engine.serving.openai_api import ApiError
from tests.helpers.page_server import Canned, PageServer
from tests.helpers.pages import CONTRAST, NAMELESS, XSS


@pytest.fixture
def server():
    with PageServer() as server:
        yield server


@pytest.fixture
def script(server):
    return server.script


def visit(browser, server, **how):
    page = browser.open(server.url, **how)
    page.wait("Boolean(model?.prompt_style)")
    return page


@pytest.fixture
def page(browser, server):
    page = visit(browser, server)
    yield page
    assert page.complaints() == []


def ask(page, text, turns, given=""):
    """Send a message by the keyboard, and wait for the answer to the turn of this number."""
    page.click("#ask")
    page.write(text)
    if given:
        page.press("Tab")
        page.write(given)
        page.press("Enter", modifiers=2)
    else:
        page.press("Enter")
    page.wait(f"!answering && chat.turns.length === {turns}")


def answers(page):
    return page.run("[...document.querySelectorAll('.answered .text')].map(one => one.textContent)")


def test_an_instruction_and_its_input_are_answered_as_a_stream(page, script):
    script.answers = [Canned(("Jars ", "hold ", "pens."))]
    ask(page, "Name a use.", 1, given="a glass jar")
    (wanted,) = script.heard
    assert (wanted.messages, wanted.input, wanted.model) == ([("user", "Name a use.")], "a glass jar", "demo")
    assert answers(page) == ["Jars hold pens."]
    stats = page.text(".answered .stats")
    assert stats.startswith("3 tokens · ") and "tokens/s · first after " in stats
    assert page.run("document.getElementById('ask').value + document.getElementById('input').value") == ""
    heard = page.run("document.getElementById('live').innerText")
    assert "Jars hold pens." in heard and heard.endswith("The answer is complete.")


def test_each_instruction_is_sent_alone_and_a_chat_as_a_whole(page, script):
    script.answers = [Canned((text,)) for text in ("one", "two", "three", "four")]
    ask(page, "first", 1)
    ask(page, "second", 2)
    assert [w.messages for w in script.heard] == [[("user", "first")], [("user", "second")]]
    page.click("input[value=chat]")
    assert page.run("chat.turns.length") == 0  # another conversation: the modes do not mix
    ask(page, "third", 1)
    ask(page, "fourth", 2)
    assert script.heard[3].messages == [("user", "third"), ("assistant", "three"), ("user", "fourth")]


def test_stop_keeps_what_is_written_and_tells_the_server(page, script):
    script.answers = [Canned(("half ", "of it"), hangs=True)]
    page.write("Begin.")
    page.press("Enter")
    page.wait("document.querySelector('.answered .text')?.textContent === 'half of it'")
    assert page.run("document.getElementById('send').hidden && !document.getElementById('stop').hidden")
    page.click("#stop")
    page.wait("!answering")
    assert script.left.wait(60)
    assert answers(page) == ["half of it"] and page.text(".answered .stats").endswith("stopped")
    assert page.run("document.activeElement.id") == "ask"
    script.answers = [Canned(("more",), hangs=True)]
    page.write("Again.")
    page.press("Enter")
    page.wait("document.querySelectorAll('.answered .text')[1]?.textContent === 'more'")
    page.press("Escape")
    page.wait("!answering")
    assert answers(page) == ["half of it", "more"]


def test_the_history_outlives_a_reload_and_can_be_deleted(page, server, script):
    script.answers = [Canned(("kept",)), Canned(("second",))]
    ask(page, "Remember me.", 1)
    page.click("#new")
    ask(page, "Another one.", 1)
    page.go(server.url)
    page.wait("Boolean(model?.prompt_style)")
    assert answers(page) == ["second"]
    names = "[...document.querySelectorAll('#chats .open')].map(one => one.textContent)"
    assert page.run(names) == ["Another one.", "Remember me."]
    page.click("#chats li:last-child .open")
    assert answers(page) == ["kept"] and "1 token" in page.text(".answered .stats")
    page.click("#chats li:last-child .delete")
    assert page.run(names) == ["Another one."] and answers(page) == []
    page.run("window.confirm = () => true")
    page.click("#delete-all")
    assert page.run(names) == [] and page.run("chatKeys().length") == 0


def test_what_the_store_holds_besides_is_passed_over(page, server, script):
    page.run("""for (const [i, text] of ['{', '3', '{"id":1}', '{"id":"a","turns":[{}]}', 'null'].entries())
        localStorage.setItem(CHAT + i, text)""")
    page.run("localStorage.setItem('cria.settings', '[')")
    page.go(server.url)
    page.wait("Boolean(model?.prompt_style)")
    script.answers = [Canned(("fine",))]
    ask(page, "Still there?", 1)
    assert answers(page) == ["fine"]


def test_retry_and_edit_in_a_chat_take_back_what_came_after(page, script):
    page.click("input[value=chat]")
    script.answers = [Canned((text,)) for text in ("a1", "a2", "a3", "a4")]
    ask(page, "q1", 1)
    ask(page, "q2", 2)
    page.click(".turn:nth-child(2) .answered button:nth-child(2)")
    page.wait("!answering && document.querySelectorAll('.answered .text')[1].textContent === 'a3'")
    assert script.heard[2].messages == script.heard[1].messages
    page.click(".turn:nth-child(1) .asked button:first-child")
    page.write(" changed")
    page.press("Enter")
    page.wait("!answering && chat.turns.length === 1")
    assert script.heard[3].messages == [("user", "q1 changed")] and answers(page) == ["a4"]


def test_retry_and_edit_of_an_instruction_leave_the_others(page, script):
    script.answers = [Canned((text,)) for text in ("a1", "a2", "a3", "a4")]
    ask(page, "q1", 1, given="g1")
    ask(page, "q2", 2)
    page.click(".turn:nth-child(1) .answered button:nth-child(2)")
    page.wait("!answering && document.querySelector('.answered .text').textContent === 'a3'")
    page.click(".turn:nth-child(1) .asked button:first-child")
    page.press("Escape")
    assert answers(page) == ["a3", "a2"]  # nothing was sent
    page.click(".turn:nth-child(1) .asked button:first-child")
    page.write("!")
    page.press("Enter")
    page.wait("!answering && document.querySelector('.answered .text').textContent === 'a4'")
    assert answers(page) == ["a4", "a2"]
    assert (script.heard[3].messages, script.heard[3].input) == ([("user", "q1!")], "g1")


def test_the_settings_are_sent_and_kept(page, server, script):
    page.click("#show-settings")
    page.run("""for (const [id, value] of Object.entries({temperature: 0.25, top_p: 0.5, max_tokens: 99, seed: 7}))
        document.getElementById(id).value = value""")
    page.click("#system")
    page.write("Answer like a pirate.")
    page.click("#settings .primary")
    assert "pirate" in page.run("localStorage.getItem('cria.settings')")  # at once: the page may be left now
    page.click("#show-settings")
    page.run("document.getElementById('temperature').value = 1")
    page.click("#no-settings")
    page.go(server.url)
    page.wait("Boolean(model?.prompt_style)")
    page.click("input[value=chat]")
    script.answers = [Canned(("Arr.",))]
    ask(page, "Hello", 1)
    (wanted,) = script.heard
    sampling = wanted.sampling
    assert (sampling.temperature, sampling.top_p, wanted.max_tokens, sampling.seed) == (0.25, 0.5, 99, 7)
    assert wanted.messages == [("system", "Answer like a pirate."), ("user", "Hello")]


def test_the_key_is_asked_for_and_never_stored_for_good(browser, server, script):
    script.key, script.answers = "s3cret", [Canned(("in",))]
    page = browser.open(server.url)
    page.wait("document.getElementById('key-dialog').open")
    page.write("wrong")
    page.press("Enter")
    page.wait("document.getElementById('key-dialog').open && document.getElementById('key').value === ''")
    page.write("s3cret")
    page.press("Enter")
    page.wait("Boolean(model?.prompt_style)")
    ask(page, "Let me in.", 1)
    assert answers(page) == ["in"]
    assert "s3cret" not in page.run("JSON.stringify(localStorage)")
    assert all("401" in line for line in page.complaints())  # the browser's own words about the status


def test_a_full_server_is_asked_again(browser, server, script):
    full = Canned(error=ApiError(503, "72 answers are being written or waited for; try again later"))
    page = visit(browser, server)
    script.answers = [full, full, Canned(("at last",))]
    ask(page, "Now?", 1)
    assert answers(page) == ["at last"] and len(script.heard) == 3


@pytest.mark.parametrize(
    ("canned", "told"),
    [
        (Canned(error=ApiError(400, "the prompt is <b>too long</b>")), "the prompt is <b>too long</b>"),
        (Canned(("Some text",), late_error="the model failed: RuntimeError"), "the model failed: RuntimeError"),
        (Canned(("Some text",), cut=True), "The connection ended before the answer did."),
    ],
)
def test_errors_are_told_as_text_and_the_next_try_begins_anew(browser, server, script, canned, told):
    page = visit(browser, server)
    script.answers = [canned, Canned(("good",))]
    ask(page, "Go", 1)
    assert answers(page) == ["".join(canned.chunks)] and page.text(".answered .problem") == told
    page.click(".answered button:nth-child(2)")
    page.wait("!answering && document.querySelector('.answered .text').textContent === 'good'")
    assert page.run("document.querySelector('.problem:not([hidden])')") is None


def test_html_of_users_and_models_is_text(page, server, script):
    """Typed, streamed in one piece and cut in two, edited, kept, and named in the history and by the models' list."""
    script.models = (XSS[0], XSS[1])
    script.style = XSS[2]
    page.go(server.url)
    page.wait("Boolean(model?.prompt_style)")
    page.click("input[value=instruction]")
    for n, text in enumerate(XSS, 1):
        script.answers = [Canned((text, text[: len(text) // 2], text[len(text) // 2 :]))]
        ask(page, text, n, given=text)
    assert [wanted.messages[0][1] for wanted in script.heard] == list(XSS)
    assert answers(page) == [text + text for text in XSS]
    page.click(".turn:nth-child(4) .asked button:first-child")
    assert page.run("document.getElementById('edit-ask').value") == XSS[3]
    page.press("Escape")
    assert page.run("document.querySelector('#chats .open').textContent") == XSS[0][:80]
    page.go(server.url)
    page.wait("Boolean(model?.prompt_style)")
    assert answers(page) == [text + text for text in XSS]
    assert page.run("window.owned") is None
    assert page.run("document.querySelectorAll('script, style, iframe, img, svg, math, a, base, meta').length") == 6


def test_nothing_lies_outside_of_a_phone_or_under_something(browser, server, script):
    script.models = ("a-model-of-a-long-name-13b-instruct", "another")
    page = visit(browser, server, width=360, height=640, touch=True)
    script.answers = [Canned(("word " * 60 + "x" * 400,))]
    page.click("#ask")
    page.write("y" * 300)
    page.press("Enter")  # a new line here: phones have no Shift
    assert page.run("document.getElementById('ask').value.endsWith('\\n')") and not script.heard
    page.click("#send")
    page.wait("!answering && chat.turns.length === 1")
    assert page.run("document.documentElement.scrollWidth <= 360 && log.scrollWidth <= log.clientWidth")
    page.click("#show-side")
    page.wait("getComputedStyle(side).transform === 'none'")
    page.click("#chats .open")
    page.wait("getComputedStyle(side).visibility === 'hidden'")
    page.click("#show-settings")
    assert page.run("settings && document.getElementById('settings').getBoundingClientRect().right <= 360")
    assert page.complaints() == []


@pytest.mark.parametrize("dark", [False, True])
def test_every_control_has_a_name_and_every_text_enough_contrast(browser, server, script, dark):
    page = visit(browser, server, dark=dark)
    script.answers = [Canned(("Some text",), late_error="the model failed")]
    ask(page, "Go", 1)
    assert page.run(NAMELESS) == []
    assert page.run(f"({CONTRAST})()") == []
