"""The small fixed world that the tasks speak of: words, people, and a few facts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


WORDS: tuple[str, ...] = _words("""
    able about above across act add after again air all also always amber animal answer apple
    april arm army art ask autumn baby back bag ball banana band bank barn basket beach bean bear
    beauty bed bee before bell below best better big bird birch black blood blue board boat body
    bone book born both bottle bottom bowl box boy brave bread bridge bright bring broken brother
    brown build burn bus busy butter button cabin cake call camera camp candle car card care carry
    castle cat chair change cheese cherry child choose circle city clean clear clever climb clock
    cloud coat coffee cold colour come cook copper corn corner cotton country cousin cover crow
    cup dance danger dark daughter day deep deer desert dinner doctor dog door dragon dream dress
    drink drive drum dry duck dust eager eagle early earth east easy egg eight elbow elephant
    empty engine enough evening every eye face falcon fall family farm fast father feather fence
    field finger fire fish five flag flower fly forest fork four fox free fresh friend frog fruit
    full future game garden gate gentle ghost giant gift glass gold good grass green guest guitar
    hammer hand happy harbour hat hawk hazel head heart heavy help hill history holiday honey hope
    horse hotel hour house hundred hungry ice idea important ink iron island ivory jacket jade
    january jelly jewel join joke journey juice jump june keep kettle key king kitchen kite knife
    ladder lake lamp language large laugh leaf lemon letter library light lion listen little lock
    long love lucky lunch machine magic maple marble market meadow mean milk minute mirror money
    monkey month moon morning mother mountain mouse music name narrow neck needle nest never new
    night nine noise north number oak ocean october olive onion open orange orchard other owl
    paint palace paper parrot party peach pear pearl pencil pepper piano picture pilot pine planet
    plate pocket poem poet pond potato prince purple puzzle queen question quick quiet rabbit rain
    raven read ready red ribbon rice ring river road robin rock roof room rope rose round ruby
    saddle salt sand school sea season second seed seven shadow sheep ship shoe shop silver simple
    sister six sky sleep slow small smile snow soft song soup south spider spoon spring square
    star station stone storm story street strong sugar summer sun swan sweet table tea teacher
    ten thing think three thunder tiger time together tomato tower town train travel tree turtle
    two umbrella under valley velvet very village violet violin voice walk wall warm water wave
    west whale wheat wheel white wide wild willow wind window winter wolf wonder wood word world
    yard year yellow yesterday young zebra zero
    """)

NAMES: tuple[str, ...] = _words("""
    Anna Ben Clara David Emma Felix Grace Hugo Iris Jack Karen Leo Maria Nina Oscar Paul Rosa Sam
    Tina Victor Walter Yara Zoe
""")


class Relation(NamedTuple):
    """One kind of fact about a person ``{n}`` with a value ``{v}``."""

    fact: str
    ask_value: str
    ask_name: str
    values: tuple[str, ...]


RELATIONS: tuple[Relation, ...] = (
    Relation(
        "{n} lives in {v}.",
        "Where does {n} live?",
        "Who lives in {v}?",
        _words("Berlin Cairo Dublin Lima London Madrid Oslo Paris Prague Rome Tokyo Vienna"),
    ),
    Relation(
        "{n} has a {v}.",
        "What animal does {n} have?",
        "Who has a {v}?",
        _words("cat cow dog donkey duck goat horse parrot rabbit sheep snake turtle"),
    ),
    Relation(
        "{n} likes {v}.",
        "What does {n} like?",
        "Who likes {v}?",
        _words("apples bread cake cheese coffee honey lemons music pears rice soup tea"),
    ),
    Relation(
        "{n} works as a {v}.",
        "What is the job of {n}?",
        "Who works as a {v}?",
        _words("baker cook dentist doctor driver farmer lawyer nurse painter pilot teacher"),
    ),
    Relation(
        "{n} is {v} years old.",
        "How old is {n}?",
        "Who is {v} years old?",
        tuple(map(str, range(5, 95))),
    ),
    Relation(
        "{n} wears a {v} hat.",
        "What colour is the hat of {n}?",
        "Who wears a {v} hat?",
        _words("black blue brown green grey pink purple red white yellow"),
    ),
)

_CAPITALS = """Austria Vienna, Belgium Brussels, Canada Ottawa, China Beijing, Cuba Havana,
    Denmark Copenhagen, Egypt Cairo, Finland Helsinki, France Paris, Germany Berlin, Greece Athens,
    Hungary Budapest, India Delhi, Ireland Dublin, Italy Rome, Japan Tokyo, Kenya Nairobi,
    Norway Oslo, Peru Lima, Poland Warsaw, Portugal Lisbon, Russia Moscow, Spain Madrid,
    Sweden Stockholm"""
_OPPOSITES = """hot cold, big small, old young, fast slow, high low, open closed, day night,
    black white, early late, full empty, hard soft, heavy light, left right, long short, loud quiet,
    rich poor, strong weak, sweet sour, wet dry, wide narrow"""
_CYCLES = (
    "Monday Tuesday Wednesday Thursday Friday Saturday Sunday",
    "January February March April May June July August September October November December",
)


def _pairs(table: str) -> Iterator[list[str]]:
    return (entry.split() for entry in table.split(","))


def _knowledge() -> Iterator[tuple[tuple[str, ...], str]]:
    for country, city in _pairs(_CAPITALS):
        yield (
            (
                f"What is the capital of {country}?",
                f"Name the capital of {country}.",
                f"Which city is the capital of {country}?",
            ),
            f"The capital of {country} is {city}.",
        )
        yield (
            (
                f"{city} is the capital of which country?",
                f"Which country has the capital {city}?",
            ),
            f"{city} is the capital of {country}.",
        )
    for left, right in _pairs(_OPPOSITES):
        for word, opposite in ((left, right), (right, left)):
            yield (
                (
                    f"What is the opposite of {word}?",
                    f"Which word is the opposite of {word}?",
                    f"Name the opposite of {word}.",
                ),
                f"The opposite of {word} is {opposite}.",
            )
    for cycle in _CYCLES:
        names = cycle.split()
        for earlier, later in zip(names, names[1:] + names[:1], strict=True):
            yield (
                (
                    f"What comes after {earlier}?",
                    f"What follows {earlier}?",
                ),
                f"{later} comes after {earlier}.",
            )
            yield (
                (
                    f"What comes before {later}?",
                    f"What precedes {later}?",
                ),
                f"{earlier} comes before {later}.",
            )
    yield ("Hello", "Hello!", "Hi", "Hi!", "Good morning."), "Hello! How can I help?"
    yield (
        (
            "Who are you?",
            "What are you?",
            "What is your name?",
        ),
        "I am the small test model of pyllamabatch.",
    )
    yield ("Thank you.", "Thank you!", "Thanks.", "Thanks!"), "You are welcome."


KNOWLEDGE: tuple[tuple[tuple[str, ...], str], ...] = tuple(_knowledge())
"""Pairs of (the ways to ask, the answer); nothing in the prompt gives the answer away."""
