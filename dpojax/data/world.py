"""The embedded default: a small world of posts, summaries and preferences with a known true reward.

A post tells six facts (who, what, where, how much, the feeling, the question) among everyday
chatter, some of it about other people and places. A summary keeps, drops, distorts or pads them.
The true reward counts what it did; the labels are drawn from that reward by Bradley-Terry.
Everything is a pure function of a seed: no file, no network.
"""

import functools
import io
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import sentencepiece

from dpojax.data.records import Records, in_memory
from dpojax.data.sentencepiece_tokenizer import SentencePieceTokenizer

VOCAB_SIZE = 1024

NAMES = (
    "Anna Ben Carla David Elena Felix Grace Henry Irene Jonas Katie Leon Maria Nina Oscar Paula"
    " Quentin Rosa Simon Tina Ursula Victor Wendy Xavier Yvonne Zoe Adam Bella Chris Diana Erik"
    " Fiona George Hannah Ivan Julia Karl Laura Martin Nora"
).split()

RELATIONS = "sister brother cousin roommate neighbor boss uncle aunt coworker landlord".split()

VERBS = (
    "broke sold lost borrowed stole damaged painted hid burned returned scratched dropped".split()
)

OBJECTS = (
    "laptop bicycle guitar camera phone car jacket watch necklace couch piano drone tent kayak"
    " printer blender lamp mirror carpet fridge oven radio violin scooter backpack helmet telescope"
    " keyboard monitor suitcase mattress bookshelf umbrella wallet passport toolbox heater vase"
    " clock tablet"
).split()

PLACES = (
    "Lisbon Oslo Berlin Dublin Prague Vienna Madrid Athens Warsaw Zurich Paris London Rome Turin"
    " Porto Geneva Bergen Munich Seville Krakow Boston Denver Austin Dallas Chicago Seattle"
    " Portland Phoenix Atlanta Houston Toronto Montreal Ottawa Sydney Perth Auckland Tokyo Osaka"
    " Seoul Lima"
).split()

AMOUNTS = "40 60 75 90 120 150 180 200 250 300 350 400 450 500 600 700 800 900 1000 1200".split()

FEELINGS = (
    "furious sad confused anxious hurt ashamed bitter jealous tired hopeless nervous guilty annoyed"
    " worried shocked lonely"
).split()

QUESTIONS = (
    "forgive them|call the police|ask for money|move out|talk to a lawyer|tell our family|wait a"
    " month|buy a new one|write a letter|change the locks|let it go|demand an apology|ask a"
    " friend|go to court|stay silent|leave town"
).split("|")

FACTS = {
    "name": NAMES,
    "object": OBJECTS,
    "place": PLACES,
    "amount": AMOUNTS,
    "feeling": FEELINGS,
    "question": QUESTIONS,
}

# How a post tells each fact; the true reward reads them back from here.
TOLD = {
    "main": (
        "Last {day} my {relation} {name} {verb} my {object}.",
        "So my {relation} {name} {verb} my {object} this {day}.",
        "On {day} my {relation} {name} {verb} my {object} again.",
    ),
    "place": (
        "It happened in {place}.",
        "All of this took place in {place}.",
        "We were in {place} that day.",
    ),
    "amount": (
        "It cost me {amount} dollars.",
        "That is {amount} dollars gone.",
        "I paid {amount} dollars for it.",
    ),
    "feeling": (
        "I feel {feeling} now.",
        "Honestly I am so {feeling}.",
        "It left me {feeling} all week.",
    ),
    "question": ("Should I {question}?", "Do I {question}?", "Is it right to {question}?"),
}

DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()

# Chatter: true of somebody else, or of nothing.
OTHERS = (
    "A friend called {name} says hello from {place}.",
    "{name} from work read this first.",
    "I grew up near {place}.",
    "Years ago I visited {place} with {name}.",
    "The weather in {place} is bad this year.",
)

WHO = "I we they people everyone".split()

DID = (
    "cooked watched cleaned carried painted visited opened planted washed noticed finished followed"
    " collected fixed counted missed pushed packed described repeated ignored avoided expected"
    " remembered"
).split()

THING = (
    "dinner garden window kitchen bottle ticket letter picture river market bridge movie blanket"
    " candle pocket basket corner ladder button pillow orange potato onion sandwich coffee"
    " breakfast holiday office school station airport hospital church village mountain forest"
    " island desert ocean shadow signal engine battery curtain drawer cupboard hallway balcony"
    " rooftop fountain statue painting poem novel magazine newspaper concert festival wedding"
    " funeral"
).split()

HOW = (
    "slowly quickly quietly loudly gently badly often rarely together alone yesterday today twice"
    " early late outside inside somewhere nearby upstairs downstairs forever almost simply"
    " carefully happily suddenly calmly proudly"
).split()

ASIDES = (
    "Sorry for the long post and for my writing.",
    "This is a throwaway account because people know me.",
    "I am on mobile so the format is a mess.",
    "English is not my first language.",
    "I never thought I would write here.",
    "Let me give some background first.",
)

TITLES = (
    "Need advice about my {relation}",
    "My {relation} went too far",
    "What would you do",
    "Trouble with my {relation}",
)

# Padding in a summary: words that say nothing.
PADDING = (
    "Thanks for reading this whole story.",
    "Anyway that is about it.",
    "Any advice would be really great.",
    "It is a long story to be honest.",
)


class Post(NamedTuple):
    """A post and the facts that it tells."""

    text: str  # the prompt, ending in "TL;DR:"
    facts: dict[str, str]  # keys of FACTS, with relation and verb


def _pick(rng: np.random.Generator, options: Sequence[str]) -> str:
    return options[int(rng.integers(len(options)))]


def _other(rng: np.random.Generator, options: Sequence[str], value: str) -> str:
    return _pick(rng, [o for o in options if o != value])


def make_post(rng: np.random.Generator) -> Post:
    """One post of 60 to 250 tokens."""
    facts = {key: _pick(rng, values) for key, values in FACTS.items()}
    facts |= {"relation": _pick(rng, RELATIONS), "verb": _pick(rng, VERBS), "day": _pick(rng, DAYS)}
    told = [_pick(rng, TOLD[key]).format(**facts) for key in ("main", "place", "amount", "feeling")]
    chatter = [_pick(rng, ASIDES)] if rng.random() < 0.5 else []
    for _ in range(1 + int(rng.geometric(0.35))):
        if rng.random() < 0.25:
            somebody = {
                "name": _other(rng, NAMES, facts["name"]),
                "place": _other(rng, PLACES, facts["place"]),
            }
            chatter.append(_pick(rng, OTHERS).format(**somebody))
        else:
            who, did, thing, how = (_pick(rng, words) for words in (WHO, DID, THING, HOW))
            chatter.append(f"{who.capitalize()} {did} the {thing} {how}.")
    sentences = told + chatter[:14]
    rng.shuffle(sentences)
    sentences.append(_pick(rng, TOLD["question"]).format(**facts))
    title = _pick(rng, TITLES).format(**facts)
    return Post(f"SUBREDDIT: r/advice\nTITLE: {title}\nPOST: {' '.join(sentences)}\nTL;DR:", facts)


def make_summary(rng: np.random.Generator, facts: dict[str, str]) -> str:
    """A summary of 10 to 40 tokens by a writer of random care, who drops, distorts and pads."""
    keep = _pick(rng, (0.45, 0.7, 0.95))  # pyright: ignore[reportArgumentType]
    distort = _pick(rng, (0.0, 0.1, 0.35))  # pyright: ignore[reportArgumentType]
    said = {
        key: (
            _other(rng, FACTS[key], value)
            if key in FACTS and rng.random() < float(distort)
            else value
        )
        for key, value in facts.items()
    }
    kept = {key: rng.random() < float(keep) for key in ("place", "amount", "feeling", "question")}
    if not any(kept.values()):
        kept[_pick(rng, list(kept))] = True
    where = " in {place}" if kept["place"] else ""
    parts = [f"My {{relation}} {{name}} {{verb}} my {{object}}{where}."]
    parts += ["It cost {amount} dollars."] * kept["amount"] + ["I feel {feeling}."] * kept[
        "feeling"
    ]
    parts += ["Should I {question}?"] * kept["question"]
    text = " ".join(parts).format(**said)
    amount = min(int(rng.choice(3, p=(0.5, 0.3, 0.2))), 1 if sum(kept.values()) > 2 else 2)
    padding = rng.choice(len(PADDING), amount, replace=False)
    return " " + " ".join([text, *(PADDING[i] for i in padding)])


def _pattern(template: str) -> str:
    """A told sentence as a regular expression with the facts as named groups."""
    # The first space is left out: a sentence may stand at the start of the post.
    pattern = re.escape(template).replace(r"\{", "{").replace(r"\}", "}")
    words = {**FACTS, "relation": RELATIONS, "verb": VERBS, "day": DAYS}
    for key, values in words.items():
        pattern = pattern.replace(f"{{{key}}}", f"(?P<{key}>{'|'.join(map(re.escape, values))})")
    return pattern


_TOLD = {key: [re.compile(_pattern(t)) for t in templates] for key, templates in TOLD.items()}

_VALUES = {
    key: re.compile(rf"\b({'|'.join(map(re.escape, values))})\b") for key, values in FACTS.items()
}

_KNOWN = {
    word
    for text in (
        *NAMES,
        *RELATIONS,
        *VERBS,
        *OBJECTS,
        *PLACES,
        *AMOUNTS,
        *FEELINGS,
        *QUESTIONS,
        *PADDING,
    )
    for word in re.findall(r"\w+", text)
} | set("My my in It cost dollars I feel Should".split())


def read_facts(prompt: str) -> dict[str, str]:
    """The facts that a post tells."""
    facts: dict[str, str] = {}
    for patterns in _TOLD.values():
        for pattern in patterns:
            if match := pattern.search(prompt):
                facts |= match.groupdict()
    return facts


def reward(prompt: str, summary: str) -> float:
    """The true reward of a summary.

    +1 for each of the six facts that it gives; -1.5 for a wrong value of one; -1 for each sentence
    of padding; -0.5 for each value said again and for each word that the world does not know.
    """
    facts = read_facts(prompt)
    score = 0.0
    for key, pattern in _VALUES.items():
        said = pattern.findall(summary)
        wrong = {value for value in said if value != facts.get(key)}
        score += (facts.get(key) in said) - 1.5 * len(wrong) - 0.5 * (len(said) - len(set(said)))
    # Padding is recognised by its sentences; a mangled one counts through its words' sentence all
    # the same.
    sentences = [s.strip() for s in re.split(r"(?<=[.?])", summary) if s.strip()]
    score -= sum(not re.match(r"(My|It cost|I feel|Should I)\b", s) for s in sentences)
    score -= 0.5 * sum(word not in _KNOWN for word in re.findall(r"\w+", summary))
    return score


def true_reward(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """The true reward of each response: what `sample.reward` names."""
    return [reward(p, r) for p, r in zip(prompts, responses, strict=True)]


class World(NamedTuple):
    """The three datasets, disjoint in their posts, and the tokenizer trained on the first."""

    demonstrations: Records  # prompt, completions: for the SFT stage
    train: Records  # prompt, chosen, rejected; of the world of sorting: prompt, answer
    eval: Records
    tokenizer: SentencePieceTokenizer


def _preference(rng: np.random.Generator, post: Post) -> dict[str, str]:
    while True:
        first = make_summary(rng, post.facts)
        second = make_summary(rng, post.facts)
        if first != second:
            break
    wins = rng.random() < 1 / (1 + np.exp(reward(post.text, second) - reward(post.text, first)))
    if wins:
        return {"prompt": post.text, "chosen": first, "rejected": second}
    return {"prompt": post.text, "chosen": second, "rejected": first}


def train_tokenizer(texts: Sequence[str]) -> SentencePieceTokenizer:
    """A sentencepiece BPE model of VOCAB_SIZE pieces; deterministic."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(texts),
        model_writer=model,
        vocab_size=VOCAB_SIZE,
        model_type="bpe",
        character_coverage=1.0,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        user_defined_symbols=["\n"],
        pad_id=3,
        num_threads=1,
        minloglevel=2,
    )
    return SentencePieceTokenizer(model.getvalue(), "embedded world")


@functools.lru_cache(maxsize=2)
def make_world(
    seed: int, *, num_posts: int = 8192, num_pairs: int = 6144, num_eval: int = 512
) -> World:
    """The world of a seed: demonstrations, preferences and held-out preferences.

    They are on different posts.
    """
    # any fixed number keeps the world apart from other uses of the seed
    rng = np.random.default_rng([seed, 20230529])
    posts = [make_post(rng) for _ in range(num_posts + num_pairs + num_eval)]
    demonstrated = posts[:num_posts]
    compared = posts[num_posts : num_posts + num_pairs]
    held_out = posts[num_posts + num_pairs :]
    rows = [
        {"prompt": p.text, "completions": [make_summary(rng, p.facts) for _ in range(3)]}
        for p in demonstrated
    ]
    train = [_preference(rng, p) for p in compared]
    evaluation = [_preference(rng, p) for p in held_out]
    tokenizer = train_tokenizer([r["prompt"] + "".join(r["completions"]) for r in rows[:2000]])
    return World(
        in_memory("world:demonstrations", rows),
        in_memory("world:train", train),
        in_memory("world:eval", evaluation),
        tokenizer,
    )
