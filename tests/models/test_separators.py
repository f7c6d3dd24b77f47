"""Which tokens count as separators, and what the config refuses."""

import re

import jax.numpy as jnp
import numpy as np
import pytest
from model_cases import quick_jit

from seqeff.checks import ConfigError
from seqeff.models import SeparatorAttention

TEXTS = [
    "a",
    ".",
    " the",
    ".\n\n",
    "),",
    ". ",
    "),(",
    "\t",
    "?!",
    ".a",
    "",
    "\u00e9;",
    ":x:",
    "\u3002",
]


def test_separators_are_the_tokens_that_end_with_a_character():
    derived = SeparatorAttention().for_vocabulary(TEXTS)
    assert [TEXTS[i] for i in derived.separator_ids] == [
        *(".", ".\n\n", "),", ". ", "\t", "?!", "\u00e9;", ":x:")
    ]
    assert derived.for_vocabulary(TEXTS) == derived


def test_the_characters_are_configurable():
    assert SeparatorAttention(characters="a").for_vocabulary(TEXTS).separator_ids == (0, 9)
    assert SeparatorAttention(characters="\u3002").for_vocabulary(TEXTS).separator_ids == (13,)
    assert SeparatorAttention(characters="").for_vocabulary(TEXTS).separator_ids == ()


def test_given_ids_are_kept():
    given = SeparatorAttention(separator_ids=(4, 2)).for_vocabulary(TEXTS)
    assert given.separator_ids == (4, 2)


@pytest.mark.parametrize(
    ("preset", "vocabulary_size", "ids"),
    [
        ("pythia", 50304, (15, 13, 32, 2, 28, 27, 209, 186, 187)),
        (
            "pythia-streaming",
            50304,
            (
                *(15, 13, 32, 2, 28, 27, 209, 186, 187, 964, 1157, 3736, 2195, 3706, 1163, 2490),
                *(50276, 586, 4928, 50275),
            ),
        ),
        ("llama3", 128256, (13, 11, 30, 0, 26, 25, 198, 220, 128000)),
        (
            "llama3-streaming",
            128256,
            (13, 11, 30, 0, 26, 25, 198, 220, 662, 1174, 949, 758, 2652, 551, 720, 256, 262),
        ),
        (
            "llama3-sepcache",
            128256,
            (
                *(13, 11, 30, 0, 26, 25, 198, 220, 662, 1174, 949, 758, 2652, 551, 720, 256, 262),
                128000,
            ),
        ),
        ("falcon", 65024, (25, 23, 42, 12, 38, 37, 193, 4610, 204, 258, 1212, 23787, 466)),
    ],
)
def test_presets(preset, vocabulary_size, ids):
    attention = SeparatorAttention(preset=preset)
    vocabulary = ["a"] * vocabulary_size
    for i in ids:
        vocabulary[i] = " ."
    assert attention.for_vocabulary(vocabulary).separator_ids == ids
    with pytest.raises(ConfigError, match="lie outside the tokenizer's 100 tokens"):
        attention.for_vocabulary(vocabulary[:100])


def test_a_preset_needs_its_own_tokenizer():
    attention = SeparatorAttention(preset="pythia", characters="")
    vocabulary = ["a"] * 300
    for i in (15, 13, 32, 2):
        vocabulary[i] = "."
    with pytest.raises(
        ConfigError, match="preset = 'pythia' is for another tokenizer: 4 of its 9 ids end with"
    ):
        attention.for_vocabulary(vocabulary)
    vocabulary[28] = "\n"
    assert len(attention.for_vocabulary(vocabulary).separator_ids) == 9


def test_ids_that_the_tokens_never_reach_are_no_separators():
    tokens = np.array([[0, 9, 1, 9, 0, 0]])
    attention = SeparatorAttention(window=1, initial_tokens=0, separator_ids=(1,))
    plan = quick_jit(lambda tokens: attention.plan(tokens, None))(tokens)
    np.testing.assert_array_equal(plan.kept[0].packed.count[0], [0, 0, 1, 1, 1, 1])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"window": 0}, "SeparatorAttention.window = 0 must be at least 1"),
        ({"initial_tokens": -1}, "SeparatorAttention.initial_tokens = -1 must not be negative"),
        ({"preset": "opt"}, "SeparatorAttention.preset = 'opt' is not one of pythia, pythia-str"),
        ({"separator_ids": (3, -1)}, "SeparatorAttention.separator_ids = (3, -1) must not be neg"),
        ({"separator_ids": (1.5,)}, "SeparatorAttention.separator_ids = (1.5,) is of type tuple"),
        (
            {"characters": None},
            "SeparatorAttention.characters = None is of type NoneType; give str",
        ),
    ],
)
def test_bad_fields(fields, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        SeparatorAttention(**fields)


def test_vocabularies_that_do_not_fit():
    with pytest.raises(ConfigError, match=r"characters = '#': no token of the tokenizer ends with"):
        SeparatorAttention(characters="#").for_vocabulary(TEXTS)
    with pytest.raises(
        ConfigError, match=r"separator ids \[14, 99\] lie outside the tokenizer's 14"
    ):
        SeparatorAttention(separator_ids=(3, 14, 99)).for_vocabulary(TEXTS)
    with pytest.raises(ConfigError, match="call for_vocabulary with the tokenizer's vocabulary"):
        SeparatorAttention().plan(jnp.zeros((1, 3), jnp.int32), None)
