"""The words that may stand around the number of an answer without changing it: units, counted things, labels.

Why lists: a word behind a number can be a unit ("18 eggs") or make it another number ("18 halves", "18 lakh",
"18 less two"), and no rule of spelling tells the two apart. So a word is refused unless it is known. Known are the
words below and, if the question is at hand, the things that it counts. The words in CHANGING are refused even if the
question names them. The price is that a right answer with an unknown word is refused; the other way round, a wrong
answer would be rewarded.

`unit_kind` and `label_kind` give each word one letter. A phrase becomes a short string of letters, and UNIT_PHRASE,
LABEL and SENTENCE are regular expressions over such strings.
"""

import re
from functools import lru_cache

# ---- Units -----------------------------------------------------------------------------------------------------------

LENGTHS = frozenset(
    """mm cm dm km meter meters metre metres centimeter centimeters centimetre centimetres millimeter
    millimeters millimetre millimetres kilometer kilometers kilometre kilometres inch inches ft foot feet
    yd yds yard yards mi mile miles""".split()
)

# Not here, because they can also be factors: M, k, b, t, bn, mn.
LETTERS = frozenset("m g s h L l C F W V J N".split())  # upper and lower case differ

UNITS = frozenset(
    """mg kg lb lbs oz gram grams gramme grammes milligram milligrams kilogram kilograms kilo
    kilos kgs pound pounds ounce ounces ton tons tonne tonnes stone stones carat carats ml
    mL cl dl liter liters litre litres milliliter milliliters millilitre millilitres
    gallon gallons gal quart quarts qt pint pints pt cup cups tablespoon tablespoons tbsp
    teaspoon teaspoons tsp bushel bushels barrel barrels ms sec secs second seconds min
    mins minute minutes hr hrs hour hours day days night nights week weeks wk wks weekend
    weekends weekday weekdays fortnight fortnights month months mo year years yr yrs
    decade decades century centuries acre acres hectare hectares ha sq sqft sqm mph kph
    kmh kmph fps mps rpm knot knots degree degrees deg celsius fahrenheit kelvin radian
    radians rad bit bits byte bytes kb mb gb tb kilobyte kilobytes megabyte megabytes
    gigabyte gigabytes terabyte terabytes megabit megabits gigabit gigabits mbps gbps watt
    watts kilowatt kilowatts kw kwh volt volts joule joules hz hertz calorie calories cal
    kcal am pm dollar dollars buck bucks cent cents penny pennies pence dime dimes nickel
    nickels euro euros rupee rupees rs yen yuan won ruble rubles rouble roubles franc
    francs krona kroner kr peso pesos shilling shillings peseta pesetas lira zloty real
    reais rand dirham dirhams usd eur gbp inr jpy cny rmb cad aud nzd chf sek nok dkk krw
    mxn brl zar sgd hkd 元 円 圆 块 日元 美元 欧元 英镑 人民币 個 个 只 隻 件 人
    天 年 岁 歲 小时 小時 分钟 分鐘 秒 米 公里 厘米 千克 公斤 克 升""".split()
)

# In front of a number or behind it. A `$` may be escaped, as in LaTeX, and have a country in front.
CURRENCY = r"(?: (?: US\ ? | U\.S\.\ ? | CA | C | AU | A | NZ | HK | S | R | MX )? \\?\$ | [€£¥￥₹₩₽₺₫₱₪₦฿¢] )"
CURRENCY_CODE = r"(?: USD | EUR | GBP | INR | JPY | CNY | RMB | CAD | AUD | NZD | CHF | Rs\.? )"

# ---- Counted things --------------------------------------------------------------------------------------------------

# Singular; the plural is understood. A word whose singular means something else ("point", "part") is in
# COUNTED_PLURALS.
COUNTED = frozenset(
    """acorn actor ad adult album alligator animal answer ant apartment appetizer apple apron article artwork
    athlete attendee aunt avocado baby bag bagel baguette bale ball balloon banana band bandage bandaid
    basket basketball bat batch bathroom bead beaker bean beanbag bear bed bedroom bee beer beetle berry
    bicycle bike bill billboard bird birdhouse biscuit blanket block blouse blueberry boat bolt bone bonus
    book boot bottle bouquet bowl box boy bracelet branch bread brick brochure brother brownie brush
    bubble bucket bug bugle building bulb bun bunch bundle bunny burger burrito bus bush bushel butterfly
    button buyer cabin cabinet cake calf call camel camera camper can candle candy cane cap car card
    carnation carpet carriage carrot carton cartridge case cat caterpillar cent centipede chair channel
    chapter character charger charm cheerleader cheesecake chef cherry chicken child chip chocolate chore
    cigarette circle city clam class classmate classroom client clip cloud clove clown clownfish coach
    coat coconut coffee coin color colour comic commercial company complaint computer cone container
    cookie copy cost counter country coupon course court cousin cow crab cracker crate crayon credit crew
    cricket croissant crop crow cub cube cucumber cupcake curtain cushion customer daisy dancer dandelion
    daughter day deck decoration deer demerit deposit desk dessert diamond diaper diary digit dinner disc
    dish dividend doctor dog doll dolphin domino donkey donut door doughnut dragon drawer drawing
    dream dress drink driver driveway drop drum drummer duck duckling dumpling ear earning earring egg
    eggplant elephant email emerald employee emu enchilada engine engineer envelope episode eraser error
    essay event exam exercise expense eye family fan farmer feather fee female fence figurine file film
    fine finger fire firefighter firefly firework fish flag flamingo flavor flight flock floor flower
    flute fly flyer follower foot footprint fork fox friend frog fruit game garage garden gate gecko
    gem gerbil ghost gift giraffe girl glass glove gnome goal goat goldfish goose grade graduate grain
    grandchild granddaughter grandson grape grapefruit grave grocery group guest guitar gumball guppy
    haircut hamburger hammer hamster hat hawk hedgehog hen herd highlighter hit hole home homerun horse
    hospital hotdog house hummingbird hut ice-cream idea individual ingredient insect instrument
    interception invitation island item jacket jar jean jelly jellybean jewel job joke judge juice jump
    kangaroo kebab kernel key keychain kid kind kite kitten knife koala lady ladybug lake lamb lamp lap
    laptop lawn lawyer leaf leg lego lemon lesson letter level light lightbulb lily lime line lion litter
    lizard load loaf log lollipop lunch macaron machine magazine mailbox male man mango map marathon
    marble marigold marker marshmallow mask match matchstick meal meatball medal meeting melon member
    message mile milkshake millipede minivan minnow mirror mistake model monkey monster mouse movie muffin
    mug mushroom nail napkin necklace necktie neighbor neighborhood nephew nest newspaper niece noodle
    note notebook novel nugget number nurse nut object offer officer omelet onion orange orchid order
    ornament ostrich owl ox oyster pack package packet page pail painting pair pallet pan pancake panda
    panel papaya paper parakeet parent park parrot participant party passenger pastry patient patty
    paycheck payment pea peach peanut pear pearl pebble peg pen pencil penguin penny people pepper
    peppermint permit person pet petal phone photo photograph piano pickle picture pie pig pigeon pile
    pill pillow pilot pin pipe pizza plane planet plank plant plate player plum pocket poem pony popsicle
    post postcard poster pot potato present president pretzel prize problem profit program project puddle
    pumpkin pup puppet puppy purse puzzle quesadilla question rabbit raccoon racer radish raisin raspberry
    rat reader recipe record rectangle reindeer repair report reporter request restaurant review rib
    ribbon ring river robot rock rod roll room roommate rooster rope rose round row rug runner sack salad
    salary sale sandwich sapling sausage saving scarf school scientist scone scoop scooter scorpion screen
    sculpture seagull seashell seat seed seedling seller semester sentence serving session set shark sheep
    sheet shelf shell shingle ship shirt shoe shop shopper shot shovel show shrimp shrub sibling sign
    singer sister skateboard sketch skip skirt slice slide slipper smoothie snack snail snake sneaker
    snowball snowflake snowman soap sock soda sofa soldier son song soup spaceship spider spoke spoon
    sport spot spray sprig sprint squid squirrel stack stair stall stamp star state station statue steak
    step stick sticker stitch stop store stork story straw strawberry street string stripe student subject
    suit suitcase sunflower supply surfer sweater sweet swimmer tab table tablet taco tail tank tarantula
    task taxi tea teacher team tent test text textbook thing ticket tie tiger tile tin tip tire tissue
    toad toast toenail token tomato tool tooth toothbrush toothpick topping tortilla touchdown tourist
    towel tower town toy tractor trail train traveler tray treat tree triangle trip trophy truck trumpet
    tub tulip tune turkey turn turtle twig umbrella uncle unicorn uniform unit vacation vampire van vase
    vegetable vehicle video violin visit visitor volunteer vote voter waffle wage waiter walk wall wallet
    walnut watch watermelon werewolf whale wheel whisker whistle widget wife window wing winner wolf woman
    word worker workout worm wrench yolk zebra zit zombie""".split()
)
COUNTED_PLURALS = frozenset(
    """allowance area bacon bars beef bread budget butter calves candy cash cattle cement cereal change cheese
    children chocolate clothes coal coffee concrete corn cream deer depth dice dirt distance earnings
    energy fabric feet fish flour food fruit fuel furniture gas gasoline geese glasses gold grass gravel
    gum hair ham hay height homework honey ice income jeans jewelry juice knives land leaves lemonade
    length loaves luggage mail marks meat medicine men mice milk money noodles oil oxen paint pants paper
    parts pasta pay people pieces points popcorn portions profit protein rent revenue ribbon rice rock
    rope sales salmon salt sand savings scarves scissors seconds sections segments series servings shares
    sheep shelves shorts shrimp sides silver soda soil spaces spaghetti species speed squares sugar tax
    taxes tea teeth them traffic trout tuna volume wages water weight wheat width wine winnings wire wives
    wolves women wood""".split()
)

# ---- Words around the number -----------------------------------------------------------------------------------------

# Words after which a noun must follow ("18 more apples", but not "18 more").
BEFORE_A_NOUN = frozenset(
    """additional adult american baby baseball big black blue brown canadian different empty extra female fewer
    fluid free full golden green hot large little male metal metric more nautical new orange other
    pink plastic purple red regular small stuffed tennis us white whole wooden yellow""".split()
)
RATES = frozenset("per a an every".split())  # "18 per hour"
LINKS = frozenset("for on at the his her their its my our your this that these".split())  # "18 for the tickets"
BEHIND = frozenset(
    """now leftover combined total altogether overall left remaining apiece old tall long wide deep high away
    apart today tomorrow yesterday all saved earned weekly daily monthly yearly annually hourly""".split()
)

# ---- Labels ----------------------------------------------------------------------------------------------------------

ANSWERS = frozenset("answer ans result solution conclusion".split())
# In front of these: "my first answer" or "part of the answer" would be another one.
ANSWER_FRONT = frozenset(
    "the my our your final correct numerical numeric exact total so thus therefore hence finally then".split()
)
LABEL_WORDS = frozenset(
    """age amount annual average balance bill bought buying capacity change charge circumference collected
    combined cost costs count current daily diameter difference discounted duration earned eaten expected
    expenditure expenses fee grand gross hourly initial interest left made mean median mode monthly needed
    net new now number original overall paid payment percent percentage perimeter population price
    produced product quantity quotient radius range rate ratio received regular remaining required salary
    saved score selling size sold spending spent sum tax temperature time total value wage weekly yearly""".split()
)
SUBJECTS = frozenset("he she they it we i you there this that".split())
IS = frozenset("is are was were equals be will becomes comes".split())
# What a person does with a number of things, without changing its sign.
DOES = frozenset(
    """ate baked bakes bought buy buys collected collects cost costs earn earned earns eat eats get gets got
    had has have made make makes need needed needs paid pay pays picked picks ran read reads received
    receives runs save saved saves sell sells sold spend spends spent take takes took use used uses walked
    walks wants writes wrote""".split()
)

# Never a counted thing or a name, even if the question has the word.
CHANGING = frozenset(
    """about above ago almost and approximately around barely behind below besides billion billions bn but couple
    couples crore crores cube cubed debt debts decimal decimals deficit deficits divide divided divides
    does double doubled doubles dozen dozens eight eighteen eighth eighths eighty eleven equals except
    factorial false fewer fifteen fifth fifths fifty five fold forty four fourteen fourth fourths fraction
    fractions grand gross grosses half halves hardly has hundred hundreds hundredth hundredths incorrect
    inverse is lakh lakhs least less log loss losses maybe mil million millions millionth millionths minus
    minuses mln mod modulo more most multiple multiples myriad myriads nearly negative negatives neither
    never nine nineteen ninety ninth ninths no nobody none nor not nothing one opposite or over part
    percent percentage percents perhaps pi plus point positive possibly power powers quadruple quadruples
    quarter quintuple reciprocal root roots roughly score scores seven seventeen seventh sevenths seventy
    short sine six sixteen sixth sixths sixty square squared ten tenth tenths third thirds thirteen thirty
    thousand thousands thousandth thousandths three thrice time times tn to treble trillion trillions
    triple tripled triples twelve twenty twice two under unless versus vs was without wrong zero""".split()
)

_WORD = re.compile(r"[A-Za-z]+")
_COUNTS = re.compile(r"(?:[0-9]|\bhow\s+(?:many|much))\s+((?:(?:[a-z]+\s+){0,2}?[a-z]+s|[a-z]+))\b")
MAX_WORDS = 10  # around a number: more are refused, which bounds the time of the expressions below
MAX_QUESTION_CHARS = 5_000  # what is behind is not read: the time for hostile text stays bounded


def _forms(word):
    """The word, and what it may be the plural of."""
    yield word
    if word.endswith("s") and not word.endswith("ss"):
        yield word[:-1]
        if word.endswith("es"):
            yield word[:-2]
        if word.endswith("ies"):
            yield word[:-3] + "y"


@lru_cache(maxsize=256)
def things_counted_in(question: str) -> frozenset:
    """The words of a question that its answer may count: what follows a number or "how many", and plurals.

    Never one of CHANGING, and never a word of fewer than three letters.
    """
    question = question[:MAX_QUESTION_CHARS].lower()
    words = {word for match in _COUNTS.finditer(question) for word in match[1].split()}  # 12 red flings
    words |= {word for word in _WORD.findall(question) if word.endswith("s") and not word.endswith("ss")}
    forms = {form for word in words - CHANGING for form in _forms(word)}
    return frozenset(form for form in forms - CHANGING if len(form) > 2)


def _is_counted(word, things):
    if word in CHANGING:
        return False
    return word in COUNTED_PLURALS or word in things or any(form in COUNTED for form in _forms(word))


# ---- Phrases as strings of letters -----------------------------------------------------------------------------------

_UNIT_KINDS = {"in": "I", "of": "F", "each": "E", "%": "C", "²": "P", "³": "P", "^": "P", "/": "R", "°": "U"}
_UNIT_KINDS |= dict.fromkeys(("percent", "times"), "C") | dict.fromkeys(("square", "sq", "cubic", "cu"), "S")
_UNIT_LISTS = (("D", LENGTHS), ("U", UNITS), ("M", BEFORE_A_NOUN), ("R", RATES), ("L", LINKS), ("T", BEHIND))


def unit_kind(word: str, things: frozenset = frozenset()) -> str:
    """One letter for a word or sign behind a number; "?" for one that is not known to leave the number as it is.

    C  percent, times            I  in: a preposition, or inches      R  rate: per, a, every, /
    D  length: may be squared    L  other link: for, the              S  square, cubic
    E  each                      M  adjective: a noun must follow     T  total, left, apiece
    F  of                        O  single letter, such as m          U  other unit, or a counted thing
                                 P  power of a length                 Y  currency sign
    """
    lower = word.lower()
    if word in LETTERS:
        return "O"
    if len(word) == 1 and word.isascii() and word.isalpha() and lower != "a" or word == "MM":  # MM: million
        return "?"
    if lower in _UNIT_KINDS:
        return _UNIT_KINDS[lower]
    for letter, words in _UNIT_LISTS:
        if lower in words:
            return letter
    return "U" if _is_counted(lower, things) else "?"


_THING = "M* (?: (?: S[DIO] | [DI]P? | U )+ | OP? )"  # red apples, square feet, m^2
UNIT_PHRASE = re.compile(
    rf"""
    (?: T? {_THING} | C (?![FIL]) | Y | [TE]+ )?       # total apples; percent, but not percent of; €; left
    (?: [RLFIE]+ (?: {_THING} | T+ ) | [TE] )*      # per hour; of the eggs; in total; each
    """,
    re.VERBOSE,
)


def label_kind(word: str, things: frozenset = frozenset()) -> str:
    """One letter for a word in front of a number; "?" for one that is not known to leave the number as it is.

    A  may stand before "answer"      H  has, needs, costs       N  name           W  other word of a label, or a thing
    F  of                             I  is, are                 Q  he, there      X  variable
    G  possessive: Tom's              K  answer, result          T  to
    """
    lower = word.lower()
    stem, apostrophe, _ = lower.partition("'")
    if len(word) == 1 and lower != "a" and word != "I":
        return "X"
    if lower in ("of", "to"):
        return {"of": "F", "to": "T"}[lower]
    for letter, words in (("K", ANSWERS), ("A", ANSWER_FRONT), ("I", IS), ("H", DOES), ("Q", SUBJECTS)):
        if lower in words:
            return letter
    if apostrophe:
        return "G" if stem not in CHANGING and (word[0].isupper() or _is_counted(stem, things)) else "?"
    known = (LABEL_WORDS, UNITS, LENGTHS, RATES, LINKS, BEFORE_A_NOUN - {"more", "fewer"}, BEHIND)
    if any(lower in words for words in known) or lower == "in" or _is_counted(lower, things):
        return "W"
    return "N" if word[0].isupper() and len(word) > 1 and lower not in CHANGING else "?"


_LABEL = "(?: X | A*K [AWGH]* (?: [TF][AWGH]+ )* | [AWGH]+ (?: F[AWG]+ )* (?:FX)? )"
LABEL = re.compile(f"{_LABEL} I*", re.VERBOSE)  # with = or : behind it
SENTENCE = re.compile(rf"(?: A? Q [IH]+ | (?![HI]+\Z) {_LABEL} [IH]+ | A? N H+ )", re.VERBOSE)  # The answer is, Tom has
