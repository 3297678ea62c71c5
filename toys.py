"""The built-in toy tasks: arithmetic, invented facts and list programs, made from a seed as FlowSteer-Dataset records.

Three sources are for training, four (OOD) for asking whether what was learned on them carries over: other texts, other
forms of answer (a letter, a program that reads stdin), harder levels, a kind of task that was never seen (choice).
Item i of a source depends on (source, i, seed) alone, so that the first k of n are the same for any n. Every text opens
with its kind and level ("[math, level 2] "): a workflow can be fitted to the difficulty by reading the question.
meta["distractors"] holds wrong answers of the right form for the simulated executor: integers, other names of the text,
programs that lack one stage. Use them through tasks.toy_tasks(source, n, seed) or `python tasks.py toy toy_code -n 3`.
"""

import random

TOY_SOURCES = ("toy_math", "toy_qa", "toy_code")  # that are trained on
# Their canvas, for a policy that is too small to read descriptions: names only, short feedback, short episodes.
TOY_CANVAS = {"max_turns": 12, "feedback_chars": 200, "problem_chars": 600, "brief": True}
LEVELS = 4
OOD = {"toy_aime": "math", "toy_mathqa": "choice", "toy_open_qa": "qa", "toy_stdin_code": "code"}  # source -> kind
LOWEST = {"toy_aime": 3}  # level; elsewhere 1

# A step of a story: operation, number, words. {n} is the number.
STORY = {
    "+": ("buys {n} more", "finds {n} more", "is given {n}", "makes {n} new ones"),
    "-": ("gives away {n}", "loses {n}", "sells {n}", "throws out {n}"),
    "*": ("swaps each for {n}", "trades each for {n}", "gets {n} in place of each"),
    "/": ("keeps 1 in {n}", "trades every {n} for 1", "swaps each {n} for 1"),
}
RECIPE = {"+": "add {n}", "-": "subtract {n}", "*": "multiply by {n}", "/": "divide by {n}"}
APPLY = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__, "/": int.__floordiv__}
ITEMS = ("marbles", "coins", "shells", "stamps", "apples", "cards", "beads", "pens", "tickets", "buttons", "plums")

# Every name is one word: a wrong one shares no token with the right one, so that its F1 is 0.
NAMES = {
    "person": ("Ada", "Bela", "Cora", "Dario", "Edda", "Finn", "Greta", "Hugo", "Ines", "Jonas", "Kira", "Leo", "Mira"),
    "town": ("Arlen", "Brevik", "Calder", "Dunmoor", "Elsted", "Farrow", "Grimsel", "Harnby", "Istra", "Kelm"),
    "river": ("Abel", "Brune", "Cassa", "Dree", "Esk", "Fenn", "Gorse", "Hask", "Ilme", "Jura", "Lorn", "Moss", "Nidd"),
    "job": ("baker", "carpenter", "doctor", "farmer", "gardener", "lawyer", "miller", "nurse", "painter", "tailor"),
}
RELATIONS = (  # from, to, fact, phrase
    ("person", "town", "{a} lives in {b}.", "the home town of {a}"),
    ("person", "job", "{a} works as a {b}.", "the job of {a}"),
    ("person", "person", "The best friend of {a} is {b}.", "the best friend of {a}"),
    ("town", "river", "{a} lies on the {b}.", "the river at {a}"),
    ("town", "person", "The mayor of {a} is {b}.", "the mayor of {a}"),
    ("river", "river", "The {a} flows into the {b}.", "the river that takes in {a}"),
)

# Stages of a program: words, expression of nums. {k} is a parameter.
STAGES = (
    ("keeps the even ones", "[x for x in nums if x % 2 == 0]"),
    ("keeps the odd ones", "[x for x in nums if x % 2 == 1]"),
    ("keeps those above {k}", "[x for x in nums if x > {k}]"),
    ("drops multiples of {k}", "[x for x in nums if x % {k} != 0]"),
    ("adds {k} to each", "[x + {k} for x in nums]"),
    ("multiplies each by {k}", "[x * {k} for x in nums]"),
    ("squares each", "[x * x for x in nums]"),
    ("turns negatives into 0", "[max(x, 0) for x in nums]"),
    ("takes absolute values", "[abs(x) for x in nums]"),
    ("reverses the order", "nums[::-1]"),
    ("sorts them ascending", "sorted(nums)"),
    ("sorts them descending", "sorted(nums, reverse=True)"),
    ("drops later repeats", "list(dict.fromkeys(nums))"),
    ("keeps the first {k}", "nums[:{k}]"),
    ("drops the first {k}", "nums[{k}:]"),
    ("keeps the 1st, 3rd, 5th, ...", "nums[::2]"),
    ("replaces each by the running sum", "[sum(nums[: i + 1]) for i in range(len(nums))]"),
    ("appends their number", "nums + [len(nums)]"),
)
RESULTS = (
    ("their sum", "sum(nums)"),
    ("the largest (0 if none)", "max(nums, default=0)"),
    ("the smallest (0 if none)", "min(nums, default=0)"),
    ("how many are left", "len(nums)"),
    ("the last (0 if none)", "nums[-1] if nums else 0"),
    ("first minus last (0 if none)", "nums[0] - nums[-1] if nums else 0"),
)
VERBS = ("blend", "carve", "distil", "fold", "gather", "hone", "knead", "mend", "mould", "polish", "refine", "weave")
EDGES = ([], [0], [-3, -1, -2], [5, 5, 5])

# ---- out of distribution: nothing below is in a task of the three sources above
TANK = {
    "+": ("{n} litres are poured in", "rain adds {n} litres"),
    "-": ("{n} litres leak out", "{n} litres evaporate"),
    "*": ("it is filled up to {n} times as much",),
    "/": ("all but one part in {n} is drained",),
}
# A world of open questions: what it says stands in no text. Names are a stem and the ending of their kind, one word each.
STEMS = ("Bal", "Cor", "Dun", "Fal", "Gar", "Hol", "Jor", "Kel", "Lam", "Mor", "Nor", "Pel", "Quen", "Ros", "Sal", "Tor")
ENDINGS = {"country": ("avia", "onia"), "capital": ("burg", "ford"), "lake": ("mere", "water"), "writer": ("wick", "son"),
           "novel": ("ling", "more")}
OPEN_RELATIONS = (  # from, to, phrase
    ("country", "capital", "the capital of {a}"),
    ("country", "writer", "the national poet of {a}"),
    ("capital", "lake", "the lake beside {a}"),
    ("capital", "writer", "the writer born in {a}"),
    ("writer", "novel", "the first novel by {a}"),
    ("lake", "country", "the country around {a}"),
)
# Stages of a program that reads words.
WORD_STAGES = (
    ("reverses every word", "[w[::-1] for w in words]"),
    ("keeps words of more than {k} letters", "[w for w in words if len(w) > {k}]"),
    ("drops later repeats", "list(dict.fromkeys(words))"),
    ("sorts them alphabetically", "sorted(words)"),
    ("sorts them by length", "sorted(words, key=len)"),
    ("cuts every word to {k} letters", "[w[:{k}] for w in words]"),
    ("writes them in capitals", "[w.upper() for w in words]"),
    ("drops the first {k}", "words[{k}:]"),
    ("reverses their order", "words[::-1]"),
    ("doubles the last letter of each", "[w + w[-1] for w in words]"),
    ("drops words with an a", "[w for w in words if 'a' not in w.lower()]"),
)
WORD_RESULTS = (
    ("how many are left", "len(words)"),
    ("how many letters they have", "sum(map(len, words))"),
    ("the first letters as one word", "''.join(w[0] for w in words)"),
)
WORD_LINE = (("the words, joined by blanks", "' '.join(words)"),)
LINES = ("", "Zebra bb a bb apple")  # few: each case is a process


def toy_records(source: str, n: int, seed: int) -> list[dict]:
    """Return items 0..n-1 of a toy source in FlowSteer-Dataset's schema."""
    kind, records = OOD.get(source, source.removeprefix("toy_")), []
    for i in range(n):
        rng = random.Random(f"{seed}/{source}/{i}")  # a string seeds by its SHA-512, the same in every process
        level = rng.randint(LOWEST.get(source, 1), LEVELS)
        text, truth, meta = MAKERS[source](rng, level)
        record = {"problem": f"[{kind}, level {level}] {text}", "ground_truth": truth, "source": source}
        meta = {"task_id": f"{source}-{seed}-{i}", "level": level, **meta}
        records.append({**record, "problem_type": kind, "meta": meta})
    return records


def _math(rng: random.Random, level: int) -> tuple[str, str, dict]:
    """Return level + 1 steps of integer arithmetic as a story, a recipe, a chain of names or an expression."""
    start, steps, answer, wrong = _chain(rng, level)
    text = rng.choice((_story, _recipe, _names, _expression))(rng, start, steps)
    return text, str(answer), {"distractors": [str(value) for value in wrong[:4]]}


def _chain(rng: random.Random, level: int) -> tuple[int, list[tuple[str, int]], int, list[int]]:
    """Return start, steps, result and at least four wrong results of level + 1 steps of integer arithmetic."""
    values, steps = [rng.randint(4, 20 + 10 * level)], []
    for _ in range(level + 1):
        value = values[-1]
        divisors = [d for d in (2, 3, 4, 5) if value % d == 0 and value > d]
        symbol = rng.choice("+" + "-" * (value > 5) + "*" * (value < 80) + "/" * bool(divisors))
        upper = {"+": 10 + 10 * level, "-": value - 2, "*": 5, "/": 0}[symbol]
        number = rng.choice(divisors) if symbol == "/" else rng.randint(2, upper)
        steps.append((symbol, number))
        values.append(APPLY[symbol](value, number))
    before, answer = values[-2:]
    wrong = (before, answer + 1, answer - number, answer - 1, answer + 10, 2 * answer)
    return values[0], steps, answer, [value for value in dict.fromkeys(wrong) if value != answer]


def _story(rng: random.Random, start: int, steps: list[tuple[str, int]]) -> str:
    name, item = rng.choice(NAMES["person"]), rng.choice(ITEMS)
    told = ", then ".join(rng.choice(STORY[symbol]).format(n=number) for symbol, number in steps)
    return f"{name} has {start} {item}, {told}. How many {item} are there now?"


def _recipe(rng: random.Random, start: int, steps: list[tuple[str, int]]) -> str:
    told = ", ".join(RECIPE[symbol].format(n=number) for symbol, number in steps)
    asked = rng.choice(("What is the result?", "What number do you get?", "Which number comes out?"))
    return f"Start with {start}, {told}. {asked}"


def _names(rng: random.Random, start: int, steps: list[tuple[str, int]]) -> str:
    names = rng.choice(("abcdef", "uvwxyz", "pqrstu"))
    told = "".join(f", {names[i + 1]} = {names[i]} {symbol} {number}" for i, (symbol, number) in enumerate(steps))
    return f"Let {names[0]} = {start}{told}. What is {names[len(steps)]}?"


def _expression(rng: random.Random, start: int, steps: list[tuple[str, int]]) -> str:
    text, last = str(start), ""
    for symbol, number in steps:
        text = f"({text})" if symbol in "*/" and last in ("+", "-") else text
        text, last = f"{text} {symbol} {number}", symbol
    return rng.choice(("Compute {}.", "What is {}?", "Find the value of {}.")).format(text)


def _qa(rng: random.Random, level: int) -> tuple[str, list[str], dict]:
    """Return level + 2 facts in random order and a question of min(level, 3) hops over them."""
    hops = min(level, 3)
    unused = {kind: rng.sample(names, len(names)) for kind, names in NAMES.items()}
    kind = rng.choice(("person", "person", "town", "river")) if level == 1 else "person"
    here = unused[kind].pop()
    phrase = f"the {here}" if kind == "river" else here
    path, facts, mentioned = [], [], [(kind, here)]
    for hop in range(level + 2):
        if hop < hops:  # only the last hop may end in a job: nothing leads on from there
            ways = [each for each in RELATIONS if each[0] == kind and (hop == hops - 1 or each[1] != "job")]
            path.append(rng.choice(ways))
            start = here
        else:  # facts about others; the first is of the kind asked for, so that a wrong answer of that kind exists
            start = None
        relation = path[hop] if hop < hops else path[-1] if hop == hops else rng.choice(RELATIONS)
        start = start or unused[relation[0]].pop()
        end = unused[relation[1]].pop()
        facts.append(relation[2].format(a=start, b=end))
        mentioned += [(relation[0], start), (relation[1], end)]
        if hop < hops:
            kind, here, phrase = relation[1], end, relation[3].format(a=phrase)
    rng.shuffle(facts)
    wrong = sorted({each for each in mentioned if each[1] != here}, key=lambda each: (each[0] != kind, each))
    answers = {"river": [f"the {here}", here], "job": [here, f"a {here}"]}.get(kind, [here])
    question = f"{'Who' if kind == 'person' else 'What'} is {phrase}?"
    return f"{' '.join(facts)} {question}", answers, {"distractors": [name for _, name in wrong[:4]]}


def _code(rng: random.Random, level: int) -> tuple[str, str, dict]:
    """Return a program of `level` stages over a list of integers; leaving out any stage fails a hidden test."""
    name = rng.choice(VERBS)
    inputs = [[rng.randint(-6, 14) for _ in range(rng.randint(4, 8))] for _ in range(6)]
    public, hidden = inputs[:2], [*EDGES, *inputs[2:]]
    while True:  # most draws pass
        result = rng.choice(RESULTS) if level > 1 and rng.random() < 0.6 else ("the list", "nums")
        drawn = rng.sample(STAGES, level - (result[1] != "nums"))
        stages = [(words.format(k=k), code.format(k=k)) for words, code in drawn for k in [rng.randint(2, 4)]]
        body = [f"nums = {code}" for _, code in stages]
        reference = _program(name, [*body, f"return {result[1]}"])
        wrong = [_program(name, [*body[:i], *body[i + 1 :], f"return {result[1]}"]) for i in range(len(body))]
        wrong += [_program(name, [*body, "return nums"])] * (result[1] != "nums")
        wanted = _outputs(name, reference, hidden)
        if len(set(map(str, wanted))) > 2 and all(_outputs(name, program, hidden) != wanted for program in wrong):
            break
    told = ", then ".join(words for words, _ in stages)
    text = f"Write a function `{name}(nums)` that takes integers, {told} and returns {result[0]}."
    shown = _asserts(name, public, _outputs(name, reference, public))
    tests = {"entry_point": name, "test": _asserts(name, hidden, wanted), "public_tests": shown}
    return text, reference, {**tests, "distractors": wrong}


def _asserts(name: str, inputs: list[list[int]], outputs: list[object]) -> str:
    return "\n".join(f"assert {name}({given}) == {wanted}" for given, wanted in zip(inputs, outputs, strict=True))


def _program(name: str, lines: list[str], given: str = "nums") -> str:
    return "\n    ".join([f"def {name}({given}):", *lines]) + "\n"


def _outputs(name: str, program: str, inputs: list[list]) -> list[object]:
    """Run a program made of the constants above (nothing from outside) on copies of the inputs."""
    namespace: dict = {}
    exec(program, namespace)
    return [namespace[name](list(given)) for given in inputs]


# ---- out of distribution


def _aime(rng: random.Random, level: int) -> tuple[str, str, dict]:
    """Return a question of number theory whose numbers grow with the level; the answer is an integer from 0 to 999."""
    a, b, m = rng.randint(3, 9), rng.randint(2 + level, 8 + 2 * level), rng.randint(7, 20 * level)
    n, k = rng.randint(100, 200 * level), rng.randint(3, 9)
    text, answer = rng.choice((
        (f"Find the remainder when {a}^{b} + {n} is divided by {m}.", (a**b + n) % m),
        (f"Find the number of positive divisors of {n}.", sum(n % d == 0 for d in range(1, n + 1))),
        (f"How many positive integers up to {n} are multiples of {a} or of {a + k}?",
         sum(i % a == 0 or i % (a + k) == 0 for i in range(1, n + 1))),
        (f"Find the sum of the digits of {a}^{b}.", sum(map(int, str(a**b)))),
        (f"How many positive integers up to {n} have digits whose sum is {k}?",
         sum(sum(map(int, str(i))) == k for i in range(1, n + 1))),
        (f"Find the number of pairs of positive integers x < y with x * y = {n * k}.",
         sum(n * k % d == 0 and d * d < n * k for d in range(1, n * k))),
    ))
    wrong = [value for value in (answer + 1, answer - 1, answer + 2, 2 * answer + 3, answer + 10) if value >= 0]
    return text, str(answer), {"distractors": [str(value) for value in wrong[:4]]}


def _mathqa(rng: random.Random, level: int) -> tuple[str, str, dict]:
    """Return level + 1 steps of arithmetic about a tank with five options; the answer is a letter."""
    start, steps, answer, wrong = _chain(rng, level)
    told = ", then ".join(rng.choice(TANK[symbol]).format(n=number) for symbol, number in steps)
    values = rng.sample(options := [answer, *wrong[:4]], len(options))
    shown = ", ".join(f"{letter}) {value}" for letter, value in zip("abcde", values, strict=False))
    gold = "abcde"[values.index(answer)]
    text = f"A tank holds {start} litres; {told}. How many litres does it hold then? Options: {shown}"
    return text, gold, {"distractors": rng.sample(others := [c for c in "abcde"[:len(values)] if c != gold], len(others))}


def _open_qa(rng: random.Random, level: int) -> tuple[str, list[str], dict]:
    """Return a question of min(level, 3) hops whose facts stand nowhere: one fixed world, the same for every seed."""
    world, names = random.Random("open world"), {kind: [s + e for s in STEMS for e in ENDINGS[kind]] for kind in ENDINGS}
    facts = [dict(zip(names[a], world.sample(names[b], len(names[b])), strict=True)) for a, b, _ in OPEN_RELATIONS]
    kind = rng.choice(("country", "capital", "writer", "lake") if level == 1 else ("country", "lake"))
    here = rng.choice(names[kind])
    phrase = here
    for hop in range(hops := min(level, 3)):  # only the last hop may end in a novel: nothing leads on from there
        ways = [i for i, each in enumerate(OPEN_RELATIONS) if each[0] == kind and (hop == hops - 1 or
                any(each[1] == later[0] and (hop == hops - 2 or later[1] != "novel") for later in OPEN_RELATIONS))]
        way = rng.choice(ways)
        kind, here, phrase = OPEN_RELATIONS[way][1], facts[way][here], OPEN_RELATIONS[way][2].format(a=phrase)
    asked = rng.choice(("{who} is {phrase}?", "Name {phrase}.", "Do you know {phrase}?"))
    answers = [f"Lake {here}", here] if kind == "lake" else [here]
    wrong = rng.sample([name for name in names[kind] if name != here], 4)
    return asked.format(who="Who" if kind == "writer" else "What", phrase=phrase), answers, {"distractors": wrong}


def _stdin_code(rng: random.Random, level: int) -> tuple[str, str, dict]:
    """Return a program of `level` stages that reads a line of words and prints; leaving out any stage fails a test."""
    letters = "aabcdeeilmnorst"
    drawn = [" ".join("".join(rng.choices(letters, k=rng.randint(1, 6))) for _ in range(rng.randint(3, 7))) for _ in range(3)]
    public, hidden = drawn[:1], [*LINES, *drawn[1:]]
    while True:  # most draws pass
        result = rng.choice(WORD_RESULTS if level > 1 and rng.random() < 0.6 else WORD_LINE)
        told = [(words.format(k=k), code.format(k=k)) for words, code in rng.sample(WORD_STAGES, level)
                for k in [rng.randint(1, 3)]]
        body = [f"words = {code}" for _, code in told]

        def outputs(lines: list[str], inputs: list[str], end: str = f"return {result[1]}") -> list[str]:
            program = _program("solve", [*lines, end], "words")
            return [str(value) for value in _outputs("solve", program, [line.split() for line in inputs])]

        wanted = outputs(body, hidden)
        if len(set(wanted)) > 2 and all(outputs(body[:i] + body[i + 1:], hidden) != wanted for i in range(level)):
            break
    program = "\n".join(["words = input().split()", *body, f"print({result[1]})\n"])
    text = f"Write a program that reads words from one line of standard input, {', then '.join(words for words, _ in told)} " \
           f"and prints {result[0]}."
    cases = [[{"input": line + "\n", "output": value + "\n"} for line, value in zip(lines, outputs(body, lines), strict=True)]
             for lines in (hidden, public)]
    return text, program, {"test": cases[0], "public_tests": cases[1]}


MAKERS = {"toy_math": _math, "toy_qa": _qa, "toy_code": _code,  # source -> (text, ground truth, meta) of a level
          "toy_aime": _aime, "toy_mathqa": _mathqa, "toy_open_qa": _open_qa, "toy_stdin_code": _stdin_code}
