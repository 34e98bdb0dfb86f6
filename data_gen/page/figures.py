"""What the dataset report reads and counts: rows, rejections, lengths, root verbs with their objects, nearest pairs."""

import json
import math
import random
import re
import statistics
from collections import Counter
from typing import NamedTuple

import numpy as np
from rapidfuzz import process
from rapidfuzz.distance import Indel, LCSseq

from data_gen.base.cli import DataError
from data_gen.dedup import tokenize

EXAMPLES = 3  # kept of each reason, and of what one instruction attracted
LIMIT = 0.7  # ROUGE-L at which an instruction is a duplicate
NEAREST_ROWS = 1500  # of a sample at most; each is compared with all rows
BLOCK_PAIRS = 4_000_000  # compared at a time, which bounds the memory: 16 MB
VERBS_SHOWN, OBJECTS_SHOWN = 20, 4  # of the figure in Stanford's Alpaca


def listed(text):
    return frozenset(text.split())


VERBS = listed(
    """act adapt add address adjust advise alter analyze annotate answer append apply argue arrange articulate ask
    assemble assess assign assist balance brainstorm break build calculate capitalize caption categorize change
    chart check choose cite clarify classify clean code collect combine come comment compare compile complete
    compose compress compute concatenate conclude condense conduct connect consider construct contrast continue
    contribute convert convince correct count craft create critique curate cut debate debug decide decipher
    declare decode decompose deduce deduplicate define delete demonstrate depict derive describe design detail
    detect determine develop devise diagnose differentiate discover discuss display distinguish divide document
    draft draw edit elaborate eliminate enhance enter enumerate establish estimate evaluate examine exchange
    execute expand explain explore express extend extract factor figure fill filter find fix forecast form
    format formulate gather generate give grade group guess help highlight hypothesize identify illustrate
    imagine implement improve include incorporate indicate infer insert inspect integrate interpret invent
    investigate join judge justify label lay link list locate look make map match mark measure mention merge
    model modify multiply name narrate offer optimize order organize outline output pair paraphrase parse
    perform persuade pick pitch place plan plot point polish portray pose predict prepare present print
    prioritize produce program prompt proofread propose prove provide punctuate put quote rank rate read
    rearrange reason recall recommend reconstruct record recreate redact redesign reduce refactor refine reflect
    reformat reformulate relate remove rename render reorder reorganize reorder repeat rephrase replace reply
    report represent reproduce research resolve respond restate restructure retell retrieve return reverse
    review revise reword rewrite rhyme role roleplay round run say scan schedule script search segment select
    send separate sequence set share shorten show sign simplify simulate sketch solve sort speculate spell split
    spot standardize start state strengthen structure study subtract suggest sum summarize supply support swap
    synthesize tag take talk teach tell test think trace track train transcribe transform translate trim try
    turn update use validate verify visualize vote weigh work write"""
)
# Verbs that take their object through a word such as "with"; of other verbs that word means no direct object.
THROUGH = {"act", "ask", "brainstorm", "come", "comment", "decide", "elaborate", "expand", "fill", "look", "point"}
THROUGH |= {"reflect", "reply", "research", "respond", "search", "talk", "think", "work", "assist", "help"}
PARTICLES = {"up", "out", "down", "off", "in", "back"}
LINKS = {"with", "of", "on", "for", "about", "to", "as", "upon", "at"}
LEADS = [
    words.split()
    for words in """please|kindly|now|then|also|first|next|finally|just|simply|briefly|so|and|can you|
    could you|would you| will you|i want you to|i would like you to|i'd like you to|i need you to|
    you need to|you have to|you should|you must| you will|you are asked to|you are to|
    your task is to|your job is to|your goal is to|the task is to|the goal is to| try to|
    help me to|help me|help us|let's|step by step|to|in this task""".replace("\n", "").split("|")
]
QUESTIONS = listed("what which who whom whose when where why how is are was were do does did has have should would")
STOPS = QUESTIONS | listed(
    """i you he she it we they me us him them himself herself itself themselves yourself can could will may might must
    be been being am had if and or but nor that than then because since while although though so as at by for
    from in into of off on onto out over to under up with without within about above across after against along
    among around before behind below between beyond during except inside like near per regarding through
    throughout toward towards until upon via versus vs not there here please only also too let let's's e.g i.e
    etc using containing including"""
)
SKIPPED = listed(
    """a an the this that these those my your our their his her its some any all each every both either neither no one
    two three four five six seven eight nine ten eleven twelve fifteen twenty thirty fifty hundred several many
    few more most other another such what which whose me us him them"""
)
PLURAL_ONLY = listed(
    """physics mathematics economics politics statistics ethics lyrics genetics athletics linguistics electronics
    logistics mechanics aesthetics basics robotics thanks means headquarters"""
)
CONTAINERS = listed(
    """list set number series couple pair variety range collection type kind sort form piece group bit lot plenty
    selection amount handful bunch dozen"""
)
ADJECTIVES = listed(
    """following given new good great best better bad short long brief simple complex different similar same own
    possible main key top major important interesting creative detailed common popular correct appropriate
    relevant specific suitable random small large big old young high low first second third last next final
    original unique funny various certain real true false full complete own single double positive negative
    active passive informal formal present past future modern early late following above below provided
    available necessary useful english largest
    smallest longest shortest highest lowest biggest oldest youngest newest latest closest earliest fastest easiest"""
)
NOT_ADJECTIVES = {"table", "vegetable", "variable", "cable", "syllable", "timetable", "timeline"}
NOT_ADVERBS = {"family", "reply", "supply", "assembly", "anomaly", "butterfly", "fly", "monopoly"}
GERUND_NOUNS = listed(
    """learning marketing engineering writing meaning building meeting heading ending programming training processing
    testing clothing housing setting feeling spelling thing string king ring spring wing greeting saying
    recording computing advertising banking parking shopping gaming painting drawing being wedding pricing
    funding manufacturing reading pudding evening morning ceiling rating ranking finding warning wording
    beginning opening understanding"""
)
SINGULAR = {
    "children": "child", "men": "man", "women": "woman", "people": "people", "criteria": "criterion", "movies":
    "movie", "cookies": "cookie", "calories": "calorie", "zombies": "zombie", "smoothies": "smoothie", "ties":
    "tie", "pies": "pie", "analyses": "analysis", "hypotheses": "hypothesis", "theses": "thesis", "crises":
    "crisis", "synopses": "synopsis", "shoes": "shoe", "toes": "toe", "leaves": "leaf", "lives": "life", "knives":
    "knife", "wolves": "wolf", "mice": "mouse", "news": "news", "series": "series", "species": "species", "pros":
    "pros", "cons": "cons", "lens": "lens", "gas": "gas", "selfies": "selfie", "genies": "genie", "databases":
    "database", "indices": "index", "matrices": "matrix", "bias": "bias", "atlas": "atlas", "canvas": "canvas",
    "christmas": "christmas", "always": "always", "axes": "axis",
}  # fmt: skip
WORD = re.compile(r"\d[\d.,]*\d|\d|[^\W\d_]+(?:[-'\u2019][^\W\d_]+)*|[.,:;!?\n]")

LIST_LINE = re.compile(r"^\s*(?:[-*•]|\d{1,3}[.)])\s+\S", re.MULTILINE)
TABLE_LINE = re.compile(r"^\s*\|.*\|\s*$", re.MULTILINE)
NUMBER_ALONE = re.compile(r"[-+\u2212$€£]?\s?\d[\d.,\s]*%?")


def median(values):
    return statistics.median(values) if values else None


def percentile(values, share):
    """The smallest of the sorted values that at least this share of them do not exceed."""
    return values[max(0, math.ceil(share * len(values)) - 1)] if values else None


def nice(width):
    """The smallest 1, 2 or 5 times a power of ten that is not under `width`."""
    power = 10.0 ** math.floor(math.log10(width))
    return next(digit * power for digit in (1, 2, 5, 10) if digit * power >= width * 0.999)


def whole_bins(values, most=26):
    """Bins [(first, end, count)] of sorted whole numbers from 1 up, and whether their widths grow (a long tail)."""
    low, high = values[0], values[-1]
    grows = high > 6 * median(values)
    if grows:
        edges = sorted(
            {round(2 ** (half / 2)) for half in range(2 * high.bit_length() + 2)}
        )  # 1 2 3 4 6 8 11 16 23 ...
        first = max(i for i, edge in enumerate(edges) if edge <= low)
        edges = edges[first : 1 + next(i for i, edge in enumerate(edges) if edge > high)]
    else:
        width = max(1, int(nice((high - low + 1) / most)))
        first = low // width * width
        end = max(high + 1, first + 8 * width)
        edges = list(range(first, end + width, width))
    return filled(edges, values), grows


def even_bins(values, low, high, width):
    """Bins of numbers in low..high; what lies outside is counted in the outermost."""
    steps = round((high - low) / width)
    counts = Counter(min(steps - 1, max(0, math.floor((value - low) / width + 1e-6))) for value in values)
    return [(round(low + i * width, 6), round(low + (i + 1) * width, 6), counts[i]) for i in range(steps)]


def filled(edges, values):
    counts, at = [0] * (len(edges) - 1), 0
    for value in values:
        while value >= edges[at + 1]:
            at += 1
        counts[at] += 1
    return list(zip(edges, edges[1:], counts, strict=False))


def kinds(rows):
    """[(kind, rows)], exact counts of simple patterns; a row may be of several kinds or none."""
    outputs = Counter(row.output.strip() for row in rows)
    tests = {
        "asked as a question": lambda row: row.instruction.rstrip().endswith(("?", "\uff1f")),
        "output with a list": lambda row: len(LIST_LINE.findall(row.output)) > 1,
        "output with code (```)": lambda row: "```" in row.output,
        "output with a table": lambda row: len(TABLE_LINE.findall(row.output)) > 1,
        "output of paragraphs": lambda row: "\n\n" in row.output.strip(),
        "output of one number": lambda row: NUMBER_ALONE.fullmatch(row.output.strip()) is not None,
        "output of one word": lambda row: len(row.output.split()) == 1,
        "output seen in another row": lambda row: outputs[row.output.strip()] > 1,
        "output empty": lambda row: not row.output.strip(),
    }
    counts = [(name, sum(map(test, rows))) for name, test in tests.items()]
    return sorted(((name, n) for name, n in counts if n), key=lambda pair: -pair[1])


def root(instruction):
    """(verb, object) of an English instruction: its imperative verb and the head of the words after it.

    Either may be "": a question has no verb, "Summarize the following:" no object. A guess from word lists."""
    words = [word.replace("\u2019", "'") for word in WORD.findall(instruction[:600])]
    lower = [word.lower() for word in words]
    for start in clause_starts(lower):
        at = after_leads(lower, start)
        verb = base_verb(lower[at]) if at < len(lower) else ""
        after = lower[at + 1] if at + 1 < len(lower) else "."
        if verb and (at == 0 or after not in {",", "of", "is", "are", "was", "were"}):
            return verb, direct_object(lower, at + 1, verb)
    return "", ""


def clause_starts(words):
    """Where a command may begin: at a sentence's start and, unless it opens as a question, after its commas."""
    yield 0
    question = bool(words) and words[0] in QUESTIONS
    for at, word in enumerate(words[:-1]):
        if word in ".:!?\n":
            question = words[at + 1] in QUESTIONS
        if word in ".:!?\n" or (word in ",;" and not question):
            yield at + 1


def after_leads(words, at):
    """Past "Please", "Can you", "Your task is to" and adverbs."""
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


def base_verb(word):
    word = word.replace("-", "")
    american = re.sub(r"(?<=[a-z]{3})yse$", "yze", re.sub(r"(?<=[a-z]{3})ise$", "ize", word))
    return next((form for form in (word, american) if form in VERBS), "")


def direct_object(words, at, verb):
    while at + 1 < len(words) and words[at] in {"and", "or"} and base_verb(words[at + 1]):  # compare and contrast
        at += 2
    if at < len(words) and words[at] in PARTICLES:
        at += 1
    if verb in THROUGH and at < len(words) and words[at] in LINKS:
        at += 1
    return head_noun(words, at)


def head_noun(words, at):
    """The last word of the noun phrase at `at`, past "a list of"; "" if there is none."""
    while at < len(words) and (words[at] in SKIPPED or words[at][0].isdigit()):
        at += 1
    phrase = []
    while at < len(words) and words[at] not in STOPS and words[at][0].isalpha():
        word = words[at]
        noun_before = any(not adjective(known) for known in phrase)
        if noun_before and (word in SKIPPED or (word.endswith(("ing", "ed")) and word not in GERUND_NOUNS)):
            break  # a sentence using ..., a poem titled ..., the impact each ...
        phrase.append(word)
        at += 1
    while phrase and (
        adjective(phrase[-1]) or phrase[-1] in SKIPPED or (phrase[-1].endswith("ly") and phrase[-1] not in NOT_ADVERBS)
    ):
        phrase.pop()
    if not phrase:
        return ""
    noun = singular(phrase[-1].removesuffix("'s"))
    if noun in CONTAINERS and at < len(words) and words[at] == "of":
        return head_noun(words, at + 1) or noun
    return noun if len(noun) > 1 else ""


def adjective(word):
    if word in NOT_ADJECTIVES:
        return False
    return word in ADJECTIVES or word.endswith(("ous", "ful", "less", "able", "ible"))


def singular(word):
    if word in SINGULAR or word in PLURAL_ONLY:
        return SINGULAR.get(word, word)
    if word.endswith("ies") and len(word) > 4:
        return word[:-3] + "y"
    if re.search(r"(?:[sc]h|x|ss|zz|o)es$", word):
        return word[:-2]
    if word.endswith("s") and len(word) > 3 and not word.endswith(("ss", "us", "is")):
        return word[:-1]
    return word


def roots(instructions):
    """([(verb, rows with an object, [(object, rows)])] of the commonest, rows with a verb, rows with both)."""
    objects, with_verb = {}, 0
    for instruction in instructions:
        verb, noun = root(instruction)
        with_verb += bool(verb)
        if noun:
            objects.setdefault(verb, Counter())[noun] += 1
    ranked = sorted(objects.items(), key=lambda item: (-item[1].total(), item[0]))[:VERBS_SHOWN]
    top = [
        (verb, nouns.total(), sorted(nouns.items(), key=lambda item: (-item[1], item[0]))[:OBJECTS_SHOWN])
        for verb, nouns in ranked
    ]
    return top, with_verb, sum(nouns.total() for nouns in objects.values())


def coded(token_lists):
    """Token lists as strings of one code point a token, over the surrogates; equal tokens, equal code points."""
    ids = {}
    number = [[ids.setdefault(token, len(ids)) + 0x100 for token in tokens] for tokens in token_lists]
    return ["".join(chr(code + 0x800 if code >= 0xD800 else code) for code in codes) for codes in number]


def nearest(token_lists, most=NEAREST_ROWS):
    """Sampled rows against all: their similarity to the nearest other row, and pairs (similarity, row, row) under
    LIMIT, closest first, each row in one pair. ROUGE-L F = 2 LCS / (m + n), Indel similarity of token strings."""
    known = [i for i, tokens in enumerate(token_lists) if tokens]
    texts = coded([token_lists[i] for i in known])
    sample = sorted(random.Random(0).sample(range(len(known)), min(most, len(known)))) if len(known) > 1 else []
    best, pairs, block = [], set(), max(1, BLOCK_PAIRS // max(1, len(known)))
    for start in range(0, len(sample), block):
        rows = sample[start : start + block]
        scores = process.cdist(
            [texts[i] for i in rows], texts, scorer=Indel.normalized_similarity, dtype=np.float32, workers=-1
        )
        scores[np.arange(len(rows)), rows] = -1  # not itself
        best += scores.max(axis=1).tolist()
        scores[scores > LIMIT - 1e-6] = -1  # a fraction of under 10,000 tokens that is not 0.7 is further off
        for row, other, score in zip(rows, scores.argmax(axis=1).tolist(), scores.max(axis=1).tolist(), strict=True):
            if score > 0:
                pairs.add((score, *sorted((known[row], known[other]))))
    chosen, used = [], set()
    for score, a, b in sorted(pairs, key=lambda pair: (-pair[0], *pair[1:])):
        if used.isdisjoint((a, b)):
            used |= {a, b}
            chosen.append((score, a, b))
    return best, chosen


def in_common(text, other):
    """text as [(piece, whether it belongs to the longest common subsequence with other)]."""
    tokens, lowered = tokenize(text), text.lower()
    a, b = coded([tokens, tokenize(other)])
    shared = {i for op in LCSseq.opcodes(a, b) if op.tag == "equal" for i in range(op.src_start, op.src_end)}
    pieces, done, at = [], 0, 0
    for i, token in enumerate(tokens if len(lowered) == len(text) else ()):
        found = lowered.find(token, at)
        if found < 0:
            continue
        at = found + len(token)
        if i in shared:
            pieces += [(text[done:found], False), (text[found:at], True)]
            done = at
    return [piece for piece in [*pieces, (text[done:], False)] if piece[0]]


class Row(NamedTuple):
    instruction: str
    input: str
    output: str
    request: float | None
    usd: float | None
    model: str


class Rejected:
    """rejected.jsonl: {reason: count}, examples drawn evenly with a fixed seed, and what duplicates were like."""

    def __init__(self):
        self.counts, self.examples, self.unreadable = Counter(), {}, 0
        self.similarities, self.attracted = [], {}  # {kept instruction: [count, examples]}
        self.requests, self.duplicates = Counter(), Counter()  # by request
        self.rng = random.Random(0)

    def add(self, line):
        reason = text_of(line.get("reason")) or "no reason given"
        self.counts[reason] += 1
        examples, request = self.examples.setdefault(reason, []), number(line.get("request"))
        if len(examples) < EXAMPLES:
            examples.append(line)
        elif (place := self.rng.randrange(self.counts[reason])) < EXAMPLES:
            examples[place] = line
        if request is not None:
            self.requests[request] += 1
        if line.get("duplicate_of") is None and line.get("similarity") is None:
            return
        if request is not None:
            self.duplicates[request] += 1
        similarity = number(line.get("similarity"))
        if similarity is not None:
            self.similarities.append(similarity)
        kept = text_of(line.get("duplicate_of"))
        if kept:
            attracted = self.attracted.setdefault(kept, [0, []])
            attracted[0] += 1
            if len(attracted[1]) < EXAMPLES:
                like = "" if similarity is None else f"similarity {similarity:.2f}"
                attracted[1].append((like, text_of(line.get("instruction"))))


def clean(rows, path):
    if rows and not any("instruction" in row for row in rows):
        raise DataError(f'{path}: no row has an "instruction"; wanted Alpaca rows: instruction, input, output')
    cleaned = []
    for row in rows:
        source = row.get("provenance") if isinstance(row.get("provenance"), dict) else {}
        texts = [text_of(row.get(key)) for key in ("instruction", "input", "output")]
        cleaned.append(
            Row(*texts, number(source.get("request")), number(source.get("usd")), text_of(source.get("model")))
        )
    return cleaned


def read_rejected(path):
    """What rejected.jsonl tells, or None without it. A line that is no object is only counted."""
    rejected = Rejected()
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            for line in file:
                try:
                    rejected.add(json.loads(line))
                except (ValueError, AttributeError, RecursionError):
                    rejected.unreadable += bool(line.strip())
    except OSError:
        return None
    return rejected


def read_run(path):
    """run.json of a generation run with every part an object; all empty where there is none."""
    try:
        told = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        told = None
    if not isinstance(told, dict) or not any(isinstance(told.get(part), dict) for part in ("counts", "cost")):
        told = {}
    for part in ("settings", "counts", "cost", "models", "versions"):
        told[part] = told[part] if isinstance(told.get(part), dict) else {}
    return told


def text_of(value):
    """Whatever a file holds where a text is wanted."""
    return value if isinstance(value, str) else "" if value is None else json.dumps(value, ensure_ascii=False)


def number(value):
    """`value` if it is a finite number, else None."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != value or abs(value) > 1e15:
        return None
    return value
