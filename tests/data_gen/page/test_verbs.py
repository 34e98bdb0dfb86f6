"""Verbs of instructions and their objects."""

import pytest

from data_gen.page.verb_words import VERBS
from data_gen.page.verbs import count_verbs, find_verb

ROOTS = {
    "Write a short story about a lonely robot.": "write story",
    "write a haiku": "write haiku",
    "Please suggest a few books for a child.": "suggest book",
    "Can you explain the concept of entropy?": "explain concept",
    "Could you please list three healthy snacks?": "list snack",
    "Given a list of numbers, find the largest one.": "find",
    "Given the following attributes, build a customer persona.": "build persona",
    "In one sentence, explain photosynthesis.": "explain photosynthesis",
    "Generate a list of ideas for a birthday party.": "generate idea",
    "Create a set of five quiz questions on rivers.": "create question",
    "Give me an example of a metaphor.": "give example",
    "Tell me a joke about cats.": "tell joke",
    "Come up with a creative tagline for a bakery.": "come tagline",
    "Think of a new name for a café.": "think name",
    "Fill in the blank: the sky is ___.": "fill blank",
    "Compare and contrast the two cities.": "compare city",
    "Summarise the article in two sentences.": "summarize article",
    "Re-write this sentence in the passive voice.": "rewrite sentence",
    "You are given a paragraph. Identify the main topic.": "identify topic",
    "Your task is to classify the sentiment of the tweet.": "classify sentiment",
    "I want you to act as a travel guide.": "act guide",
    "Help me write an apology letter.": "write letter",
    "Describe the following:": "describe",
    "Sort the following list of words alphabetically.": "sort word",
    "Write a product description for a backpack.": "write description",
    "Create a marketing plan.": "create plan",
    "Build a machine learning algorithm to sort mail.": "build algorithm",
    "Compose a poem titled The Sea": "compose poem",
    "Make a sentence using the word brave.": "make sentence",
    "Name two European countries.": "name country",
    "List the pros and cons of remote work": "list pros",
    "Provide advice.": "provide advice",
    "Find all the synonyms of happy": "find synonym",
    "Design a logo.\nUse blue.": "design logo",
    "Explain how a bicycle works.": "explain",
    "Convert 5 miles to kilometers": "convert mile",
    "Identify the children's favourite movies.": "identify movie",
    "Rewrite the paragraph carefully": "rewrite paragraph",
    "What is the capital of France?": "",
    "How do I write a good resume?": "",
    "If I have three apples, how many are left": "",
    "The quick brown fox": "",
    "": "",
    "Classify the animals into groups: lion, name, list.": "classify animal",
    "Review this author's": "review author",
    "Write 3 hypotheses": "write hypothesis",
    "请写一个故事": "",
    "What happens here? Describe the scene.": "describe scene",
    "Translate “good morning” into French": "translate morning",
}


@pytest.mark.parametrize("instruction", ROOTS)
def test_root_verb_and_object(instruction):
    assert " ".join(find_verb(instruction)).strip() == ROOTS[instruction]


def test_the_commonest_verbs_and_objects_are_counted_and_the_others_left_out():
    """Four objects of a verb and twenty verbs; of equally common ones those that come first in the alphabet."""
    nouns = ["poem"] * 3 + ["story"] * 2 + ["essay", "letter", "list", "song"]
    verbs = sorted(VERBS - {"write"})[:22]
    asked = [f"Write a {noun}." for noun in nouns] + [f"{verb.capitalize()} a poem." for verb in verbs]
    top, with_verb, with_both = count_verbs([*asked, "Why?"])
    assert top[0] == ("write", 9, [("poem", 3), ("story", 2), ("essay", 1), ("letter", 1)])
    assert top[1:] == [(verb, 1, [("poem", 1)]) for verb in verbs[:19]] and with_verb == with_both == 31


TOLD = """\
Please, list the three largest rivers of Europe.
What is the capital of France?
If it rains, what should I wear, and write a short note about it
Can you analyse this dataset and summarise the main findings?
Compare and contrast two poems about winter
Write a list of the cities' names
Create a pair of glasses
Kindly quickly draw a picture
Your task is to classify the tweets, of which some are angry.
Given a paragraph, rewrite it in your own words
A recipe, of bread, is needed. Bake it!
Describe
Name
Explain to me the process of photosynthesis using simple words
Generate ideas, for a party
Find out the cube root of 27
Add up 3 and 4
Describe something beautiful
Suggest five synonyms for 'happy'.
Identify the adverbs: quickly, slowly
Reply to John's letters
Make the boxes and the buses into glasses
Rewrite the following sentence: She walks
Look at the picture titled Sunrise
Who wrote Hamlet? Summarize the play
Give me a series of numbers each larger than the last
Convert 5 kilometers into miles
Build a family of classes
Draw the pies
Is it red? In short, describe it
Hello there. Name, place and thing. Draw a cat
Can you, briefly, explain the rule?
Write a list of
"""


def test_verbs_and_objects_are_kept(snapshot):
    assert "".join(f"{line}  ->  {' … '.join(find_verb(line))}\n" for line in TOLD.splitlines()) == snapshot
