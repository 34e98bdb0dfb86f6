"""The page at /compare, in a real browser: asking, voting, the reveal, lists that go on, results, and what is saved."""

import json

import pytest

pytest.importorskip("starlette")
pytest.importorskip("openai")

from data_gen.base.files import read_rows
from engine.comparing.questions import Question
from engine.serving.guard import Access
from tests.helpers.comparisons import FULL, Compared, Scripted, Told
from tests.helpers.judging import read_annotations
from tests.helpers.pages import CONTRAST, NAMELESS, XSS

QUESTIONS = [Question(f"Question {n}", f"input {n}" if n % 2 else "") for n in range(4)]
VOTING = "round?.state === 'voting'"


@pytest.fixture
def votes(tmp_path):
    return tmp_path / "votes.jsonl"


def visit(browser, compared, **how):
    page = browser.open(f"{compared.url}/compare", **how)
    page.wait("isReady")
    return page


def ask(page, text, given=""):
    page.click("#ask")
    page.write(text)
    if given:
        page.press("Tab")
        page.write(given)
        page.press("Enter", modifiers=2)
    else:
        page.press("Enter")
    page.wait("['voting', 'void'].includes(round?.state)")


def vote(page, value):
    page.click(f"#buttons [value={value}]")
    page.wait("round?.state === 'told'")


def answers(page):
    return page.run("[...document.querySelectorAll('.answered .text')].map(one => one.textContent)")


def titles(page):
    return page.run("[...document.querySelectorAll('.answered h2')].map(one => one.innerText)")


def test_an_own_question_is_answered_by_both_voted_on_and_revealed(browser, votes):
    with Compared(votes) as compared:
        page = visit(browser, compared)
        ask(page, "Name a fruit.", given="a red one")
        question, _ = compared.contestants[0].heard[0]
        assert (question.instruction, question.input) == ("Name a fruit.", "a red one")
        shown = answers(page)
        assert sorted(shown) == ["acapla says: Name a fruit.", "icnivad says: Name a fruit."]
        assert titles(page) == ["Answer A", "Answer B"]
        vote(page, "B")
        names = [text.split(" says")[0][::-1] for text in shown]
        assert titles(page) == [f"Answer A {names[0]}", f"Answer B {names[1]}"]
        assert page.text("#status") == "You said: B is better."
        assert page.run("document.getElementById('live').textContent").endswith(f"A is {names[0]}, B is {names[1]}.")
        assert page.run("document.activeElement.id") == "ask"  # for the next one
        (row,) = read_rows(votes)
        assert (row["models"], row["vote"], row["answers"]) == (names, "B", shown)
        assert page.complaints() == []


def test_the_keys_vote_where_they_belong(browser, votes):
    with Compared(votes) as compared:
        page = visit(browser, compared)
        for key, value in zip("1234", ("A", "B", "tie", "both-bad"), strict=True):
            ask(page, f"Question {key}")
            page.press(key)  # the focus is on the buttons
            page.wait("round?.state === 'told'")
            assert read_rows(votes)[-1]["vote"] == value
        ask(page, "Once more")
        page.run("document.getElementById('show-results').focus()")
        page.press("1")
        assert page.run(VOTING)
        page.run("document.getElementById('round').focus()")
        page.press("1")
        page.wait("round?.state === 'told'")


def test_a_list_is_asked_in_turn_and_goes_on_after_a_reload(browser, votes):
    with Compared(votes, questions=QUESTIONS) as compared:
        page = visit(browser, compared)
        assert page.text("#progress") == "0 of 4 questions have your vote." and page.text("#begin") == "Begin"
        page.press("Enter")  # the focus is on Begin
        page.wait(VOTING)
        page.click("#skip")
        page.wait(f"{VOTING} && round.id")
        skipped, first = (one.instruction for one, _ in compared.contestants[0].heard)
        page.press("1")
        page.wait("round?.state === 'told'")
        page.press("Enter")  # the focus is on Next question
        page.wait(VOTING)
        assert page.text(".asked h2") == "Question 2 of 4"
        page.press("3")
        page.wait("round?.state === 'told'")
        page.go(f"{compared.url}/compare")
        page.wait("isReady")
        assert page.text("#progress") == "2 of 4 questions have your vote." and page.text("#begin") == "Go on"
        for _ in range(2):
            page.press("Enter")
            page.wait(VOTING)
            page.press("2")
            page.wait("round?.state === 'told'")
        assert page.text("#next") == "Finish"
        page.press("Enter")
        page.wait("!round")
        assert page.text("#finished") == "All questions of the list have your vote."
        rows = read_rows(votes)
        assert sorted(row["prompt"] for row in rows) == sorted(one.instruction for one in QUESTIONS)
        assert rows[0]["prompt"] == first != skipped and page.complaints() == []


def test_a_list_can_be_a_file_of_the_voter_and_can_be_left(browser, votes, tmp_path):
    (tmp_path / "mine.txt").write_text("One?\nTwo?\n")
    (tmp_path / "bad.json").write_text('[{"output": "x"}]')
    with Compared(votes) as compared:
        page = visit(browser, compared)
        page.click("#show-list")
        page.choose_file("#file", tmp_path / "bad.json")
        assert "bad.json:1" in page.wait("!document.getElementById('list-problem').hidden && "
                                         "document.getElementById('list-problem').innerText")  # fmt: skip
        page.choose_file("#file", tmp_path / "mine.txt")
        page.wait("list.questions.length === 2 && !document.getElementById('list').open")
        page.click("#begin")
        page.wait(VOTING)
        vote(page, "tie")
        page.go(f"{compared.url}/compare")
        page.wait("isReady && list.questions.length")
        assert page.text("#progress") == "1 of 2 questions have your vote."
        page.click("#show-list")
        page.click("#own")
        ask(page, "My own")
        page.go(f"{compared.url}/compare")
        page.wait("isReady && !document.getElementById('composer').hidden")
        assert page.text("#progress") == ""


def test_stop_keeps_both_and_the_vote_says_so(browser, votes):
    told = Told("half a", hangs=True), Told("half b", hangs=True)
    with Compared(votes, (Scripted("alpaca", told[0]), Scripted("davinci", told[1]))) as compared:
        page = visit(browser, compared)
        page.click("#ask")
        page.write("Go.")
        page.press("Enter")
        page.wait("document.querySelector('.answered .text')?.textContent.startsWith('half')")
        assert page.run("document.querySelectorAll('.writing').length") == 2
        assert page.run("document.getElementById('buttons').hidden")
        page.press("Escape")
        page.wait(VOTING)
        assert told[0].closed.wait(60) and told[1].closed.wait(60)
        vote(page, "both-bad")
        assert read_rows(votes)[0]["stopped"] is True


def test_a_vote_that_was_not_acknowledged_is_sent_again(browser, votes, monkeypatch):
    with Compared(votes) as compared:
        page = visit(browser, compared)
        ask(page, "Name a fruit.")

        def refuse(row):
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(compared.votes, "add", refuse)
            page.click("#buttons [value=A]")
            page.wait("!document.getElementById('notice').hidden")
        assert "The vote is not kept: the vote could not be kept: No space left" in page.text("#notice")
        vote(page, "A")
        assert len(read_rows(votes)) == 1 and page.run("document.getElementById('notice').hidden")
        ask(page, "Twice.")
        compared.vote(page.run("round.id"), "B", voter=page.run("voter"))  # in another tab
        page.click("#buttons [value=A]")
        page.wait("round?.state === 'void'")
        assert "has a vote already, B" in page.text("#notice") and page.run("round.question.is_done")
        ask(page, "Another.")
        compared.comparison.rounds.clear()  # as after a restart
        page.click("#buttons [value=A]")
        page.wait("round?.state === 'void'")
        assert "there is no such round (any more); ask the question again" in page.text("#notice")


def test_errors_are_told_and_a_full_server_is_asked_again(browser, votes):
    contestants = (
        Scripted("alpaca", Told(refusal=FULL), Told("one"), Told("x", error=KeyError("y"))),
        Scripted("davinci"),
    )
    with Compared(votes, contestants) as compared:
        page = visit(browser, compared)
        ask(page, "Now?")
        assert "one" in answers(page)
        vote(page, "A")
        ask(page, "And now?")
        assert page.text("#notice") == "the model failed: KeyError" and page.run("round.state") == "void"
        assert page.run("document.getElementById('ask').value") == "And now?"


def test_the_results_are_shown_on_request_and_saved(browser, votes, tmp_path):
    with Compared(votes) as compared:
        page = visit(browser, compared)
        page.click("#show-results")
        page.wait("document.getElementById('figures').innerText.includes('There is no vote yet.')")
        page.press("Escape")
        for n in range(3):
            ask(page, f"Question {n}")
            better = "A" if answers(page)[0].startswith("icnivad") else "B"
            vote(page, better)
        page.click("#show-results")
        page.wait("Boolean(document.querySelector('tbody'))")
        cells = page.run(
            "[...document.querySelectorAll('tbody tr')].map(row => [...row.children].map(c => c.innerText))"
        )
        assert cells == [
            ["Won", "3", "0"],
            ["Equally good", "0", "0"],
            ["Both bad", "0", "0"],
            ["Lost", "0", "3"],
            ["Win rate", "100.0%", "0.0%"],
            ["95% interval", "100.0 to 100.0", "0.0 to 0.0"],
        ]
        figures = {"win_rate": {"value": 60, "interval": [40, 75]}, "a_share": None}
        figures |= {"wins": 5, "losses": 2, "ties": 1, "both_bad": 3}
        found = {"models": ["a", "b"], "votes": 11, "voters": 2, "without_answers": 0, "figures": figures}
        cells = page.run(
            f"[...newFigures({json.dumps(found)})[0].rows].map(row => [...row.cells].map(c => c.textContent))"
        )
        assert cells == [["", "b", "a"], ["Won", "5", "2"], ["Equally good", "1", "1"], ["Both bad", "3", "3"],
                         ["Lost", "2", "5"], ["Win rate", "60.0%", "40.0%"],
                         ["95% interval", "40.0 to 75.0", "25.0 to 60.0"]]  # fmt: skip
        page.run("list.mostTokens = 5; 0")
        assert page.run("bodyOf({instruction: 'a', input: ''}).max_tokens") == 5  # no more than the server writes
        page.run("""window.saved = new Promise(done => { const real = URL.createObjectURL;
            URL.createObjectURL = blob => { blob.text().then(done); return real(blob); } }); 0""")
        page.click("#download")
        (tmp_path / "annotations.json").write_text(page.run("saved"))
        assert read_annotations(tmp_path / "annotations.json")[0] == 100
        assert page.complaints() == []


def test_the_settings_go_to_both_and_are_kept(browser, votes):
    with Compared(votes) as compared:
        page = visit(browser, compared)
        page.click("#show-settings")
        page.run("""for (const [id, value] of Object.entries({temperature: 0.25, top_p: 0.5, max_tokens: 99, seed: 7}))
            document.getElementById(id).value = value""")
        page.click("#settings .primary")
        page.go(f"{compared.url}/compare")
        page.wait("isReady")
        ask(page, "Go.")
        for contestant in compared.contestants:
            _, wanted = contestant.heard[0]
            sampling = wanted.sampling
            assert (sampling.temperature, sampling.top_p, wanted.max_tokens, sampling.seed) == (0.25, 0.5, 99, 7)


def test_the_key_is_asked_for(browser, votes):
    with Compared(votes, access=Access(api_key="k3y")) as compared:
        page = browser.open(f"{compared.url}/compare")
        page.wait("document.getElementById('key-dialog').open")
        page.write("k3y")
        page.press("Enter")
        page.wait("isReady")
        ask(page, "Go.")
        vote(page, "A")


def test_html_of_people_and_models_is_text(browser, votes, tmp_path):
    contestants = Scripted(XSS[0], *map(Told, XSS)), Scripted(XSS[1], *map(Told, reversed(XSS)))
    with Compared(votes, contestants) as compared:
        page = visit(browser, compared)
        for n, text in enumerate(XSS):
            ask(page, text, given=text)
            assert contestants[0].heard[n][0] == Question(text, text.strip())
            assert sorted(answers(page)) == sorted((text, XSS[-1 - n]))
            assert page.run("document.querySelector('.asked .text').textContent") == text
            vote(page, "A")
        assert set(titles(page)[0].split("Answer A ")) <= {"", XSS[0], XSS[1]}
        page.click("#show-results")
        page.wait("Boolean(document.querySelector('tbody'))")
        assert page.run("document.querySelector('thead th').textContent") == XSS[1]
        page.press("Escape")
        page.click("#show-list")
        (tmp_path / "x.txt").write_text("\n".join(text for text in XSS if "\u2028" not in text))
        page.choose_file("#file", tmp_path / "x.txt")
        page.wait("list.questions.length")
        assert page.run("window.owned") is None
        assert page.run("document.querySelectorAll('script, style, iframe, img, svg, math, a, base, meta').length") == 6


def test_two_files_of_answers_need_no_composer(browser, votes):
    class Filed(Scripted):
        def answer(self, question, wanted):
            return Told(f"{self.name[::-1]} {question.number}")

    questions = [Question(f"Q{n}", "", n) for n in range(2)]
    with Compared(votes, (Filed("a-x"), Filed("b-y")), questions, has_fixed_questions=True, longest=0) as compared:
        page = visit(browser, compared)
        assert page.run("['composer', 'show-list', 'show-settings'].every(id => document.getElementById(id).hidden)")
        page.click("#begin")
        page.wait(VOTING)
        vote(page, "A")
        page.click("#next")
        page.wait(VOTING)
        vote(page, "B")
        assert {json.dumps(sorted(row["answers"])) for row in read_rows(votes)} == {
            '["x-a 0", "y-b 0"]', '["x-a 1", "y-b 1"]',
        }  # fmt: skip


def test_nothing_lies_outside_of_a_phone_or_under_something(browser, votes):
    long = "word " * 80 + "x" * 300
    with Compared(votes, (Scripted("alpaca" * 9, Told(long)), Scripted("davinci", Told(long)))) as compared:
        page = visit(browser, compared, width=360, height=640, touch=True)
        page.click("#ask")
        page.write("y" * 300)
        page.click("#send")
        page.wait(VOTING)
        fits = "[log, dock].every(one => one.scrollWidth <= one.clientWidth)"
        fits += " && document.documentElement.scrollWidth <= 360"
        assert page.run(fits) and page.run("document.getElementById('dock').scrollHeight <= innerHeight / 2")
        vote(page, "tie")
        assert page.run(fits)
        page.click("#show-results")
        page.wait("Boolean(document.querySelector('tbody'))")
        assert page.run("document.getElementById('results').getBoundingClientRect().right <= 360")
        assert page.complaints() == []


@pytest.mark.parametrize("dark", [False, True])
def test_every_control_has_a_name_and_every_text_enough_contrast(browser, votes, dark):
    with Compared(votes, questions=QUESTIONS) as compared:
        page = visit(browser, compared, dark=dark)
        assert page.run(NAMELESS) == [] and page.run(f"({CONTRAST})()") == []
        page.click("#begin")
        page.wait(VOTING)
        assert page.run(f"({CONTRAST})()") == []
        vote(page, "A")
        page.click("#show-results")
        page.wait("Boolean(document.querySelector('tbody'))")
        assert page.run(f"({CONTRAST})()") == []
