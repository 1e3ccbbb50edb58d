"""Which words of an instruction say how long its answer is to be?

By what they ask for. `PRIOR` is what an answer has more, or less, in logarithms of tokens, before
anything is learned: our guess, which training and then every finished answer correct.
"""

# By cue: the prior, then words and pairs of words.
_CUES: dict[str, tuple[float, str]] = {
    "one word": (-2.0, "one word,single word,one number,single number,one letter,yes or,true or"),
    "one sentence": (
        -1.0,
        "one sentence,single sentence,one line,single line,one phrase,headline,title,slogan,"
        "tagline,tweet,motto,caption,haiku,liner,name for",
    ),
    "brief": (
        -0.6,
        "brief,briefly,short,shortly,concise,concisely,succinct,succinctly,tl,tldr,quick,quickly,"
        "simple answer,few words,terse,minimal,only the,just the",
    ),
    "few": (-0.4, "two sentences,three sentences,few sentences,couple of,two lines,few lines"),
    "classify": (
        -1.3,
        "classify,categorize,categorise,category,label,sentiment,identify,detect,determine,choose,"
        "select,pick,odd one,rate the,which of,multiple choice,is this,part of",
    ),
    "fill": (-1.6, "fill in,blank,blanks,complete the,_,missing"),
    "fact": (
        -0.9,
        "who is,who was,who wrote,who invented,when is,when was,when did,where is,where was,"
        "how many,how much,how old,how far,how tall,what year,capital of,calculate,compute,"
        "convert,solve,synonym,synonyms,antonym,antonyms,spell,define,plural,rhyme,rhymes,"
        "find the,translate",
    ),
    "edit": (
        -0.6,
        "rewrite,rephrase,paraphrase,edit,correct,proofread,fix,punctuation,reword,transform,"
        "change the,replace,rearrange,reorder,sort,format,capitalize,simplify",
    ),
    "extract": (-0.8, "extract,keyword,keywords,main topic,main idea"),
    "summary": (-0.3, "summary,summarize,summarise,summarizing,key points,gist"),
    "list": (
        0.1,
        "list,bullet,bullets,brainstorm,suggest,recommend,ideas,ways,tips,example,examples,"
        "reasons,generate a,name some",
    ),
    "explain": (
        0.6,
        "explain,describe,discuss,compare,contrast,how do,how does,how can,how could,how to,why,"
        "benefits,advantages,disadvantages,causes,effects,differences,analyze,analyse,evaluate,"
        "outline,elaborate,pros,cons,impact",
    ),
    "compose": (
        0.8,
        "story,poem,letter,email,speech,script,dialogue,conversation,song,lyrics,review,blog,"
        "narrative,diary,monologue,scene,imagine",
    ),
    "long": (
        1.1,
        "essay,article,report,comprehensive,detailed,detail,details,depth,thorough,thoroughly,"
        "extensive,extensively,long,complete guide,step by,tutorial,chapter,plan,proposal,"
        "itinerary,curriculum,paper,guide,recipe,strategy,documentation,exhaustive,exhaustively,"
        "design an,develop a",
    ),
    "code": (
        0.0,
        "python,java,javascript,typescript,php,ruby,sql,html,css,bash,shell,function,code,"
        "program,algorithm,class,query,regex,rust,golang",
    ),
    "format": (0.0, "json,yaml,xml,csv,table,markdown,schema"),
}
CUES = tuple(_CUES)
# Cue's number by word or pair of words.
LEXICON: dict[str, int] = {
    phrase: number
    for number, (_, phrases) in enumerate(_CUES.values())
    for phrase in phrases.split(",")
}
# "3 examples", "500 words": tokens of one of each, about.
UNITS: dict[str, float] = {
    "word": 1.3,
    "sentence": 25.0,
    "paragraph": 110.0,
    "page": 600.0,
    "line": 14.0,
    "item": 12.0,
    "example": 30.0,
    "idea": 20.0,
    "way": 35.0,
    "bullet": 25.0,
    "point": 30.0,
    "step": 30.0,
    "question": 18.0,
    "tip": 30.0,
    "reason": 35.0,
    "fact": 30.0,
    "chapter": 800.0,
}
UNITS |= {f"{unit}s": tokens for unit, tokens in UNITS.items()}
NUMBERS = {
    name: number
    for number, name in enumerate(
        ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"], start=1
    )
}
NUMBERS |= {"a": 1, "an": 1, "twenty": 20, "hundred": 100}

# Features below this number have a meaning of their own; hashes of words come after them.
FIRST_ASKED = 32  # so many tokens are asked for: 2^n
FIRST_SIZE = 48  # characters of the instruction: 2^n
FIRST_LINES = 64  # lines of it
FIRST_OPTION = 72
FIRST_WORD = 96
OPTIONS = (
    "question",
    "json",
    "tools",
    "stop",
    "greedy",
    "hot",
    "low effort",
    "high effort",
    "not Latin",
    "code block",
    "second turn",
    "later turn",
    "system prompt",
)


def prior() -> dict[int, float]:
    """Return what features weigh before anything is learned, logarithms of tokens, by number."""
    weights = {number: each[0] for number, each in enumerate(_CUES.values())}
    # Twice as much asked for is twice as much, about, around the usual 75 tokens.
    weights |= {FIRST_ASKED + bits: 0.5 * (bits - 6.2) for bits in range(14)}
    weights[FIRST_OPTION + OPTIONS.index("question")] = -0.3
    weights[FIRST_OPTION + OPTIONS.index("low effort")] = -0.5
    weights[FIRST_OPTION + OPTIONS.index("high effort")] = 0.5
    return weights
