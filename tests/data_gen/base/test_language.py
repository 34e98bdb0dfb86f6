# ruff: noqa: RUF001 - sentences of many alphabets
"""The language of sentences in every known language is found; an unclear text gets no guess."""

import json
import random
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_gen.base.language import (
    BITS,
    CODES,
    LANGUAGES,
    LATIN,
    LETTER_VOTES,
    LETTERS,
    MIN_LETTERS,
    SCAN,
    SCRIPTS,
    UNIT,
    WORD,
    WORD_VOTES,
    WORDS,
    find_script,
    guess_language,
    guess_other_language,
    split_ascii,
)
from tests.helpers.linear import measure_cpu_s
from tests.helpers.own_rows import alpaca_rows
from tests.helpers.run import ROOT

SENTENCES = {
    "en": ["Write a short story about a dog that wants to learn how to swim.",
           "What are the main causes of the French Revolution?",
           "Summarize the article and list its three most important points."],
    "de": ["Schreibe eine kurze Geschichte über einen Hund, der schwimmen lernen will.",
           "Was sind die wichtigsten Ursachen der Französischen Revolution?",
           "Erkläre mir bitte, wie man einen Fahrradreifen flickt und was man dazu braucht."],
    "fr": ["Écris une courte histoire sur un chien qui veut apprendre à nager.",
           "Quelles sont les principales causes de la Révolution française ?",
           "Explique en trois phrases pourquoi le ciel est bleu pendant la journée."],
    "es": ["Escribe una historia corta sobre un perro que quiere aprender a nadar.",
           "¿Cuáles son las principales causas de la Revolución francesa?",
           "Explica en tres frases por qué el cielo es azul durante el día."],
    "pt": ["Escreva uma pequena história sobre um cachorro que quer aprender a nadar.",
           "Quais são as principais causas da Revolução Francesa?",
           "Explique em três frases por que o céu é azul durante o dia."],
    "it": ["Scrivi un breve racconto su un cane che vuole imparare a nuotare.",
           "Quali sono le principali cause della Rivoluzione francese?",
           "Spiega in tre frasi perché il cielo è azzurro durante il giorno."],
    "nl": ["Schrijf een kort verhaal over een hond die wil leren zwemmen.",
           "Wat zijn de belangrijkste oorzaken van de Franse Revolutie?",
           "Leg in drie zinnen uit waarom de lucht overdag blauw is."],
    "sv": ["Skriv en kort berättelse om en hund som vill lära sig att simma.",
           "Förklara varför himlen är blå under dagen och röd på kvällen.",
           "Jag vet inte vad du menar, men vi kan prata om det i morgon."],
    "da": ["Skriv en kort historie om en hund, der gerne vil lære at svømme.",
           "Forklar, hvorfor himlen er blå om dagen, og hvad der sker, når solen går ned.",
           "Jeg ved ikke, hvad du mener, men nu skal vi tale med nogle af de andre."],
    "no": ["Jeg vet ikke hva du mener, men nå skal vi snakke med noen av de andre.",
           "Forklar hvorfor himmelen er blå om dagen, og hva som skjer etter at solen har gått ned.",
           "Boka ble skrevet for mange år siden, og nå finnes det nesten ingen som husker den."],
    "fi": ["Kirjoita lyhyt tarina koirasta, joka haluaa oppia uimaan, mutta ei uskalla.",
           "Mitkä ovat tärkeimmät syyt siihen, että taivas on sininen?"],
    "pl": ["Napisz krótkie opowiadanie o psie, który chce nauczyć się pływać.",
           "Jakie są najważniejsze przyczyny rewolucji francuskiej?"],
    "cs": ["Napiš krátký příběh o psovi, který se chce naučit plavat.",
           "Jaké jsou hlavní příčiny Velké francouzské revoluce a proč je dodnes důležitá?"],
    "ro": ["Scrie o scurtă povestire despre un câine care vrea să învețe să înoate.",
           "Care sunt cauzele principale ale Revoluției franceze?"],
    "hu": ["Írj egy rövid történetet egy kutyáról, aki meg akar tanulni úszni.",
           "Mi volt a francia forradalom legfontosabb oka, és miért nem sikerült elkerülni?"],
    "tr": ["Yüzmeyi öğrenmek isteyen bir köpek hakkında kısa bir hikâye yaz.",
           "Fransız Devrimi'nin en önemli nedenleri nelerdir ve sonuçları ne oldu?"],
    "vi": ["Viết một câu chuyện ngắn về một chú chó muốn học bơi.",
           "Những nguyên nhân chính của Cách mạng Pháp là gì?"],
    "id": ["Tulislah cerita pendek tentang seekor anjing yang ingin belajar berenang.",
           "Apa saja penyebab utama dari Revolusi Prancis dan bagaimana akibatnya?"],
    "ru": ["Напиши короткий рассказ о собаке, которая хочет научиться плавать.",
           "Каковы главные причины Великой французской революции?"],
    "uk": ["Напиши коротке оповідання про собаку, який хоче навчитися плавати.",
           "Якими були головні причини Великої французької революції?"],
    "bg": ["Напиши кратка история за куче, което иска да се научи да плува.",
           "Кои са основните причини за Френската революция и защо е важна?"],
    "ar": ["اكتب قصة قصيرة عن كلب يريد أن يتعلم السباحة.", "ما هي الأسباب الرئيسية للثورة الفرنسية؟"],
    "fa": ["یک داستان کوتاه درباره سگی بنویس که می‌خواهد شنا یاد بگیرد.", "دلایل اصلی انقلاب فرانسه چه بود؟"],
    "ur": ["ایک کتے کے بارے میں مختصر کہانی لکھیں جو تیرنا سیکھنا چاہتا ہے۔"],
    "el": ["Γράψε μια σύντομη ιστορία για έναν σκύλο που θέλει να μάθει να κολυμπάει."],
    "he": ["כתוב סיפור קצר על כלב שרוצה ללמוד לשחות."],
    "hi": ["एक कुत्ते के बारे में एक छोटी कहानी लिखें जो तैरना सीखना चाहता है।"],
    "bn": ["সাঁতার শিখতে চায় এমন একটি কুকুর সম্পর্কে একটি ছোট গল্প লিখুন।"],
    "pa": ["ਇੱਕ ਕੁੱਤੇ ਬਾਰੇ ਇੱਕ ਛੋਟੀ ਕਹਾਣੀ ਲਿਖੋ ਜੋ ਤੈਰਨਾ ਸਿੱਖਣਾ ਚਾਹੁੰਦਾ ਹੈ।"],
    "gu": ["તરવાનું શીખવા માંગતા કૂતરા વિશે ટૂંકી વાર્તા લખો."],
    "ta": ["நீச்சல் கற்றுக்கொள்ள விரும்பும் ஒரு நாயைப் பற்றி ஒரு சிறுகதை எழுதுங்கள்."],
    "te": ["ఈత నేర్చుకోవాలనుకునే కుక్క గురించి ఒక చిన్న కథ రాయండి."],
    "kn": ["ಈಜು ಕಲಿಯಲು ಬಯಸುವ ನಾಯಿಯ ಬಗ್ಗೆ ಒಂದು ಸಣ್ಣ ಕಥೆ ಬರೆಯಿರಿ."],
    "ml": ["നീന്തൽ പഠിക്കാൻ ആഗ്രഹിക്കുന്ന ഒരു നായയെക്കുറിച്ച് ഒരു ചെറുകഥ എഴുതുക."],
    "si": ["පිහිනීමට ඉගෙන ගැනීමට කැමති බල්ලෙකු ගැන කෙටි කතාවක් ලියන්න."],
    "th": ["เขียนเรื่องสั้นเกี่ยวกับสุนัขที่อยากเรียนว่ายน้ำ"],
    "lo": ["ຂຽນເລື່ອງສັ້ນກ່ຽວກັບໝາທີ່ຢາກຮຽນລອຍນ້ຳ"],
    "km": ["សរសេររឿងខ្លីអំពីឆ្កែដែលចង់រៀនហែលទឹក"],
    "my": ["ရေကူးသင်ချင်တဲ့ခွေးအကြောင်း ဝတ္ထုတိုတစ်ပုဒ်ရေးပါ။"],
    "ka": ["დაწერე მოკლე მოთხრობა ძაღლზე, რომელსაც ცურვის სწავლა სურს."],
    "hy": ["Գրիր կարճ պատմություն մի շան մասին, որը ցանկանում է լողալ սովորել։"],
    "am": ["መዋኘት መማር ስለሚፈልግ ውሻ አጭር ታሪክ ጻፍ።"],
    "zh": ["写一个关于想学游泳的狗的短篇故事。", "請解釋為什麼天空是藍色的。",
           "用Python写一个函数，计算列表中所有偶数的和。"],
    "ja": ["泳ぎを習いたい犬についての短い物語を書いてください。", "明日の朝、友達と山に登ります。",
           "コンピュータの歴史"],
    "ko": ["수영을 배우고 싶어 하는 개에 대한 짧은 이야기를 써 주세요."],
}  # fmt: skip

NO_GUESS = [
    "", " \n", "12 + 34 = 46", "Red", "Oui", "да", "Gesundheit!", "🙂🙂🙂", "Paris, Berlin, Madrid, Roma",
    "Dr. Elena Rodriguez García", "x = [i * j for j in y]", "SELECT id, name FROM users;", "E = mc²",
    "C, F, G, A minor", "a: B, e: C, o: A, i: D", "Describe a company's mission",
    "v = s * z, s = v / z", "好", "한", "and the", "https://a.b/s/v/z/se/na/je",
    "Zebra quark fjord glyph waltz и не на что",
    "Madrid Sevilla Zaragoza Toledo Granada Bilbao Burgos Murcia Segovia Pamplona y los Ricardo Fernando Alberto",
    "Lorem ipsum dolor sit amet", "Привет means hello and спасибо means thank you",
    '<div class="a"><p id="b">1</p></div>', "kiitos - danke - merci - gracias - obrigado - grazie - tak",
]  # fmt: skip


@pytest.mark.parametrize("code", LANGUAGES)
def test_sentences_are_in_their_language(code):
    for sentence in SENTENCES[code]:
        assert guess_language(sentence) == code, sentence
    text = " ".join(SENTENCES[code])
    assert (
        guess_language(text)
        == guess_language(text.upper())
        == guess_language(f"1. **{text}**\n\n```\n2 + 2\n```")
        == code
    )


def test_as_many_letters_as_count_are_a_guess_in_a_script_of_one_language():
    for codes in SCRIPTS.values():
        if len(codes.split()) == 1:
            (code,) = codes.split()
            letters = [char for char in "".join(SENTENCES[code]) if char.isalpha()]
            letters = [char for char in letters if code != "ja" or find_script(char) == "KANA"]
            assert guess_language("".join(letters[:MIN_LETTERS])) == code
            assert guess_language("".join(letters[: MIN_LETTERS - 1]) + " 1") == ""


@pytest.mark.parametrize("text, code", [("の" + "山" * 9, "ja"), ("の" + "山" * 10, "zh")])
def test_a_tenth_of_kana_makes_han_letters_japanese(text, code):
    assert guess_language(text) == code


@pytest.mark.parametrize("text", NO_GUESS)
def test_no_clear_case_is_no_guess(text):
    assert guess_language(text) == ""


def test_the_mark_of_a_long_vowel_is_kana():
    assert {char: find_script(char) for char in "あアー漢a"} == {
        "あ": "KANA", "ア": "KANA", "ー": "KANA", "漢": "CJK", "a": "LATIN",
    }  # fmt: skip


def test_letters_with_separate_accents_are_the_same_letters():
    for code in ("vi", "cs", "pl", "ru"):
        assert guess_language(unicodedata.normalize("NFD", SENTENCES[code][0])) == code


def test_tables_speak_of_known_languages():
    assert set(WORDS) | set(LETTERS) <= set(LANGUAGES)
    assert sorted(code for codes in SCRIPTS.values() for code in codes.split()) == sorted(LANGUAGES)


def test_seed_tasks_are_english():
    rows = [json.loads(line) for line in (ROOT / "data_gen" / "seed_tasks.jsonl").read_text().splitlines()]
    guesses = [guess_language(row["instruction"]) for row in rows]
    assert set(guesses) <= {"en", ""} and guesses.count("") < 30


def test_many_rows_are_english():
    rows = alpaca_rows()
    assert {guess_language(row["instruction"]) for row in rows} <= {"en", ""}
    long = [guess_language(row["output"]) for row in rows if len(row["output"]) > 400]
    assert long.count("en") > 0.9 * len(long)


def test_a_language_must_lead_by_a_share_of_its_votes():
    lists = {code: words.split() for code, words in WORDS.items()}
    of = {
        code: [word for word in lists[code] if sum(word in words for words in lists.values()) == 1]
        for code in ("en", "de")
    }
    assert guess_language(" ".join(of["en"][:20] + of["de"][:16])) == "en"
    assert guess_language(" ".join(of["en"][:20] + of["de"][:18])) == ""


def test_only_the_beginning_is_looked_at():
    long = SENTENCES["de"][0] * 99 + "the " * 1_000_000
    assert guess_language(long) == "de"
    assert guess_language("the of and a " * SCAN + SENTENCES["de"][0]) == "en"
    assert measure_cpu_s(guess_language, long) < 10 * measure_cpu_s(guess_language, long[:SCAN]) + 0.2


@given(st.text(st.sampled_from("aasst's'1_. \n-"), max_size=30))
def test_words_of_ascii_are_those_of_any_text(text):
    """The faster way gives the same words, with and without the s of "dog's"."""
    assert split_ascii(text) == WORD.findall(text)


def test_another_language_is_the_guess_where_that_is_not_the_expected_one():
    """Texts of words of two languages, so few that a word decides, and of the shares of words that several list."""
    generator, others = random.Random(0), 0
    words = {code: [word for word in WORDS[code].split() if word.isascii()] for code in LATIN}
    for _ in range(3000):
        one, two = generator.sample(LATIN, 2)
        text = generator.choices(words[one], k=generator.randint(0, 5)) + generator.choices(words[two], k=3)
        text = " ".join([*text, *generator.choices(["https://the.and.of/to", "Ja.", "\u00fc", "\u0434\u0430"], k=1)])
        guess = guess_language(text)
        for expected in (one, two, "ru", "ja"):
            assert guess_other_language(text, expected) == ("" if guess == expected else guess), (text, expected)
        others += guess not in ("", one)
    assert others > 300


def test_votes_are_shares_of_a_unit_in_lanes_that_no_text_overflows():
    for table, votes in ((WORDS, WORD_VOTES), (LETTERS, LETTER_VOTES)):
        for entry, packed in votes.items():
            listed = [
                code for code, entries in table.items() if entry in (entries.split() if table is WORDS else entries)
            ]
            lanes = {code: packed >> BITS * i & 2**BITS - 1 for i, code in enumerate(CODES)}
            assert {code: n for code, n in lanes.items() if n} == dict.fromkeys(listed, UNIT // len(listed))
            assert UNIT % len(listed) == 0
            assert not entry.isascii() or set(listed) <= set(LATIN)  # so that the lanes of others can be left out
    assert CODES[: len(LATIN)] == LATIN and SCAN * UNIT < 2**BITS
