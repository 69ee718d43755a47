"""Fuzz the grader: a million hostile completions through every reward, the answer extraction and the behaviour metrics.

    python benchmarks/fuzz_grader.py --count 1000000 --processes 2

Four kinds, made from a seed: soups of fragments (broken tags, LaTeX, HTML, control characters, halves of surrogate
pairs, digits of other scripts); long repeats of one fragment; near-misses, which look like the gold answer and must
not be accepted (other numbers, and words that make it another number); equivalents, which must be (units, money, LaTeX,
Markdown, sentences). What is checked: nothing raises, no near-miss is accepted and no equivalent
refused, a soup is only accepted if a second, cruder reading of its answer block finds the gold number too, and nothing
takes more than 5 ms for each 10 kB begun. The exit code is 1 if anything fails.

Left out on purpose: fuzzing guided by coverage; golds that are no numbers (tests/test_evaluator.py has them).
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # the worker processes are forked

import argparse
import multiprocessing
import random
import re
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import evaluator

CHUNK = 5_000  # cases of one seed
BUDGET = 0.005  # seconds of processor time for each 10,000 characters begun
WEIGHTS = dict.fromkeys(evaluator.REWARDS, 1.0)


@dataclass
class Case:
    kind: str
    text: str
    gold: str
    tags: str
    accuracy: bool | None = None  # what it must be; None: not known
    format: bool | None = None


# ---------------------------------------------------------------- numbers, and ways to write them


def make_gold(rng) -> Fraction:
    """Integers of one to twelve digits, a few of them negative or with decimals."""
    number = Fraction(rng.randrange(10 ** rng.randint(1, 12)))
    if rng.random() < 0.2:
        number /= 10 ** rng.randint(1, 4)
    return -number if rng.random() < 0.15 else number


def plain(number: Fraction) -> str:
    """Its decimal digits: 18, -3, 0.25. The denominator must divide a power of ten."""
    places = next(n for n in range(20) if number * 10**n == int(number * 10**n))
    digits = str(abs(int(number * 10**places))).rjust(places + 1, "0")
    text = digits[: len(digits) - places] + ("." + digits[len(digits) - places :] if places else "")
    return "-" * (number < 0) + text


LABELS = ["x = ", "x=", "Answer: ", "The answer = ", "Total cost = ", "Answer:\n", "total: ", "The answer is: "]
LABELS += ["Number of eggs: ", r"\text{Total: }", "Tom's total = "]
SENTENCES = ["The answer is ", "So, the answer is ", "Tom has ", "She earns ", "There are ", "x is ", "#### "]
UNITS = [" dollars", " km/h", " apples", " percent", "%", r"\%", " %", " per hour", " eggs a day", r"\text{ dollars}"]
UNITS += ["cm", " m^2", " m²", r" \text{ m}^{2}", "°", r"^\circ", " °C", " square feet", " sq. ft.", " eggs (in total)"]
UNITS += [
    r"\,\text{cm}",
    r"~\mathrm{kg}",
    r"\;\textrm{ml}",
    "/hour",
    ", dollars",
    " more red marbles",
    " cups of flour",
]
UNITS += [
    " people in total",
    " times a day",
    " years old",
    " dollars left",
    " pairs of shoes",
    " miles per hour",
    " each",
]
CURRENCIES = ["$", r"\$", "$ ", "€", "£", "¥", "₹ ", "US$", "USD ", "A$"]
WRAPPERS = ["**{}**", "`{}`", "({})", "${}$", r"\({}\)", r"\[{}\]", r"\boxed{{{}}}", "**\n{}\n**", "$$ {} $$"]
WRAPPERS += ["*{}*", "__{}__", '"{}"', "'{}'", "“{}”", r"\textbf{{{}}}", r"\mathrm{{{}}}", r"\left({}\right)"]
AROUND_THE_NUMBER = ["**{}**", "*{}*", r"\boxed{{{}}}", r"\textbf{{{}}}", '"{}"', "`{}`", "${}$", r"\({}\)"]
THOUSANDS = [",", "{,}", r"\,", "\u00a0", "\u2009", "\u202f", "'", r",\!"]
SPACES = ["", "", "", " ", "\n", "\t", "\r\n", "\u00a0", "\u3000", " \n "]


def write_fraction(rng, size: Fraction) -> str:
    """One of the ways to write it as a fraction or a mixed number."""
    factor = rng.randint(1, 12)
    whole, rest = divmod(size.numerator, size.denominator)
    top, bottom = size.numerator * factor, size.denominator * factor
    forms = [f"{top}/{bottom}", *(rf"\{name}{{{top}}}{{{bottom}}}" for name in ("frac", "dfrac", "tfrac"))]
    if top < 10 and bottom < 10:
        forms.append(rf"\frac{top}{bottom}")
    if whole and rest:
        top = rest * factor
        forms += [f"{whole} {top}/{bottom}", rf"{whole}\frac{{{top}}}{{{bottom}}}"]
    if Fraction(rest, size.denominator) == Fraction(1, 2):
        forms.append(f"{whole or ''}½")
    return rng.choice(forms)


def write(rng, number: Fraction) -> str:
    """One of the many ways to write the number that the grader must read."""
    size, form = abs(number), rng.randrange(5)
    whole, _, decimals = plain(size).partition(".")
    if form == 0:
        text = write_fraction(rng, size)
    else:
        if form == 1 and len(whole) > 3:
            whole = f"{int(whole):,}".replace(",", rng.choice(THOUSANDS))
        elif form == 2:
            whole = "0" * rng.randint(1, 3) + whole
        elif form == 3 and whole == "0" and decimals:
            whole = ""
        decimals += "0" * rng.choice([0, 0, 0, 1, 2, 5])
        text = whole + ("." + decimals if decimals else "")
    sign = rng.choice(["-", "−", "–", "- "]) if number < 0 else rng.choice(["", "", "", "+"])
    money = rng.random()
    if money < 0.3:
        text = sign + rng.choice(CURRENCIES) + text
    elif money < 0.4:
        text = sign + text + rng.choice(["€", " €", "£", "$"])
    else:
        text = sign + text
    unit = rng.choice(UNITS) if rng.random() < 0.5 and not 0.3 <= money < 0.4 else ""
    layers = rng.choice([0, 0, 0, 1, 1, 2, 3])
    if layers == 0 and money > 0.4 and unit[:1] == " " and unit != " %" and rng.random() < 0.3:
        text = rng.choice(AROUND_THE_NUMBER).format(text)
    text += unit + rng.choice(["", "", "."])
    if layers == 0 and rng.random() < 0.3:
        text = rng.choice(SENTENCES) + text
    for _ in range(layers):
        layer = rng.choice([*WRAPPERS, *(label.replace("{", "{{").replace("}", "}}") + "{}" for label in LABELS)])
        text = layer.format(text)
    if layers == 0 and rng.random() < 0.1:
        text = rng.choice(["**Answer:** ", "**Final answer**: "]) + text
    text = rng.choice(SPACES) + text + rng.choice(SPACES)
    return text if len(text.strip()) <= evaluator.MAX_ANSWER_CHARS else plain(number)


def other_number(rng, number: Fraction) -> Fraction:
    """Near in value, or in its digits; never equal."""
    n, whole = abs(number), str(int(abs(number)))
    others = [
        number + rng.choice([-1, 1]) * Fraction(10) ** rng.randint(-9, 3),
        number * Fraction(10) ** rng.choice([-3, -1, 1, 2, 3]), -number, n + int(n) + 1, Fraction(int(n) // 10),
        Fraction(number.numerator * 10 + rng.randrange(10)), Fraction("".join(rng.sample(whole, len(whole)))),
    ]  # fmt: skip
    return next((other for other in rng.sample(others, len(others)) if other != number), number + 1)


OTHER_DIGITS = [
    {ord("0") + d: chr(zero + d) for d in range(10)} for zero in (0x660, 0x966, 0xFF10, 0x2080, 0x1D7CE)
]  # Arabic-Indic, Devanagari, full-width, subscript, mathematical bold
TWO = [" or ", ", ", " and ", "\n", "; ", " ", " - ", "±", "=", " = ", " to ", " | ", " / ", "–", " vs ", "->", "\x00"]
MORE_THAN_A_NUMBER = [
    "{}!", "{}^1", "{}e0", "{}e999999999", "{}**1", "{}_0", "0x{}", "{}j", "{}k", "{} k", "int('{}')", "={}", "--{}",
    "+-{}", "{}..", ",{}", "{},", "#{}", "≈{}", "> {}", "x != {}", "x1 = {}", "{} thousand", "{} Million",
    "{} dozen", "{} squared", "{} and a half", "{} or nineteen", "{} plus two", "{} x", "[{}]", "{{{}}}", "<b>{}</b>",
    "{}<br>", "({}", "{})", "**{}", "{}**", "\\boxed{{{}", "\\text{{1}}{}", "\\frac{{{}}}", "1/0 {}", "{}/0",
    "{}²", "⑱{}", "\u202e{}", "{}\ud800", "{}\x00", "{} if 1 else 0", "__import__('os').system('echo {}')",
    "${{{}}}", "{}%%", "{} 😀", "{} " + "very " * 30, "{} a b c d e", "not {} but more", "Answer: {}: {}", "{}, {}",
    "{} {}", "1 {}", "{}(1)",
]  # fmt: skip
CHANGING_BEHIND = (
    "halves|thirds|tenths|hundredths|point five|percent of twenty|% of twenty|lakh|crore|divided by two"
    "|times two|over two|less two|plus two|doubled|tripled|squared|cubed|score|gross|pi|i|n|y|x|M|bn|mln"
    "|million|k dollars|thousand people|dozen eggs|nineteen|maybe nineteen|but perhaps nineteen|is wrong"
    "|unless nineteen|more|more than twenty|fewer|less|short|below zero|degrees below zero|years ago"
    "|hundred|hundred dollars|per hundred|out of twenty|of twenty|times more|times the price"
    "|and fifty cents|dollars in debt|zorbs|to nineteen|minus|root two|in binary|万|万 元|million people"
    "|m people|for two|by two|minutes to six|eggs, hens|eggs and hens|eggs times two|square|recurring"
).split("|")
CHANGING_BEFORE = (
    "not = |not |not equal to: |minus x = |half of it = |half of |Twice the answer: |negative: |negative "
    "|minus |wrong: |wrong answer: |The answer is not |The answer is about |The answer is half of |about "
    "|less than |more than |at least |at most |approximately |The wrong answer is |x squared = "
    "|square root of x = |a x = |x y = |ten x = |dozens: |thousands = |in lakhs: |Nobody has "
    "|There are no |x ≠ |x > |x + 1 = |-x = |2x = |Answer: not |x = half of |The first answer is "
    "|part of the answer: |Tom has about |Tom has twice |If x = |log x = |two times |incorrect: "
).split("|")


def near_miss(rng, number: Fraction) -> str:
    """An answer that has to do with the number and does not state it, or not alone."""
    digits, kind = plain(number), rng.randrange(8)
    if kind == 0:
        return write(rng, other_number(rng, number))
    if kind == 1:
        pair = [digits, plain(abs(other_number(rng, number)))]
        rng.shuffle(pair)
        return rng.choice(TWO).join(pair)
    if kind == 2:
        return digits.translate(rng.choice(OTHER_DIGITS))
    if kind == 3 and len(digits.lstrip("-")) > 1 and "." not in digits:
        place = rng.randrange(1 + (number < 0), len(digits))
        strange = rng.choice([" ", "_", "\u200b", "\x00", "\u00ad", "٬", "\ud800", "·", "\n", "<b>", ", ", "."])
        return digits[:place] + strange + digits[place:]
    if kind == 4:
        a = rng.randint(1, 99)
        return rng.choice([f"{plain(number - a)}+{a}", f"{plain(number + a)} - {a}", f"{digits}*1", f"{digits}×1"])
    if kind == 5:
        space = rng.choice([" ", " ", r"~", r"\ "])
        return rng.choice(["", "", "$"]) + digits + space + rng.choice(CHANGING_BEHIND) + rng.choice(["", "."])
    if kind == 6:
        return rng.choice(CHANGING_BEFORE) + rng.choice(["", "$"]) + digits + rng.choice(["", " dollars", "."])
    return rng.choice(MORE_THAN_A_NUMBER).format(digits, digits)


# ---------------------------------------------------------------- completions

WORDS = "we have so then he pays wait check 9+9=18 each of them but the rest is wrong recheck\n".split(" ")
FRAGMENTS = [
    "<reasoning>", "</reasoning>", "<answer>", "</answer>", "<think>", "</think>", "<reasoning>", "</reasoning>",
    "<answer>", "</answer>", "<reasoning", "reasoning>", "</ answer>", "<Answer>", "<answer/>", "<<answer>>",
    "< answer >", "&lt;answer&gt;", "<answer id=1>", "</answer", "<answ\x00er>", "<answ\u200ber>", "<ａnswer>",
    "\\boxed{", "}", "{", "\\frac{1}{2}", "\\frac{", "\\text{18}", "$", "$$", "\\(", "\\)", "(", ")", "**", "`", "```",
    "18", "-18", "1,8", "1e9999", "9" * 120, "0x12", "٣", "１８", "²", "½", "Ⅻ", "NaN", "inf", "1/0", "-", "−", ".",
    ",",
    "/", "%", "=", ":", "x = ", "Answer: ", " ", "\n", "\t", "\r", "\x00", "\x1b[31m", "\x85", "\u2028", "\ufeff",
    "\u202e", "\ud800", "\udfff", "😀", "e\u0301\u0301\u0301", "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>", "<!--", "-->", "]]>", "{{7*7}}", "__import__('os')", "'; DROP TABLE answers; --",
    "%s%n", "wait, ", "recheck ", "check again ", "go over the steps ",
]  # fmt: skip


def blocks(tags: str, reasoning: str, answer: str, between: str = "\n") -> str:
    """A completion in the asked-for form."""
    open_reasoning, close_reasoning, open_answer, close_answer = markers(tags)
    return f"{open_reasoning}{reasoning}{close_reasoning}{between}{open_answer}{answer}{close_answer}"


def markers(tags: str) -> tuple[str, str, str, str]:
    reasoning, answer = evaluator.TAGS[tags]
    return f"<{reasoning}>", f"</{reasoning}>", f"<{answer}>", f"</{answer}>"


def some_words(rng) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(1, 12)))


def soup(rng) -> Case:
    """Fragments in any order, sometimes in the right blocks."""
    pieces = [rng.choice(FRAGMENTS) if rng.random() < 0.9 else chr(rng.randrange(0x110000)) for _ in range(12)]
    text, tags = "".join(pieces[: rng.randint(0, 12)]), rng.choice(list(evaluator.TAGS))
    if rng.random() < 0.5:
        text = blocks(tags, some_words(rng), text)
    return Case("soup", text, "18", tags)


def repeat(rng) -> Case:
    """One or two fragments, thousands of times."""
    unit = "".join(rng.choices([*FRAGMENTS, "a", "1", "1,234,", "a b "], k=rng.randint(1, 2)))
    text = unit * (rng.randint(1_000, 40_000) // len(unit))
    tags = rng.choice(list(evaluator.TAGS))
    form = rng.randrange(4)
    if form == 1:
        text = blocks(tags, text, "18")
    elif form == 2:
        text = blocks(tags, "so", text)
    elif form == 3:
        text = "<answer>" + text + "18</answer>"
    return Case("long repeat", text, "18", tags)


def wrong_number(rng) -> Case:
    number, tags = make_gold(rng), rng.choice(list(evaluator.TAGS))
    return Case("near-miss", blocks(tags, some_words(rng), near_miss(rng, number)), plain(number), tags, False)


def wrong_place(rng) -> Case:
    """The gold itself, but not in the one answer block after the one reasoning block."""
    number, tags = make_gold(rng), rng.choice(list(evaluator.TAGS))
    answer, words, (r, nr, a, na) = write(rng, number), some_words(rng), markers(tags)
    good, place = blocks(tags, words, answer), rng.randrange(1, len(r) - 1)
    other = next(name for name in evaluator.TAGS if name != tags)
    text = rng.choice([
        # no answer block after the reasoning
        answer, words + answer, f"{r}{words} {answer}{nr}", f"{r}{words}{nr}{answer}{na}", f"{r}{words}{nr}{a}{answer}",
        # in the wrong order, or one inside the other
        f"{r}{words}{a}{answer}{na}{nr}", f"{a}{answer}{na}{r}{words}{nr}", f"{na}{answer}{a}{nr}{words}{r}",
        f"{a}{r}{words}{nr}{answer}{na}", f"{r}{a}{words}{nr}{answer}{na}",
        # a tag too few or too many
        f"{r}{words}{a}{answer}{na}", f"{words}{nr}{a}{answer}{na}", f"{r}{r}{words}{nr}{nr}{a}{answer}{na}",
        f"{r}{words}{nr}{a}{a}{answer}{na}{na}", f"{r}{words}{nr}{r}{a}{answer}{na}", good + na, good + a,
        good + f"{a}{answer}{na}",
        # other tags
        blocks(other, words, answer), good.upper(), good.replace("<", "< "), good.replace(">", "&gt;"),
        good.replace(r, r[:place] + rng.choice(" \x00\u200b\u00ad/") + r[place:]),
    ])  # fmt: skip
    return Case("near-miss", text, plain(number), tags, False, False)


def equivalent(rng) -> Case:
    """Right, in the right place. Text around the blocks costs the format reward alone."""
    number, tags = make_gold(rng), rng.choice(list(evaluator.TAGS))
    gold = f"{int(number):,}" if number.denominator == 1 and rng.random() < 0.5 else plain(number)
    text = blocks(tags, some_words(rng), write(rng, number), rng.choice(SPACES))
    if around := rng.random() < 0.3:
        text = rng.choice(
            [some_words(rng) + text, text + some_words(rng), text + "<b>", text.replace("<answer>", ".<answer>")]
        )
    else:
        text = rng.choice(SPACES) + text + rng.choice(SPACES)
    return Case("equivalent", text, gold, tags, True, not around)


def make_case(rng) -> Case:
    makers, shares = (soup, repeat, wrong_number, wrong_place, equivalent), (35, 1, 24, 10, 30)
    return rng.choices(makers, shares)[0](rng)


# ---------------------------------------------------------------- checks


def grade(case: Case) -> tuple[dict[str, float], str | None]:
    """Everything that the grader says about a completion -> (its rewards, its answer)."""
    scores = evaluator.score(case.text, case.gold, WEIGHTS, case.tags)
    answer = evaluator.extract_answer(case.text, case.tags)
    evaluator.extract_answer_flexible(case.text)
    evaluator.behaviour_metrics([case.text], [1], ["stop"], [scores["accuracy"] == 1])
    return scores, answer


def crude_reading(answer: str) -> Fraction | None:
    """The size of the number in an accepted answer: its digits, with nothing but its point or fraction bar kept."""
    digits = re.sub("[^0-9./]", "", answer.replace("}{", "/")).strip("./")
    if len(digits) > evaluator.MAX_ANSWER_CHARS:
        return None
    return Fraction(digits) if re.fullmatch(r"[0-9]*\.?[0-9]+|[0-9]+/[0-9]*[1-9][0-9]*", digits) else None


def problem_of(case: Case, scores: dict[str, float], answer: str | None) -> str | None:
    """What is wrong with the rewards of a case; None if nothing is."""
    for name in ("accuracy", "format"):
        expected = getattr(case, name)
        if scores[name] not in (0.0, 1.0) or expected is not None and scores[name] != expected:
            return f"{name} is {scores[name]}"
    if case.accuracy is None and scores["accuracy"]:
        if answer is None or crude_reading(answer) != abs(Fraction(case.gold)):
            return f"accepted the answer {answer!r}"
    return None


@dataclass
class Tally:
    kinds: Counter = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    too_slow: list[str] = field(default_factory=list)
    slow: int = 0  # over the budget when first measured
    worst: float = 0.0  # seconds for each 10,000 characters begun
    characters: int = 0
    seconds: float = 0.0  # of processor time in the grader


def check(case: Case, tally: Tally) -> None:
    """Grades a case and counts it. One that is over its budget is measured three times more, and the least counts."""
    units = max(1.0, len(case.text) / 10_000)
    tally.kinds[case.kind] += 1
    tally.characters += len(case.text)
    started = time.process_time()
    try:
        scores, answer = grade(case)
    except Exception as error:  # the very thing that must not happen
        tally.problems.append(f"{case.kind}: raised {error!r} on {shown(case)}")
        return
    seconds = time.process_time() - started
    tally.seconds += seconds
    if seconds > BUDGET * units:
        tally.slow += 1
        for _ in range(3):
            started = time.process_time()
            grade(case)
            seconds = min(seconds, time.process_time() - started)
        if seconds > BUDGET * units:
            took = f"{1000 * seconds:.1f} ms for {len(case.text)} characters"
            tally.too_slow.append(f"{case.kind}: {took} of {shown(case)}")
    tally.worst = max(tally.worst, seconds / units)
    if problem := problem_of(case, scores, answer):
        tally.problems.append(f"{case.kind}: {problem}, gold {case.gold}, on {shown(case)}")


def shown(case: Case) -> str:
    return ascii(case.text if len(case.text) < 300 else case.text[:150] + "..." + case.text[-150:])


def fuzz_chunk(seed: str, count: int = CHUNK) -> Tally:
    """`count` cases of one seed."""
    rng, tally = random.Random(seed), Tally()
    for _ in range(count):
        check(make_case(rng), tally)
    return tally


def main(arguments=None) -> int:
    """Fuzzes -> the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--count", type=int, default=1_000_000, help="completions, in whole chunks of 5,000")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    started = time.monotonic()
    seeds = [f"{args.seed}-{chunk}" for chunk in range(-(-args.count // CHUNK))]
    with multiprocessing.get_context("fork").Pool(args.processes) as pool:
        tallies = list(pool.imap_unordered(fuzz_chunk, seeds))
    kinds = sum((tally.kinds for tally in tallies), Counter())
    problems = [problem for tally in tallies for problem in tally.problems + tally.too_slow]
    total, grading = sum(kinds.values()), sum(tally.seconds for tally in tallies)
    characters = sum(tally.characters for tally in tallies)
    for kind, number in kinds.most_common():
        print(f"{number:10,}  {kind}")
    print(f"{total:10,}  completions of {characters / 1e6:,.0f} million characters, seed {args.seed}")
    seconds = time.monotonic() - started
    print(f"{seconds:,.0f} s with {args.processes} processes, {grading:,.0f} s of processor time in the grader:")
    print(f"{total / grading:,.0f} completions a second, {characters / grading / 1e6:.1f} million characters a second")
    print(
        f"worst {1000 * max(tally.worst for tally in tallies):.2f} ms for each 10 kB begun (limit {1000 * BUDGET:.0f})"
    )
    print(f"{sum(tally.slow for tally in tallies)} over the limit at first, and measured again")
    for problem in problems[:20]:
        print(f"VIOLATION: {problem}")
    print(f"{len(problems)} violations")
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
