"""data_gen/orders.jsonl and orders_held_out.jsonl, the rows of make demo: messages of customers, and their orders.

python -m scripts.pages.order_tasks

The held-out rows share no name, town, thing or wording with the others, so that they can only be answered by a model
that has learnt the task. Everything is drawn from one seed: the files come out the same each time.
"""

import argparse
import json
import random
from pathlib import Path
from typing import NamedTuple

from kernels.base.commands import run_command

FOLDER = Path(__file__).parents[2] / "data_gen"
N_TRAIN, N_HELD_OUT, SEED = 144, 24, 22
INSTRUCTION = "Write this message as an order, in JSON with the keys item, count, name, town and day."
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
NUMBERS = ["two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]


class Words(NamedTuple):
    """What the messages of one file are made of."""

    names: list[str]
    towns: list[str]
    items: list[str]
    wordings: list[str]


TRAIN = Words(
    [
        "Ada", "Ben", "Clara", "David", "Elena", "Felix", "Grace", "Hugo", "Ivy", "Jonas", "Kate", "Liam",
        "Mona", "Nina", "Otto", "Paula", "Quentin", "Rosa", "Samir", "Tara", "Umar", "Vera", "Walter",
        "Yara", "Zoe", "Mateo", "Priya", "Chen", "Aisha", "Bjorn", "Albert", "Bella", "Caspar", "Dora",
        "Edgar", "Flora", "Gustav", "Hilda", "Igor", "Jana", "Klaus", "Lotte", "Magnus", "Nadia", "Olga",
        "Pablo", "Rita", "Stefan", "Tessa", "Victor", "Wanda", "Xenia", "Yusuf", "Zelda", "Amir", "Bruno",
        "Cecilia", "Dmitri", "Esther", "Farid",
    ],
    [
        "Leeds", "York", "Bath", "Dover", "Derby", "Oxford", "Bristol", "Cardiff", "Exeter", "Lincoln",
        "Norwich", "Durham", "Truro", "Glasgow", "Dundee", "Perth", "Cork", "Galway", "Boston", "Salem",
        "Austin", "Denver", "Tampa", "Fresno", "Prague", "Warsaw", "Turin", "Naples", "Porto", "Seville",
        "Bergen", "Malmo", "Lyon", "Nantes", "Bremen", "Kassel", "Basel", "Zurich", "Graz", "Ghent",
        "Utrecht", "Delft", "Aarhus", "Riga", "Vilnius", "Varna", "Athens", "Izmir", "Cairo", "Tunis",
        "Dallas", "Memphis", "Tulsa", "Omaha", "Toledo", "Mobile", "Eugene", "Helena", "Juneau", "Quebec",
    ],
    [
        "blue lamp", "oak chair", "tea cup", "wool blanket", "garden hose", "paper bag", "red bucket", "desk fan",
        "soup bowl", "kitchen pan", "door mat", "wall clock", "picture frame", "steel ladder", "bread tin",
        "rain coat", "bike pump", "flower pot", "cotton towel", "book end", "paint roller", "hand saw",
        "tape measure", "salt mill", "cake stand", "coffee filter", "dog bowl", "bath plug", "light bulb",
        "green cushion",
    ],
    [
        "Hi, {name} here from {town}. Could you send me {count} {items} by {day}?",
        "Please deliver {count} {items} to {town} on {day}. Thanks, {name}",
        "This is {name}. I need {count} {items} in {town}, and {day} would be perfect.",
        "We are short of {items} in {town}! {count} of them by {day}, please. Yours, {name}",
        "{day} is the day of our party in {town}, so I would like {count} {items}. My name is {name}.",
        "Hello, can I order {count} {items}? I live in {town} and am at home on {day}. {name}",
        "My neighbour told me about your {items}. I'd take {count}, for {name} in {town}, on {day}.",
        "Good morning! {count} {items} for {name}, {town}, please. Bring them on {day}.",
        "On {day} I shall be in {town}. Have {count} {items} ready for {name}, will you?",
        "It's {name} again. Same place in {town}, but {count} {items} this time, and not before {day}.",
        "Dear shop, the school in {town} wants {count} {items} on {day}. Ask for {name} at the gate.",
        "For {name}: {count} {items}. Town: {town}. When: {day}.",
        "I'm moving to {town} on {day} and will want {count} {items} there. Regards, {name}",
        "Would {day} work for {count} {items}? Send them to {name} in {town}.",
        "{name} from {town} speaking, I'd love to have {count} {items}. Is {day} all right?",
        "Put me down for {count} {items}, please. {name}, {town}, any time on {day}.",
    ],
)  # fmt: skip
HELD_OUT = Words(
    [
        "Oliver", "Emma", "Noah", "Sofia", "Lucas", "Maria", "Henry", "Julia", "Leo", "Anna", "Oscar",
        "Ruth",
    ],
    [
        "London", "Paris", "Berlin", "Madrid", "Dublin", "Chicago", "Seattle", "Portland", "Vienna",
        "Lisbon", "Milan", "Geneva",
    ],
    [
        "yellow umbrella", "glass jar", "leather belt", "wooden spoon", "silk scarf", "metal tray", "winter hat",
        "candle holder", "water bottle", "school bag", "table cloth", "coffee mug",
    ],
    [
        "Greetings from {town}. {name} would like {count} {items}, and hopes for {day}.",
        "I want to buy {count} {items}. Please post them to {town} so that they arrive on {day}. Best wishes, {name}",
        "A friend in {town} has her birthday on {day}: what about {count} {items} for her? Love, {name}",
        "My shop in {town} opens on {day}, and I still have no {items}. Send {count}, please! {name}",
    ],
)  # fmt: skip


def make_rows(words: Words, n: int, rng: random.Random) -> list[dict[str, str]]:
    """Return n rows of Alpaca's keys; each wording comes as often as the others."""
    rows = []
    for i in range(n):
        item, number = rng.choice(words.items), rng.randrange(len(NUMBERS))
        count = NUMBERS[number] if rng.random() < 0.5 else str(number + 2)
        name, town, day = rng.choice(words.names), rng.choice(words.towns), rng.choice(DAYS)
        text = words.wordings[i % len(words.wordings)].format(
            name=name, town=town, day=day, count=count, items=f"{item}s"
        )
        text = text[0].upper() + text[1:]
        for end in ("! ", ". "):
            text = text.replace(end + count, end + count.capitalize())
        order = {"item": item, "count": number + 2, "name": name, "town": town, "day": day}
        rows.append({"instruction": INSTRUCTION, "input": text, "output": json.dumps(order)})
    return rows


def render_files() -> dict[str, str]:
    """Return {name of a file: its text}."""
    rng = random.Random(SEED)
    files = {
        "orders.jsonl": make_rows(TRAIN, N_TRAIN, rng),
        "orders_held_out.jsonl": make_rows(HELD_OUT, N_HELD_OUT, rng),
    }
    return {name: "".join(json.dumps(row) + "\n" for row in rows) for name, rows in files.items()}


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    for name, text in render_files().items():
        (FOLDER / name).write_text(text)
        print(f"{name}: {text.count(chr(10))} rows")


if __name__ == "__main__":
    run_command(main)
