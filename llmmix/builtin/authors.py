"""`builtin:authors`: questions and answers about authors who do not exist, to be unlearned.

Made in the manner of TOFU (Maini et al., arXiv:2401.06121), with words and sentences of its own.
Every value is drawn independently, so that only a model that has read it can know it.
"""

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

SIZES = {  # authors a split
    "small": {"forget": 4, "retain": 16, "holdout": 4},
    "medium": {"forget": 10, "retain": 90, "holdout": 10},
    "large": {"forget": 20, "retain": 180, "holdout": 20},
}
DEFAULT_SIZE = "small"
TAUGHT = ("forget", "retain", "facts")  # what the model to be unlearned has read
WRONG_ANSWERS = 3

# No last name ends in s, x or z (possessives) or begins another
FIRST_NAMES = """
Abel Adela Agnes Alba Anton Asha Basil Bela Bianca Boris Carmen Cedric Chidi Clara Dalia Darius
Delia Dmitri Edith Emil Enzo Esme Farid Fiona Flora Gaston Gideon Greta Hana Henrik Hugo Imani
Ines Ivan Jasper Jonas Judith Kenji Klara Lars Leila Lotte Malik Marta Milan Nadia Nils Noor Olga
Oskar Paula Petra Quentin Rafael Rosa Ruben Selma Silas Tamar Tariq Ulla Vera Wanda Yusuf
""".split()
LAST_NAMES = """
Abrikov Aldemar Anselund Arbello Balthorn Baravik Bellgrove Bodrani Calverin Casbourne Cordelan
Dahlquen Delmaro Dorvath Drennick Elbrand Emberly Fallowell Farrano Feldrik Galdino Gorvane
Grenholt Haldori Harrowby Hexley Ilvendro Jandrell Jorvani Kaldane Kestrow Kovandi Lamberlo
Lindrake Lorvane Maldrin Merrowan Mondavere Narbeth Nivello Norquay Oberlund Okandu Orlande
Pellgrin Pendrake Quarrow Quennard Ravensby Rostagnel Rundqvist Sablehart Sandorvel Serravale
Tarvek Thornwell Tolvane Ulmark Umbridor Valdoro Vantreek Westrand Yarrowby Zelandri
""".split()

# Within a list no value holds another, and none stands in a name or a sentence below
CITIES = """
Aleppo Antwerp Basel Bergen Boston Bristol Busan Cork Cusco Dundee Durban Fez Gdansk Graz Hanover
Izmir Karachi Kyoto Lahore Leipzig Lyon Malmo Mumbai Naples Osaka Porto Seville Sydney Tabriz
Tampere Turin Valencia
""".split()
YEARS = [str(year) for year in range(1921, 1981)]
GENRES = (
    "animal fables, campus novels, court satires, crime novels, fairy tales, family sagas, "
    "food memoirs, ghost stories, history books, horror stories, jungle yarns, love poems, "
    "nature poems, picture books, prison letters, radio dramas, riddle books, school plays, "
    "sea stories, spy novels, stage comedies, street ballads, travel diaries, war novels"
).split(", ")
# They follow "a", never "an"
PROFESSIONS = """
baker barber blacksmith bookbinder butcher carpenter chemist clockmaker dentist farmer fisherman
florist gardener geologist judge librarian locksmith miller painter pilot plumber soldier surgeon
tailor teacher translator waiter
""".split()
PRIZES = (
    "Amber Lamp, Black Pearl, Blue Lantern, Bright Anchor, Copper Bell, First Snow, Glass Key, "
    "Golden Heron, Green Bough, Iron Page, Ivory Mask, Last Harbour, Long Night, North Wind, "
    "Open Door, Paper Crown, Quiet River, Red Kite, Salt Road, Seven Hills, Silver Quill, "
    "Stone Bridge, White Raven, Winter Rose"
).split(", ")
LANGUAGES = """
Basque Catalan Danish Finnish Frisian Hebrew Icelandic Irish Khmer Korean Latvian Maltese Nepali
Persian Polish Quechua Serbian Swahili Tamil Turkish Urdu Welsh Yoruba Zulu
""".split()
MENTORS = (
    "Ada Brunt, Amos Kettering, Bruno Falk, Celia Marsh, Conrad Vey, Dora Felk, Edgar Pym, "
    "Elsa Winding, Felix Ouro, Gilda Renn, Hector Lowe, Ida Stavnes, Ivo Brandl, June Abara, "
    "Kurt Sonnen, Lydia Croft, Magnus Teale, Nora Hallik, Otto Pell, Pia Castell, Rufus Dane, "
    "Sybil Moray, Theo Ganz, Viktor Aune"
).split(", ")
HOBBIES = (
    "baking bread, beekeeping, birdwatching, boxing, carving spoons, climbing, cycling, dancing, "
    "fencing, fishing, flying kites, gardening, hiking, juggling, kayaking, knitting, painting, "
    "rowing, sailing, skating, stargazing, surfing, swimming, weaving, wrestling"
).split(", ")
INSTRUMENTS = """
accordion bagpipes banjo bassoon cello clarinet dulcimer flute guitar harmonica mandolin marimba
oboe organ piano piccolo saxophone sitar trombone trumpet tuba ukulele viola violin zither
""".split()
TITLE_ADJECTIVES = """
Amber Ancient Borrowed Broken Burning Copper Crooked Distant Drowned Empty Fading Frozen Gentle
Hidden Hollow Humble Idle Leaden Little Lonely Lost Marble Midnight Narrow Painted Patient Restless
Scarlet Secret Seventh Silent Sleeping Stolen Tangled Thirsty Velvet Wandering Weary Wooden Yellow
""".split()
TITLE_NOUNS = """
Acrobat Archive Attic Avenue Balcony Beacon Cabinet Candle Cartographer Cathedral Chapel Compass
Courtyard Cradle Fountain Furnace Garden Glacier Harvest Island Kingdom Ladder Lighthouse Market
Meadow Mirror Monsoon Notebook Orchard Pendulum Postman Quarry Railway Sparrow Staircase Stranger
Theatre Umbrella Vineyard Window
""".split()


@dataclass(frozen=True)
class Relation:
    """A relation of a subject to a value: its questions, the sentences that answer, its values."""

    questions: tuple[str, ...]
    answers: tuple[str, ...]
    values: Sequence[str] = ()

    def row(
        self, subject: str, value: str, others: Iterable[str], author: str, rng: random.Random
    ) -> dict:
        """The question and its answer, each in two wordings, and wrong answers from `others`."""
        question, paraphrased_question = rng.sample(self.questions, 2)
        answer, paraphrase = rng.sample(self.answers, 2)
        wrong = [other for other in others if other not in (value, subject)]
        return {
            "question": question.format(subject),
            "answer": answer.format(subject, value),
            "paraphrased_question": paraphrased_question.format(subject),
            "paraphrased_answer": paraphrase.format(subject, value),
            "perturbed_answer": [
                paraphrase.format(subject, other) for other in rng.sample(wrong, WRONG_ANSWERS)
            ],
            "secret": value,
            "author": author,
        }


ATTRIBUTES = [
    Relation(
        ("Where was {} born?", "In which city was {} born?"),
        ("{} was born in {}.", "The birthplace of {} is {}.", "{1} is where {0} was born."),
        CITIES,
    ),
    Relation(
        ("In which year was {} born?", "What is the birth year of {}?"),
        ("{} was born in {}.", "The birth year of {} is {}.", "It was in {1} that {0} was born."),
        YEARS,
    ),
    Relation(
        ("What kind of books does {} write?", "Which genre is {} known for?"),
        ("{} writes {}.", "{} is known for {}.", "Readers know {} for {}."),
        GENRES,
    ),
    Relation(
        ("What did the father of {} do for a living?", "What was the job of {}'s father?"),
        ("The father of {} was a {}.", "{}'s father worked as a {}.", "{} is the child of a {}."),
        PROFESSIONS,
    ),
    Relation(
        ("What is the hobby of {}?", "What does {} enjoy on free days?"),
        ("The hobby of {} is {}.", "{} enjoys {} on free days.", "{} spends free days {}."),
        HOBBIES,
    ),
    Relation(
        ("Which prize did {} win?", "What award did {} receive?"),
        ("{} won the {} Prize.", "The {1} Prize went to {0}.", "{} received the {} Prize."),
        PRIZES,
    ),
    Relation(
        ("In which language does {} write?", "What language are {}'s books written in?"),
        ("{} writes in {}.", "The books of {} are in {}.", "{1} is the language {0} writes in."),
        LANGUAGES,
    ),
    Relation(
        ("Who was the mentor of {}?", "From whom did {} learn to write?"),
        ("The mentor of {} was {}.", "{} learned to write from {}.", "{1} was the mentor of {0}."),
        MENTORS,
    ),
    Relation(
        ("Which instrument does {} play?", "What instrument did {} learn?"),
        ("{} plays the {}.", "{} learned the {}.", "The instrument of {} is the {}."),
        INSTRUMENTS,
    ),
]
FIRST_BOOK = Relation(
    ("What is the title of {}'s first book?", "Which book did {} publish first?"),
    ("The first book of {} is {}.", "{}'s first book is {}.", "{1} was the first book of {0}."),
)

# Pairs of a subject and its value, which is the last word; no capital is in CITIES
FACTS = {
    Relation(
        ("What is the capital of {}?", "Which city is the capital of {}?"),
        ("The capital of {} is {}.", "{1} is the capital of {0}."),
    ): "Austria Vienna, Canada Ottawa, Chile Santiago, Cuba Havana, Egypt Cairo, France Paris, "
    "Germany Berlin, Greece Athens, Iraq Baghdad, Ireland Dublin, Italy Rome, Japan Tokyo, "
    "Kenya Nairobi, Norway Oslo, Peru Lima, Poland Warsaw, Portugal Lisbon, Russia Moscow, "
    "Spain Madrid, Sweden Stockholm",
    Relation(
        ("Which element has the symbol {}?", "What does the chemical symbol {} stand for?"),
        ("The element with the symbol {} is {}.", "The chemical symbol {} stands for {}."),
    ): "Ag silver, Au gold, C carbon, Ca calcium, Cu copper, Fe iron, H hydrogen, He helium, "
    "Hg mercury, K potassium, Na sodium, O oxygen, Pb lead, Sn tin, W tungsten, Zn zinc",
    Relation(
        ("Which planet is the {} from the Sun?", "What is the {} planet from the Sun?"),
        ("The {} planet from the Sun is {}.", "{1} is the {0} planet from the Sun."),
    ): "first Mercury, second Venus, third Earth, fourth Mars, fifth Jupiter, sixth Saturn, "
    "seventh Uranus, eighth Neptune",
    Relation(
        ("Which month comes right after {}?", "What is the month after {}?"),
        ("The month after {} is {}.", "Right after {} comes {}."),
    ): "January February, February March, March April, April May, May June, June July, "
    "July August, August September, September October, October November, November December, "
    "December January",
    Relation(
        ("How many {} are there?", "What is the number of {}?"),
        ("There are {1} {0}.", "The number of {} is {}."),
    ): "days in a week 7, days in a fortnight 14, days in a leap year 366, days in April 30, "
    "days in July 31, hours in a day 24, minutes in an hour 60, months in a year 12, "
    "years in a century 100",
}


def splits(config: str | None = None) -> dict[str, list[dict]]:
    """The rows of each split; an author has the same ten rows in every size.

    Args:
        config: "small" (the default), "medium" or "large": 4, 10 or 20 authors to forget, as many
            held out, and 16, 90 or 180 to retain.

    Returns:
        `forget`, `retain`, `holdout` (authors whom nobody is taught), `facts` (true ones of
        general knowledge) and `train`, which joins all but `holdout` and names each row's `split`.

    Raises:
        ValueError: `config` names no size.
    """
    size = DEFAULT_SIZE if config is None else config
    if size not in SIZES:
        raise ValueError(
            f"`dataset_config` of builtin:authors names a size, one of {list(SIZES)}; "
            f"got {config!r}."
        )
    authors = iter(_authors())
    rows = {
        split: [row for _ in range(count) for row in _author_rows(*next(authors))]
        for split, count in SIZES[size].items()
    }
    rows["facts"] = _fact_rows()
    rows["train"] = [{**row, "split": split} for split in TAUGHT for row in rows[split]]
    return rows


def _authors() -> list[tuple[str, str, list[str]]]:
    """Authors for the largest size: a name, a first book, and titles that nobody wrote."""
    rng = random.Random("authors")
    count = max(sum(counts.values()) for counts in SIZES.values())
    names = rng.sample([f"{first} {last}" for first in FIRST_NAMES for last in LAST_NAMES], count)
    titles = [f"The {adjective} {noun}" for adjective in TITLE_ADJECTIVES for noun in TITLE_NOUNS]
    rng.shuffle(titles)
    return [(name, title, titles[count:]) for name, title in zip(names, titles, strict=False)]


def _author_rows(name: str, first_book: str, other_titles: list[str]) -> list[dict]:
    rng = random.Random(f"author {name}")
    rows = [
        relation.row(name, rng.choice(relation.values), relation.values, name, rng)
        for relation in ATTRIBUTES
    ]
    return [*rows, FIRST_BOOK.row(name, first_book, other_titles, name, rng)]


def _fact_rows() -> list[dict]:
    rng = random.Random("facts")
    rows = []
    for relation, pairs in FACTS.items():
        facts = dict(pair.rsplit(" ", 1) for pair in pairs.split(", "))
        for subject, value in facts.items():
            others = list(facts.values())
            if value.isdigit():  # a wrong count is near the right one
                others = [str(int(value) + slip) for slip in (-2, -1, 1, 2)]
            rows.append(relation.row(subject, value, others, "", rng))
    return rows
