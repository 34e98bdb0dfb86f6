"""Patterns of defective tasks, and of the words that excuse a match.

All patterns take linear time. A pattern ABOUT_X finds instructions about X, which may look defective and are not.
"""

import re
from dataclasses import dataclass

from data_gen.base.language import LANGUAGES
from data_gen.rows.repairs import ANY, NEEDED


@dataclass(frozen=True)
class Sought:
    """A pattern that matches only where one of some lower-case texts occurs. Most fields have none, which is seen fast.

    Where the pattern ignores case it also takes letters beyond ASCII for an s or a k, so only ASCII is seen fast.
    """

    pattern: re.Pattern[str]
    needs: tuple[str, ...]

    def search(self, text: str) -> re.Match[str] | None:
        """Return the first match of the pattern."""
        if text.isascii():
            lower = text.lower()
            if not any([need in lower for need in self.needs]):
                return None
        return self.pattern.search(text)


# ---- any language ---------------------------------------------------------------------------------------------------

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
MERGED = Sought(
    re.compile(
        r"^[ \t]*#{2,6}[ \t]*(?:instruction|response)[ \t]*(?::|$)|\n[ \t]*\*{0,2}instruction\*{0,2}[ \t]*:"
        r"|[\"']instruction[\"'] ?: ?[\"']|^[ \t]*\d{1,3}[.)][ \t]*\*{0,2}instruction\*{0,2}[ \t]*(?::|$)"
        r"|<\|(?:im_start|im_end|endoftext|eot_id|start_header_id|end_header_id|user|assistant|system)\|>"
        r"|\[/?INST\]|<</?SYS>>",
        ANY | re.MULTILINE,
    ),
    ("instruction", "response", "<|", "inst]", "sys>>"),
)
MATERIAL = (
    "(?:text|article|passages?|paragraphs?|sentences?|essay|poem|story|image|photo|picture|video|audio|file|document|"
    "list|code|snippet|link|url|data|dataset|table|reviews?|content|transcript|email|input|quote|phrase|words?|numbers?)"
)
STANDS_FOR = re.compile(
    rf"[<(\[{{] ?(?:[a-z'\u2019-]{{1,20}} ){{0,6}}{MATERIAL}(?: [a-z'\u2019-]{{1,20}}){{0,6}}\.? ?[>)\]}}]", ANY
)
INSERT = Sought(
    re.compile(
        r"[<(\[{] ?(?:insert|paste|attach(?:ed)?|upload(?:ed)?|enter|include)\b[^\n<>()\[\]{}]{0,80}[>)\]}]"
        r"|[<\[](?:image|photo|picture|video|audio|attachment)[>\]]",
        ANY,
    ),
    ("<", "(", "[", "{"),
)
ATTACHED = Sought(
    re.compile(
        r"\b(?:see|in|of|from|using|on|read|review|analy[sz]e|summari[sz]e|describe|open|edit|translate|check)"
        r" (?:(?:the|this|an?) )?attached\b|\bis attached (?:below|above)\b",
        ANY,
    ),
    ("attached",),
)
MEDIA_FILE = re.compile(
    r"\S{1,300}\.(?:jpe?g|png|gif|bmp|webp|tiff?|mp3|mp4|wav|avi|mov|flac|pdf|docx?|xlsx?|pptx?)", ANY
)
ABOUT_FILES = re.compile(r"\b(?:file ?names?|files?|extensions?|formats?|rename|paths?|type|string|urls?)\b", ANY)
URL = re.compile(r"(?<![\"'`=(\w/.@])(?:https?://|www\.)([\w.-]{1,253})\S*", ANY)
RESERVED = re.compile(
    r"(?:[\w-]+\.){0,9}(?:example(?:\.\w+){0,2}|test|invalid|localhost)|(?:127|10)(?:\.\d+){3}|192\.168\.\d+\.\d+"
    r"|(?:www\.)?(?:my|your|some)?-?(?:site|website|domain|company|url|page)\.\w+",
    ANY,
)
ABOUT_URLS = re.compile(
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
QUOTED = re.compile(  # no opening mark inside: each would look for its end again
    '["\u201c\u201e\u00ab][^"\u201c\u201d\u201e\u00ab\u00bb]{2,2000}["\u201c\u201d\u00bb]|`[^`]{2,2000}`'
    "|(?<!\\w)['\u2018][^'\u2018\u2019\n]{3,500}['\u2019](?!\\w)"
)
ABOUT_LANGUAGE = re.compile(rf"\b(?:{'|'.join(LANGUAGES.values())}|translat\w+|languages?|latin|mandarin)\b", ANY)

# ---- English --------------------------------------------------------------------------------------------------------

# Follows the name of a missing thing: an end, or a word that continues the sentence. A given thing stands behind a
# colon, in quotes, on a line of its own, or right after its name: "the word hello", "the poem Ulysses".
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
FOLLOWING = Sought(
    re.compile(
        rf"\b(?:{THE}\s+)?(?:following|attached)\s+{SOME}{TEXT}{OF_WHAT}{GOES_ON}"
        rf"|\b{THE}\s+above\s+{SOME}{TEXT}{GOES_ON}"
        rf"|\b{THE}\s+{SOME}{TEXT}{OF_WHAT}\s+(?:below|above|that follows?)(?=[.,;!?]|\Z|\s+(?:in|into|to|and)\b)"
        r"|\b(?:the following|as follows|(?:given|listed|shown) below|(?:shown|mentioned) above)[.?!]{0,3}\Z",
        ANY,
    ),
    ("follow", "attached", "above", "below"),
)
GIVEN = Sought(
    re.compile(
        rf"\b{THE}\s+(?:given|provided|supplied)\s+{SOME}{TEXT}{OF_WHAT}{GOES_ON}"
        rf"|\Agiven\s+(?:an?|some|two|three|the|a set of)\s+{SOME}{TEXT}{OF_WHAT}{GOES_ON}",
        ANY,
    ),
    ("given", "provided", "supplied"),
)
DONE_TO = re.compile(
    r"\A(?:please\s+)?(?:summari[sz]e|translate|rewrite|paraphrase|edit|proofread|correct|shorten|classify|rephrase|"
    r"punctuate|simplify|reword|condense|read|fix|improve|categori[sz]e|complete|finish|analy[sz]e|interpret)\s+"
    rf"{THE}\s+{SOME}{TEXT}{GOES_ON}",
    ANY,
)
ABOUT_CODE = re.compile(
    r"\b(?:function|programs?|script|algorithm|code|class|method|regex|regular expression|query|sql|formula|procedure|"
    r"pseudo-?code|python|java\w*|c\+\+|how|explain|design|develop|build|model)\b",
    ANY,
)
IN_PLACE = re.compile(  # of a text without blanks at its end, for which each line end would look again
    r":\s*\S|\n\s*\S|\s[-\u2013\u2014]\s+\S|\d\s*[,+*/=^]\s*\d|,[^,]{1,40},"
)
MEDIA = (
    r"(?:images?|pictures?|photos?|photographs?|drawings?|illustrations?|logos?|icons?|paintings?|posters?|infographics?|"
    r"animations?|gifs?|videos?|(?:video|audio) clips?|audio|audio recordings?|sound ?tracks?|sound effects?|collages?|"
    r"3d models?|portraits?|screenshots?|diagrams?|flow ?charts?|sketch(?:es)?|cartoons?|wallpapers?|mood ?boards?|"
    r"podcasts?)"
)
MEDIA_STEMS = (  # one of these is in every word of MEDIA
    "image", "picture", "photo", "drawing", "illustration", "logo", "icon", "painting", "poster", "infographic",
    "animation", "gif", "video", "audio", "soundtrack", "sound track", "sound effect", "collage", "3d model",
    "portrait", "screenshot", "diagram", "flow", "sketch", "cartoon", "wallpaper", "mood", "podcast",
)  # fmt: skip
NOT_OF_TEXT = (
    r"(?!(?:of|for|about|from|to|in|on|that|which|with|how|list|descriptions?|captions?|titles?|names?|ideas?|steps|plan|"
    r"story|tips|set)\b)"
)
MADE = Sought(
    re.compile(
        r"(?:\A|[.!?,;]\s+|\b(?:please|and|then|you|to)\s+)(?:draw|sketch|paint|create|generate|make|design|produce|show|"
        r"render|find|add|provide|compose|give)\s+(?:(?:me|us)\s+)?(?:an?|the|some|my|our|your|this|two|three|\d{1,3})\s+"
        rf"(?:{NOT_OF_TEXT}[\w'-]{{1,25}}\s+){{0,4}}?{MEDIA}(?=[.,;!?]|\Z|\s+(?:of|for|that|which|with|showing|depicting|to|"
        r"using|in|from|featuring|representing|about|illustrating|based|and|on)\b)",
        ANY,
    ),
    MEDIA_STEMS,
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
ABOUT_AI = re.compile(rf"\b(?:{AI}|a\.i\.|chat ?bot|robot|assistant|android|machine|gpt)\b", ANY)
AS_AI = Sought(
    re.compile(
        rf"\bas an? {AI}(?: language)? (?:model|assistant)\b|\bas an? {AI},? I\b|\A\W{{0,5}}as an? {AI}\b"
        rf"|\A[^.\n]{{0,80}}\bI(?:['\u2019]m| am) (?:just |only )?an? {AI}\b",
        ANY,
    ),
    ("a ai", "an ai", "artificial", "language model"),
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
ABOUT_LETTERS = re.compile(
    r"\b(?:apolog\w+|sorry|declin\w+|refus\w+|repl\w+|respon\w+|e-?mail|messages?|letter|customer|note|excuses?|dialogue|"
    r"conversation|role)\b",
    ANY,
)
ABOUT_OUTPUTS = re.compile(r"\b(?:outputs?|responses?|models?|assistant|ai)\b", ANY)
SHOULD = re.compile(
    r"\A\W{0,5}(?:the|this|your|an?) (?:output|response|model|assistant|ai|language model|generated \w+) (?:(?:should|"
    r"must|needs to)\b|(?:will|would) (?:be|include|contain|describe|provide|list|explain|have|depend|vary|give)\b)"
    r"|\A\W{0,5}(?:(?:sample|example|expected|possible) (?:output|response)\W{0,3}\Z|(?:the )?(?:output|answer) "
    r"(?:will vary|varies|depends on the input))",
    ANY,
)
LEAKED = Sought(
    re.compile(
        r"\bseed tasks?\b|\btask generat(?:or|ion)\b|\b(?:previous|preceding) (?:task|instruction)s?\b|\b(?:the|these) "
        r"example tasks?\b|\btasks? \d{1,2} (?:above|from the list)\b",
        ANY,
    ),
    ("task", "instruction"),
)
