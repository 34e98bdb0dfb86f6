"""The verbs of English instructions and their objects: a guess from word lists, without a parser."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from data_gen.page.verb_words import (
    ADJECTIVES,
    CONTAINERS,
    GERUND_NOUNS,
    LEADS,
    LINKS,
    NOT_ADJECTIVES,
    NOT_ADVERBS,
    PARTICLES,
    PLURAL_ONLY,
    QUESTIONS,
    SINGULAR,
    SKIPPED,
    STOPS,
    THROUGH,
    VERBS,
)

VERBS_SHOWN, OBJECTS_SHOWN = 20, 4  # as in the figure of Stanford's Alpaca
WORD = re.compile(r"\d[\d.,]*\d|\d|[^\W\d_]+(?:[-'\u2019][^\W\d_]+)*|[.,:;!?\n]")


class Verb(NamedTuple):
    """A verb, the number of rows where it has an object, and its commonest objects with their rows."""

    verb: str
    rows: int
    objects: list[tuple[str, int]]


def find_verb(instruction: str) -> tuple[str, str]:
    """Guess (verb, object) of an English instruction: its imperative verb and the head of the words after it.

    Either may be "": a question has no verb, "Summarize the following:" has no object.
    """
    words = [word.replace("\u2019", "'") for word in WORD.findall(instruction[:600])]
    lower = [word.lower() for word in words]
    for start in find_clause_starts(lower):
        place = skip_leads(lower, start)
        verb = find_base_verb(lower[place]) if place < len(lower) else ""
        after = lower[place + 1] if place + 1 < len(lower) else "."
        if verb and (place == 0 or after not in {",", "of", "is", "are", "was", "were"}):
            return verb, find_object(lower, place + 1, verb)
    return "", ""


def find_clause_starts(words: list[str]) -> Iterator[int]:
    """Yield the places where a command may begin: a sentence's start and, outside of questions, after a comma."""
    yield 0
    question = bool(words) and words[0] in QUESTIONS
    for at, word in enumerate(words[:-1]):
        if word in ".:!?\n":
            question = words[at + 1] in QUESTIONS
        if word in ".:!?\n" or (word in ",;" and not question):
            yield at + 1


def skip_leads(words: list[str], at: int) -> int:
    """Return the place after "Please", "Can you", "Your task is to" and adverbs."""
    while at < len(words):
        lead = next((lead for lead in LEADS if words[at : at + len(lead)] == lead), None)
        if lead:
            at += len(lead)
        elif words[at].endswith("ly") and words[at] not in VERBS:
            at += 1
        else:
            break
        at += at < len(words) and words[at] == ","
    return at


def find_base_verb(word: str) -> str:
    """Return the word as it stands in VERBS, with American spelling, or "" if it is no such verb."""
    word = word.replace("-", "")
    american = re.sub(r"(?<=[a-z]{3})yse$", "yze", re.sub(r"(?<=[a-z]{3})ise$", "ize", word))
    return next((form for form in (word, american) if form in VERBS), "")


def find_object(words: list[str], at: int, verb: str) -> str:
    """Return the head noun of the verb's object in the words from this place, or ""."""
    while at + 1 < len(words) and words[at] in {"and", "or"} and find_base_verb(words[at + 1]):  # compare and contrast
        at += 2
    if at < len(words) and words[at] in PARTICLES:
        at += 1
    if verb in THROUGH and at < len(words) and words[at] in LINKS:
        at += 1
    return find_head_noun(words, at)


def find_head_noun(words: list[str], at: int) -> str:
    """Return the last word of the noun phrase at this place, beyond "a list of", or ""."""
    while at < len(words) and (words[at] in SKIPPED or words[at][0].isdigit()):
        at += 1
    phrase: list[str] = []
    while at < len(words) and words[at] not in STOPS and words[at][0].isalpha():
        word = words[at]
        noun_before = any(not is_adjective(known) for known in phrase)
        if noun_before and (word in SKIPPED or (word.endswith(("ing", "ed")) and word not in GERUND_NOUNS)):
            break  # a sentence using ..., a poem titled ..., the impact each ...
        phrase.append(word)
        at += 1
    while phrase and (is_adjective(phrase[-1]) or phrase[-1] in SKIPPED or is_adverb(phrase[-1])):
        phrase.pop()
    if not phrase:
        return ""
    noun = make_singular(phrase[-1].removesuffix("'s"))
    if noun in CONTAINERS and at < len(words) and words[at] == "of":
        return find_head_noun(words, at + 1) or noun
    return noun if len(noun) > 1 else ""


def is_adjective(word: str) -> bool:
    """Return whether a word looks like an adjective."""
    if word in NOT_ADJECTIVES:
        return False
    return word in ADJECTIVES or word.endswith(("ous", "ful", "less", "able", "ible"))


def is_adverb(word: str) -> bool:
    """Return whether a word looks like an adverb."""
    return word.endswith("ly") and word not in NOT_ADVERBS


def make_singular(word: str) -> str:
    """Return the singular of an English noun."""
    if word in SINGULAR or word in PLURAL_ONLY:
        return SINGULAR.get(word, word)
    if word.endswith("ies") and len(word) > 4:
        return word[:-3] + "y"
    if re.search(r"(?:[sc]h|x|ss|zz|o)es$", word):
        return word[:-2]
    if word.endswith("s") and len(word) > 3 and not word.endswith(("ss", "us", "is")):
        return word[:-1]
    return word


def count_verbs(instructions: Iterable[str]) -> tuple[list[Verb], int, int]:
    """Return the commonest verbs, the number of rows with a verb, and the number with a verb and an object."""
    objects: dict[str, Counter[str]] = {}
    with_verb = 0
    for instruction in instructions:
        verb, noun = find_verb(instruction)
        with_verb += bool(verb)
        if noun:
            objects.setdefault(verb, Counter())[noun] += 1
    ranked = sorted(objects.items(), key=lambda item: (-item[1].total(), item[0]))[:VERBS_SHOWN]
    top = [
        Verb(verb, nouns.total(), sorted(nouns.items(), key=lambda item: (-item[1], item[0]))[:OBJECTS_SHOWN])
        for verb, nouns in ranked
    ]
    return top, with_verb, sum(nouns.total() for nouns in objects.values())
