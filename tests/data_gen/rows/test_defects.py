# ruff: noqa: RUF001 - texts in many alphabets
"""Every reason with defects as models write them, and with tasks that look alike and are good."""

import json
import random

import pytest

from data_gen.rows import defect_patterns as patterns
from data_gen.rows.defects import CHECKS, MAX_TOKENS, REASONS, SCAN, SEEN, find_defect, find_no_answer
from data_gen.rows.repairs import repair_item
from tests.helpers import hostile
from tests.helpers.linear import assert_linear_time
from tests.helpers.own_rows import EVALUATION, alpaca_rows
from tests.helpers.run import ROOT


def task(instruction="Name three primary colours.", input="", output="Red, yellow and blue."):
    return {"instruction": instruction, "input": input, "output": output}


def reason(item, language="en"):
    found = find_defect(item, language)
    return found and found[0]


def rows_of(path):
    text = path.read_text(encoding="utf-8")
    return json.loads(text) if text[0] == "[" else [json.loads(line) for line in text.splitlines()]


# Defects

LONG = "Keep every name in the text as it is, put each sentence on a line of its own and leave out all dates. " * 8
LOOP = "The sea is blue and the sky is blue. " * 12
DEFECTS = {
    "empty instruction": [task(""), task("???"), task("..."), task(" \n")],
    "empty output": [task(output=""), task(output=" \n"), task("Summarise it.", "A text.", "")],
    "N/A output": [
        task(output="N/A"), task(output="n/a."), task(output="<nooutput>"), task(output="<No output>"),
        task(output="..."),
        task(output="Not applicable."), task(output="N/A (no input was given)"), task(output="[Output]"),
        task(output="TBD"),
        task(output="Your answer here"), task(output="No output required."),
    ],
    "broken characters": [
        task(output="It\ufffds fine."), task("Explain DNA\x00 please."), task(input="a\x1b[31mred"),
        task(output="a\x7f"),
        task(output="Itâ€™s a nice cafÃ©."), task(output="He ate crÃ¨me brulee."),
        task(output="\x0crac{1}{2} is half."),
        task(output="3 \times 4 = 12"), task(output="Use \text{min} here."), task(input="\ud800 and more"),
        task(output="A \nabla B"), task(output="x \x85 y"),
    ],
    "short instruction": [task("Summarize"), task("Translate:", "Guten Tag"), task("好"), task("a")],
    "long instruction": [task("Do this: " + LONG), task("word " * (MAX_TOKENS + 1)), task("字" * (MAX_TOKENS + 1))],
    "list debris": [
        task(", and then name a colour."), task("- Name a colour."), task(") Name a colour."), task("] Name a colour"),
        task("# Name a colour"), task(". Name a colour."), task("• Name a colour."), task(": Name a colour."),
        task("} Name a colour."), task("== Name a colour"),
    ],
    "merged examples": [
        task(output="Red\n\n### Instruction:\nName a fruit.\n\n### Response:\nApple"),
        task(output="Red\n\nInstruction: Name a fruit.\nInput:\nOutput: Apple"),
        task(output='Red"}, {"instruction": "Name a fruit", "output": "Apple"'),
        task(output="Red\n21. Instruction: Name a fruit.\nOutput: Apple"),
        task(output="Red\n\n21. Instruction\nName a fruit."),
        task(input="The sea.\n### Response:\nIt is blue."),
        task("Name a colour.\n**Instruction**: Name a fruit."),
        task(output="Red<|im_end|>\n<|im_start|>user"), task(output="Red [/INST] Blue"),
        task(output="Red<|endoftext|>"),
        task(output="Red\n## Instruction\nName a fruit."),
    ],
    "placeholder": [
        task("Describe it.", "[attached image]"), task("What is shown here?", "<image>"), task("Caption it.",
        "[Image]"),
        task("Summarize it.", "[insert text here]"), task("Summarize it.", "<Article about climate change>"),
        task("Sort it.", "[list of numbers]"), task("Edit it.", "{paragraph}"), task("Proofread it.",
        "[Paste your essay here]"),
        task("Classify the animal.", "cat.jpg"), task("Transcribe this.", "recording_01.mp3"),
        task("Summarize the attached document.", "The document."), task("Rewrite it, see attached."),
        task("Summarize this: [insert article]"), task("Summarize it.", "(a short text about dogs)"),
    ],
    "URL": [
        task("Summarize https://www.nytimes.com/2021/01/02/a.html"), task("Describe the site.", "www.cnn.com"),
        task("Who wrote this article?", "https://time.com/5798772/a-b/"),
        task("Rate this site: http://shop.notreserved.io."),
        task("Explain the page.", "See https://de.wikipedia.org/wiki/Hund (German)"),
        task("Summarise it.", "https://example.com.evil.net/a"),
    ],
    "media task": [
        task("Draw a cat."), task("Please draw me a picture of a sunset."), task("Create an image of a red barn."),
        task("Generate a picture that shows a happy family."), task("Design a logo for a coffee shop."),
        task("You need to design a suitable logo for a cafe."), task("Make a short video about recycling."),
        task("Create a 3D model of a chair."), task("Produce an infographic about vaccines."),
        task("Sketch a portrait of an old sailor."), task("Colorize the photo.", "An old photo of a street."),
        task("Record a video in which you introduce yourself."), task("Play a song that makes me happy."),
        task("Create a diagram of the water cycle."), task("Find a photo of the Eiffel Tower."),
        task("Paint a landscape with mountains."), task("Add some background illustrations to the menu."),
    ],
    "missing text": [
        task("Summarize the following article."), task("Correct the errors in the following paragraph."),
        task("Translate the following sentence into French."), task("Rewrite the sentence in the passive voice."),
        task("Sort the numbers below."), task("Summarise the text above in one sentence."),
        task("Find the bug in the above code."),
        task("Classify the given list of words."), task("Identify the tone of the given passage."),
        task("Proofread this paragraph."), task("Complete this sentence with an example of a homophone."),
        task("Given a paragraph, identify its main idea."), task("Please edit the text for grammar."),
        task("How could you improve the design of the following website?"), task("Calculate the following."),
        task("Describe the following painting in at least ten words."), task("Explain what the following code does."),
        task("Find the average of the following set of numbers."), task("Read the passage and answer the question."),
        task("Arrange the words given below."), task("Answer the question based on the passage below."),
    ],
    "copied input": [
        task("Fix the grammar.", "She go home.", "She go home."), task("Make it formal.", "hey", " hey\n"),
        task("Translate it into simple English.", "The contract is void.", "The contract is void."),
    ],
    "copied instruction": [
        task("Name three colours.", "", "Name three colours."), task("What is a noun?", "", "what is a noun"),
        task("Explain gravity.", "Explain gravity.", "It pulls."),
        task("Explain gravity.", "", '* "Explain" -- gravity ...\n'),
        task("Explain gravity.", " EXPLAIN: gravity!! ", "It pulls."),
    ],
    "refusal": [
        task(output="As an AI language model, I cannot feel joy."), task(output="As an AI, I don't have a favourite."),
        task(output="I'm sorry, but as an AI language model I am unable to browse."),
        task(output="I'm sorry, but I can't assist with that request."),
        task(output="I’m sorry, but I can’t help with that."),
        task(output="I am sorry, I do not have access to that data."),
        task(output="Sorry, I cannot provide medical advice."),
        task(output="Unfortunately, I am unable to access the article."), task(output="I cannot fulfill this request."),
        task(output="I apologize, but I cannot generate images."), task(output="I'm unable to view the picture."),
        task(output="I am just an AI and have no taste."),
        task(output="It is blue. However, as an AI language model, I see none."),
        task(output="I'm sorry, but you didn't provide the text."),
        task(output="Please provide the text you want me to edit."),
        task(output="Sure! Could you please share the list so that I can sort it?"),
    ],
    "no answer": [
        task(output="The output should be a list of three colours."),
        task(output="The model should name three colours."),
        task(output="The generated poem will describe the sea."), task(output="Sample output:"),
        task("Write one like the seed tasks."), task("Do the same as in the previous task."),
        task(output="The output will vary, depending on the reader."),
    ],
    "repetition": [
        task(output=LOOP), task(output="no! " * 80), task(output="a" * 60), task(output="Buy more milk today.\n" * 6),
        task(output="A tale. " + "x y z w " * 40), task(output="哈" * 80),
        task(output=" ".join(f"w{i}" for i in range(40)) + " and so on" * 40), task(output="Aaaa" + "h" * 55 + "!"),
    ],
    "wrong language": [
        task("Schreibe eine kurze Geschichte über einen Hund, der schwimmen lernen will.", "",
        "Es war einmal ein Hund."),
        task("¿Cuáles son las principales causas de la Revolución francesa?"), task("请解释为什么天空是蓝色的。"),
        task(output="Der Himmel ist blau, weil das Licht an der Luft gestreut wird und nicht alle Farben gleich sind."),
        task(output="天空是蓝色的，因为大气散射阳光。"),
    ],
}  # fmt: skip
GOOD = {
    "empty instruction": [task("为什么？"), task("1 + 1 = ?"), task("¿Qué hora es?")],
    "empty output": [task(output="0"), task(output=":)"), task(output="🙂")],
    "N/A output": [
        task(output="None"), task(output="None of them."), task(output="No"), task(output="-"),
        task(output="No output"),
        task(output="N/A stands for not applicable."), task(output="Na"), task(output="... --- ..."),
        task(output="null"),
    ],
    "broken characters": [
        task(output="a\tb\n\n\tc"), task(output="naïve café, São Paulo, Ångström, “so”"), task(output="👩‍👩‍👧 ok"),
        task(output="\\frac{1}{2} \\times 3 \\text{ m}"), task(output="a\ttan b"), task(output="x\nequal\ty"),
        task(output="\ttime\ttheta"), task(output="à la carte, Ã vs. ã"),
    ],
    "short instruction": [task("Proofread this.", "I has it."), task("Why me?")],
    "long instruction": [task("word " * MAX_TOKENS, "", "Fine."), task("Do this.", LONG * 3, "Done.")],
    "list debris": [
        task('"To be or not to be" is from which play?'), task("(a + b)^2 = ? Expand it."), task("-5 + 3 = what?"),
        task(".NET or Java: which is older?"), task("#hashtags: are they useful?"),
        task("*args in Python: explain it."),
        task("¿Why do Spaniards write this mark?"), task("[1, 2, 3] in Python: what type is it?"), task("$5 in cents?"),
        task("'Affect' or 'effect'?"), task("/etc/passwd holds what?"), task("2 + 2 = ?"),
    ],
    "merged examples": [
        task(output="Instructions:\n1. Boil water.\n2. Add pasta."), task(output="## Instructions\nBoil water."),
        task(output="Input: [1, 2]\nOutput: 3"), task("Write a function.\nInput: 5\nOutput: 120"),
        task(output="### Output\n```\n5\n```"), task(output="1. Task: sweep. 2. Task: mop."),
        task(output="User: Hi\nAssistant: Hello"), task(output="My instruction: never give up."),
        task("What is an instruction set?"), task(output="1. Follow every instruction: it helps."),
    ],
    "placeholder": [
        task(output="Dear [Your Name],\nI enjoyed [insert event].\n[Image]"), task("Sum it.", "[1, 2, 3]"),
        task("Explain the tag.", "<p>"), task("What does it match?", "[a-z]+"), task("Convert it.", "(a + b)"),
        task("Rename this file.", "holiday photo.jpg"), task("What type of file is this?", "cat.jpg"),
        task("Write an e-mail that says the report is attached."), task("Improve it.",
        "Please see attached the invoice."),
        task("Reply to it.", "Dear [Name], thank you for the list of words."), task("Explain the code.", "{x: 1}"),
        task("Explain how muscles are attached to bones."),
    ],
    "URL": [
        task("What is https?"), task("Explain http:// in a sentence."),
        task("Open https://example.com/a?b=1 with curl."),
        task("What does it print?", "curl http://localhost:8080/health"), task("Read it.", "http://127.0.0.1/a"),
        task("Extract the domain.", "https://docs.google.com/document"), task("Explain it.", "www.shop.example/a"),
        task("Explain it.", '<a href="https://www.w3.org">W3C</a>'), task("Explain it.",
        "requests.get('https://a.io')"),
        task("Make it polite.",
        "Hi all, the new menu of the canteen is out, look at https://canteen.io/menu. There is soup "
             "on Monday, curry on Tuesday and fish on Friday, and whoever wants to change a day tells Anna by noon."),
        task(output="See https://www.wikipedia.org."), task("Find the path in https://www.bbc.com/a/b with a regex."),
        task("Explain it.", "www.yourwebsite.com"), task("Mail me at bob@www.co, what is wrong?"),
    ],
    "media task": [
        task("Explain what a flowchart is."), task("Describe how to draw a cat."),
        task("Draw a conclusion from the data."),
        task("Write a prompt for an image of a cat."), task("Write the HTML that shows a picture of a dog."),
        task("Write alt text for a photo of a beach."), task("Draw up a table of the inner planets."),
        task("Sketch a relaxed two-day itinerary."), task("Create a list of photo album titles."),
        task("Generate a title for a video about bees."), task("Draw a comparison between cats and dogs."),
        task("Paint a picture of village life in words."), task("Draw an ASCII picture of a house."),
        task("Create an SVG logo with a circle."), task("Write a script for a video about recycling."),
        task("What makes a logo memorable?"), task("Render this German notice in English.", "Rauchen verboten"),
        task("How do I resize an image?"), task("Create a slogan for a photo shop."),
        task("Give a tip for better photos."),
        task("Design a study plan for a portrait course."), task("Play the role of a shop assistant."),
        task("Record the minutes of the meeting.", "Anna opened it."), task("Name a painting by Monet."),
        task("Draw a line between fact and opinion."), task("Make a photosynthesis quiz."),
        task("Create a video game story."),
        task("Illustrate the point with an example."), task("Create a podcast episode title."),
    ],
    "missing text": [
        task("Summarize the following article.", "The sea is blue."),
        task("Translate the following sentence: I am here."),
        task('Rewrite the following sentence.\n"He was late."'), task("Rewrite the following sentence:\nHe was late."),
        task("Describe the following painting Guernica in two sentences."),
        task("Explain the following word serendipity."),
        task('"He was late." Put the above sentence into the passive voice.'),
        task('Put the sentence "He was late." into the passive voice.'), task("Explain the following term - entropy"),
        task("Sort the following numbers: 3, 1, 2."), task("Sort the following numbers 3, 1, 2."),
        task("Write a function that reverses the given string."), task("Write an algorithm to sort a given list."),
        task("List the prime numbers below 20."), task("What are the numbers above 90 that are prime?"),
        task("Name a country above the equator."), task("Write a story in the following week."),
        task("What is a given name?"),
        task("Explain the text of the First Amendment."), task("Translate the word hello into Spanish."),
        task("Analyze the poem The Road Not Taken."), task("Summarize the story of Cinderella."),
        task("What does the data say?"),
        task("Given two numbers a and b, write a function that adds them."), task("Plan the following day."),
        task("Edit the `sentence` variable."), task("Tell me a story in the style of the Brothers Grimm."),
        task("Which of the following is a fruit: carrot or apple?"), task("How do you write the sentence of a judge?"),
        task("Give the steps for following a recipe."), task("Describe the map of Europe in 1914."),
    ],
    "copied input": [
        task("Correct it if needed.", "All is well.", "All is well."), task("Sort the words.", "a b c", "a b c"),
        task("Make it upper case.", "abc", "ABC"), task("Add the comma.", "Yes he said.", "Yes, he said."),
        task("Repeat it.", "a b", "a b"), task(input="", output="Red"),
    ],
    "copied instruction": [
        task("Name three colours.", "", "Three colours are red, blue and green."), task("Hello there", "", "Hello"),
        task("Say what you see.", "What do you see?", "A tree."),
    ],
    "refusal": [
        task("Decline an invitation.", "", "I'm sorry, but I can't make it. I cannot help with the party."),
        task("Write an apology.", "", "I'm sorry, I could not find the time."),
        task(output="I can't help with getting into someone's home; it is likely to be a crime."),
        task(output="I won't write a forged note."), task("What is an AI?", "", "As an AI, a program can learn."),
        task("You are a chatbot. Greet me.", "", "As an AI language model, I greet you."),
        task(output="Unfortunately, I cannot determine the angle from two sides alone."),
        task(output="Sorry is a hard word. I cannot forget it."), task(output="Please provide feedback by Friday."),
        task(output="As an aim, try to save more."), task(output="I am unable to sleep, he said."),
        task(output="As an airline pilot, I fly."), task(output="I'm sorry for your loss. It takes time."),
        task("Reply to the customer.", "My kettle broke.", "I am sorry, but I cannot give a refund yet."),
    ],
    "no answer": [
        task(output="The answer depends on the country."), task(output="The model T was built by Ford."),
        task("What should a model return?", "", "The model should return a list."), task("What is a seed?"),
        task(output="The task is hard."), task(output="Your response was kind."),
        task(output="The output of a sum is a number."),
    ],
    "repetition": [
        task("Repeat the line.", "", LOOP), task("Say it 50 times.", "", "no! " * 80), task(output="-" * 80),
        task(output="Row, row, row your boat,\nGently down the stream.\nRow, row, row your boat,\nMerrily, merrily."),
        task(output="| a | b |\n|-----|-----|\n" + "".join(f"| item {i} | price {i * 7} |\n" for i in range(20))),
        task(output="ha " * 20), task(output="The moon is up again.\n" * 3 + "The sun is gone."),
        task(output="The moon is up again.\n" * 5 + "".join(f"The star number {i} is gone.\n" for i in range(9))),
        task(output="x = 1\n" * 9), task(output=" ".join(str(i) for i in range(200))),
        task(output="".join(f"{i}. Step {i}: turn the wheel by {i} degrees.\n" for i in range(9))),
        task(output="0" * 99),
    ],
    "wrong language": [
        task("Translate it into French.", "I am lost.", "Je suis perdu et je ne sais pas où est la gare."),
        task("How do you say in German that you are lost and need help?", "",
        "Ich bin leider verloren und brauche Hilfe."),
        task('What does "Je ne sais pas ce que tu veux dire, mais c\'est bien" mean?', "",
        "I do not know what you mean."),
        task("Summarise it.", "Der Hund ist alt und will nicht mehr mit dem Kind spielen.",
        "Der Hund ist alt und müde, und "
             "er will nicht mehr spielen."),
        task(output="x = [i for i in range(10)]"), task(output="Rot"), task("Olá!  Bom dia", "", "Good day."),
        task("Name five cities in Spain.", "", "Madrid, Barcelona, Valencia, Sevilla, Zaragoza"),
    ],
}  # fmt: skip


def cases(table):
    return [pytest.param(name, item, id=f"{name}-{i}") for name in table for i, item in enumerate(table[name])]


@pytest.mark.parametrize("name, item", cases(DEFECTS))
def test_a_defect_has_its_reason(name, item):
    assert reason(item) == name


@pytest.mark.parametrize("name, item", cases(GOOD))
def test_a_good_task_that_looks_defective_passes(name, item):
    assert find_defect(item) is None


def test_every_reason_is_tested_and_explained():
    assert list(DEFECTS) == list(GOOD) == list(REASONS) == [*CHECKS, "wrong language"]


def test_the_first_reason_counts():
    everything = task("Summarize", "https://a.io", "")
    assert reason(everything) == "empty output"
    assert reason(everything | {"output": "As an AI, I cannot."}) == "short instruction"
    assert reason(task("Summarize the site.", "https://a.io", "As an AI, I cannot.")) == "URL"


def test_a_defect_shows_what_was_seen():
    assert find_defect(task("Summarize the\nfollowing text.")) == ("missing text", "the following text")
    assert find_defect(task(output="a\ud800")) == ("broken characters", "\\ud800")
    assert len(find_defect(task("Show it.", "https://a.io/" + "x" * 500))[1]) == SEEN


def test_tasks_in_other_languages_are_judged_by_their_own_rules():
    german = task(
        "Schreibe eine kurze Geschichte über einen Hund, der schwimmen lernen will.", "", "Es war einmal ein Hund."
    )
    assert reason(german, "de") is None and reason(german, "fr") == "wrong language"
    assert reason(task("Write a short story about a dog that wants to swim."), "de") == "wrong language"
    assert reason(german | {"output": ""}, "de") == "empty output"
    assert reason(german | {"output": "There was a dog that wanted to learn how to swim."}, "de") is None
    assert reason(german | {"output": "As an AI language model, I cannot."}, "de") is None
    assert reason(task("用一句话总结下面的文字。", "天空是蓝色的。", "天很蓝。"), "zh") is None
    assert reason(task("Fasse ihn zusammen.", "https://spiegel.de/a", "Kurz."), "de") == "URL"


LINE = "Wash the cups."  # of more than 12 characters


@pytest.mark.parametrize("lines, looped", [
    ([LINE] * 4, False), ([LINE] * 5, True), ([LINE] * 4 + ["Dry them at last."], False), ([LINE, ""] * 5, True),
    ([LINE, "Dry all the cups."] * 5, False), ([LINE, "Dry all the cups."] * 5 + [LINE], True),
    ([LINE[:12]] * 9, False), ([LINE[:13]] * 5, True), ([f"  {LINE}\t"] * 5, True), ([LINE, f"{LINE} "] * 3, True),
    (["a" * 49], False), (["a" * 50], True), (["=" * 99], False), (["ab" * 60], False),
    ([" ".join(f"w{i}" for i in range(58)) + " a a"], False), (["one two three " * 19], False),
    (["one two three " * 20], True), (["one two three " * 8 + " ".join(f"w{i}" for i in range(36))], False),
])  # fmt: skip
def test_where_a_loop_begins(lines, looped):
    """A character 50 times, a line 5 times and in most lines, 60 words with few different runs of 4."""
    assert (reason(task(output="\n".join(lines))) == "repetition") is looped


@pytest.mark.parametrize("period, looped", [(1, True), (30, True), (38, True), (39, False)])
def test_of_which_period_words_are_a_loop(period, looped):
    """A hundred words have 97 runs of 4, of which fewer than 38.8 may differ in a loop."""
    words = " ".join(f"word{at % period}" for at in range(100))
    assert (reason(task(output=words)) == "repetition") is looped


@pytest.mark.parametrize("marks", ['""', "''", "``", "\u201c\u201d", "\u00ab\u00bb"])
def test_what_is_quoted_tells_nothing_of_an_instructions_language(marks):
    asked = "What does {}der Hund ist nicht in dem Haus und das ist auch nicht schlecht{} mean, and who says that?"
    assert reason(task(instruction=asked.format("", ""))) == "wrong language"
    assert reason(task(instruction=asked.format(*marks))) is None


SOUGHT = {name: found for name, found in vars(patterns).items() if isinstance(found, patterns.Sought)}


@pytest.mark.parametrize("name", SOUGHT)
def test_a_pattern_that_is_sought_where_a_text_occurs_matches_nowhere_else(name):
    """Of texts that the pattern nearly matches, those that it matches are found, in any case and beyond ASCII too."""
    sought, rng, n = SOUGHT[name], random.Random(0), 0
    nodes = hostile.parser.parse(sought.pattern.pattern, sought.pattern.flags)
    for _ in range(3000):
        text = hostile.draw_text(nodes, rng)
        for one in (text, text.upper(), f"\n{text}.", f"See: {text} \u00e9", text.replace("s", "\u017f")):
            found = sought.pattern.search(one)
            n += found is not None and one.isascii()
            assert (sought.search(one) is None) == (found is None), one
    assert n > 1000
    assert all(need == need.lower() for need in sought.needs)


def test_an_instruction_beyond_what_is_scanned_is_long():
    assert reason(task("Name a colour." + "." * (SCAN - 15))) is None
    assert reason(task("Name a colour." + "." * SCAN + " word" * 999)) == "long instruction"


# Rows that are no examples of a defect


def test_seed_tasks_pass():
    rows = [{key: row[key] for key in task()} for row in rows_of(ROOT / "data_gen" / "seed_tasks.jsonl")]
    assert len(rows) == 175
    for row in rows:
        assert repair_item(row) == (row, []) and find_defect(row) is None


def test_few_of_many_rows_are_dropped():
    dropped = [[reason(repair_item(row)[0]) for row in alpaca_rows(defects=share)] for share in (0.0, 0.1)]
    none, some = ([name for name in names if name] for names in dropped)
    assert len(none) <= 2, none
    assert 0.04 * len(dropped[1]) < len(some) < 0.1 * len(dropped[1])
    assert {"refusal", "URL", "missing text", "media task"} <= set(some)


def test_tasks_that_people_wrote_pass():
    for _, instruction, given, told in EVALUATION:
        item = {"instruction": instruction, "input": given, "output": told}
        assert reason(repair_item(item)[0]) is None, item


# Text that is made to hurt

HOSTILE = [
    "a ", "the following ", "draw a a a a ", "I'm sorry, I cannot ", "<a ", "[a-b ", "https://a.", "\n", " ", "' ",
    '"', "1 ",
    "#", "*", "Instruction:", "3. ", "no input ", "<noinput>", "的", "A.b.c.", "given a ", "the above ", "`", "…", "\t",
    "n/a",
]  # fmt: skip


@pytest.mark.parametrize("part", HOSTILE)
def test_hostile_text_takes_linear_time(part):
    def check(text):
        for item in (task(text), task("Do it now.", text), task("Do it now.", "a", text), task(text, text, text)):
            find_defect(item)

    n = SCAN // 4 // len(part)
    assert_linear_time(check, part * n, part * (4 * n))


def test_defects_behind_what_is_scanned_are_not_seen():
    words = " ".join(f"w{i}" for i in range(SCAN))
    assert reason(task(output=words + "\ufffd")) is None
    assert reason(task(output=words[: SCAN - 1] + "\ufffd")) == "broken characters"


def test_words_of_the_prompt_are_looked_for_where_an_output_begins():
    """A long text may speak of a previous task of its own."""
    assert find_no_answer(task(output="x" * 390 + " seed task")) == "seed task"
    assert find_no_answer(task(output="x" * 391 + " seed task")) is None
