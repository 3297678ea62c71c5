"""The built-in toy tasks: arithmetic, invented facts and list programs, made from a seed as FlowSteer-Dataset records.

Item i of a source depends on (source, i, seed) alone, so that the first k of n are the same for any n. Every text opens
with its kind and level ("[math, level 2] "): a workflow can be fitted to the difficulty by reading the question.
meta["distractors"] holds wrong answers of the right form for the simulated executor: integers, other names of the text,
programs that lack one stage. Use them through tasks.toy_tasks(source, n, seed) or `python tasks.py toy toy_code -n 3`.
"""

import random

LEVELS = 4

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


def toy_records(source: str, n: int, seed: int) -> list[dict]:
    """Return items 0..n-1 of a toy source in FlowSteer-Dataset's schema."""
    kind, records = source.removeprefix("toy_"), []
    for i in range(n):
        rng = random.Random(f"{seed}/{source}/{i}")  # a string seeds by its SHA-512, the same in every process
        level = rng.randint(1, LEVELS)
        text, truth, meta = MAKERS[source](rng, level)
        record = {"problem": f"[{kind}, level {level}] {text}", "ground_truth": truth, "source": source}
        meta = {"task_id": f"{source}-{seed}-{i}", "level": level, **meta}
        records.append({**record, "problem_type": kind, "meta": meta})
    return records


def _math(rng: random.Random, level: int) -> tuple[str, str, dict]:
    """Return level + 1 steps of integer arithmetic as a story, a recipe, a chain of names or an expression."""
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
    wrong = [str(value) for value in dict.fromkeys(wrong) if value != answer]
    text = rng.choice((_story, _recipe, _names, _expression))(rng, values[0], steps)
    return text, str(answer), {"distractors": wrong[:4]}


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


def _program(name: str, lines: list[str]) -> str:
    return "\n    ".join([f"def {name}(nums):", *lines]) + "\n"


def _outputs(name: str, program: str, inputs: list[list[int]]) -> list[object]:
    """Run a program made of the constants above (nothing from outside) on copies of the inputs."""
    namespace: dict = {}
    exec(program, namespace)
    return [namespace[name](list(given)) for given in inputs]


MAKERS = {"toy_math": _math, "toy_qa": _qa, "toy_code": _code}  # source -> (text, ground truth, meta) of a level
