# ruff: noqa: RUF001 - words of many alphabets
"""A heuristic for the language of a text: scripts separate most languages, then letters and common small words.

It knows the languages of LANGUAGES, mistakes others for their neighbours or for none, and is unsure about short texts,
names, mixtures and most code. Use it to find whole texts in a wrong language, not to label single phrases.
"""

import math
import re
import struct
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping
from functools import cache
from itertools import repeat

LANGUAGES = {
    "en": "English", "de": "German", "fr": "French", "es": "Spanish", "pt": "Portuguese", "it": "Italian",
    "nl": "Dutch", "sv": "Swedish", "da": "Danish", "no": "Norwegian", "fi": "Finnish", "pl": "Polish", "cs": "Czech",
    "ro": "Romanian", "hu": "Hungarian", "tr": "Turkish", "vi": "Vietnamese", "id": "Indonesian", "ru": "Russian",
    "uk": "Ukrainian", "bg": "Bulgarian", "el": "Greek", "ar": "Arabic", "fa": "Persian", "ur": "Urdu", "he": "Hebrew",
    "hi": "Hindi", "bn": "Bengali", "pa": "Punjabi", "gu": "Gujarati", "ta": "Tamil", "te": "Telugu", "kn": "Kannada",
    "ml": "Malayalam", "si": "Sinhala", "th": "Thai", "lo": "Lao", "km": "Khmer", "my": "Burmese", "ka": "Georgian",
    "hy": "Armenian", "am": "Amharic", "zh": "Chinese", "ja": "Japanese", "ko": "Korean",
}  # fmt: skip

# The first word of a letter's Unicode name -> the languages of that script.
SCRIPTS = {
    "LATIN": "en de fr es pt it nl sv da no fi pl cs ro hu tr vi id",
    "CYRILLIC": "ru uk bg", "ARABIC": "ar fa ur", "DEVANAGARI": "hi", "CJK": "zh", "KANA": "ja",
    "GREEK": "el", "HEBREW": "he", "HANGUL": "ko", "THAI": "th", "LAO": "lo", "KHMER": "km", "MYANMAR": "my",
    "BENGALI": "bn", "GURMUKHI": "pa", "GUJARATI": "gu", "TAMIL": "ta", "TELUGU": "te", "KANNADA": "kn",
    "MALAYALAM": "ml", "SINHALA": "si", "GEORGIAN": "ka", "ARMENIAN": "hy", "ETHIOPIC": "am",
}  # fmt: skip

# Common words of each language. A word in n lists counts 1/n for each.
WORDS = {
    "en": "the of and to in a is that it for on with as was are be by this from at or have an not you which what your "
    "how but they their has were can will there his her my we i he she if do would could about into than its give "
    "write these who when why please should me between",
    "de": "der die das und ist nicht ein eine einen einem einer zu den dem des mit von auf für im sich auch es an als "
    "bei nach wie oder aus aber wir ich sie er hat sind wird wurde dass kann über zum zur um was man wenn noch nur so "
    "du mir mich dir ihr werden haben diese dieser dieses welche",
    "fr": "le la les de des du et un une est en que qui dans pour pas sur au aux avec ce cette ces il elle ne se son "
    "sa ses par plus nous vous je mais ou où sont été comme leur on y à qu être fait tout quel quelle mon",
    "es": "el la los las de del y un una es en que por para con no se su al lo como más pero sus le ha o este esta "
    "estos yo me si sin sobre qué muy hay fue son está también entre cuando todo ser cómo ya nos mi cada cuál quiere",
    "pt": "o a os as de do da dos das e um uma é em no na nos nas que por para com não se seu sua ao mais mas como foi "
    "ou ser são tem eu você isso ele ela muito também já está quando pelo pela até sem entre às qual me meu "
    "sobre quer três este esta",
    "it": "il lo la i gli le di del della dei delle e un una è in che per con non si da al alla nel nella sono come "
    "più ma anche ha o questo questa mi se su ci dal dalla loro cosa essere perché quando molto io ho era tra fra suo",
    "nl": "de het een en van is dat niet in op te zijn voor met die aan er maar om ook als bij dan of naar uit nog wel "
    "ik je hij ze we wat wordt worden door over heeft hebben deze dit geen kan hoe mijn jij jouw tot zich werd",
    "sv": "och att det som en är på för av med inte den till ett jag i har om de så kan men var från vi du ska när "
    "sig han hon eller vad efter också mycket nu bara ut upp över detta denna hur min många finns mig dig utan",
    "da": "og at det som en er på for af med ikke den til et jeg i har om de så kan men var fra vi du skal når sig han "
    "hun eller hvad efter også meget nu blev bare ud op over dette denne hvordan min mange findes mig dig uden "
    "være hvor nogle nogen der hvis gerne",
    "no": "og at det som en er på for av med ikke den til et jeg i har om de så kan men var fra vi du skal når seg han "
    "hun eller hva etter også mye nå ble bare ut opp over dette denne hvordan min mange finnes meg deg uten "
    "være hvor noen ei der hvis gjerne",
    "fi": "ja on ei se että hän oli en mutta kun niin myös ovat joka tai kuin mitä olen mikä sen minä sinä voi jos "
    "vain ole nyt hänen tämä ne me he te jotka koska sekä olla siitä kanssa miten paljon",
    "pl": "i w na z się nie to jest że do o jak a po co od za ale dla ma przez są czy tym może już przy tak oraz jego "
    "jej ich był była było być jestem który która które ten ta w ze pod mnie mi tylko bardzo kiedy gdy",
    "cs": "a je se v na to že s z do o i ve jsem jak za ale by tak pro co si po jsou nebo jako od už při byl byla bylo "
    "být který která které ten ta jeho její mi mě jen také když aby kde není velmi podle jsme",
    "ro": "și de la în a cu nu o pe un să este care din că pentru sunt mai ce se au fost prin sau dar am ca le al ale "
    "lui ei acest această cum foarte fi era eu îmi ai lor după când dacă unei unui",
    "hu": "a az és hogy nem is egy ez van de meg el ha csak volt már még mint vagy azt ki be le fel kell lehet minden "
    "ezt én te ő mi nagyon akkor most mert amely aki ami után között által való hogyan milyen",
    "tr": "ve bir bu da de için ile olarak çok daha o ne gibi var en kadar ben sen olan ama değil mi mı sonra her ya "
    "biz siz onun nasıl bana şey diye olduğu ki veya hem göre oldu zaman",
    "vi": "và của là có không được cho một các những người trong với này đã để khi tôi đó từ như cũng ra đến về nhưng "
    "bạn anh ở sẽ thì làm nhiều hay nào rất phải",
    "id": "yang dan di itu dengan untuk tidak ini dari dalam akan pada saya ke karena ada bisa adalah oleh juga sudah "
    "atau seperti mereka kita kamu dia anda telah lebih para apa bagaimana tetapi kami banyak sebuah sangat "
    "tentang ingin seorang saja",
    "ru": "и в не на что он с как это по но из у за от то для так же мы вы его она они был была быть или если мне я "
    "ты все при чтобы о к когда уже только где очень который которая которое которые какие какой каковы",
    "uk": "і в не на що він з як це по але із у за від то для так же ми ви його вона вони був була були бути або якщо "
    "мені я ти все при щоб про до коли вже тільки де дуже та й",
    "bg": "и в не на че той с как това по но от за то да се е са си ще като до ми го ни или ако аз ти те при има след "
    "много само къде кога който която което беше във със един една",
    "ar": "في من على إلى أن هذا هذه التي الذي ما لا كان عن مع هو هي و كل بعد قبل أو كيف",
    "fa": "و در به از که این را با است برای آن یک می های شد بود خود ها تا هم چه من",
    "ur": "کے کی ہے میں اور سے کا کو پر نے کہ یہ ہیں نہیں ایک وہ بھی اس کیا تھا",
   }  # fmt: skip

# Letters that few languages of a script have. Each occurrence counts like a word.
LETTERS = {
    "de": "ß", "es": "ñ¿¡", "pt": "ãõ", "fr": "œ", "pl": "ąęłśżźćń", "cs": "ěřůďťň", "ro": "țșţă", "hu": "őű",
    "tr": "ğış", "vi": "ăđơưạảấầẩẫậắằẳẵặẹẻẽếềểễệỉịọỏốồổỗộớờởỡợụủứừửữựỳỵỷỹ", "ru": "ыэё", "uk": "іїєґ",
    "fa": "پچژگیک", "ur": "پچگیکٹڈڑںےھہ", "ar": "ةيكىأإ",
}  # fmt: skip

SCAN = 1000  # only this many characters of a text are read
MIN_LETTERS, MIN_WORDS = 4, 4
SHARE = 0.7  # this share of the letters must be of one script
KANA = 0.1  # at least this share of the kana and Han letters of a Japanese text are kana
LINK = re.compile(r"\bhttps?://\S+")
WORD = re.compile(r"(?<!['\u2019])[^\W\d_]+|(?<=['\u2019])(?!s\b)[^\W\d_]+")  # without the "s" of "dog's"
ASCII_S = re.compile(r"'s\b")
ASCII_LETTERS = bytes(code if chr(code).islower() else 32 for code in range(128)) + bytes(128)  # others are blanks

# The best language must lead the second by this many votes, and by this share of its own votes.
MIN_LEAD, LEAD_SHARE = 0.8, 0.15
MIN_SHARE = 0.15  # this share of the words must be common words of the language
MIN_COMMON = 4  # letters that the different common words found must have together: "a" is also a variable or a note


def pack_votes(table: Mapping[str, Iterable[str]]) -> dict[str, int]:
    """Return {entry: its vote, divided among the languages that list it} for {language: entries}.

    The votes of an entry are one whole number, BITS bits a language in the order of LANGUAGES, so that a sum of such
    numbers is the sum for each language: 3 times as fast as a loop over languages. A vote is UNIT.
    """
    codes: dict[str, list[str]] = {}
    for code, entries in table.items():
        for entry in dict.fromkeys(entries):
            codes.setdefault(entry, []).append(code)
    return {e: sum(UNIT // len(listed) << BITS * CODES.index(code) for code in listed) for e, listed in codes.items()}


CODES = list(LANGUAGES)
UNIT = math.lcm(*range(1, 11))  # no entry is listed by more languages
BITS = 32  # of one language's votes: SCAN characters give at most SCAN * UNIT
LANES = struct.Struct(f"<{len(CODES)}I")
LATIN = SCRIPTS["LATIN"].split()  # come first in LANGUAGES, and no other language has an ASCII word
LATIN_LANES = struct.Struct(f"<{len(LATIN)}I")
WORD_LISTS = {code: words.split() for code, words in WORDS.items()}
WORD_VOTES, LETTER_VOTES = pack_votes(WORD_LISTS), pack_votes(LETTERS)
COMMON_WORDS = {code: frozenset(words) for code, words in WORD_LISTS.items()}


@cache
def compute_leads(code: str) -> dict[str, int]:
    """Return {word: its vote for a language, less its vote for any other} of the words that languages list.

    Of several words the sum is the least by which the language leads, or trails, any other.
    """
    listed = {word: LANES.unpack(votes.to_bytes(LANES.size, "little")) for word, votes in WORD_VOTES.items()}
    own = CODES.index(code)
    return {word: votes[own] - max(v for i, v in enumerate(votes) if i != own) for word, votes in listed.items()}


def guess_other_language(text: str, expected: str) -> str:
    """Return guess_language(text) where that is another language than the expected one, else "".

    An ASCII text in which no other language leads needs one sum of votes alone.
    """
    if text.isascii():
        lead = sum(map(compute_leads(expected).get, split_ascii(clean_text(text)), repeat(0)))
        if lead > -MIN_LEAD * UNIT:
            return ""
    found = guess_language(text)
    return "" if found == expected else found


def clean_text(text: str) -> str:
    """Return what is looked at of a text: its first SCAN characters, composed, in lower case and without links."""
    text = unicodedata.normalize("NFC", text[:SCAN]).lower()
    return LINK.sub(" ", text) if "://" in text else text


def guess_language(text: str) -> str:
    """Return the ISO 639-1 code, one of LANGUAGES, of a text's language, or "" when unsure."""
    text = clean_text(text)
    if text.isascii():  # all letters are of one script, and MIN_WORDS words have MIN_LETTERS
        return guess_by_words(text, LATIN)
    scripts: Counter[str] = Counter()
    for char, n in Counter(text).items():
        if char.isalpha():
            scripts[find_script(char)] += n
    n_letters = scripts.total()
    if scripts["KANA"] >= KANA * (scripts["KANA"] + scripts["CJK"]):
        scripts["KANA"] += scripts.pop("CJK", 0)
    script, n = max(scripts.items(), key=lambda item: item[1], default=("", 0))
    if n < MIN_LETTERS or n < SHARE * n_letters or script not in SCRIPTS:
        return ""
    codes = SCRIPTS[script].split()
    return codes[0] if len(codes) == 1 else guess_by_words(text, codes)


@cache
def find_script(char: str) -> str:
    """Return a letter's script, a key of SCRIPTS or another first word of a Unicode name."""
    script = unicodedata.name(char, "").partition(" ")[0]
    return "KANA" if script in ("HIRAGANA", "KATAKANA", "KATAKANA-HIRAGANA") else script


def split_ascii(text: str) -> list[str]:
    """Return the words of an ASCII text in lower case, those of WORD, in half of its time."""
    bare = ASCII_S.sub("'", text) if "'s" in text else text
    return bare.encode().translate(ASCII_LETTERS).decode().split()


def guess_by_words(text: str, codes: list[str]) -> str:
    """Return the one of these languages that the words and letters of the text clearly favour, or ""."""
    is_ascii = text.isascii()
    words, letters = (split_ascii(text), "") if is_ascii else (WORD.findall(text), text)
    if len(words) < MIN_WORDS:
        return ""
    found = sum(filter(None, map(WORD_VOTES.get, words))) + sum(filter(None, map(LETTER_VOTES.get, letters)))
    lanes = LATIN_LANES if is_ascii else LANES
    votes = lanes.unpack(found.to_bytes(lanes.size, "little"))
    second, most = sorted(votes)[-2:]
    best = CODES[votes.index(most)]
    if most - second < max(MIN_LEAD * UNIT, LEAD_SHARE * most) or best not in codes:
        return ""
    common = [*filter(COMMON_WORDS[best].__contains__, words)]
    marks = [*filter(LETTERS.get(best, "").__contains__, letters)]
    different = [*set(common), *set(marks)]
    is_common = len(different) > 1 and sum(map(len, different)) >= MIN_COMMON
    return best if is_common and len(common) + len(marks) >= MIN_SHARE * len(words) else ""
