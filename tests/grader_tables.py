"""What the grader must accept and refuse, for the tests of the grader and of real tokenizers."""

from evaluator import TAGS


def blocks(answer, reasoning="Nine and nine.", tags="reasoning"):
    """A well-formed completion."""
    outer, inner = TAGS[tags]
    return f"<{outer}>{reasoning}</{outer}>\n<{inner}>{answer}</{inner}>"


# ---- Numbers ---------------------------------------------------------------------------------------------------------

EQUAL = {
    "18": [
        "18", "$18", r"\$18", "18.", "18.0", "18.00", "$18.00", "+18", "018", "(18)", "**18**", "`18`", "$18$",
        r"\boxed{18}", r"$\boxed{18}$", r"\text{18}", "18 dollars", "18 km/h", "x = 18", "Answer: 18", "18%",
        "18/1", "36/2", " 18", "18 ", "\n18\n", "\t 18 \r\n", "\u00a018\u3000",
        # beyond the specification: what the same models also write
        "x=18", "18 dollars.", "$18 per hour", "18 percent", r"18\%", "18 %", "$18 $", "$ 18", "**$18**",
        "(**18**)", "**18.**", "$18$.", "$$18$$", r"\(18\)", r"\[ 18 \]", r"\boxed{x = 18}", r"x = \boxed{18}",
        "$x = 18$", r"18 \text{ dollars}", r"\boxed{18\text{ dollars}}", r"\frac{36}{2}", r"\dfrac{36}{2}",
        "Total cost = $18.00", "**\n18\n**", "$$\n18\n$$", "Answer:\n18",
    ],
    "1,234": ["1234", "1,234", "1,234.00", "$1,234", "1234.0", "**1,234**", "1,234 dollars", "2,468/2"],
    "1234": ["1,234", "1234"],
    "1234567": ["1,234,567", "1234567", "$1,234,567.00"],
    "-3": ["-3", "−3", "–3", "- 3", "(-3)", "-$3", "-3.0", "$-3$", "x = -3", "-6/2", "-3 degrees", "(−3)"],
    "0.5": [
        ".5", "0.50", "1/2", r"\frac{1}{2}", "0.5", "+.5", "$.50", r"$\frac{1}{2}$", r"\boxed{\frac{1}{2}}", "1/2 cup",
    ],
    "3/4": ["0.75", "6/8", "3/4", ".75", r"\frac{6}{8}"],
    "-1/2": [r"-\frac{1}{2}", "-.5"],
    "0": ["0", "-0", "0.0", "0/7", "$0.00"],
}  # fmt: skip

DIGITS_5000 = "18" * 2500

NEVER_18 = [
    "18 or 19", "19 or 18", "18, 19", "18,19", "18, 18", "17, 18, 19", "[18]", "[18, 19]", "18 18", "18; 18",
    "18\n19", "19\n18", "18\n18", "18 eggs and 3 hens", "18-19", "9*2", "2×9", "18!", "18^1", "1.8e1",
    "1e999999999", "9**9**9", DIGITS_5000, "0x12", "1_8", "1 8", "{18}", "١٨", "１８", "nan", "inf", "", " ",
    "\n", "18/0", "1/0", "0/0", "--18", "180", "1800", "0.18", "18.0001",
    # beyond the specification
    "18±1", "18–19", "18−0", "18 - 0", "18 + 0", "20-2", "-18", "−18", "- 18", "(18", "18)", "**18", "18**",
    "$$", "$", "**", "()", "(1)(8)", "$1$8$", r"1\text{8}", r"\text{1}8", r"\text{1}\text{8}", r"\boxed{1}{8}",
    r"3\frac{36}{2}", r"\frac{36}{2}3", r"\frac{18}{0}", r"\frac{18}", r"\frac{}{}", "1 36/2", "18/1/1",
    "18.0/1", "18/1.0", "36 / /2", "18..", "18...", "1.8.", "18.0.0", ",18", "18,", "+-18", "+ +18", "$$18",
    "18$$", "18%%", "18 % of 100", "9 + 9 = 18", "18 = 18", "x1 = 18", "x != 18", "x > 18", "18: 18",
    "eighteen", "18 thousand", "18 Million", "18 millions", "2 dozen", "18 or nineteen", "18 and a half",
    "18 plus two", "18 minus one", "18 to twenty", "18 squared", "18 k", "18k", "18x", "18 pi",
    "18 is what I say but it may be nineteen", "18 eggs, hens", "18<br>", "<b>18</b>", "18\x00", "1\u200b8",
    "18²", "Ⅹ", "⑱", "१८", "18 if 1 else 0", "int('18')", "__import__('os')", "True", "None", "\\", "\\text{",
    "\\boxed{18", "=18", ":18", "None = ", "a = b = ", ".", "-", "+", "/", "%", ",", "0b10010", "18j",
    "18 " + "dollars " * 20, "x" * 200 + " = 18", "(" * 60 + "18" + ")" * 60,
]  # fmt: skip

# Notations that a person reads without a second thought.
AS_A_PERSON_READS = {
    "9500": [
        "9{,}500", "$9{,}500$", r"9\,500", r"\$9{,}500", r"\boxed{9{,}500}", "9\u202f500", "9\xa0500", "9\u2009500",
        "9'500", "9’500", "9~500",
    ],
    "12345678": [
        r"12\,345{,}678",
    ],
    "1234": [
        r"1,\!234",
    ],
    "1/2": [
        r"\frac12", r"\dfrac{1}{2}", r"\frac 1 2", "1/2 cup", r"\tfrac{1}{2}", "½", r"\frac1{2}",
    ],
    "18": [
        r"\textbf{18}", r"\boxed{\textbf{18}}", r"18\,\text{cm}", r"18\;\mathrm{km/h}", r"18 \text{ eggs}",
        r"\boxed{18}\ \text{dollars}", r"\boxed{18\text{ m}^2}", r"18 \text{ m}^{2}", r"$18\text{ dollars}$",
        r"\left( 18 \right)", r"\boxed{\$18}", r"$\$18$", r"\$18.00", r"\textbf{Answer: } 18", "€18", "£18", "18€",
        "18 £", "18$", "18 $", "US$18", "US $18", "USD 18", "18 USD", "¥18", "₹18", "Rs. 18", "Rs 18", "A$18",
        "18 euros", "18 rupees", "18cm", "18 cm", "18km", "18 km/h", "18km/h", "18 kg", "18kg", "18 miles per hour",
        "18 mph", "18 square feet", "18 sq ft", "18 sq. ft.", "18 cubic meters", "18 cm^3", "18 cm³", "18 ft.",
        "18 hrs", "18 min", "18 lbs.", "18 in.", "18 inches", "18 in total", "18 eggs in total", "18 eggs left",
        "18 eggs per day", "$18 per hour", "$18/hour", "$18 an hour", "$18 every day", "18 years old",
        "18 more apples", "18 red marbles", "18 of them", "18 cups of flour", "18 pieces of candy", "18 times",
        "18 times a day", "18 percent", "18%", "18 per cent", "18 degrees Celsius", "18 °F", "18 ° C", "18°",
        "18 children", "18 people", "18 loaves of bread", "18 chocolate chip cookies", "18 boxes",
        "18 kilowatt-hours", "**18** dollars", "**18 dollars**", "**Answer:** 18", "**Answer**: 18",
        "**Answer: 18 eggs**", "*18*", "__18__", '"18"', "'18'", "‘18’", "“18 eggs.”", "The answer is 18",
        "The answer is 18.", "The answer is: 18.", "The answer is: **18**", "The final answer is $18",
        "So the answer is 18 dollars.", r"Therefore, the answer is \boxed{18}.", "Final answer: 18", "Answer: $18",
        "ANSWER: 18", "x = 18", "x is 18", "The value of x is 18", "Total cost: $18", "Number of eggs: 18",
        "Janet's earnings: $18", "Tom has 18 apples", "Tom has 18 apples left.", "She earns $18 per day",
        "He needs 18 more eggs", "There are 18 eggs", "It takes 18 minutes", "It costs $18", "#### 18", "18 dollars!",
        "18 元", "$18 in total", "18 dollars each", "18 pairs of shoes", "18 total", "18 points", "18 seconds",
        "18 hours a week", r"18 \% ", r"$\boxed{18}$ dollars", "$18$ dollars", r"\(18\) apples", "\\underline{18}",
        r"18 \text{miles/hour}", r"\text{The answer is } 18", "Answer in dollars: 18", "18.0 m", "18 liters of water",
        "18 gallons of gas", r"18\text{ dollars per hour}", "18 dollars in savings", "$18 left", "18 cents",
        "18 US dollars", r"1.8 \times 10^{1}", "18 slices (left)", "18 houses.", "18 books on the shelf",
        "18 bags of chips", "18 buses", "18 berries", "18 games", "18 of the marbles", "18 dollars a month",
        "18 gigabytes", "18 steps", "18 flowers", r"18~\text{cm}", r"18^\circ", r"18^{\circ}",
        r"18 \textrm{ dollars}", r"18 \mbox{ cm}", r"\mathbf{18}", "18 m^2", "18 m²", "18 apples (in total)",
        "18, dollars", "~18", "_18_", "18\u200b", "\ufeff18", "18。", "18元", "18 個", "18 pairs", "£18.00", "($18)",
        "1.8 × 10^1", "1.8 x 10^1", "18 total points",
    ],
    "-3": [
        "-€3", "$-3",
    ],
    "1234.5": [
        "€1,234.50",
    ],
    "70000": [
        "70000 dollars profit", "$70,000 profit",
    ],
    "5": [
        "5 bolts",
    ],
    "2.5": [
        "2 1/2 hours", "2½ cups", "2 1/2", "2½", r"2\frac{1}{2}", r"2\frac12",
    ],
    "-1/2": [
        r"\frac{-1}{2}", "-½",
    ],
    "-18": [
        "－18", "-18 dollars", "x = -18",
    ],
}  # fmt: skip
for number, texts in AS_A_PERSON_READS.items():
    EQUAL[number] = EQUAL.get(number, []) + texts

# Words that make 18 another number, or say that it is not the answer; and what cannot be decided.
CHANGED_18 = [
        "18 halves", "18 thirds", "18 half", "18 tenths", "18 hundredths", "18 thousandths", "18 quarter",
        "18 quarters", "18 sixteenths", "18 point five", "18 point 5", "18 percent of twenty", "18% of twenty",
        "18 percent of 100", "18 lakh", "18 lakhs", "18 crore", "18 arab", "18 divided by two",
        "18 multiplied by two", "18 times two", "18 times ten", "18 over two", "18 by two", "18 mod seven",
        "18 nineteen", "18 eighteen", "18 is wrong", "18 isn't right", "18 not", "18 at most", "18 or so",
        "18 or more", "18 and more", "18 plus", "18+", "18-ish", "18ish", "18 minus two", "18 hundred", "18 thousand",
        "18 thousand dollars", "18 million dollars", "18M", "18 M", "18m people", "$18m", "$18 m", "$18k", "18K",
        "18k dollars", "$18 bn", "18bn", "18b", "18B", "18T", "18 mil", "18 dozen", "18 dozen eggs", "18 dozens",
        "18 score", "18 gross", "18 couple", "18 squared", "18 cubed", "18 square", "18 cubic", "18 factorial",
        "18 doubled", "18 tripled", "18 twice", "18 halved", "18 more", "18 more than twenty", "18 less", "18 fewer",
        "18 short", "18 below zero", "18 degrees below zero", "18 years ago", "18 ago", "18 x", "18 y", "18i", "18e",
        "18 pi", "18π", "18√2", "18 root two", "18 to the second", "18 to one", "18:1", "18 for two", "18 in binary",
        "18 base eight", "18 hex", "18 dollars and fifty cents", "18 dollars and 50 cents", "18 feet 6 inches",
        "18 hours 30 minutes", "18 or nineteen", "18, no nineteen", "18 no", "18 wait", "18 maybe", "18? ",
        "18 eggs?", "not 18", "not = 18", "not: 18", "isn't 18", "The answer is not 18", "The answer isn't 18",
        "The answer is never 18", "The answer is about 18", "about 18", "approximately 18", "≈18", "≈ 18",
        "around 18", "less than 18", "more than 18", "at least 18", "at most 18", "up to 18", "minus 18",
        "negative 18", "half of it = 18", "half of 18", "half = 18", "a third of it: 18", "double = 18",
        "twice x = 18", "ten x = 18", "a x = 18", "xy = 18", "x y = 18", "-x = 18", "1/x = 18", "2x = 18",
        "x + 1 = 18", "x^2 = 18", "x squared = 18", "square root of x = 18", "log x = 18", "minus x = 18",
        "not equal to: 18", "not equal to 18", "wrong answer: 18", "wrong: 18", "Wrong = 18", "incorrect: 18",
        "False: 18", "The wrong answer is 18", "part of the answer: 18", "Half of the answer is 18",
        "first answer: 18", "My first answer is 18", "Twice the answer: 18", "negative: 18", "Negative of it: 18",
        "dozens: 18", "Dozens of eggs: 18", "Answer in dozens: 18", "in thousands: 18", "thousands = 18", "lakhs: 18",
        "percent of it lost = 18", "x != 18", "x <> 18", "x ≠ 18", r"x \ne 18", r"x \neq 18", r"x \approx 18",
        r"\approx 18", "x > 18", r"x \geq 18", "Nobody has 18 apples", "Half has 18", "Tom has not 18 apples",
        "Tom has about 18 apples", "Tom has 18 dozen apples", "Tom has twice 18 apples", "There are no 18",
        "If the answer is 18", "Is it 18", "It is 18 or 19", "It is 18 minus two", "18^2", "18^{2}", r"18^{\frac12}",
        r"\sqrt{18}", r"\sqrt18", r"-\frac{36}{-2}", r"\frac{18}{100}", r"\frac{1}{18}", r"\frac{18}",
        r"2\frac{18}{2}", "0.18", r"18\cdot 2", r"18 \times 2", r"18 \times 10^2", r"1\!8", r"1\,8", "1{,}8", "1~8",
        "1 8", "10 8", "18,000", "18.000.000", "18 1/2", "18½", "½ of 18", "18²", "18 sixths", "18 ninths",
        "18 myriads", "18 grand", "18 G", "18 hundred dollars", "18 trillion", "18 per hundred",
        "18 parts per million", "18 per thousand", "18 per dozen", "18 out of twenty", "18 out of 20", "18/20",
        "18 of 20", "18 of twenty", "18 and counting", "18 dollars less", "18 dollars short", "18 dollars in debt",
        "18 dollars loss", "18 percent less", "18 percent more", "18 times more", "18 times as many",
        "18 times the price", "18 to go", "18 minutes to six", "18 past six", "18 o'clock", "18 oh", "18 zero",
        "18 naught", "18 nil", "18 oh five", "18 dot five", "18 comma five", "18 decimal five", "18 minus", "18 mod",
        "18 n", "18 choose two", "18 power two", "18 exponent two", "18 recurring", "18 repeating", "18 bar", "18th",
        "18st", "18 th", "the 18th", "18 eggs, 3 hens", "18 eggs; 3 hens", "18 eggs / 3", "18 / 3",
        "18 eggs each times two", "18 eggs times two", "18 eggs doubled", "18 eggs minus two eggs", "18 eggs a dozen",
        "18 dollars off", "18 dollars under", "18 m squared", "18 million people", "18 pair of dozens", "18 万", "18万",
        "18千", "18 million", "five 18", "two times 18", "2 times 18", "2 dozen and 18", "x = half of 18",
        "x = not 18", "x: not 18", "Answer: not 18", "Answer: about 18", "Answer: 18?", "Answer: minus 18",
        "Answer: 18 thousand", "Answer (wrong): 18", "~~18~~", "<s>18</s>", r"\cancel{18}", r"\sout{18}", r"\not{18}",
        r"\overline{18}", r"\bar{18}", r"\hat{18}", r"18\%\%", "18%%", "$$18", "18$$", "$18$ $18$", '"18" "18"',
        "'18' or '19'", "**18** **19**", "**18** or **19**", "**1****8**", "*1*8", "`1``8`",
]  # fmt: skip
NEVER_18 += CHANGED_18

NEVER_OTHER = [
    ("12,34", "1234"), ("1, 234", "1234"), ("1 ,234", "1234"), ("1,2345", "12345"), ("1,234,56", "123456"),
    ("1234,567", "1234567"), (",234", "234"), ("0,123", "123"), ("1,23,456", "123456"), ("1.234,00", "1234"),
    ("1 234", "1234"), ("1_234", "1234"), ("--3", "-3"), ("--3", "3"), ("−−3", "-3"), ("-+3", "-3"),
    ("-$-3", "-3"), ("3", "-3"), ("-3", "3"), ("50%", "0.5"), ("50 percent", "0.5"), ("0.5", "50%"),
    ("1/3", "0.3333333333333333"), ("0.1", "0.1000000000000000055511151231257827"), ("nan", "nan"),
    ("inf", "inf"), ("", ""), ("1/0", "1/0"), ("eggs", "eggs"), (DIGITS_5000, DIGITS_5000), ("18", DIGITS_5000),
    ("18", ""), ("18", "18 or 19"), ("18", "18\n18"),
]  # fmt: skip


STRUCTURE = [
    ("[R]r[/R][A]18[/A]", 1, 1),
    ("[R]r[/R]\n[A]18[/A]", 1, 1),
    (" \n[R]\nr\nr\n[/R]\n\n[A]\n18\n[/A]\n ", 1, 1),
    ("[R]1 < 2 and </b> [/R][A]18[/A]", 1, 1),
    ("[R]r[/R][A]no idea[/A]", 0, 1),
    ("[R]r[/R][A][/A]", 0, 1),
    ("[R]r[/R][A]19[/A]", 0, 1),
    # text around: only the format minds
    ("[R]r[/R][A]18[/A] Done.", 1, 0),
    ("[R]r[/R][A]18[/A] 19", 1, 0),
    ("[R]r[/R][A]18[/A]\n[R]next question", 1, 0),
    ("Sure. [R]r[/R][A]18[/A]", 1, 0),
    ("[R]r[/R] So: [A]18[/A]", 1, 0),
    # empty reasoning
    ("[R][/R][A]18[/A]", 1, 0),
    ("[R] \n [/R][A]18[/A]", 1, 0),
    # missing or unclosed blocks
    ("", 0, 0),
    ("18", 0, 0),
    ("[A]18[/A]", 0, 0),
    ("[R]r[/R]", 0, 0),
    ("[R]r[/R]18", 0, 0),
    ("[R]r[/R][A]18", 0, 0),
    ("[R]r[/R]18[/A]", 0, 0),
    ("[R]r[A]18[/A]", 0, 0),
    ("r[/R][A]18[/A]", 0, 0),
    ("r[A]18[/A]", 0, 0),
    # several blocks
    ("[R]r[/R][A]18[/A][A]18[/A]", 0, 0),
    ("[R]r[/R][A]18[/A][A]19[/A]", 0, 0),
    ("[R]r[/R][A]19[/A][A]18[/A]", 0, 0),
    ("[R]r[/R][A]18[/A] and [A]", 0, 0),
    ("[R]r[/R][A]18[/A][/A]", 0, 0),
    ("[R]r[/R][R]r[/R][A]18[/A]", 0, 0),
    ("[R]r[/R][A]18[/A][R]r[/R][A]18[/A]", 0, 0),
    # answer in the reasoning
    ("[R]r [A]18[/A][/R]", 0, 0),
    ("[R]r [A]18[/A][/R][A]18[/A]", 0, 0),
    ("[R]r [A]18[/A][/R][A]19[/A]", 0, 0),
    ("[R]r [A] [/R][A]18[/A]", 0, 0),
    ("[R]the answer is 18[/R]", 0, 0),
    ("[R]the answer is 18[/R][A][/A]", 0, 1),
    # wrong order
    ("[A]18[/A][R]r[/R]", 0, 0),
    ("[/R]r[R][A]18[/A]", 0, 0),
    ("[R]r[/R][/A]18[A]", 0, 0),
    ("[/R][R]r[/R][A]18[/A]", 0, 0),
    ("[/A][R]r[/R][A]18[/A]", 0, 0),
    ("[A][R]r[/R]18[/A]", 0, 0),
    ("[R]r[A][/R]18[/A]", 0, 0),
    # nested
    ("[R][R]r[/R][/R][A]18[/A]", 0, 0),
    ("[R]r[/R][A][A]18[/A][/A]", 0, 0),
    ("[R]r[/R][A][R]18[/R][/A]", 0, 0),
    ("[R]r[/R][A]18[R][/A]", 0, 0),
    ("[R][A]r[/A][/R]", 0, 0),
]  # fmt: skip


def expand(text, tags):
    outer, inner = TAGS[tags]
    for short, tag in (("R", outer), ("A", inner)):
        text = text.replace(f"[{short}]", f"<{tag}>").replace(f"[/{short}]", f"</{tag}>")
    return text
