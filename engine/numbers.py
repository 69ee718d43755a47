r"""Reads the one number that an answer states: "$1,234.00", "\boxed{\frac{1}{2}}", "The answer is 18 eggs.".

The text is hostile: it is never executed and never read as a float, and at most MAX_ANSWER_CHARS are parsed.
Three steps: `_plain` turns LaTeX and Markdown into plain text, `_LEAD` and `_BRACKETS` take off what stands in front
and around, and `_NUMBER` must match all the rest. What is taken off leaves a space, so that "1\text{8}" stays two
numbers, which are refused. engine/units.py knows which words may stand around a number.

Left out on purpose: "1.8e1" and digits of other scripts, "9 500" with a plain space (it may be two numbers), a decimal
comma, times of day, approximations ("about 18"), and anything that would have to be calculated.
"""

import re
from fractions import Fraction

from engine.units import (
    CURRENCY,
    CURRENCY_CODE,
    LABEL,
    LENGTHS,
    LETTERS,
    MAX_WORDS,
    SENTENCE,
    UNIT_PHRASE,
    UNITS,
    label_kind,
    things_counted_in,
    unit_kind,
)

# Longer text is not a number but an attempt to make the grader work.
MAX_ANSWER_CHARS = 100

# ---- Plain text out of LaTeX and Markdown ----------------------------------------------------------------------------

# White space, and characters without width (U+FEFF is a byte-order mark), which nobody sees at the ends of a text.
_INVISIBLE = "".join(map(chr, [*range(9, 14), *range(28, 33), 0x85, 0xA0, 0x1680, *range(0x2000, 0x200E)]))
_INVISIBLE += "\u2028\u2029\u202f\u205f\u2060\u3000\ufeff"

# Minus signs and dashes, quotation marks, the full stop of Chinese.
_SIGNS = str.maketrans("−–‐‑‒﹣－“”„«»‘’。", "-" * 7 + '"' * 5 + "''.")
_SIGNS |= {ord("℃"): "°C", ord("℉"): "°F"}

_VULGAR = {"½": "1/2", "⅓": "1/3", "⅔": "2/3", "¼": "1/4", "¾": "3/4", "⅕": "1/5", "⅖": "2/5", "⅗": "3/5", "⅘": "4/5"}
_VULGAR |= {"⅙": "1/6", "⅚": "5/6", "⅛": "1/8", "⅜": "3/8", "⅝": "5/8", "⅞": "7/8"}
_VULGAR = str.maketrans({sign: f" {fraction} " for sign, fraction in _VULGAR.items()})

# 9{,}500  9\,500  9~500  9'500  9 500 with a space that does not break  ->  9,500
_THOUSANDS = re.compile(
    r"(?<=[0-9]) (?: \{,\} | ,\\! | \\[,;:\ ] | [~'\u00a0\u2009\u202f] ) (?=[0-9]{3}(?![0-9]))", re.X
)

_LATEX_SPACE = re.compile(r"\\[,;:!\ ] | (?<!~)~(?!~) | \\(?:quad|qquad|thinspace|displaystyle)\b", re.X)

# \frac{1}{2}  \dfrac12  \tfrac{-1}2; the digit before makes it a mixed number
_FRACTION = re.compile(
    r"""(?: ([0-9]) \ * )? \\[dtc]?frac \s*
        (?: \{\ * (-?[0-9]+) \ *\} | ([0-9]) ) \s*
        (?: \{\ * ([0-9]+) \ *\} | ([0-9]) )""",
    re.X,
)

_DEGREE = re.compile(r"\^? \ ? (?: \{\\circ\} | \\circ | \{\\degree\} | \\degree )(?![A-Za-z])", re.X)
_POWER = re.compile(r"\^\{([23])\}")

# Commands that change only how their text looks; the innermost come first.
_STYLE = re.compile(
    r"\\(?: text(?:bf|it|rm|sf|tt|up|normal)? | math(?:rm|bf|it|sf|tt)? | mbox | hbox | emph | underline | boxed | fbox"
    r" | bm | boldsymbol | operatorname )\ *\{([^{}]*)\}",
    re.X,
)

# Markdown, quotation marks and LaTeX formulas around a part of the text. Nothing may touch them from outside:
# "2*9*2" and "1**8**" are no emphasis.
_EMPHASIS = re.compile(
    r"""(?<![0-9A-Za-z.)*_$\\])
    (?: \*\*\*([^*]+)\*\*\* | \*\*([^*]+)\*\* | \*([^*]+)\* | __([^_]+)__ | _([^_]+)_ | `([^`]+)`
      | "([^"]+)" | '([^']+)' | \$\$((?:\\.|[^$\\])+)\$\$ | \$((?:\\.|[^$\\])+)\$
      | \\\((.+?)\\\) | \\\[(.+?)\\\] )
    (?![0-9A-Za-z*_$])""",
    re.X | re.DOTALL,
)
_MAX_LAYERS = 10


def _fraction(match):
    whole, top, digit, bottom, digit_below = match.groups("")
    return f"{whole}{' ' if whole else ''}{top or digit}/{bottom or digit_below} "


def _without_latex(text):
    """The same with LaTeX's thousands, spaces and fractions, and the fractions that are one character, written out."""
    text = _LATEX_SPACE.sub(" ", _THOUSANDS.sub(",", text))
    text = _FRACTION.sub(_fraction, text) if "frac" in text else text
    return text if text.isascii() else text.translate(_VULGAR)


def _without_layers(pattern, text):
    """The same without what the pattern finds around its groups, and with single spaces."""
    for _ in range(_MAX_LAYERS):
        text, changed = pattern.subn(lambda match: f" {match[match.lastindex]} ", text)
        if not changed:
            break
    return " ".join(text.split())


def _plain(text):
    """The same text without the LaTeX that a reader does not see, with single spaces."""
    text = _without_latex(text.translate(_SIGNS))
    if "\\" in text or "^" in text:
        text = _POWER.sub(r"^\1", _DEGREE.sub("°", text))
        text = text.replace(r"\times", "×").replace(r"\left", "").replace(r"\right", "")
    return _without_layers(_STYLE, text) if "\\" in text else " ".join(text.split())


# ---- What stands around the number -----------------------------------------------------------------------------------

_BRACKETS = re.compile(
    r"""(?: \((.+)\) | \$(.+)\$ | \\\((.+)\\\) | \\\[(.+)\\\] | "(.+)" | '(.+)'
      | \*\*(.+)\*\* | \*(.+)\* | __(.+)__ | _(.+)_ | `(.+)` ) \.?""",
    re.X,
)


# GSM8K's mark, or words and perhaps an equals sign or a colon. The code of a currency belongs to the number.
_LEAD = re.compile(r"\#{2,6}\ ?(?P<marked>[^#].*) | (?P<words>[A-Za-z][A-Za-z',\ ]*)(?P<sign>[=:]?)(?P<rest>.+)", re.X)
_CODE_AT_END = re.compile(rf"\b(?: US | CA | C | AU | A | NZ | HK | S | R | MX | {CURRENCY_CODE} )\ ?\Z", re.X)


def _is_lead(words, sign, things):
    """Whether the words may stand in front of a number: a label (with = or :) or a sentence without its number."""
    first, comma, others = words.partition(", ")
    if comma and label_kind(first, things) == "A":  # So, the answer is
        if not others:
            return True
        words = others
    words = words.split()
    if len(words) > MAX_WORDS:
        return False
    kinds = "".join(label_kind(word, things) for word in words)
    return (LABEL if sign else SENTENCE).fullmatch(kinds) is not None


def _without_lead(text, things):
    """What is behind a label or the start of a sentence; None if there is none that is known to be harmless."""
    match = _LEAD.fullmatch(text)
    if match is None or match["marked"]:
        return match and match["marked"]
    words, sign, rest = match["words"], match["sign"], match["rest"]
    if not sign and (code := _CODE_AT_END.search(words)):
        words, rest = words[: code.start()], code[0] + rest
    return rest.strip() if _is_lead(words, sign, things) else None


# ---- The number and its unit -----------------------------------------------------------------------------------------

# 1234, 1,234, 18.00, 36/2, .5 but not 12,34. [0-9] and not \d, which takes the digits of every script.
UNSIGNED = r"(?: [1-9][0-9]{0,2} (?:,[0-9]{3})+ | [0-9]+ ) (?: \.[0-9]+ | /[0-9]+ )? | (?<![0-9.]) \.[0-9]+"

_NUMBER = re.compile(
    rf"""(?P<sign>[-+]?) \ ?
    (?P<currency> (?: {CURRENCY} | {CURRENCY_CODE} ) \ ? (?P<inner_sign>-?) )?
    (?: (?P<whole>[0-9]+) \ (?P<part>[0-9]+/[0-9]+)                       # 2 1/2
      | (?P<one_digit>[1-9](?:\.[0-9]+)?) \ ?[×x]\ ?10\^\{{?(?P<power>-?[0-9]{{1,2}})\}}?   # 1.8 × 10^1
      | (?P<number>{UNSIGNED}) )
    (?P<rest> (?: [^0-9^] | \^[23]? )* )""",
    re.X,
)

_TOKEN = re.compile(
    rf"""\ ?
    (?: (?P<word> [A-Za-z]+ | [\u4e00-\u9fff]+ ) \.?                 # perhaps abbreviated; or Chinese, Japanese
      | (?P<mark> [²³/] | °(?:\ ?[CF]\b)? | \^[23] | \\?% )
      | (?P<money> {CURRENCY} ) )""",
    re.X,
)
_IS_THE_ANSWER = re.compile(r"\ is\ (?:the|my|our)\ (?:(?:final|correct|total)\ )?(?:answer|result|total)\Z", re.X)
_REMARK = re.compile(r"(.*[A-Za-z])\ \(([A-Za-z ]+)\)")  # 18 apples (in total)


def _is_unit(text, has_currency, things):
    """Whether what stands behind a number leaves it as it is: nothing, or a unit."""
    text = _IS_THE_ANSWER.sub("", text.removesuffix(".").rstrip())
    text = text[text.startswith(" ,") :]
    if not text:
        return True
    if len(text) > 1 and text[-1] == "!" and text[-2].isalpha():  # 18 dollars! but not 18!
        text = text[:-1]
    if remark := _REMARK.fullmatch(text):
        text = f"{remark[1]} {remark[2]}"
    text = text.replace(" left over", " leftover")
    glued, comma = text[0] not in " ,", text[0] == ","
    text = re.sub("(?<=[A-Za-z])-(?=[A-Za-z])", " ", text[comma:])  # kilowatt-hours
    kinds, first, place = "", "", 0
    while place < len(text) and len(kinds) <= MAX_WORDS:
        token = _TOKEN.match(text, place)
        if token is None:
            return False
        word = token["word"]
        first = first or word or token[0]
        if word:
            kinds += unit_kind(word, things)
        else:
            kinds += "Y" if token["money"] else unit_kind(token["mark"].lstrip("\\")[0])
        place = token.end()
    known = first in LETTERS or first.lower() in UNITS or first.lower() in LENGTHS
    if (glued and first.isalpha() or comma) and not known:
        return False  # nobody writes "18eggs" or "18, eggs", but "18cm" and "18, dollars"
    if has_currency and re.match("Y|O(?!P)", kinds):
        return False  # "$18 m" is money in millions
    return len(kinds) <= MAX_WORDS and UNIT_PHRASE.fullmatch(kinds) is not None


def _value(match):
    """The number of a match of _NUMBER; None if it is not a number after all."""
    sign = -1 if "-" in (match["sign"], match["inner_sign"]) else 1
    if match["sign"] and match["inner_sign"]:
        return None
    try:
        if match["part"]:
            part = Fraction(match["part"])
            return sign * (int(match["whole"]) + part) if 0 < part < 1 else None
        if match["power"]:
            return sign * Fraction(match["one_digit"]) * Fraction(10) ** int(match["power"])
        return sign * Fraction(match["number"].replace(",", ""))
    except ZeroDivisionError:
        return None


def _read(text, things):
    """The number of a text out of _plain."""
    while text:
        match = _NUMBER.fullmatch(text)
        if match and _is_unit(match["rest"], match["currency"], things):
            return _value(match)
        match = _BRACKETS.fullmatch(text)
        text = match[match.lastindex].strip() if match else _without_lead(text, things)
    return None


def parse_number(text: str | None, question: str | None = None) -> Fraction | None:
    r"""The one number that `text` states, exactly, or None if it states none, several, or a calculation.

    Understands signs, thousands marks, decimals, a/b, \frac{a}{b} and mixed numbers, a power of ten, money and other
    units, a label in front (`x =`, `Answer:`, `The answer is`), and the usual Markdown and LaTeX around it. The things
    that `question` counts may follow the number too. At most MAX_ANSWER_CHARS characters, and what is invisible at
    the ends.
    """
    text = (text or "").strip(_INVISIBLE)
    if not text or len(text) > MAX_ANSWER_CHARS:
        return None
    if (match := _NUMBER.fullmatch(text)) and not match["rest"]:
        return _value(match)  # nothing around it, as in most golds and answers
    text, things = _plain(text), things_counted_in(question) if question else frozenset()
    number = _read(inner := _without_layers(_EMPHASIS, text), things)
    # Layers can only be told apart from outside where one is in another of its kind: **Answer: **18****.
    return _read(text, things) if number is None and inner != text else number


# ---- The last number of a text ---------------------------------------------------------------------------------------

# A number at the end of a text, whole: it is no piece of 1.000.000, 12/25/2020, 3:30, 2020-12-25, 1.8e1, 10^2 or x_1.
# Its minus sign cannot be a subtraction or a hyphen: "20-2" ends in 2, not in -2.
_LAST_NUMBER = re.compile(
    rf"""(?P<minus> (?<![0-9A-Za-z)])- )? (?: \\?[$€£¥₹] )?
    (?<![0-9^_]) (?<![0-9][.:/'A-Za-z]) (?<![0-9][eE][-+]) (?<!\^[-{{]) (?<!\^\{{-) (?<!_\{{)
    (?<![0-9]-[0-9]-) (?<![0-9]-[0-9]{{2}}-)
    (?P<number> (?:[0-9]+\ {{1,2}})?[0-9]+/[0-9]+ | {UNSIGNED}) \ ?\Z""",
    re.X,
)
_LOOK_BACK = 2 * MAX_ANSWER_CHARS


def last_number(text: str) -> str | None:
    """The last number anywhere in the text, without commas and currency, or None if its last digits are only a piece
    of something else."""
    end = max(map(text.rfind, "0123456789½¼¾")) + 1  # the pieces of a fraction in LaTeX end in a brace
    start = max(0, end - _LOOK_BACK)
    piece = text[start:end]
    if "frac" in piece and text[end : end + 1] == "}":
        piece += "}"
    piece = _without_latex(piece.translate(_SIGNS))
    match = _LAST_NUMBER.search(piece)
    if match is None or match.start() == 0 and start > 0:
        return None
    number = " ".join(match["number"].replace(",", "").split())
    if " " in number and parse_number(number) is None:  # two numbers, not a mixed one
        number = number.split()[1]
    return ("-" if match["minus"] else "") + number if len(number) <= MAX_ANSWER_CHARS else None
