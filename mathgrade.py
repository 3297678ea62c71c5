"""Are two answers to a math question the same? From any thread, in bounded time.

Most answers are settled here, by comparing strings and exact numbers. The others go to math-verify, which bounds its
time with SIGALRM: that works in a main thread only, and without it `9^{9^{9^9}}` freezes the whole process, since the
power holds the GIL. So math-verify lives in worker processes, one line of JSON each way. They are plain children
(`python mathgrade.py`), no multiprocessing pool: a spawned pool imports the caller's __main__ again in each worker (for
train.py that is torch) and breaks in scripts without a __main__ guard.

A worker has two clocks. A signal ends a comparison after LIMIT seconds of processor time, so that a busy machine fails
nobody; a watchdog thread in C, which needs no GIL, ends the worker after WATCHDOG seconds of any kind. So a caller
waits for a bounded time, and a bad answer hurts no other.
"""

import atexit
import faulthandler
import json
import logging
import os
import queue
import re
import signal
import subprocess
import sys
import unicodedata
from fractions import Fraction

LIMIT = 5.0  # seconds of processor time for one comparison; the median is 10 milliseconds
WATCHDOG = 60.0  # seconds on the clock, the import of math-verify included
WORKERS = min(4, os.cpu_count() or 1)
MEMORY = 2 << 30  # bytes of address space of a worker; math-verify needs 0.1 GB
# A worker evaluates text that a model wrote: it gets no environment variable that could hold a credential.
ENVIRONMENT = ("PATH", "HOME", "LANG", "PYTHONPATH", "LD_LIBRARY_PATH")


class VerifierError(RuntimeError):
    """The verifier did not answer (time limit, crash, not installed): this says nothing about the answer."""


# ------------------------------------------------------------------------------------------------- what was answered
ANSWER_CHARS = 2000  # of an answer that are looked at: its end, where the result is
_DOLLARS = re.compile(r"(?<!\\)\$(?!\s)((?:[^$\\]|\\.)+?)(?<!\s)\$(?!\d)|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL)
_SAID = re.compile(r".*\banswer\b(?:\s+is\b)?\s*[:=]?\s*(.*[^\s.!*].*)", re.IGNORECASE)  # greedy: the last one in a line
_HOPE = re.compile(r"\s*I hope it is correct\.?\s*$")  # how Minerva's examples for MATH end


def math_answer(text: str) -> str:
    r"""Return the result in an answer.

    That is the last balanced \boxed{}, or what follows the last ####, or X of `answer is X` in the last line, or the
    last $..$, or the whole text; X may hold a $..$ in turn. Dollars enclose math as in pandoc, without a blank inside
    or a digit behind: "$5 and $7" are prices.
    """
    text = _HOPE.sub("", text[-ANSWER_CHARS:].strip())
    box = last_box(text)
    if box is not None:
        return box
    if "####" in text:
        return text.rpartition("####")[2].strip().partition("\n")[0]
    if said := _SAID.match(text.rpartition("\n")[2]):
        text = said[1]
    if enclosed := _DOLLARS.findall(text):
        text = "".join(enclosed[-1])
    return text.strip("* \n").rstrip(".").strip("* \n")


def last_box(text: str) -> str | None:
    r"""Return what is in the last balanced \boxed{} or \fbox{}, or follows the last "\boxed " up to a dollar."""
    for match in reversed(list(re.finditer(r"\\(?:boxed|fbox)(?:\s*(\{)|\s+(?=[^\s{]))", text))):
        box = _closed(text, match.end()) if match[1] else re.match(r"[^$\n]*", text[match.end():])[0]
        if box is not None:
            return box.strip()
    return None


def _closed(text: str, start: int, brackets: str = "{}") -> str | None:
    """Return what stands between the bracket before `start` and the one that closes it, None if none does."""
    depth = 1
    for i in range(start, len(text)):
        if text[i] in brackets and text[i - 1 : i] != "\\":
            depth += 1 if text[i] == brackets[0] else -1
        if depth == 0:
            return text[start:i]
    return None


# -------------------------------------------------------------------------------------------------- strings and numbers
_TEXT = r"\\(?:text|mbox|mathrm|textrm|textbf)\s*\{([^{}]*)\}"


def _braced(match: re.Match) -> str:
    return "\\frac" + "".join(f"{{{part.strip('{}')}}}" for part in match.groups())


_SPELLINGS = (
    (r"[€£¥₹]|(?<![A-Za-z])(?:USD|EUR|GBP)(?![A-Za-z])|\\(?:euro|pounds)(?![A-Za-z])", ""),
    (r"\\(?:left|right|displaystyle)(?![A-Za-z])|(?<!\\)\\[,;:! ]", ""),
    (r"~|\\quad(?![A-Za-z])", " "),
    (r"\\[dtc]?frac\s*(\{[^{}]*\}|\d)\s*(\{[^{}]*\}|\d)", _braced),
    (r"\^\s*\{?\s*\\circ\s*\}?|°", ""),
    (r"\{,\}", ","),
    (r"\\\$|\$(?=[\d.])", ""),
    (r"\\%|\bper ?cent\b", "%"),
    (r"(?<=[\d.])\s*(?:\\times|\\cdot|\*)\s*10\s*\^\s*(?:\{\s*([+-]?\d{1,3})\s*\}|([+-]?\d{1,3}))$", r"e\1\2"),
)
# Characters for which LaTeX has a name, and the many dashes that are meant as a minus.
_SIGNS = {"−": "-", "‐": "-", "‑": "-", "‒": "-", "–": "-", "﹣": "-", "-": "-", "∞": r"\infty ", "∪": r"\cup ", "∩": r"\cap ",
          "π": r"\pi ", "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "÷": "/", "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ",
          "±": r"\pm ", "∅": r"\emptyset ", "∈": r"\in ", "θ": r"\theta ", "²": "^2", "³": "^3", "\u00a0": " ", "\u202f": " ",
          "\u2009": " "}
_UNIT = re.compile(rf"(?<=[\d}}%])\s*{_TEXT}(?:\^\{{?\d\}}?)?$")
_NO_UNIT = ("and|or|half|dozen|hundred|thousand|million|billion|trillion|pi|sqrt|mod|times|plus|minus|over|"
            "is|are|was|not|to|if|but|than|vs|because|since")
_POWER = r"(?:\^\{?\d\}?)?"
_WORDS = re.compile(
    rf"(?<=\d)(?: (?!(?:{_NO_UNIT})\b)(?:[A-Za-z]{{2,}}{_POWER}|[A-Za-z]+{_POWER}/[A-Za-z]+{_POWER})){{1,3}}$"
    rf"|(?<=\d) ?(?:[kcm]m|[km]?g|m[lL]|mph|ft|lbs?|oz|hrs?|mins?|secs?){_POWER}$|(?<=\d) ?m\^\{{?[23]\}}?$"
)
_BASED = re.compile(r"(-?[0-9A-F]+)_\{?([0-9]+)\}?")
_REPEATING = re.compile(r"([+-]?)\s*([0-9]*)\.([0-9]*)\\overline\s*\{\s*([0-9]+)\s*\}")
_DECIMAL = r"(?:[0-9]{1,3}(?:[, ][0-9]{3})+(?:\.[0-9]*)?|[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]{1,3})?"
_NUMBER = re.compile(
    r"(?P<sign>[+-]?)\s*(?:(?P<whole>[0-9]+)(?:\s*(?=\\)|\s+(?=[0-9]+/)))?"
    rf"(?:\\frac\{{\s*(?P<a>[+-]?{_DECIMAL})\s*\}}\{{\s*(?P<b>[+-]?{_DECIMAL})\s*\}}"
    rf"|(?P<c>{_DECIMAL})\s*/\s*(?P<d>{_DECIMAL})|(?P<e>{_DECIMAL}))\s*(?P<percent>%?)"
)


def _signs(text: str) -> str:
    """Turn signs that LaTeX has names for into LaTeX, and ½ into 1/2."""
    text = re.sub(r"√\s*(\d+|[A-Za-z])", r"\\sqrt{\1}", text).replace("√", "sqrt")
    text = re.sub("[¼-¾⅐-⅞]", lambda match: " " + unicodedata.normalize("NFKC", match[0]).replace("⁄", "/"), text)
    return "".join(_SIGNS.get(char, char) for char in text).replace("\\varnothing", "\\emptyset")


def _spell(text: str) -> str:
    """Choose one of the ways to write the same thing."""
    text = _signs(text)
    for pattern, new in _SPELLINGS:
        text = re.sub(pattern, new, text)
    return text.strip()


def number(text: str) -> set[Fraction]:
    r"""Return the values that a plain number can mean, none if the text is not one.

    Plain: integer, decimal, a/b, \frac, mixed number; with sign, thousands commas, `x =` or `m + n =`, currency, degrees, a
    unit in \text{} or up to three words behind it; 1.5 \times 10^3 and 0.\overline{3} are plain as well. 50% means 50 or
    1/2 (Hendrycks' MATH drops the sign, math-verify divides).
    """
    text = _spell(re.sub(r"^\s*[A-Za-z](?:\s*\+\s*[A-Za-z])*\s*=", "", text))
    if match := _REPEATING.fullmatch(text):
        sign, whole, fixed, cycle = match.groups()
        value = Fraction(int(whole + fixed + cycle) - int((whole + fixed) or 0), (10 ** len(cycle) - 1) * 10 ** len(fixed))
        return {-value if sign == "-" else value}
    match = _NUMBER.fullmatch(_WORDS.sub("", _UNIT.sub("", text)).strip())
    if not match:
        return set()
    top = next(Fraction(re.sub("[, ]", "", match[name])) for name in "ace" if match[name])
    bottom = next((Fraction(re.sub("[, ]", "", match[name])) for name in "bd" if match[name]), Fraction(1))
    if bottom == 0:
        return set()
    value = (Fraction(match["whole"] or 0) + top / bottom) * (-1 if match["sign"] == "-" else 1)
    return {value, value / 100} if match["percent"] else {value}


def _plain(text: str) -> str:
    r"""Return a text without \text and blanks; a blank between digits stays, 2 1/2 is not 21/2."""
    return re.sub(r"(?<!\d)\s+|\s+(?!\d)", "", re.sub(_TEXT, r"\1", _spell(text))).rstrip(".")


# --------------------------------------------------------------------------------------------------------- equivalence
def same_math(gold: str, answer: str) -> bool:
    """Compare two results: as strings, as exact numbers, at last by math-verify. Raises VerifierError.

    Digits to a base, 1010_2, need the same digits, and the same base if the answer names one.
    A gold number is matched by a number alone: not by a calculation that gives it (the question may hold one to copy)
    and not by prose around it. A gold word is matched by that word (math-verify takes east = seat for a product). An
    answer with more `=` than `name =` or the gold result has is a list of guesses. Otherwise math-verify decides, with
    decimals equal to six places.
    """
    gold, answer = _signs(math_answer(gold)), _signs(math_answer(answer))
    plain_gold, plain_answer = _plain(gold), _plain(answer)
    if plain_gold == plain_answer:
        return bool(plain_gold)
    if based := _BASED.fullmatch(plain_gold):  # math-verify reads over the base
        other = _BASED.fullmatch(plain_answer)
        return other.groups() == based.groups() if other else plain_answer == based[1]
    if values := number(gold):
        return bool(values & number(answer))
    if re.fullmatch(r"[A-Za-z]{3,}", plain_gold):
        return plain_gold.casefold() == plain_answer.casefold()
    if "," in gold and "=" not in gold and len(set(re.findall(r"([a-z])\s*=", answer))) == 1:  # x = 1 or x = 2
        answer = re.sub(r"(^|,|\b(?:or|and)\b)\s*[a-z]\s*=", r"\1 ", answer)
    named = re.match(r"[A-Za-z](_\w+|\([a-z]\))?=", plain_answer) is not None
    equations = [len(re.findall(r"(?<![<>!])=", text)) for text in (gold, answer)]
    if equations[1] > max(equations[0], named) or _closed(answer + "}", 0) != answer:  # the last: balanced braces
        return False
    return equal(to_latex(gold), to_latex(answer))


def to_latex(text: str) -> str:
    """Turn Python and sympy text into LaTeX: `**`, `*`, sqrt(), pi, oo, I, function names. LaTeX stays as it is."""
    text = text.replace("**", "^")
    if "\\" not in text:
        text = re.sub(r"(?<=\d)j\b", "i", text)
        text = re.sub(r"(?<![A-Za-z])I(?![A-Za-z])", "i", re.sub(r"\boo\b", r"\\infty ", text))
    while match := re.search(r"(?<![\\A-Za-z])sqrt\s*\(", text):
        inner = _closed(text, match.end(), "()")
        inner = text[match.end() :] if inner is None else inner
        text = f"{text[: match.start()]}\\sqrt{{{inner}}}{text[match.end() + len(inner) + 1 :]}"
    text = re.sub(r"(?<![\\A-Za-z])(pi|sin|cos|tan|log|ln|exp)(?![A-Za-z])", r"\\\1 ", text)
    text = re.sub(r"(?<=\d)\s*\*\s*(?=[A-Za-z\\(])", "", text)  # 2i and not 2 i, which math-verify takes for a name
    return re.sub(r"\s*\*\s*(?=[A-Za-z\\(])", " ", text).replace("*", r"\cdot ")


# --------------------------------------------------------------------------------------------------- asking a worker
_running: set[subprocess.Popen] = set()
_idle: queue.LifoQueue = queue.LifoQueue()  # workers to be used next; None is one that is not started yet
for _ in range(WORKERS):
    _idle.put(None)


def equal(gold: str, answer: str) -> bool:
    """Return whether math-verify holds two LaTeX expressions for equal; one that does not parse equals nothing.

    Waits for a free worker, then at most WATCHDOG seconds. Raises VerifierError.
    """
    worker, reply = _idle.get(), ""
    try:
        if worker is None or worker.poll() is not None:
            worker = _start()
        try:
            worker.stdin.write(json.dumps([gold, answer]) + "\n")
            worker.stdin.flush()
            reply = worker.stdout.readline()
        except OSError as error:
            raise VerifierError(f"math-verify's process is gone: {error}") from error
    finally:
        if worker is not None and not reply.endswith("\n"):  # died, or we were interrupted: its state is unknown
            _stop(worker)
            worker = None
        _idle.put(worker)
    if not reply.endswith("\n"):
        raise VerifierError(f"math-verify crashed or hung on {answer!r:.80}")
    verdict = json.loads(reply)
    if isinstance(verdict, str):
        raise VerifierError(f"{verdict} on {answer!r:.80}")
    return verdict


def _start() -> subprocess.Popen:
    worker = subprocess.Popen(
        [sys.executable, os.path.abspath(__file__)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={name: os.environ[name] for name in ENVIRONMENT if name in os.environ},
        start_new_session=True,  # Ctrl-C is for the caller
    )
    _running.add(worker)
    return worker


def _stop(worker: subprocess.Popen) -> None:
    _running.discard(worker)
    worker.kill()
    worker.wait()
    worker.stdin.close()
    worker.stdout.close()


@atexit.register
def _kill_all() -> None:
    """No worker outlives us. After SIGKILL, which runs no handler, each one ends when it finds its stdin closed."""
    for worker in list(_running):
        worker.kill()


# ---------------------------------------------------------------------------------------------------- inside a worker
class _Expired(BaseException):
    """Time is up. Not an Exception, so that math-verify's own handlers let it pass."""


def _expire(number: int, frame: object) -> None:
    raise _Expired


def _compare(gold: str, answer: str) -> bool | str:
    """Return the verdict, or the name of what stopped us."""
    faulthandler.dump_traceback_later(WATCHDOG, exit=True)
    try:
        from math_verify import LatexExtractionConfig, parse, verify  # 1 s the first time

        # LaTeX only: where it does not parse, math-verify's other reading takes some number in the text.
        latex = [LatexExtractionConfig()]
        signal.setitimer(signal.ITIMER_PROF, LIMIT)
        parsed = [parse(f"\\boxed{{{text}}}", latex, parsing_timeout=None) for text in (gold, answer)]
        return bool(verify(*parsed, timeout_seconds=None))
    except _Expired:
        return f"math-verify needed more than {LIMIT:g} s"
    except MemoryError:
        return "math-verify ran out of memory"
    except ImportError as error:
        return f"math-verify cannot be imported ({error}); pip install 'math-verify[antlr4_13_2]'"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        faulthandler.cancel_dump_traceback_later()


def _serve() -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    signal.signal(signal.SIGPROF, _expire)
    logging.disable()
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints must not pass for a reply
    for line in sys.stdin:
        print(json.dumps(_compare(*json.loads(line))), file=replies, flush=True)


if __name__ == "__main__":
    _serve()
