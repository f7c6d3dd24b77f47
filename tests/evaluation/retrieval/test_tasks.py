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
    KeyHaystack,
    KeyValue,
    MultiKey,
    MultiNeedle,
    Needle,
    Passkey,
    Retrieval,
    Row,
    VariableTracking,
)
from seqeff.evaluation.retrieval.example import fingerprint
from seqeff.evaluation.retrieval.haystack import SENTENCES, hide, words_of
from seqeff.evaluation.retrieval.tasks import TASKS

TOKENIZER = Bytes()
# bytes of what the text grows by at a time, and a full stop
UNIT = {"key-value": 80}
TASK = {name: task() for name, task in TASKS.items()}
HIDDEN = ("passkey", "needle", "niah-single", "niah-multikey", "niah-haystack")


def make(task, length=2000, depth=0.5, seed=0):
    return task.make(TOKENIZER, length, depth, random.Random(seed))


def whole(example, question):
    return len(example.context) + len(question.tokens) + question.wanted


@pytest.mark.parametrize("length", [3000, 3999, 4000, 8191])
@pytest.mark.parametrize("name", TASKS)
def test_prompt_and_answer_fill_the_length(name, length):
    for seed in range(3):
        example = make(TASK[name], length, seed=seed)
        if isinstance(example, Row):
            assert len(example.tokens) == length
            continue
        longest = max(whole(example, question) for question in example.questions)
        assert length - UNIT.get(name, 32) < longest <= length
        assert example.context[0] == TOKENIZER.begin_of_text
        for question in example.questions:
            # an answer and a few further tokens
            assert question.wanted > len(" ".join(question.answers))


@pytest.mark.parametrize("depth", [0, 0.25, 0.5, 0.9, 1])
@pytest.mark.parametrize("name", HIDDEN)
def test_the_answer_stands_at_its_depth(name, depth):
    longest = max(map(len, SENTENCES))
    for seed in range(5):
        example = make(TASK[name], 3000, depth, seed)
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
        example = make(TASK[name], seed=seed)
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


def test_a_haystack_of_needles():
    """One asked for, and the text is those of other keys."""
    for seed in range(5):
        example = make(KeyHaystack(), 3000, 0.25, seed)
        numbers = numbers_of(example)
        assert len(numbers) > 50 and {len(found) for found in numbers.values()} == {1}
        (question,) = example.questions
        (key,) = re.findall(r"number of the (\w+)\?", TOKENIZER.decode(question.tokens))
        assert question.answers == (*numbers[key],)
        assert abs([*numbers].index(key) / len(numbers) - 0.25) < 0.05


def test_variables_follow_from_each_other():
    for seed in range(5):
        example = make(VariableTracking(chains=2, hops=3), seed=seed)
        (question,) = example.questions
        shot, text = text_of(example).split("\n\n")
        solved = re.search(r"the variables are (.*)\.$", shot)[1].split(", ")
        for part, answers, letters in ((shot, solved, 3), (text, question.answers, 5)):
            held = {}
            statements = re.findall(r"Let (\w+) = (\w+)\.", part)
            assert len(statements) == 8
            for name, value in statements:
                # what a variable is given has come before
                held[name] = value if value.isdecimal() else held[value]
                assert len(name) == letters
            value = re.search(r"variables, 4 in all, have the value (\d{5})\?", part)[1]
            assert sorted(answers) == sorted(x for x in held if held[x] == value)


def counts_of(text):
    """Of the words of a list, the second line."""
    return collections.Counter(text.split("\n")[1].split()).most_common()


def common_words(text):
    """Of the words of a numbered list."""
    places = re.findall(r"(\d+)\. (\w+)", text.split("\n")[1])
    assert [int(number) for number, _ in places] == [*range(1, len(places) + 1)]
    return collections.Counter(word for _, word in places).most_common()


@pytest.mark.parametrize(
    ("task", "length", "often", "seldom", "words", "shot"),
    [
        # as the published code has them
        (CommonWords(), 12000, 30, 3, 10, (40, 10, 3)),
        (CommonWords(), 4095, 6, 1, 10, (20, 3, 1)),
        (CommonWords(common=4, often=9, seldom=2), 2000, 9, 2, 4, (14, 3, 1)),
    ],
)
def test_common_words_come_more_often(task, length, often, seldom, words, shot):
    example = make(task, length)
    (question,) = example.questions
    before, text = text_of(example).split("\n\n")
    counts = common_words(text)
    assert {word for word, _ in counts[:words]} == {*question.answers}
    assert [count for _, count in counts[:words]] == [often] * words
    assert {count for _, count in counts[words:-1]} == {seldom}
    counts = common_words(before)
    solved = re.search(r"the words are (.*)\.$", before)[1].split(", ")
    assert {word for word, _ in counts[:words]} == {*solved}
    assert {count for _, count in counts[:words]} == {shot[1]}
    assert {count for _, count in counts[words:]} == {shot[2]} and len(counts) == shot[0]


@pytest.mark.parametrize("task", [CommonWords(shots=0), VariableTracking(shots=0)])
def test_without_shots(task):
    assert "\n\n" not in text_of(make(task, 2000))


@pytest.mark.parametrize("length", [600, 3000])
def test_frequent_words_are_the_most_frequent(length):
    for seed in range(5):
        example = make(FrequentWords(), length, seed=seed)
        (dots, most), *counts = counts_of(text_of(example))
        (question,) = example.questions
        assert dots == "..." and {word for word, _ in counts[:3]} == {*question.answers}
        assert counts[2][1] > counts[3][1]
        # every word that comes at all
        assert [count for _, count in counts] == [most // k**2 for k in range(2, len(counts) + 2)]
        assert most < (len(counts) + 2) ** 2


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
        grid = Retrieval(tasks={name: TASK[name]}, **settings | changes)
        return {
            (cell.length, cell.depth): fingerprint(cell.examples)
            for cell in grid.cells(TOKENIZER, 3000)
        }

    first = hashes()
    assert len({*first.values()}) == len(first)
    assert hashes() == first
    assert not {*hashes(seed=4).values()} & {*first.values()}
    # nothing else of the grid matters
    fewer = hashes(lengths=[3400])
    assert fewer == {key: first[key] for key in fewer}


def test_examples_are_the_same_on_every_machine():
    found = {name: fingerprint([make(task, 3000)])[:16] for name, task in TASK.items()}
    assert found == KNOWN


KNOWN = {
    "passkey": "4f774b6c2e464001",
    "needle": "aa1684d0f21b093e",
    "niah-single": "96bb71b06ca1fd2d",
    "niah-multikey": "f4c48615c8c21ccf",
    "niah-haystack": "22a1f8e1fae24a4e",
    "niah-multivalue": "6f08434a1a3df18e",
    "niah-multiquery": "608f17e8b1259fe0",
    "key-value": "5e197e7924fbc6ed",
    "mqar": "9093b50dc8e5e827",
    "variable-tracking": "bad5aed9fabf3146",
    "common-words": "c4a80b78d3d2ffd7",
    "frequent-words": "9c9bee851686712b",
}


def test_examples_of_a_cell_differ():
    (cell,) = Retrieval(tasks={"passkey": Passkey()}, lengths=[900], depths=[0.5]).cells(
        TOKENIZER, 3000
    )
    assert len({text_of(example) for example in cell.examples}) == 10


def test_filler_of_a_file(tmp_path):
    file = tmp_path / "book.txt"
    file.write_text("One two three. Four,\nfive six! Seven eight")
    filler = Filler(str(file))
    words = filler.words(random.Random(0), 20)
    assert words[:8] == words[8:16] and sorted(words[:8]) == sorted(file.read_text().split())
    assert filler.words(random.Random(1), 3) != words[:3]
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


def test_what_the_filler_holds_is_not_the_answer(tmp_path):
    all_but_one, all_things = tmp_path / "most.txt", tmp_path / "all.txt"
    all_but_one.write_text(" ".join(THINGS_BUT_ONE))
    all_things.write_text(" ".join([*THINGS_BUT_ONE, "vanilla"]))
    example = make(Needle(filler=Filler(str(all_but_one))))
    assert example.questions[0].answers == ("vanilla",)
    with pytest.raises(UserError, match="give another --filler"):
        make(Needle(filler=Filler(str(all_things))))


THINGS_BUT_ONE = [
    "almonds buttons cardamom chestnuts cinnamon coins feathers ginger lavender marbles mustard",
    "olives pearls pepper saffron shells tobacco",
]


@pytest.mark.parametrize(
    ("task", "length", "expected"),
    [
        (KeyHaystack(), 90, "90 tokens are too few"),
        (Passkey(), 90, "90 tokens are too few: the shortest prompt and its answer take 193"),
        (KeyValue(), 90, "90 tokens are too few"),
        (CommonWords(), 900, "900 tokens are too few"),
        (FrequentWords(), 99, "99 tokens are too few"),
        (AssociativeRecall(), 32, "32 tokens are too few: 8 pairs and their questions take 33"),
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
        (CommonWords, {"often": 3}, "CommonWords.often = 3 must be above CommonWords.seldom = 3"),
        (CommonWords, {"common": 0}, "CommonWords.common = 0"),
        (CommonWords, {"often": 0}, "CommonWords.often = 0 must be above"),
        (VariableTracking, {"shots": -1}, "VariableTracking.shots = -1"),
        (MultiKey, {"queries": 5}, "MultiKey.keys = 4 must be at least the 5 of MultiKey.queries"),
        (FrequentWords, {"exponent": 0.0}, "FrequentWords.exponent = 0.0"),
        (Retrieval, {"tasks": {}, "lengths": [9]}, "Retrieval.tasks is empty"),
        (Retrieval, {"tasks": {"a": Needle()}, "lengths": [0]}, "Retrieval.lengths has 0"),
        (Retrieval, {"tasks": {"a": Needle()}, "lengths": [9], "depths": [1.5]}, "depths has 1.5"),
        (Retrieval, {"tasks": {"a": Needle()}, "lengths": [9], "examples": 0}, "examples = 0"),
    ],
)
def test_settings_that_cannot_be(config, fields, expected):
    with pytest.raises(UserError, match=expected):
        config(**fields)
