"""A pool of instruction tasks for tests: answer(seed, key, n) gives the n tasks that a model "writes" for a request.

Every task is {"instruction", "input", "output"} and depends on (seed, key, its number) alone. Instructions are patterns
(a|b) {slot} filled from vocabularies, so that by ROUGE-L F >= 0.7 about a sixth of 60,000 repeats an earlier one, as in
the output of a real model: it has favourites, which it gives again word for word or in slightly other words.
"""

import hashlib
import itertools
import json
import random
import re

FAVOURITES, FAVOURITE_SHARE = 3000, 0.16  # tasks that come again and again, and how often one of them does

WORDS = {
    "subject": "urban flooding|coral reefs|compound interest|sleep and memory|the printing press|volcanic soil|"
    "honeybees|wind turbines|the Silk Road|antibiotic resistance|jet streams|public libraries|bread fermentation|"
    "plate tectonics|carbon pricing|early photography|desert irrigation|language extinction|container shipping|the "
    "human heart|vaccines|minimum wages|satellite navigation|deforestation|jazz music|medieval guilds|optical "
    "illusions|soil erosion|electric buses|ocean currents|peer pressure|nuclear fusion|food labels|remote work|"
    "glaciers|urban beekeeping|the stock market|childhood obesity|bilingual education|solar eclipses|recycled "
    "plastic|folk tales|migraine|earthquake-proof buildings|online privacy|the Roman roads|gut bacteria|night "
    "shifts|tidal power|school uniforms|lithium batteries|the water cycle|dark matter|street art|invasive species|"
    "paper money|space debris|wool|traffic congestion|birdsong|inflation|wetlands|video game design|asthma|"
    "lighthouses|democracy in ancient Athens|machine translation|the moon landing|rice farming|stage fright|cheese "
    "making|coastal erosion|tea ceremonies|genetic testing|mountain rescue|microfinance|the violin|chess openings|"
    "noise pollution|hydrogen fuel|fireflies",
    "adj": "wooden|silver|ancient|fragile|woollen|copper|tropical|miniature|damaged|seasonal|foreign|painted|"
    "abandoned|wild|frozen|digital|marble|floating|local|rare|military|medical|plastic|hollow|edible|leather|"
    "modular|hidden|sacred|illegal|imported|striped|musical|portable|electric|ceramic|forgotten|migrating|paper|"
    "nocturnal|underground|royal|heavy|steam-powered|glass|knitted|municipal|feral|salted|mechanical|colonial|"
    "alpine|inflatable|magnetic|rusty|synthetic|domestic|prehistoric|velvet|luminous|historic|organic|borrowed|"
    "coastal|stolen|bamboo|tiny|concrete|pickled|archived|orphaned|experimental|wireless|muddy|satellite|dried|"
    "perfumed|collapsible|volcanic|public|(un|re|hand|pre|home)(painted|heated|washed|stitched|printed|polished|"
    "baked|sealed|woven|wired|glazed|packed|tuned|lit|mapped|priced|carved|dyed|bound|ripened|insured|inspected|"
    "labelled|watered|fermented)",
    "plural": "boats|maps|orchids|violins|tunnels|letters|clocks|bridges|wolves|carpets|coins|mushrooms|masks|bells|"
    "statues|engines|gardens|recipes|shoes|telescopes|castles|diaries|pigeons|contracts|batteries|barrels|candles|"
    "photographs|orchards|ladders|kitchens|sensors|puppets|rivers|stamps|caves|windows|helmets|goats|libraries|"
    "murals|seeds|sculptures|fences|lanterns|harbours|poems|passports|markets|towers|tractors|quilts|monuments|"
    "microscopes|ovens|parrots|pipelines|manuscripts|wagons|flutes|satellites|chimneys|fossils|fountains|robots|"
    "swamps|tapestries|trams|vineyards|whales|archives|baskets|canals|dictionaries|elevators|festivals|gloves|"
    "hospitals|islands|jewels|kiosks|lockers|magnets|nests|oysters|playgrounds|quarries|roofs|saddles|theatres|"
    "umbrellas|vans|wells|mirrors|bracelets|turbines|crops|newspapers|salaries|mortgages|surveys|rockets|prisons|"
    "elections|treaties|museums|podcasts|spreadsheets|allergies|dialects|ballads|(water|fire|moon|salt|snow|sea|"
    "sand|wood|stone|silk|corn|star|wind|rain|tin|iron|bone|frost|river|hill|marsh|lamp|drum|plum)(mills|birds|"
    "stones|flowers|boats|fish|houses|works|bells|cloths|worms|traps|lines|blocks|berries|gates|roots|sheds|rings|"
    "posts|hounds|shells)",
    "gerund": "restoring|painting|counting|importing|stealing|designing|selling|hiding|photographing|repairing|"
    "collecting|inheriting|cleaning|measuring|smuggling|describing|naming|auctioning|recycling|protecting|burying|"
    "building|copying|insuring|lending|banning|drawing|exhibiting|transporting|inventing|decorating|taxing|renting|"
    "mapping|weighing|studying|guarding|replacing|labelling|donating|comparing|heating|polishing|sharing|tracing|"
    "ordering|dismantling|filming|storing|dating|classifying|financing|carving|moving|teaching children about|"
    "writing about|dreaming of|campaigning for|paying for|losing|testing|numbering|advertising|cataloguing|"
    "reviewing|discovering|forging|(re|un|pre|out)(packing|loading|selling|wrapping|wiring|fitting|mounting|pricing|"
    "labelling|stacking|printing|cutting|placing|casting|filing|welding|folding|tuning|staging|buying)",
    "role": "nurse|plumber|violinist|bus driver|chemist|translator|carpenter|midwife|architect|shepherd|data "
    "analyst|chef|detective|sailor|tailor|park ranger|journalist|electrician|potter|referee|astronomer|postman|"
    "beekeeper|judge|dentist|florist|geologist|firefighter|librarian|magician|mayor|miner|novelist|optician|"
    "pharmacist|pilot|priest|barista|roofer|sculptor|senator|surgeon|taxi driver|farmer|zookeeper|cashier|bank "
    "clerk|baker|blacksmith|cartographer|clown|diver|fiddler|glassblower|historian|jeweller|locksmith|lifeguard|"
    "meteorologist|night guard|painter|puppeteer",
    "first": "Ingrid|Tomás|Aisha|Kenji|Olga|Mateus|Priya|Declan|Fatima|Henrik|Lucía|Samuel|Yara|Viktor|Amara|Jonas|"
    "Mei|Rashid|Clara|Emeka|Saskia|Bruno|Leila|Arthur|Noor|Pavel|Rosa|Hamish|Chiara|Dmitri|Zoë|Idris|Marta|Felix|"
    "Sunita|Oskar",
    "surname": "(Thorn|Black|Winter|Mar|Hol|Lind|Berg|Stein|Nord|Wood|Hart|Ros|Ald|Ken|Fair|Ost|Vand|Lam|Gar|"
    "Pick)(wick|man|son|sen|ström|berg|feld|mann|ley|ova|ez|well|er|ski|ard|ington|ett)",
    "trait": "weary|newly promoted|freelance|part-time|retired|self-taught|driven|forgetful|homesick|shy|curious|"
    "busy|sceptical|penniless|famous|short-sighted|blind|left-handed|French-speaking|generous|lazy|superstitious|"
    "grumpy|gifted|nervous|cheerful|stubborn|wealthy|young|lonely|clumsy|patient|vain|bilingual|careless|modern|"
    "rebellious",
    "aspect": "main causes|long-term effects|early history|likely future|hidden costs|basic science|economics|"
    "ethics|biggest myths|unexpected benefits|social impact|key terms|common misunderstandings|practical uses|"
    "regulation",
    "limit": "in (under|about|no more than) (40|50|60|80|100|120|150|200|250|300) words|in (two|three|four|five|"
    "six) (short|plain|vivid|polite|simple) (sentences|bullet points|paragraphs|steps)|without (using jargon|naming "
    "any brand|using the letter z|mentioning money|any adjectives|repeating a word|giving opinions)|in (a friendly|"
    "a formal|a cheerful|a neutral|a poetic|a humorous|a dramatic|a calm) (tone|voice|style)|(ending|starting|"
    "closing) with a (question|proverb|surprising fact|call to action|short summary|warning)|with (one|two|three) "
    "(concrete|everyday|historical|numerical|local) (examples|comparisons|figures|anecdotes)|as (a table|a numbered "
    "list|a dialogue|a timeline|a letter|a checklist|a tweet|question and answer pairs)",
    "object": "(second-hand|folding|solar-powered|hand-made|waterproof|voice-controlled|vintage|budget|child-safe|"
    "biodegradable|lightweight|noisy|self-cleaning|rented) (bicycle|backpack|coffee maker|desk lamp|tent|lunch box|"
    "watering can|rain jacket|bookshelf|toothbrush|wheelchair|drone|keyboard|sleeping bag|greenhouse|baby monitor|"
    "guitar|thermostat|suitcase|kettle|hearing aid|phone case|garden bench|alarm clock|water bottle|snow shovel|"
    "camera strap)",
    "business": "(family-run|mobile|web-based|struggling|student-owned|rural|late-night|vegan|newly opened) (bakery|"
    "bookshop|dog-grooming salon|bike workshop|language school|flower stall|gym|pizzeria|second-hand shop|pottery "
    "studio|cleaning service|travel agency|brewery|dance school|car wash|toy shop|barber's|museum café|farm stand|"
    "print shop)",
    "place": "Lisbon|Nairobi|Kyoto|rural Wales|Buenos Aires|the Scottish Highlands|Hanoi|Montreal|Cape Town|Tbilisi|"
    "northern Norway|Istanbul|Oaxaca|Vancouver Island|Marrakesh|Ljubljana|the Black Forest|Tasmania|Seoul|Cusco|"
    "Porto|Helsinki|Zanzibar|New Orleans|Sarajevo|Chiang Mai|the Azores|Detroit|Kraków|Jaipur|Galway|Valparaíso|"
    "Reykjavík|(Ash|Thorn|Kestrel|Mill|Birch|Raven|Winter|Marl|Had|Elms|Crow|Fern|Gold|Heron|Lang|Oak|Pem|Stan|Whit|"
    "Wren|Bram|Cald|Dun|East)(ford|wick|bridge|ton|bury|mouth|dale|combe|field|stead|holm|port|burgh|leigh|hurst|"
    "worth|well)",
    "event": "(surprise|garden|low-budget|last-minute|zero-waste|multilingual|rainy-day|charity) (birthday party|"
    "school fair|book launch|retirement dinner|neighbourhood clean-up|science night|wedding|board game evening|job "
    "fair|concert|team retreat|bake sale|film festival|reunion|graduation lunch|sports day|art auction|seed swap)",
    "dish": "(spicy|creamy|gluten-free|one-pot|smoky|cold|ten-minute|slow-cooked|festive) (lentil soup|mushroom "
    "risotto|fish curry|apple pie|bean stew|noodle salad|pancakes|chickpea wraps|roast vegetables|rice pudding|"
    "dumplings|omelette|pumpkin bread|potato gratin|tomato tart|fruit crumble|chilli|pasta bake|stuffed peppers|"
    "barley broth)",
    "habit": "waking up earlier|drinking more water|learning ten words a day|saving a little money|walking to work|"
    "keeping a diary|reading before bed|stretching at lunch|cooking at home|checking email less|meditating|"
    "practising the piano|tidying for five minutes|calling old friends|eating less sugar|going to bed on time|"
    "turning off notifications|planning the week|sitting up straight|thanking colleagues|cycling in winter",
    "problem": "a (leaking|blocked|squeaking|overheating|frozen|flickering|rattling|stained|jammed|cracked) "
    "(radiator|kitchen tap|laptop|washing machine|bicycle chain|ceiling light|window frame|printer|drain|door lock|"
    "oven|carpet|bathtub|refrigerator|garage door|wooden floor)|a (noisy|rude|forgetful|jealous|bossy|distant|"
    "stubborn) (neighbour|flatmate|colleague|client|cousin|manager|teammate|customer)",
    "code": "(reverses|validates|compresses|deduplicates|merges|sorts|counts|normalises|encrypts|parses|shuffles|"
    "groups) (a list of dates|email addresses|nested dictionaries|CSV rows|phone numbers|log lines|a binary tree|"
    "ISBN numbers|time intervals|file paths|playing cards|JSON records|colour codes|shopping carts|temperature "
    "readings|matrix columns|file names|IP addresses|Roman numerals|version strings)",
    "programming": "Python|JavaScript|Rust|Go|SQL|Ruby|Haskell|Bash|Java|C|Kotlin|R|Swift|TypeScript",
    "language": "Spanish|German|Japanese|Portuguese|Swahili|Polish|Korean|Italian|Finnish|Arabic|Turkish|Hindi|"
    "Greek|Dutch",
    "number": "3|4|5|6|7|8|9|12|14|15|18|24|25|30|36|40|45|48|60|72|75|80|90|96|110|125|144|150|180|240|360|365|500",
    "unit": "kilometres|litres|euros|pages|apples|minutes|bricks|tickets|kilograms|students|cups of flour|steps|"
    "photos",
    "few": "two|three|four|five|six|seven",
    "feeling": "lonely|hopeful|jealous|proud|nervous|grateful|bored|relieved|guilty|curious|homesick|furious|calm|"
    "nostalgic",
    "animal": "otter|hedgehog|barn owl|octopus|red fox|tortoise|hummingbird|snow leopard|honey badger|sea turtle|"
    "raven|chameleon|elephant|axolotl|moose|dolphin|gecko|penguin|camel|kingfisher|bat|salmon|lynx|wombat",
    "metaphor": "a river|an old clock|a crowded train|a garden|a lighthouse|a broken mirror|a marathon|a borrowed "
    "coat|a candle|a jigsaw puzzle|a bridge|a kite|a locked door|an orchestra|a compass|a shadow",
    "genre": "science fiction|mystery|fairy tale|western|ghost story|romantic comedy|fable|diary entry|radio play|"
    "haiku|limerick|sonnet|monologue|sea shanty|bedtime story|news report|movie trailer|folk song",
}  # fmt: skip

OPEN = """(Explain|Describe|Outline) the {aspect} of {doing} to {audience}
(Explain|Summarise) why {subject} should concern {person} who is {doing}
(List|Name|Give) {few} {aspect} of {things} that {audience} should know before {doing}
(Compare|Contrast) {subject} with {doing} from the viewpoint of {person}
What do {things}, {subject} and {things} have in common?
(Write|Compose|Draft) a {genre} about a {animal} and {person} who is {doing} in {place}
(Write|Invent|Tell) a {genre} set in {place} in which {person} finds {things}
(Write|Create) a short {genre} where a {feeling} {animal} meets {person} {doing}
(Suggest|Propose|Recommend) ways to market {things} and a {object} to {audience}
(Draft|Write) a product description for a {object} made from {things}, {limit}
(Come up with|Brainstorm) names for a {business} in {place} that sells {things} {extra}
(Write|Draft) a slogan for a {business} known for {doing}, {limit}
(Design|Plan) a {number}-day itinerary around {place} for {person} interested in {doing}
What should {person} pack for {few} weeks of {doing} in {place}?
(Plan|Organise|Budget) a {event} in {place} with {things} for {number} {roles}
(Write|Draft) an invitation to a {event} about {doing}, hosted by {person}
(Create|Write) a checklist for {person} who combines a {event} with {things} {extra}
(Give|Write) a recipe for {dish} as {person} from {place} would cook it {extra}
How can {person} turn {dish} into something worthy of a {event} {extra}?
Pair {dish} with music about {things} and justify it {limit}
(Advise|Coach) {person} on {habit} while {doing}
What makes {habit} harder for {person} than {doing}?
(Make|Design) a {number}-day plan for {habit}, rewarded by {things}, {limit}
(Explain|Tell me) how {person} would deal with {problem} {limit}
(Write|Draft) a polite message to {person} about {problem} and {things}
What could {doing} have to do with {problem}? Answer {limit}
Write {programming} code that {code} for a website about {things} {extra}
How would {person} test a {programming} program that {code}? Answer {limit}
(Model|Represent) {things} and {things} as {programming} classes for a {business}
A {role} loads {number} {plural} every {number} minutes; how many {plural} in {number} hours {doing}?
If {person} shares {number} {things} among {number} {roles}, how many are left over?
A {business} sold {number} {plural} and {number} {things}; what share were {plural}?
Write a metaphor that likens {doing} to {metaphor}, to be used by {person} {extra}
(Describe|Depict) {things} as if they were {metaphor}, {limit}
How might {person} cope with feeling {feeling} while {doing}?
(Write|Imagine) a dialogue between {person} and {person} about {things}
(Role-play|Act) as {person} and answer an interview question about {doing} {extra}
(Write|Prepare) interview questions on {things} for {person} applying to a {business} {extra}
(Argue|Make the case) for {doing} instead of {subject} in {place}
(Debate|Discuss) whether {doing} is worth it for {audience}, {limit}
Teach {audience} {language} words for {things}, {plural} and {plural}
How do you ask {person} about {doing} in {language}?
(List|Give) facts about {things} and {animal}s that surprise {audience}
What would happen to the {plural} of {place} if {person} stopped {doing}?
(Write|Draft) a press release in which a {business} announces {things} {extra}, {limit}
(Write|Draft) a complaint to a {business} about {things}, {limit}
(Rank|Order) {doing}, {doing} and {subject} by their {aspect}
(Write|Give) quiz questions on {things} and {subject} for {audience}
(Suggest|Pick) a gift under {number} euros for {person} who likes {doing}
(Write|Compose) a toast in which {person} thanks {roles} for {doing}
Which skills does {person} need for {doing} in {place}?
(Predict|Speculate) how {subject} will change {things} in {place} within {number} years
(Create|Write) a thesis statement linking {things} to {subject}, {limit}
(Give|Offer) feedback to {person} who has been {doing} for {number} days
(Define|Clarify) {few} terms from {doing} using {metaphor} as an image {extra}
Invent a riddle about {things} whose answer is a {object} {extra}, {limit}
What should {audience} ask before {doing} with a {object}?
(Write|Draft) a {genre} that explains {doing} by means of {metaphor} {extra}
Were {things} more important than {things} in the history of {place}?
(Sketch|Outline) a law on {doing} that {roles} in {place} could accept
How much should {person} charge for {things} at a {event} {extra}?
(Imagine|Describe) a museum of {things} run by {person} in {place}
Is {doing} ethical when {roles} need {things}? Discuss {limit}
(Write|Design) a lesson on {subject} that uses {things} and {things}
Why did {roles} of {place} give up {doing}?
(Give|List) rhymes for {plural} and use them in a {genre} about {person} {extra}"""

GIVEN = """paragraph: (Summarise|Condense|Shorten) the passage about {things} for {audience}
paragraph: (Rewrite|Rephrase) this text on {doing} {limit}
paragraph: (Identify|Find|State) the main claim about {doing} in the given text as {person} would {extra}
paragraph: (Write|Suggest) headlines for the article on {things} below, aimed at {audience} {doing}
paragraph: (Translate|Render) the text on {doing} into {language}, {limit}
paragraph: (Extract|Pull out) every number that the report on {things} in {place} mentions {extra}
paragraph: What question about {doing} does the passage leave open for {person} {extra}?
paragraph: Would {person} agree with the author about {things} {extra}? Answer {limit}
paragraph: (Turn|Convert) the notes on {doing} into a {genre} for {audience}
sentence: (Correct|Fix) the grammar of what {person} wrote about {things} {extra}
sentence: (Classify|Label) the mood of the line on {things} as {feeling} or {feeling} {extra}
sentence: (Continue|Finish) the story of {person} {doing} in {place}
sentence: Replace the verbs in the sentence so that it suits a {genre} about {things} {extra}
sentence: (Translate|Put) what {person} said about {doing} into {language}
review: Is this opinion of {things} from a {business} positive {extra}? Answer {limit}
review: (Reply|Respond) to this customer of a {business} as {person} would {extra}, {limit}
review: (Extract|List) the complaints about {things} that would worry {audience} {doing}
review: Rate the review of the {business} for {audience} {doing} and mention {things}
list: (Sort|Arrange) the items for {doing} at a {event} by price {extra}
list: Which of these would {person} not need for {doing}?
list: (Group|Categorise) the listed {things} so that {audience} {doing} can remember them
list: (Write|Make) a sentence about {place} and {things} with each item {extra}
email: (Shorten|Tighten) the email about {things} to {person} and make it sound {feeling} {extra}
email: (Write|Draft) a reply, {limit}, in which {person} declines {doing}
email: (List|Extract) the tasks that {person} sets for {roles} {doing}
code: (Explain|Describe) the {programming} snippet to {audience} by analogy with {doing}
code: (Find|Spot) the bug in code that {code} for {roles} {extra}
code: (Port|Rewrite) the snippet for {things} from {programming} to {programming} {extra}, {limit}
numbers: (Compute|Work out) the median number of {things} counted by {person} {extra}
numbers: Which reading by {person} {doing} is the outlier?
dialogue: (Summarise|Sum up) what {person} and the caller agree on about {things} {extra}
dialogue: Who in the conversation about {doing} is {feeling} {extra}? Explain {limit}"""

INPUTS = {
    "paragraph": "A (recent|small|long-running) study in {place} looked at {subject} over {number} months. The "
    "authors report that {habit} helped {number} of {number} participants, while the {aspect} of {subject} remained "
    "unclear.",
    "sentence": "The two of them, {person} and {person}, was walking near {place} and they has seen a {feeling} "
    "{animal} besides the {object}.",
    "review": "I bought the {object} from a {business} in {place}. It (broke|arrived late|works well|surprised me) "
    "after {number} days, and {person} at the desk was {feeling}. I would (not|gladly) buy it again for {number} "
    "euros.",
    "list": "{object} ({number} euros), {dish}, {object}, {metaphor}, {object} ({number} euros)",
    "email": "Hi, the {event} is on the {number}th and {person} still needs {number} {unit}. Please send {few} "
    "quotes from a {business} by Friday and call {person} about {problem}.",
    "code": "def process(items, limit={number}):\n    result = []\n    for i in range(len(items)):\n        if "
    "items[i] > limit:\n            result.append(items[i] * {number})\n    return result",
    "numbers": "{number}, {number}, {number}, {number}, {number}, {number}",
    "dialogue": "Caller: I have {problem} and a {event} tomorrow.\nAgent: We can send {person} within {number} "
    "minutes.\nCaller: I am {feeling}, but {number} euros is too much.\nAgent: Then let us say {number}.",
}  # fmt: skip

SAID = """(Most|Some|Many) people in {place} first meet {subject} through {habit}.
The {aspect} of {subject} can be seen in {metaphor}.
(Start|Begin) with {number} {unit} and adjust until it feels right.
A {object} helps, but it is not (essential|required).
{person} would (probably|certainly) put {subject} before {subject}.
(Remember|Note) that {habit} takes about {number} days to become routine.
(First|Next|Finally), check the {object} and write down what you see.
In short, {subject} and {subject} depend on each other.
One {business} in {place} (tried|tested|adopted) this and kept it.
(For example|For instance), {number} {unit} a week is a good target.
The {animal} shows the same pattern in the wild.
If you feel {feeling}, take a break and talk to {person}.
It works (best|well) with {dish} or something similar.
(However|Still), the {aspect} of {subject} should not be ignored."""

MACROS = {
    "{extra}": "for {audience} {doing}",
    "{doing}": "{gerund} {adj} {plural}",
    "{things}": "{adj} {plural}",
    "{person}": "(a {trait} {role}|{first} {surname})",
    "{audience}": "{trait} {role}s",
    "{roles}": "{role}s",
}
SLOT = re.compile(r"\{(\w+)\}")


def expanded(pattern):
    """Return every text of a pattern with (a|b) in it."""
    parts = re.split(r"\(([^()]*\|[^()]*)\)", pattern)
    choices = [part.split("|") if i % 2 else [part] for i, part in enumerate(parts)]
    return ["".join(words) for words in itertools.product(*choices)]


def alternatives(text):
    """Return every text of a|b (c|d)|e."""
    depth, parts = 0, [""]
    for letter in text:
        depth += (letter == "(") - (letter == ")")
        if letter == "|" and not depth:
            parts.append("")
        else:
            parts[-1] += letter
    return [text for part in parts for text in expanded(part)]


def compiled(patterns):
    """(format, vocabularies) of every text of every pattern, grouped by pattern so that each is as likely."""
    for name, text in MACROS.items():
        patterns = [pattern.replace(name, text) for pattern in patterns]
    return [
        [(SLOT.sub("%s", text), [VOCABULARY[name] for name in SLOT.findall(text)]) for text in expanded(pattern)]
        for pattern in patterns
    ]


def filled(groups, rng):
    group = groups[int(rng() * len(groups))]
    text, slots = group[int(rng() * len(group))]
    return text % tuple([words[int(rng() * len(words))] for words in slots])


def capital(text):
    return text[:1].upper() + text[1:]


VOCABULARY = {name: alternatives(words) for name, words in WORDS.items()}
OPEN_TASKS = compiled(OPEN.splitlines())
GIVEN_TASKS = [(line.partition(": ")[0], compiled([line.partition(": ")[2]])) for line in GIVEN.splitlines()]
INPUT_TEXTS = {kind: compiled([text]) for kind, text in INPUTS.items()}
SENTENCES = [capital(filled(compiled(SAID.splitlines()), random.Random(i).random)) for i in range(3000)]


def task(rng):
    """Return one task without a defect."""
    given = rng() < 0.4
    if given:
        kind, groups = GIVEN_TASKS[int(rng() * len(GIVEN_TASKS))]
    instruction = filled(groups if given else OPEN_TASKS, rng)
    instruction = capital(instruction) + ("" if instruction[-1] in ".?" else ".")
    text = filled(INPUT_TEXTS[kind], rng) if given else ""
    output = " ".join([SENTENCES[int(rng() * 3000)] for _ in range(1 + int(rng() * 8))])
    return {"instruction": instruction, "input": text, "output": output}


def favourite(rng):
    """Return a task that the model likes: equal each time, or with one word of its instruction added or left out."""
    item = task(random.Random(int(rng() * FAVOURITES)).random)
    if rng() < 0.7:
        words = item["instruction"].split(" ")
        place = 1 + int(rng() * (len(words) - 1))
        words[place : place + int(rng() * 2)] = [
            ("really", "short", "perhaps", "good", "carefully", "own")[int(rng() * 6)]
        ]
        item["instruction"] = " ".join(words)
    return item


def changed(**texts):
    """Return a defect that gives fields of a task other texts; a tuple of texts: one of them."""

    def defect(item, luck):
        for name, text in texts.items():
            text = text if isinstance(text, str) else text[int(luck * len(text))]
            item[name] = text.format(**item)

    return defect


DEFECTS = {
    "no-input marker": changed(input=("<noinput>", "No input required.", "N/A", "None", "(no input)", "n/a.")),
    "N/A output": changed(output=("N/A", "n/a", "Not applicable.", "<nooutput>", "-")),
    "empty output": changed(output=("", " ", "\n")),
    "input copied": changed(input="{output}"),
    "missing text": changed(
        input="",
        instruction=(
            "Summarise the following paragraph.",
            "Proofread the given text and correct its mistakes.",
            "Based on the passage below, answer: {instruction}",
            "Sort the following list of words by length.",
        ),
    ),
    "URL": changed(input=("https://www.coastnews.com/articles/2021/03", "See http://cityreports.org/waste.pdf")),
    "attachment": changed(
        input=("[attached image]", "<image>", "[Insert link to the article here]", "(see attachment)")
    ),
    "image task": changed(
        input="",
        instruction=(
            "Draw a logo for the business in this brief: {instruction}",
            "Paint a picture of a sunset over the sea.",
            "Create an infographic on this theme: {instruction}",
            "Record a short video in which you do this: {instruction}",
        ),
    ),
    "refusal": changed(
        output=(
            "I'm sorry, but as an AI language model I cannot do that.",
            "I apologize, but I can't assist with that request.",
            "As an AI, I do not have personal experiences or opinions.",
        )
    ),
    "merged example": changed(
        output=(
            "{output}\n\n###\n12. Instruction: Name three colours.\n12. Input:\n<noinput>\n12. Output:\nRed, blue.",
            "{output}\nInstruction: List two rivers.\nOutput: The Nile and the Rhine.",
        )
    ),
    "placeholder": changed(output=("[Your answer here]", "Dear [Name],\n\n[Insert text]\n\nSincerely,\n[Your Name]")),
    "too short": changed(instruction=("Explain.", "Go on", "Translate:")),
    "odd start": changed(instruction=("- {instruction}", "»{instruction}«", "3. {instruction}", "* {instruction}")),
    "instruction repeated": changed(output="{instruction}"),
    "unfinished": changed(output="{output} And the last reason is that the"),
}


def answer(seed, key, n=20, defects=0.1):
    """Return the first n tasks for the key; `defects` is the share that is given one defect."""
    digest = hashlib.blake2b(json.dumps([seed, key]).encode(), digest_size=8).digest()
    rng = random.Random(int.from_bytes(digest, "big")).random
    items = []
    for _ in range(n):
        item = favourite(rng) if rng() < FAVOURITE_SHARE else task(rng)
        which, luck, spoilt = int(rng() * len(DEFECTS)), rng(), rng() < defects
        if spoilt:
            list(DEFECTS.values())[which](item, luck)
        items.append(item)
    return items
