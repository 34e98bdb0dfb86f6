"""Word lists of English instructions, for finding a verb and its object without a parser."""


def split_words(text: str) -> frozenset[str]:
    """Return the words of a text."""
    return frozenset(text.split())


VERBS = split_words(
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
# Verbs that take their object through a word of LINKS, such as "with". Other verbs have no direct object before one.
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
QUESTIONS = split_words(
    "what which who whom whose when where why how is are was were do does did has have should would"
)
STOPS = QUESTIONS | split_words(
    """i you he she it we they me us him them himself herself itself themselves yourself can could will may might must
    be been being am had if and or but nor that than then because since while although though so as at by for
    from in into of off on onto out over to under up with without within about above across after against along
    among around before behind below between beyond during except inside like near per regarding through
    throughout toward towards until upon via versus vs not there here please only also too let let's's e.g i.e
    etc using containing including"""
)
SKIPPED = split_words(
    """a an the this that these those my your our their his her its some any all each every both either neither no one
    two three four five six seven eight nine ten eleven twelve fifteen twenty thirty fifty hundred several many
    few more most other another such what which whose me us him them"""
)
PLURAL_ONLY = split_words(
    """physics mathematics economics politics statistics ethics lyrics genetics athletics linguistics electronics
    logistics mechanics aesthetics basics robotics thanks means headquarters"""
)
CONTAINERS = split_words(
    """list set number series couple pair variety range collection type kind sort form piece group bit lot plenty
    selection amount handful bunch dozen"""
)
ADJECTIVES = split_words(
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
GERUND_NOUNS = split_words(
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
