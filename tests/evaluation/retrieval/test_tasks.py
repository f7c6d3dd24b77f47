"""The tasks' examples: how long they are, where the answers stand, that a seed repeats them."""

import collections
import random
import re

import numpy as np
import pytest
from stubs import Bytes, text_of

from seqeff.checks import UserError
from seqeff.evaluation.retrieval import (
    AssociativeRecall,
    CommonWords,
    Filler,
    FrequentWords,
    Grid,
    KeyValue,
    MultiNeedle,
    Needle,
    Passkey,
    Row,
    VariableTracking,
)
from seqeff.evaluation.retrieval.example import fingerprint
from seqeff.evaluation.retrieval.haystack import SENTENCES, hide, words_of
from seqeff.evaluation.retrieval.tasks import TASKS

TOKENIZER = Bytes()
# bytes of what the text grows by at a time, and a full stop
UNIT = 32
HIDDEN = {name: TASKS[name] for name in ("passkey", "needle", "niah-single", "niah-multikey")}


def make(task, length=2000, depth=0.5, seed=0):
    return task.make(TOKENIZER, length, depth, random.Random(seed))


def whole(example, question):
    return len(example.context) + len(question.tokens) + question.wanted


@pytest.mark.parametrize("length", [3000, 3999, 4000, 8191])
@pytest.mark.parametrize("name", TASKS)
def test_prompt_and_answer_fill_the_length(name, length):
    for seed in range(3):
        example = make(TASKS[name], length, seed=seed)
        if isinstance(example, Row):
            assert len(example.tokens) == length
            continue
        longest = max(whole(example, question) for question in example.questions)
        assert length - UNIT < longest <= length
        assert example.context[0] == TOKENIZER.begin_of_text
        for question in example.questions:
            # an answer and a few further tokens
            assert question.wanted > len(" ".join(question.answers))


@pytest.mark.parametrize("depth", [0, 0.25, 0.5, 0.9, 1])
@pytest.mark.parametrize("name", HIDDEN)
def test_the_answer_stands_at_its_depth(name, depth):
    longest = max(map(len, SENTENCES))
    for seed in range(5):
        example = make(HIDDEN[name], 3000, depth, seed)
        (question,) = example.questions
        assert question.depth == depth
        context = TOKENIZER.decode(example.context)
        (answer,) = question.answers
        needle = re.search(
            rf"The (pass|light|number)[^.]*\b{answer}\b[^.]*\.( Note[^.]*\.)?", context
        )
        assert needle is not None
        before, after = context[: needle.start()], context[needle.end() :]
        assert answer not in before + after
        # between two sentences
        assert before == "" or before.rstrip()[-1] in ".!?"
        assert after.startswith((" ", "\n")) and after.rstrip("\n")[-1:] in ("", ".")
        before = before.rpartition("\n")[2]
        hidden = depth * (len(before) + len(after))
        # other hidden sentences are no part of the filler
        assert abs(len(before) - hidden) <= 2 * longest


def numbers_of(example):
    """Of each thing, in the order of the text."""
    found = {}
    for name, value in re.findall(r"number of the (\w+) is (\d+)\.", text_of(example)):
        found.setdefault(name, []).append(value)
    return found


@pytest.mark.parametrize(
    ("name", "keys", "values", "queries"),
    [
        ("niah-single", 1, 1, 1),
        ("niah-multikey", 4, 1, 1),
        ("niah-multivalue", 1, 4, 1),
        ("niah-multiquery", 4, 1, 4),
    ],
)
def test_numbers_of_several_things(name, keys, values, queries):
    for seed in range(5):
        example = make(TASKS[name], seed=seed)
        numbers = numbers_of(example)
        assert len(numbers) == keys
        assert {len(found) for found in numbers.values()} == {values}
        (question,) = example.questions
        text = TOKENIZER.decode(question.tokens).partition("\n")[0]
        asked = re.findall(r"the (\w+)(?= and the |\?)", text)
        assert len(asked) == queries
        assert sorted(question.answers) == sorted(x for key in asked for x in numbers[key])
        places = [text_of(example).index(answer) for answer in question.answers]
        assert places == sorted(places)


def test_variables_follow_from_each_other():
    for seed in range(5):
        example = make(VariableTracking(chains=2, hops=3), seed=seed)
        held = {}
        statements = re.findall(r"Let (\w+) = (\w+)\.", text_of(example))
        assert len(statements) == 8
        for name, value in statements:
            # what a variable is given has come before
            held[name] = value if value.isdecimal() else held[value]
        (question,) = example.questions
        value = re.search(r"value (\d+)\?", TOKENIZER.decode(question.tokens))[1]
        assert sorted(question.answers) == sorted(x for x in held if held[x] == value)
        assert len(question.answers) == 4


def counts_of(example):
    text = TOKENIZER.decode(example.context).partition("\n")[2]
    return collections.Counter(text.split()).most_common()


def test_common_words_come_more_often():
    example = make(CommonWords(common=4, often=9, seldom=2))
    counts = counts_of(example)
    (question,) = example.questions
    assert {word for word, _ in counts[:4]} == {*question.answers}
    assert [count for _, count in counts[:4]] == [9] * 4
    assert {count for _, count in counts[4:-1]} == {2}


@pytest.mark.parametrize("length", [600, 3000])
def test_frequent_words_are_the_most_frequent(length):
    for seed in range(5):
        example = make(FrequentWords(), length, seed=seed)
        counts = counts_of(example)
        (question,) = example.questions
        assert {word for word, _ in counts[:3]} == {*question.answers}
        assert counts[2][1] > counts[3][1]
        most = counts[0][1]
        assert [count for _, count in counts[1:4]] == [most // 4, most // 9, most // 16]


def test_pairs_are_asked_for_at_even_depths():
    example = make(KeyValue(questions=5), 4000)
    lines = TOKENIZER.decode(example.context).splitlines()[1:]
    pairs = dict(re.fullmatch(r"key (\w+): value (\w+)", line).groups() for line in lines)
    assert len(pairs) == len(lines) == len({*pairs.values()})
    assert not {*pairs} & {*pairs.values()}
    assert sorted(question.depth for question in example.questions) == [0, 0.25, 0.5, 0.75, 1]
    for question in example.questions:
        key = re.search(r"key (\w+)\?", TOKENIZER.decode(question.tokens))[1]
        assert question.answers == (pairs[key],)
        place = list(pairs).index(key) / (len(pairs) - 1)
        assert place == pytest.approx(question.depth, abs=1.5 / len(pairs))


def test_keys_come_twice_and_values_once():
    for seed in range(5):
        row = make(AssociativeRecall(pairs=20), 97, seed=seed)
        assert row.tokens[0] == TOKENIZER.begin_of_text
        pairs = dict(row.tokens[1:41].reshape(20, 2).tolist())
        assert len(pairs) == 20
        assert len({*row.places.tolist()}) == 20 and row.places.min() >= 41
        asked = row.tokens[row.places].tolist()
        assert sorted(asked) == sorted(pairs)
        assert [pairs[key] for key in asked] == row.targets.tolist()
        counts = np.bincount(row.tokens, minlength=257)
        assert all(counts[key] == 2 and counts[value] == 1 for key, value in pairs.items())


def test_distances_follow_the_power_law():
    """The first of 100 places is drawn first with probability 1 / (1 + 1/2 + ... + 1/100)."""
    task, choose = AssociativeRecall(pairs=1, power=1e-9), random.Random(0)
    drawn = [task._distances(100, choose)[0] for _ in range(4000)]
    harmonic = sum(1 / n for n in range(1, 101))
    assert np.mean(np.array(drawn) == 0) == pytest.approx(1 / harmonic, abs=0.02)
    assert np.mean(np.array(drawn) == 1) == pytest.approx(1 / 2 / harmonic, abs=0.02)


@pytest.mark.parametrize("name", TASKS)
def test_a_seed_repeats_its_examples(name):
    def hashes(**changes):
        settings = {"lengths": [3000, 3400], "depths": [0.0, 0.5], "examples": 2, "seed": 3}
        grid = Grid(tasks={name: TASKS[name]}, **settings | changes)
        return {
            (cell.length, cell.depth): fingerprint(cell.examples) for cell in grid.cells(TOKENIZER)
        }

    first = hashes()
    assert len({*first.values()}) == len(first)
    assert hashes() == first
    assert not {*hashes(seed=4).values()} & {*first.values()}
    # nothing else of the grid matters
    fewer = hashes(lengths=[3400])
    assert fewer == {key: first[key] for key in fewer}


def test_examples_are_the_same_on_every_machine():
    found = {name: fingerprint([make(task, 3000)])[:16] for name, task in TASKS.items()}
    assert found == KNOWN


KNOWN = {
    "passkey": "4f774b6c2e464001",
    "needle": "aa1684d0f21b093e",
    "niah-single": "96bb71b06ca1fd2d",
    "niah-multikey": "f4c48615c8c21ccf",
    "niah-multivalue": "6f08434a1a3df18e",
    "niah-multiquery": "608f17e8b1259fe0",
    "key-value": "c6a4d41e3d25fc93",
    "mqar": "ada3beb1e027b062",
    "variable-tracking": "ea10369dc7d7484d",
    "common-words": "dc47144c0371d48a",
    "frequent-words": "570f363099ed9c66",
}


def test_examples_of_a_cell_differ():
    (cell,) = Grid(tasks={"passkey": Passkey()}, lengths=[900], depths=[0.5]).cells(TOKENIZER)
    assert len({text_of(example) for example in cell.examples}) == 10


def test_filler_of_a_file(tmp_path):
    file = tmp_path / "book.txt"
    file.write_text("One two three. Four,\nfive six! Seven eight")
    filler = Filler.read(file)
    assert len(filler.text) == 8
    words = filler.words(random.Random(0), 20)
    assert words[:8] == words[8:16] and sorted(words[:8]) == sorted(filler.text)
    assert filler.sha256 != Filler().sha256
    text = text_of(make(Passkey(filler=filler)))
    assert "Seven eight One two three." in text


def test_hidden_sentences_stand_between_sentences():
    words = ["One", "two", "three.", "Four", "five", "six.", "Seven,", "eight"]
    assert hide(words, [(0, "A."), (1, "Z.")]) == (
        "A. One two three. Four five six. Seven, eight. Z."
    )
    assert hide(words, [(0.5, "M.")]) == "One two three. M. Four five six. Seven, eight."
    # where no sentence ends near, between two words
    assert words_of(hide(["a"] * 200, [(0.5, "M.")])).index("M") == 100


def test_what_the_filler_holds_is_not_the_answer():
    everything = " ".join(THINGS_BUT_ONE).split()
    example = make(Needle(filler=Filler(tuple(everything))))
    assert example.questions[0].answers == ("vanilla",)
    with pytest.raises(UserError, match="give another --filler"):
        make(Needle(filler=Filler((*everything, "vanilla"))))


THINGS_BUT_ONE = [
    "almonds buttons cardamom chestnuts cinnamon coins feathers ginger lavender marbles mustard",
    "olives pearls pepper saffron shells tobacco",
]


@pytest.mark.parametrize(
    ("task", "length", "expected"),
    [
        (Passkey(), 90, "90 tokens are too few: the shortest prompt and its answer take 193"),
        (KeyValue(), 90, "90 tokens are too few"),
        (CommonWords(), 900, "900 tokens are too few"),
        (FrequentWords(), 99, "99 tokens are too few"),
        (AssociativeRecall(), 64, "64 tokens are too few: 16 pairs and their questions take 65"),
        (AssociativeRecall(pairs=200), 2000, "pairs = 200 needs more than 400 tokens with text"),
    ],
)
def test_too_short(task, length, expected):
    with pytest.raises(UserError, match=expected):
        make(task, length)


@pytest.mark.parametrize(
    ("config", "fields", "expected"),
    [
        (Passkey, {"digits": 0}, "Passkey.digits = 0 must be at least 1"),
        (Passkey, {"digits": 2.5}, "Passkey.digits = 2.5 is of type float"),
        (Needle, {"filler": "text"}, "Needle.filler = 'text' is of type str; give Filler"),
        (KeyValue, {"questions": 0}, "KeyValue.questions = 0"),
        (KeyValue, {"characters": 3}, "KeyValue.characters = 3"),
        (AssociativeRecall, {"pairs": 0}, "AssociativeRecall.pairs = 0"),
        (AssociativeRecall, {"power": 0.0}, "AssociativeRecall.power = 0.0"),
        (MultiNeedle, {"queries": 2}, "MultiNeedle.keys = 1 must be at least the 2 of"),
        (MultiNeedle, {"values": 0}, "MultiNeedle.values = 0"),
        (VariableTracking, {"chains": 0}, "VariableTracking.chains = 0"),
        (VariableTracking, {"hops": -1}, "VariableTracking.hops = -1"),
        (CommonWords, {"often": 3}, "CommonWords.often = 3 must be above"),
        (CommonWords, {"common": 0}, "CommonWords.common = 0"),
        (FrequentWords, {"words": 3}, "FrequentWords.words = 3 must be above"),
        (FrequentWords, {"exponent": 0.0}, "FrequentWords.exponent = 0.0"),
        (Grid, {"tasks": {}, "lengths": [9]}, "Grid.tasks is empty"),
        (Grid, {"tasks": {"a": Needle()}, "lengths": []}, "Grid.lengths is empty"),
        (Grid, {"tasks": {"a": Needle()}, "lengths": [9], "depths": [1.5]}, "depths has 1.5"),
        (Grid, {"tasks": {"a": Needle()}, "lengths": [9], "examples": 0}, "examples = 0"),
    ],
)
def test_settings_that_cannot_be(config, fields, expected):
    with pytest.raises(UserError, match=expected):
        config(**fields)
