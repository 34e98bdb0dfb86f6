"""What is repaired in a generated task, and what drops it: the defects of the original 52K data, each with its reason.

A pattern must be sure of its defect: a task that might be good passes. Patterns of English phrases apply to English
data alone. All take linear time and look at the first SCAN characters of a field.
"""

import re
from collections import Counter

from data_gen.base.language import LANGUAGES, guess
from data_gen.dedup import tokenize

REASONS = {
    "empty instruction": "the instruction holds no word",
    "empty output": "the output is empty",
    "N/A output": "the output only says that there is none",
    "broken characters": "control characters, wrongly decoded text, or LaTeX that lost its backslashes",
    "short instruction": "the instruction has fewer than 2 words",
    "long instruction": "the instruction has more than 150 words",
    "list debris": "the instruction begins with a bullet, or with the end of something else",
    "merged examples": "a field holds another example, or the markup of a chat",
    "placeholder": "instruction or input stand for an attachment, or for a text that was never written",
    "URL": "instruction or input point to the web, which a model of text cannot read",
    "media task": "the task is to see or make an image, sound or video",
    "missing text": "the instruction speaks of a given text, and none is given",
    "copied input": "the output is the input",
    "copied instruction": "input or output is the instruction",
    "refusal": "the output refuses as an AI, or apologises for what it cannot do",
    "no answer": "the output says what an answer should be like, or a field speaks of the prompt",
    "repetition": "the output runs in a loop",
    "wrong language": "the instruction, or an output that nobody asked to translate, is in another language",
}
REPAIRS = {
    "line ends": "CRLF and CR became LF",
    "blanks": "blanks around a field were removed",
    "label": "a leading label or number, such as 'Instruction:' or '3.', was removed",
    "no-input marker": "an input, or an end of the instruction, that only says that there is no input was removed",
}
SCAN = 20_000  # characters
SEEN = 120  # characters of a defect that are shown
MIN_TOKENS, MAX_TOKENS = 2, 150
SAMPLE = 500  # characters of an output tell its language
MIN_OUTPUT = 8  # tokens below which an output is no text in any language
SELF_CONTAINED = 120  # characters besides a link: an input that merely mentions one
ANY = re.IGNORECASE

# ---- repairs --------------------------------------------------------------------------------------------------------

EDGES = "\ufeff\u200b\u2060"
HEAD, TAIL = r"(?:#{1,6} ?)?\*{0,3}", rf"\*{{0,3}}[\s{EDGES}]*"
LABELS = {
    "instruction": rf"{HEAD}(?:(?:task|instruction|prompt) ?\d{{0,3}} ?[:.)]|\d{{1,2}}[.)](?=\s)){TAIL}",
    "input": rf"{HEAD}input ?:{TAIL}",
    "output": rf"{HEAD}(?:output|response) ?:{TAIL}",
}
LABELS = {field: re.compile(label, ANY) for field, label in LABELS.items()}
NEEDED = "(?:required|needed|necessary|provided|given|available|applicable)"
NO_INPUT = re.compile(
    rf"none(?: {NEEDED})?|n a|no ?input|(?:input )?(?:is )?not {NEEDED}"
    rf"|no (?:(?:additional|further|specific|extra) )?input(?: is)?(?: {NEEDED})?(?: for this \w+)?"
    "|keine(?: eingabe)?|aucune(?: entrée)?|sin entrada|ninguna|sem entrada|nenhuma"
    "|nessun input|geen(?: invoer)?|无|无输入|無|なし|入力なし|없음|нет(?: ввода)?"
)
NO_INPUT_AS_IS = re.compile(r"[<(\[{] ?(?:empty|null|nil|blank|no data|no text) ?[>)\]}]|[-\u2013\u2014]", ANY)
NO_INPUT_END = re.compile(r"`?< ?no[ _-]?input ?>`?\.?\Z|\bnoinput\.?\Z|(?<=[.?!\n])\s{0,9}\(?no input\)?\.?\Z", ANY)


def tidy(item: dict) -> tuple[dict, list[str]]:
    """The item with what can be repaired safely, and which of REPAIRS that took. Once repaired, it stays as it is."""
    fields, repairs = {}, set()
    for field, label in LABELS.items():
        text = item[field].replace("\r\n", "\n").replace("\r", "\n") if "\r" in item[field] else item[field]
        bare = stripped(text)
        start = 0
        while (found := label.match(bare, start)) and found.end() < len(bare):
            start = found.end()
        fields[field] = bare[start:]
        repairs |= {"line ends"} if text != item[field] else set()
        repairs |= {"blanks"} if text != bare else set()
        repairs |= {"label"} if start else set()
    if says(fields["input"], NO_INPUT) or NO_INPUT_AS_IS.fullmatch(fields["input"]):
        fields["input"] = ""
        repairs.add("no-input marker")
    text = fields["instruction"]
    end = len(text)
    while (found := NO_INPUT_END.search(text, max(0, end - 40), end)) and found.start():
        end = found.start()
        while end and (text[end - 1].isspace() or text[end - 1] in EDGES):
            end -= 1
        repairs.add("no-input marker")
    fields["instruction"] = text[:end]
    return fields, [repair for repair in REPAIRS if repair in repairs]


def stripped(text):
    """Without blanks and invisible characters around it."""
    while (bare := text.strip().strip(EDGES)) != text:
        text = bare
    return text


def says(text, pattern):
    """Whether the whole text, in lower case and without punctuation, is one of the pattern."""
    return len(text) <= 80 and pattern.fullmatch(" ".join(re.findall(r"[^\W_]+", text.lower()))) is not None


# ---- defects of any language: each check takes a task and returns what it saw, or None ------------------------------

NO_OUTPUT = re.compile(
    rf"n a|not applicable|nooutput|no output {NEEDED}|tbd|todo|output|your (?:answer|output)(?: here)?"
)
NO_OUTPUT_AS_IS = re.compile(r"< ?no ?output ?>|\.{3,9}|\u2026|\W{0,3}n/?a\b[^\n]{0,80}\binput\b[^\n]{0,40}", ANY)
BROKEN = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufffd\ufffe\uffff\ud800-\udfff]"
    "|\u00e2\u20ac[\u0153\u2122\u201c\u201d\u02dc\u00a6]|\u00c3[\u00a1-\u00bf](?=[a-z])"  # UTF-8 read as Windows-1252
    r"|\t(?:ext(?:bf|it)?\{|imes\b|heta\b|frac\{|an\()|\n(?:abla\b|eq\b|ightarrow\b)"
)
DEBRIS = re.compile(r"[,;:!?)\]}|%&>]|\.(?!\w)|[-*\u2022\u2013\u2014]\s|#+\s|={2,9}|\d{1,9}[.)]?\Z")
MERGED = re.compile(
    r"^[ \t]*#{2,6}[ \t]*(?:instruction|response)[ \t]*(?::|$)|\n[ \t]*\*{0,2}instruction\*{0,2}[ \t]*:"
    r"|[\"']instruction[\"'] ?: ?[\"']|^[ \t]*\d{1,3}[.)][ \t]*\*{0,2}instruction\*{0,2}[ \t]*(?::|$)"
    r"|<\|(?:im_start|im_end|endoftext|eot_id|start_header_id|end_header_id|user|assistant|system)\|>"
    r"|\[/?INST\]|<</?SYS>>",
    ANY | re.MULTILINE,
)
MATERIAL = (
    "(?:text|article|passages?|paragraphs?|sentences?|essay|poem|story|image|photo|picture|video|audio|file|document|"
    "list|code|snippet|link|url|data|dataset|table|reviews?|content|transcript|email|input|quote|phrase|words?|numbers?)"
)
STANDS_FOR = re.compile(
    rf"[<(\[{{] ?(?:[a-z'\u2019-]{{1,20}} ){{0,6}}{MATERIAL}(?: [a-z'\u2019-]{{1,20}}){{0,6}}\.? ?[>)\]}}]", ANY
)
INSERT = re.compile(
    r"[<(\[{] ?(?:insert|paste|attach(?:ed)?|upload(?:ed)?|enter|include)\b[^\n<>()\[\]{}]{0,80}[>)\]}]"
    r"|[<\[](?:image|photo|picture|video|audio|attachment)[>\]]",
    ANY,
)
ATTACHED = re.compile(
    r"\b(?:see|in|of|from|using|on|read|review|analy[sz]e|summari[sz]e|describe|open|edit|translate|check)"
    r" (?:(?:the|this|an?) )?attached\b|\bis attached (?:below|above)\b",
    ANY,
)
MEDIA_FILE = re.compile(
    r"\S{1,300}\.(?:jpe?g|png|gif|bmp|webp|tiff?|mp3|mp4|wav|avi|mov|flac|pdf|docx?|xlsx?|pptx?)", ANY
)
OF_FILES = re.compile(r"\b(?:file ?names?|files?|extensions?|formats?|rename|paths?|type|string|urls?)\b", ANY)
URL = re.compile(r"(?<![\"'`=(\w/.@])(?:https?://|www\.)([\w.-]{1,253})\S*", ANY)
RESERVED = re.compile(
    r"(?:[\w-]+\.){0,9}(?:example(?:\.\w+){0,2}|test|invalid|localhost)|(?:127|10)(?:\.\d+){3}|192\.168\.\d+\.\d+"
    r"|(?:www\.)?(?:my|your|some)?-?(?:site|website|domain|company|url|page)\.\w+",
    ANY,
)
OF_URLS = re.compile(
    r"\b(?:parse|extract|validate|encode|decode|shorten|split|replace|remove|redact|mask|count|format|convert|hyperlink|"
    r"anchor|html|markdown|curl|regex|regular expression|domain|subdomain|protocol|query string|slug|bibliograph\w+|"
    r"citation|cite|reference)s?\b",
    ANY,
)
MAY_STAY = re.compile(
    r"\b(?:if|whether|needed|necessary|unchanged|repeat|copy|copied|echo|verbatim|quote|same|sort|order|exact\w*|print|"
    r"missing|already|return|organi[sz]e|arrange|rank|chronological\w*)\b",
    ANY,
)
AGAIN = re.compile(r"\b(?:repeat\w*|times|loop\w*|over and over|again|\d{2,})\b", ANY)
CHARACTER_LOOP = re.compile(r"([^\s\-=_*#.~+|/\\0])\1{49}")
QUOTED = re.compile(
    '["\u201c\u201e\u00ab][^"\u201c\u201d\u00bb]{2,2000}["\u201c\u201d\u00bb]|`[^`]{2,2000}`'
    "|(?<!\\w)['\u2018][^'\u2019\n]{3,500}['\u2019](?!\\w)"
)
ABOUT_LANGUAGE = re.compile(rf"\b(?:{'|'.join(LANGUAGES.values())}|translat\w+|languages?|latin|mandarin)\b", ANY)


def empty_instruction(item):
    return None if re.search(r"\w", item["instruction"]) else item["instruction"] or "nothing"


def empty_output(item):
    return None if item["output"].strip() else "nothing"


def no_output(item):
    output = item["output"].strip()
    return output if says(output, NO_OUTPUT) or NO_OUTPUT_AS_IS.fullmatch(output) else None


def broken_characters(item):
    return first(BROKEN, *item.values())


def short_instruction(item):
    return item["instruction"] if len(tokenize(item["instruction"])) < MIN_TOKENS else None


def long_instruction(item):
    n = len(tokenize(item["instruction"]))
    return f"{n} words" if n > MAX_TOKENS else None


def list_debris(item):
    return item["instruction"] if DEBRIS.match(item["instruction"]) else None


def merged_examples(item):
    return first(MERGED, *item.values())


def placeholder(item):
    whole = STANDS_FOR.fullmatch(item["input"]) or MEDIA_FILE.fullmatch(item["input"])
    if whole and not OF_FILES.search(item["instruction"]):
        return whole[0]
    return first(INSERT, item["instruction"], item["input"]) or first(ATTACHED, item["instruction"])


def url(item):
    if OF_URLS.search(URL.sub("", item["instruction"])):
        return None
    for field in ("instruction", "input"):
        for found in URL.finditer(item[field]):
            mentioned = field == "input" and len(item[field]) - len(found[0]) >= SELF_CONTAINED
            if not mentioned and not RESERVED.fullmatch(found[1].rstrip(".-")):
                return found[0]
    return None


def copied_input(item):
    text = item["input"].strip()
    return text if text and text == item["output"].strip() and not MAY_STAY.search(item["instruction"]) else None


def copied_instruction(item):
    words = tokenize(item["instruction"])
    for field in ("input", "output"):
        if len(item[field]) <= 2 * len(item["instruction"]) and tokenize(item[field]) == words:
            return f"{field}: {item[field]}"
    return None


def repetition(item):
    """A character 50 times on end, a long line 5 times and mostly, or 60 words with few different runs of 4."""
    if AGAIN.search(item["instruction"]):
        return None
    found = CHARACTER_LOOP.search(item["output"])
    if found:
        return found[0]
    lines = [line.strip() for line in item["output"].split("\n") if len(line.strip()) > 12]
    line, n = Counter(lines).most_common(1)[0] if lines else ("", 0)
    if n >= 5 and n > len(lines) / 2:
        return line
    words = tokenize(item["output"])
    runs = Counter(zip(*(words[i:] for i in range(4)), strict=False)) if len(words) >= 60 else Counter()
    return " ".join(max(runs, key=runs.get)) if len(runs) < 0.4 * runs.total() else None


def wrong_language(item, language):
    found = guess(QUOTED.sub(" ", item["instruction"]))
    if found not in ("", language):
        return f"{found}: {item['instruction']}"
    if language != "en" or ABOUT_LANGUAGE.search(item["instruction"]):
        return None
    output = item["output"][:SAMPLE]
    found = guess(output)
    if found in ("", language, guess(item["input"])) or len(tokenize(output)) < MIN_OUTPUT:
        return None
    return f"{found}: {output}"


# ---- defects of English data ----------------------------------------------------------------------------------------

# What follows the name of a thing that is missing: an end, or a word with which the sentence goes on. What is there
# stands behind a colon, in quotes, on a line of its own, or right after the name: "the word hello", "the poem Ulysses".
GOES_ON = (
    r"(?=[.,;!?)]|\Z|\s+(?:in|into|to|so|as|for|with|without|and|or|by|using|that|which|is|are|was|were|from|based|"
    r"according|if|on|at|correctly|again|has|have|contains?|does|means?|says?|then|while|below|above|provided|"
    r"given)\b)"
)
TEXT = (
    r"(?:text|sentences?|paragraphs?|passage|article|essay|poem|story|list|snippet|lines? of code|code|function|script|"
    r"numbers?|table|data ?set|data|words?|phrases?|quotes?|e-?mail|letter|review|document|conversation|"
    r"dialogue|equations?|expressions?|statements?|recipe|website|web ?page|options|set|string|array|tweet|headline|"
    r"excerpt|report|message|query|items|terms|ingredients|lyrics|transcript|abstract|blog post|job description|resume|"
    r"image|picture|photo\w*|painting|graph|chart|diagram|video|audio|figure|map|screenshot)"
)
THE, SOME = r"(?:the|these|those|this)", r"(?:(?!following\b|given\b)[a-z'-]{2,15}\s+){0,2}?"
OF_WHAT = (
    r"(?:\s+of\s+(?:[a-z]{2,15}\s+)?(?:numbers|integers|words|names|sentences|items|data|text|code|values|events))?"
)
FOLLOWING = re.compile(
    rf"\b(?:{THE}\s+)?(?:following|attached)\s+{SOME}{TEXT}{OF_WHAT}{GOES_ON}|\b{THE}\s+above\s+{SOME}{TEXT}{GOES_ON}"
    rf"|\b{THE}\s+{SOME}{TEXT}{OF_WHAT}\s+(?:below|above|that follows?)(?=[.,;!?]|\Z|\s+(?:in|into|to|and)\b)"
    r"|\b(?:the following|as follows|(?:given|listed|shown) below|(?:shown|mentioned) above)[.?!]{0,3}\Z",
    ANY,
)
GIVEN = re.compile(
    rf"\b{THE}\s+(?:given|provided|supplied)\s+{SOME}{TEXT}{OF_WHAT}{GOES_ON}"
    rf"|\Agiven\s+(?:an?|some|two|three|the|a set of)\s+{SOME}{TEXT}{OF_WHAT}{GOES_ON}",
    ANY,
)
DONE_TO = re.compile(
    r"\A(?:please\s+)?(?:summari[sz]e|translate|rewrite|paraphrase|edit|proofread|correct|shorten|classify|rephrase|"
    r"punctuate|simplify|reword|condense|read|fix|improve|categori[sz]e|complete|finish|analy[sz]e|interpret)\s+"
    rf"{THE}\s+{SOME}{TEXT}{GOES_ON}",
    ANY,
)
OF_CODE = re.compile(
    r"\b(?:function|programs?|script|algorithm|code|class|method|regex|regular expression|query|sql|formula|procedure|"
    r"pseudo-?code|python|java\w*|c\+\+|how|explain|design|develop|build|model)\b",
    ANY,
)
IN_PLACE = re.compile(r":\s*\S|\n\s*\S|\s[-\u2013\u2014]\s+\S|\d\s*[,+*/=^]\s*\d|,[^,]{1,40},")
MEDIA = (
    r"(?:images?|pictures?|photos?|photographs?|drawings?|illustrations?|logos?|icons?|paintings?|posters?|infographics?|"
    r"animations?|gifs?|videos?|(?:video|audio) clips?|audio|audio recordings?|sound ?tracks?|sound effects?|collages?|"
    r"3d models?|portraits?|screenshots?|diagrams?|flow ?charts?|sketch(?:es)?|cartoons?|wallpapers?|mood ?boards?|"
    r"podcasts?)"
)
NOT_OF_TEXT = (
    r"(?!(?:of|for|about|from|to|in|on|that|which|with|how|list|descriptions?|captions?|titles?|names?|ideas?|steps|plan|"
    r"story|tips|set)\b)"
)
MADE = re.compile(
    r"(?:\A|[.!?,;]\s+|\b(?:please|and|then|you|to)\s+)(?:draw|sketch|paint|create|generate|make|design|produce|show|"
    r"render|find|add|provide|compose|give)\s+(?:(?:me|us)\s+)?(?:an?|the|some|my|our|your|this|two|three|\d{1,3})\s+"
    rf"(?:{NOT_OF_TEXT}[\w'-]{{1,25}}\s+){{0,4}}?{MEDIA}(?=[.,;!?]|\Z|\s+(?:of|for|that|which|with|showing|depicting|to|"
    r"using|in|from|featuring|representing|about|illustrating|based|and|on)\b)",
    ANY,
)
DRAWN = re.compile(
    r"\A(?:(?:please|can you|could you)\s+)?(?:draw\s+(?:me\s+)?(?:an?|the|some|my|your|two|three)\s+"
    r"(?!(?:\w+\s+)?(?:conclusions?|comparisons?|parallels?|distinctions?|inferences?|lines?|connections?|analog\w+|"
    r"lessons?|contrasts?|moral|table|links?|plan|timeline|list)\b)|(?:colori[sz]e|photoshop|crop|resize|retouch)\s+"
    r"(?:the|this|an?)\b|(?:sketch|paint)\s+(?:me\s+)?an?\s+(?:\w+\s+)?(?:portrait|landscape|scene|still life|mural)\b"
    r"|record\s+(?:an?|yourself|your)\s+(?:\w+\s+){0,3}?(?:video|audio|message|podcast|voice|clip|song)\b"
    r"|play\s+(?:me\s+)?(?:an?|the|some)\s+(?:\w+\s+)?(?:song|music|video|audio|sound|clip|tune|melody)\b)",
    ANY,
)
BY_TEXT = re.compile(
    r"\b(?:ascii|svg|html|css|code|python|java\w*|sql|latex|tikz|mermaid|graphviz|plantuml|markdown|prompts?|"
    r"alt[- ]?text|captions?|script|words?|text|function|program|algorithm|how|write|describe|description|explain|"
    r"excel|steps|instructions)\b",
    ANY,
)
AI = r"(?:ai|artificial intelligence|(?:large )?language model)"
OF_AI = re.compile(rf"\b(?:{AI}|a\.i\.|chat ?bot|robot|assistant|android|machine|gpt)\b", ANY)
AS_AI = re.compile(
    rf"\bas an? {AI}(?: language)? (?:model|assistant)\b|\bas an? {AI},? I\b|\A\W{{0,5}}as an? {AI}\b"
    rf"|\A[^.\n]{{0,80}}\bI(?:['\u2019]m| am) (?:just |only )?an? {AI}\b",
    ANY,
)
CANNOT = (
    r"(?:(?:I|we) (?:cannot|can ?not|can['\u2019]t|could not|couldn['\u2019]t|do not|don['\u2019]t|am unable to|"
    r"am not able to)|I['\u2019]m (?:unable|not able) to)"
)
DO = (
    r"(?:help|assist|fulfil+|complete|comply|provide|generate|create|access|see|view|open|browse|answer|process|find|"
    r"retrieve|estimate|display|write|translate|identify|engage|discuss|draw|play|do (?:that|this)|analy[sz]e|"
    r"summari[sz]e|support|have (?:access|enough|the ability|(?:any )?information|personal))"
)
SORRY = (
    r"\A\W{0,5}(?:I(?:['\u2019]m| am)? )?(?:(?:so|very|really) )?(?:sorry|afraid|unfortunately|(?:my )?apologi[a-z]+)\b"
)
UNABLE = re.compile(
    rf"{SORRY}[^.\n]{{0,40}}?\b(?:{CANNOT}\s+(?:\w+\s+)?{DO}|you (?:need to|did not|didn['\u2019]t|have not|"
    rf"haven['\u2019]t) (?:provid|specif|giv|includ|mention|attach))"
    rf"|\A\W{{0,5}}I(?:['\u2019]m| am) (?:unable|not able) to {DO}\b"
    r"|\A\W{0,5}I (?:cannot|can['\u2019]t) (?:fulfil+|comply|complete|assist with|access|browse|view|open)\b"
    r"|\A(?:sure[,!.] )?(?:please|(?:could|can) you(?: please)?) (?:provide|share|specify|give me|send)\b[^.\n]{0,120}"
    r"\b(?:you(?:['\u2019]d| would) like|you want|so (?:that )?I can|for me to|me with)\b",
    ANY,
)
OF_LETTERS = re.compile(
    r"\b(?:apolog\w+|sorry|declin\w+|refus\w+|repl\w+|respon\w+|e-?mail|messages?|letter|customer|note|excuses?|dialogue|"
    r"conversation|role)\b",
    ANY,
)
OF_OUTPUTS = re.compile(r"\b(?:outputs?|responses?|models?|assistant|ai)\b", ANY)
SHOULD = re.compile(
    r"\A\W{0,5}(?:the|this|your|an?) (?:output|response|model|assistant|ai|language model|generated \w+) (?:(?:should|"
    r"must|needs to)\b|(?:will|would) (?:be|include|contain|describe|provide|list|explain|have|depend|vary|give)\b)"
    r"|\A\W{0,5}(?:(?:sample|example|expected|possible) (?:output|response)\W{0,3}\Z|(?:the )?(?:output|answer) "
    r"(?:will vary|varies|depends on the input))",
    ANY,
)
LEAKED = re.compile(
    r"\bseed tasks?\b|\btask generat(?:or|ion)\b|\b(?:previous|preceding) (?:task|instruction)s?\b|\b(?:the|these) "
    r"example tasks?\b|\btasks? \d{1,2} (?:above|from the list)\b",
    ANY,
)


def media_task(item):
    text = item["instruction"]
    return None if BY_TEXT.search(text) else first(MADE, text) or first(DRAWN, text)


def missing_text(item):
    text = item["instruction"]
    if item["input"].strip() or QUOTED.search(text):
        return None
    for pattern in (FOLLOWING, DONE_TO) if OF_CODE.search(text) else (FOLLOWING, DONE_TO, GIVEN):
        found = pattern.search(text)
        if found and not IN_PLACE.search(text, found.end()):
            return found[0]
    return None


def refusal(item):
    asked, output = item["instruction"] + "\n" + item["input"], item["output"]
    seen = None if OF_AI.search(asked) else first(AS_AI, output)
    return seen or (None if OF_LETTERS.search(asked) else first(UNABLE, output))


def no_answer(item):
    seen = None if OF_OUTPUTS.search(item["instruction"]) else first(SHOULD, item["output"])
    return seen or first(LEAKED, item["instruction"], item["output"][:400])


# ---- all of them ----------------------------------------------------------------------------------------------------

CHECKS = {
    "empty instruction": empty_instruction,
    "empty output": empty_output,
    "N/A output": no_output,
    "broken characters": broken_characters,
    "short instruction": short_instruction,
    "long instruction": long_instruction,
    "list debris": list_debris,
    "merged examples": merged_examples,
    "placeholder": placeholder,
    "URL": url,
    "media task": media_task,
    "missing text": missing_text,
    "copied input": copied_input,
    "copied instruction": copied_instruction,
    "refusal": refusal,
    "no answer": no_answer,
    "repetition": repetition,
}
ENGLISH = {"media task", "missing text", "refusal", "no answer"}


def defect(item: dict, language: str = "en") -> tuple[str, str] | None:
    """(reason of REASONS, what was seen) for the first defect of the item, in that order, or None."""
    short = {field: item[field][:SCAN] for field in LABELS}
    for reason, check in CHECKS.items():
        if language == "en" or reason not in ENGLISH:
            seen = check(short)
            if seen is not None:
                return reason, shown(seen)
    seen = wrong_language(short, language)
    return ("wrong language", shown(seen)) if seen else None


def first(pattern, *texts):
    """What the pattern finds in the first of the texts in which it finds anything."""
    return next((found[0] for text in texts if (found := pattern.search(text))), None)


def shown(seen):
    return " ".join(seen.encode("utf-8", "backslashreplace").decode().split())[:SEEN]
