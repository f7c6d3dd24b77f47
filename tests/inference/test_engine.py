"""Continuous batching: a request gives what it gives alone, and what the whole rows say."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from seqeff.checks import ConfigError, UserError
from seqeff.data import Tokenizer
from seqeff.inference import Engine, Request, Sampling, failures, generation_context, most_kept_by
from seqeff.inference import engine as engine_module
from seqeff.models import DenseAttention, SeparatorAttention
from seqeff.models.flops import entries_of_tokens
from seqeff.models.positions import BilevelPositions, LearnedPositions

pytestmark = pytest.mark.usefixtures("quick_compilation")

CONTEXT = 160
GREEDY = Sampling(temperature=0.0)
SEPARATORS = tuple(range(2, 60, 5))
UNBOUNDED = SeparatorAttention(window=9, initial_tokens=2, separator_ids=SEPARATORS)
BOUNDED = dataclasses.replace(UNBOUNDED, separators=3)
ATTENTIONS = {
    "dense": {},
    "separators": {"attention": UNBOUNDED},
    "bounded": {"attention": BOUNDED},
    "compact": {"attention": dataclasses.replace(BOUNDED, positions="compact")},
    "published": {"attention": dataclasses.replace(BOUNDED, positions="compact", cache_entries=24)},
    "segments": {"positions": BilevelPositions(separator_ids=SEPARATORS)},
    "window": {"attention": DenseAttention(window=9)},
    "layers": {
        "layers": 4,
        "attention": UNBOUNDED,
        "layer_attention": {0: DenseAttention(), 1: DenseAttention(window=9), -1: BOUNDED},
    },
    "constant layers": {
        "layers": 3,
        "attention": BOUNDED,
        "layer_attention": {0: DenseAttention(window=5), -1: DenseAttention(window=30)},
    },
}


@pytest.fixture(scope="module")
def tokenizer(finished):
    return Tokenizer.load(finished / "tokenizer")


@pytest.fixture(scope="module")
def made(tiny):
    """A function of a name that gives a config and a model, whose next tokens are far apart."""
    found = {}

    def make(name):
        if name not in found:
            config = dataclasses.replace(tiny.load().model, **ATTENTIONS[name])
            found[name] = config, config.make(nnx.Rngs(3))
        return found[name]

    return make


def parameters_of(model):
    return nnx.to_pure_dict(nnx.split(model)[1])


def gather(engine, model, requests, prefix=()):
    """Each request's pieces, joined: text, ids, log-probabilities, and the reason."""
    found = {}
    for piece in engine.stream(engine.prepare(parameters_of(model)), requests, prefix):
        text, tokens, chances, reason = found.get(piece.request, ("", (), (), None))
        assert reason is None
        found[piece.request] = (
            text + piece.text,
            tokens + piece.tokens,
            chances + piece.log_probabilities,
            piece.reason,
        )
    return [found[number] for number in range(len(found))]


def prompts(*lengths, seed=0):
    drawn = np.random.default_rng(seed)
    return [drawn.integers(1, 290, length).tolist() for length in lengths]


@nnx.jit
def _logits(model, tokens):
    return model.logits(model(tokens))


def logits_of(model, tokens, size):
    """Of the whole row; what follows the tokens changes nothing."""
    row = np.zeros((1, -(-len(tokens) // 64) * 64), np.int32)
    row[0, : len(tokens)] = tokens
    return np.asarray(_logits(model, row)[0, : len(tokens), :size])


REQUESTS = [
    Request(prompt=prompt, tokens=tokens, sampling=sampling)
    for prompt, tokens, sampling in zip(
        prompts(5, 70, 1, 130, 64, 23, 9),
        (12, 3, 20, 9, 1, 17, 8),
        (
            GREEDY,
            Sampling(temperature=1.0, seed=1),
            GREEDY,
            Sampling(temperature=0.7, top_p=0.8, seed=2),
            Sampling(seed=3),
            GREEDY,
            Sampling(temperature=1.0, repetition_penalty=1.3, seed=4),
        ),
        strict=True,
    )
]


@pytest.mark.parametrize("name", [name for name in ATTENTIONS if name != "published"])
def test_greedy_tokens_are_the_likeliest_of_the_whole_row(name, made, tokenizer):
    config, model = made(name)
    requests = [dataclasses.replace(request, sampling=GREEDY) for request in REQUESTS]
    engine = Engine(config, tokenizer, slots=3, context=CONTEXT, steps=4)
    for request, found in zip(requests, gather(engine, model, requests), strict=True):
        _, tokens, chances, reason = found
        assert reason in ("length", "end")
        assert len(tokens) == request.tokens or reason == "end"
        whole = [*request.prompt, *tokens]
        logits = logits_of(model, whole, tokenizer.vocabulary_size)[len(request.prompt) - 1 : -1]
        # as near as float32 tells
        drawn = np.take_along_axis(logits, np.asarray(tokens, int)[:, None], 1)[:, 0]
        np.testing.assert_allclose(drawn, logits.max(1)[: len(tokens)], atol=1e-4)
        expected = drawn - np.asarray(jax.nn.logsumexp(logits, axis=1))
        np.testing.assert_allclose(chances, expected, atol=1e-4)


@pytest.mark.parametrize("name", ATTENTIONS)
def test_a_request_does_not_depend_on_the_others(name, made, tokenizer):
    config, model = made(name)
    kept = most_kept_by(config, REQUESTS)
    engine = Engine(config, tokenizer, slots=3, context=CONTEXT, kept=kept, steps=4)
    together = gather(engine, model, REQUESTS)
    assert len({tokens for _, tokens, _, _ in together}) == len(REQUESTS)
    for request, found in zip(REQUESTS, together, strict=True):
        (alone,) = gather(engine, model, [request])
        assert (alone[0], alone[1], alone[3]) == (found[0], found[1], found[3])
        np.testing.assert_allclose(alone[2], found[2], atol=1e-5)
    backwards = gather(engine, model, REQUESTS[::-1])[::-1]
    assert [x[1] for x in backwards] == [x[1] for x in together]


@pytest.mark.parametrize("name", ["dense", "bounded", "layers"])
def test_a_request_does_not_depend_on_the_others_to_the_last_bit(name, made, tokenizer):
    """In bfloat16, where the order of a sum shows, with prompts of all sizes in all company."""
    config, model = made(name)
    config = dataclasses.replace(config, dtype="bfloat16")
    lengths = np.random.default_rng(4).integers(1, 150, 24)
    samplings = (GREEDY, Sampling(temperature=1.0, seed=5), Sampling(top_k=50, seed=6))
    requests = [
        Request(prompt=prompt, tokens=1 + number % 7, sampling=samplings[number % 3])
        for number, prompt in enumerate(prompts(*lengths, seed=8))
    ]
    kept = most_kept_by(config, requests)
    engine = Engine(
        config,
        tokenizer,
        slots=8,
        context=CONTEXT,
        kept=kept,
        steps=2,
        chunks=(16, 64),
        prompt_rows=3,
    )
    together = gather(engine, model, requests)
    assert gather(engine, model, requests[::-1])[::-1] == together
    for request, found in zip(requests, together, strict=True):
        assert gather(engine, model, [request]) == [found]


def test_slots_and_steps_change_nothing(made, tokenizer):
    config, model = made("bounded")
    found = [
        [x[:2] for x in gather(Engine(config, tokenizer, slots=n, steps=k), model, REQUESTS)]
        for n, k in ((2, 1), (8, 3))
    ]
    assert all(other == found[0] for other in found)


def test_rows_past_the_slots_change_nothing(made, tokenizer, monkeypatch):
    config, model = made("bounded")
    expected = gather(Engine(config, tokenizer, slots=1), model, REQUESTS)
    monkeypatch.setattr(engine_module, "_LEAST_ROWS", {"cpu": 2})
    engine = Engine(config, tokenizer, slots=1)
    assert (engine.rows, engine.empty(count=engine.rows).cache.length.shape) == (2, (2,))
    most = []

    def watched(*arguments, **named):
        after, drawn = decode(*arguments, **named)
        most.append((after.left > 0).sum())
        return after, drawn

    decode, engine.decode = engine.decode, watched
    found = gather(engine, model, REQUESTS)
    assert [x[:2] for x in found] == [x[:2] for x in expected]
    assert max(most) == 1


def test_nothing_compiles_for_other_lengths(made, tokenizer):
    config, model = made("dense")
    engine = Engine(config, tokenizer, slots=5, context=CONTEXT, steps=2)
    sampling = Sampling(seed=7, top_k=50)
    lengths = (1, 40, 64, 65, 120)
    requests = [Request(prompt=p, tokens=6, sampling=sampling) for p in prompts(*lengths)]
    # many prompts and one, long and short ones, which have a chunk each
    for some in (requests, requests[:3], requests[:1], requests[-1:]):
        gather(engine, model, some)
    compiled = engine.read._cache_size(), engine.decode._cache_size()
    assert compiled == (2, 1)
    others = [
        Request(prompt=p, tokens=n, sampling=Sampling(seed=n, top_k=n, top_p=0.9, temperature=n))
        for n, p in enumerate(prompts(7, 99, 3, 151, 80, 12, 140, seed=1), 1)
    ]
    gather(engine, model, others)
    assert (engine.read._cache_size(), engine.decode._cache_size()) == compiled


def test_the_host_is_behind_the_device(made, tokenizer):
    """Calls are started before what earlier ones gave is read."""
    config, model = made("dense")
    engine = Engine(config, tokenizer, slots=1, context=CONTEXT, steps=1)
    started, decode = [], engine.decode

    def counted(*arguments, **named):
        started.append(None)
        return decode(*arguments, **named)

    engine.decode = counted
    request = Request(prompt=[3, 4], tokens=9, sampling=GREEDY)
    ahead = [len(started) for _ in engine.stream(engine.prepare(parameters_of(model)), [request])]
    # the first token is of the prompt's call
    assert ahead == [2, 3, 4, 5, 6, 7, 8, 8, 8]


def test_the_context_is_filled_and_not_exceeded(made, tokenizer):
    config, model = made("dense")
    engine = Engine(config, tokenizer, context=32, slots=2)
    longest = [
        Request(prompt=prompt, tokens=1000, sampling=GREEDY) for prompt in prompts(2, 31, seed=5)
    ]
    for request, (_, tokens, _, reason) in zip(
        longest, gather(engine, model, longest), strict=True
    ):
        assert reason == "end" or len(request.prompt) + len(tokens) == 32
    with pytest.raises(UserError, match="32 tokens; the context of 32 leaves room for 31"):
        gather(engine, model, [Request(prompt=[1] * 32, tokens=1)])


def test_prompts_that_are_none(made, tokenizer):
    config, model = made("dense")
    engine = Engine(config, tokenizer, context=64)
    for prompt in ([1, config.vocabulary_size], [-1], [0.5]):
        with pytest.raises(UserError, match="no id of the model: give whole numbers from 0 to"):
            gather(engine, model, [Request(prompt=prompt, tokens=1)])
    with pytest.raises(UserError, match="prompt is a text: give a list, of a tokenizer's ids"):
        Request(prompt="The", tokens=1)
    with pytest.raises(UserError, match="stops is a text: give a list, of texts"):
        Request(prompt=[1], tokens=1, stops="ab")


def test_it_ends_before_the_end_of_text(made, tokenizer, monkeypatch):
    config, model = made("dense")
    request = Request(prompt=[9], tokens=10, sampling=Sampling(seed=1, temperature=2.0))
    ((_, whole, _, _),) = gather(Engine(config, tokenizer, context=64, steps=3), model, [request])
    monkeypatch.setattr(tokenizer, "ends_of_text", (-1, whole[6]))
    engine = Engine(config, tokenizer, context=64, steps=3)
    ((_, tokens, chances, reason),) = gather(engine, model, [request])
    assert (tokens, reason) == (whole[: whole.index(whole[6])], "end")
    assert len(chances) == len(tokens)
    # another request takes the slot of one that ended early
    after = gather(engine, model, [request, dataclasses.replace(request, prompt=[8])])
    ((_, alone, _, _),) = gather(engine, model, [dataclasses.replace(request, prompt=[8])])
    assert [x[1] for x in after] == [tokens, alone]


@pytest.mark.parametrize("steps", [1, 7])
def test_stop_strings(made, tokenizer, steps, monkeypatch):
    config, model = made("bounded")
    monkeypatch.setattr(tokenizer, "ends_of_text", ())
    engine = Engine(config, tokenizer, slots=2, steps=steps)
    request = Request(prompt=[9, 30], tokens=40, sampling=Sampling(seed=1, temperature=1.5))
    ((text, tokens, _, _),) = gather(engine, model, [request])
    stop = text[10:13]
    stopped = dataclasses.replace(request, stops=[stop, "never there"])
    others = [request, stopped, dataclasses.replace(request, tokens=3), stopped]
    found = gather(engine, model, others)
    for cut, ids, _, reason in (found[1], found[3]):
        assert (cut, reason) == (text[: text.index(stop)], "stop")
        assert ids == tokens[: len(ids)]
    assert found[0][:2] == (text, tokens)


def test_prompts_of_any_length_where_every_layer_is_constant(made, tokenizer):
    """Batch mates far beyond any context, beside short ones."""
    for name in ("window", "constant layers"):
        config, model = made(name)
        assert generation_context(config, CONTEXT) is None
        long, short = (
            Request(prompt=prompt, tokens=6, sampling=GREEDY) for prompt in prompts(1100, 7)
        )
        engine = Engine(config, tokenizer, slots=2, steps=4)
        found = gather(engine, model, [long, short])
        for request, (_, tokens, _, reason) in zip((long, short), found, strict=True):
            assert reason in ("length", "end")
            logits = logits_of(model, [*request.prompt, *tokens], tokenizer.vocabulary_size)
            rows = logits[len(request.prompt) - 1 : -1]
            drawn = np.take_along_axis(rows, np.asarray(tokens, int)[:, None], 1)[:, 0]
            np.testing.assert_allclose(drawn, rows.max(1)[: len(tokens)], atol=1e-4)
        entries = [
            entries_of_tokens(config, jnp.asarray([[*r.prompt, *x[1]][: len(r.prompt) + 5]]), None)
            for r, x in zip((long, short), found, strict=True)
        ]
        assert engine.use.read == pytest.approx(sum(float(read.sum()) for read, _ in entries))
        assert engine.use.resident == max(int(most.max()) for _, most in entries)


def test_the_caches_use_is_that_of_the_mask(made, tokenizer):
    config, model = made("compact")
    assert generation_context(config, CONTEXT) is None
    engine = Engine(config, tokenizer)
    (prompt,) = prompts(1300)
    request = Request(prompt=prompt, tokens=6, sampling=GREEDY)
    ((_, tokens, _, _),) = gather(engine, model, [request])
    taken = jnp.asarray([[*prompt, *tokens][:-1]])
    entries, _ = entries_of_tokens(config, taken, None)
    assert (engine.use.tokens, engine.use.resident) == (taken.shape[1], 2 + 3 + 9)
    assert engine.use.read == pytest.approx(float(entries.sum()))


def test_requests_are_taken_as_slots_become_free(made, tokenizer):
    config, model = made("bounded")
    engine, taken, ended = Engine(config, tokenizer, slots=2, steps=2), [], []

    def endless():
        for number in range(1000):
            taken.append(number)
            yield Request(prompt=[number % 200 + 1], tokens=3, sampling=GREEDY)

    for piece in engine.stream(engine.prepare(parameters_of(model)), endless()):
        if piece.reason is not None:
            ended.append(piece.request)
        if len(ended) == 20:
            break
    assert sorted(ended) == list(range(20))
    assert len(taken) < 30


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"prompt": []}, UserError, "the prompt is empty"),
        ({"tokens": 0}, ConfigError, "Request.tokens = 0 must be at least 1"),
        ({"stops": ["a", ""]}, UserError, "a stop string is empty"),
    ],
)
def test_requests_that_cannot_be(values, error, message):
    with pytest.raises(error, match=message):
        Request(**{"prompt": [1], "tokens": 1, **values})


@pytest.mark.parametrize("values", [{"slots": 0}, {"steps": 0}, {"prompt_rows": 0}])
def test_engines_that_cannot_be(made, tokenizer, values):
    with pytest.raises(ConfigError, match=f"Engine.{next(iter(values))} = 0"):
        Engine(made("dense")[0], tokenizer, **values)


@pytest.mark.parametrize("name", ["dense", "separators", "published", "segments", "layers"])
def test_a_prefix_is_read_once(name, made, tokenizer):
    """What prompts that begin alike give, without reading their beginning again."""
    config, model = made(name)
    (prefix,) = prompts(75, seed=5)
    requests = [r for r in REQUESTS if len(r.prompt) + r.tokens + len(prefix) < CONTEXT]
    assert any(r.sampling.repetition_penalty != 1 for r in requests) and len(requests) > 4
    whole = [dataclasses.replace(r, prompt=[*prefix, *r.prompt]) for r in requests]
    kept = most_kept_by(config, whole)
    engine = Engine(config, tokenizer, slots=3, context=CONTEXT, kept=kept, steps=4)
    expected = gather(engine, model, whole)
    alone = engine.use
    without = gather(engine, model, requests)
    found = gather(engine, model, requests, prefix)
    for one, other in zip(found, expected, strict=True):
        assert (one[0], one[1], one[3]) == (other[0], other[1], other[3])
        np.testing.assert_allclose(one[2], other[2], atol=1e-5)
    assert engine.use.tokens == alone.tokens - (len(requests) - 1) * len(prefix)
    # the next stream knows nothing of it
    assert gather(engine, model, requests) == without
    assert not any(one[2] == other[2] for one, other in zip(found, without, strict=True))


def test_a_prefix_draws_nothing(made, tokenizer):
    """A token drawn after it would be penalised as one that the prompts hold."""
    config, model = made("dense")
    engine = Engine(config, tokenizer, slots=3, context=CONTEXT)
    read, starts = engine.read, []

    def watched(*arguments, start, **named):
        starts.append(start)
        return read(*arguments, start=start, **named)

    engine.read = watched
    prefix, prompt = prompts(40, 3, seed=6)
    gather(engine, model, [Request(prompt=prompt, tokens=2, sampling=GREEDY)], prefix)
    before, start = starts
    assert before is None
    assert np.flatnonzero(start.seen[0]).tolist() == sorted(set(prefix))


def test_a_cache_that_grows_wants_a_context(made, tokenizer):
    for name in ("dense", "separators"):
        with pytest.raises(ConfigError, match=r"Engine\.context = None is for models whose caches"):
            Engine(made(name)[0], tokenizer)


def test_room_for_known_requests(made, tokenizer):
    config, _ = made("dense")
    few = Engine.for_requests(config, tokenizer, iter(REQUESTS[:3]), slots=16)
    assert (few.slots, few.context) == (3, 256)
    many = Engine.for_requests(config, tokenizer, REQUESTS, slots=2, context=100)
    assert (many.slots, many.context) == (2, 100)
    long = [dataclasses.replace(REQUESTS[0], tokens=300)]
    assert Engine.for_requests(config, tokenizer, long, slots=1).context == 512
    assert Engine.for_requests(config, tokenizer, [], slots=4).slots == 1
    table = dataclasses.replace(config, positions=LearnedPositions(length=170))
    assert Engine.for_requests(table, tokenizer, REQUESTS, slots=1).context == 170
    assert Engine.for_requests(made("bounded")[0], tokenizer, long, slots=1).context is None


def test_room_for_kept_tokens_is_that_of_the_fullest_prompt(made, tokenizer):
    """Every entry of it a separator, where the room of the default would be the context's."""
    config, model = made("separators")
    (plain,) = prompts(200)
    requests = [Request(prompt=plain, tokens=900, sampling=GREEDY)]
    requests += [Request(prompt=SEPARATORS[:1] * 700, tokens=5, sampling=GREEDY)]
    engine = Engine.for_requests(config, tokenizer, requests, slots=2)
    expected = gather(Engine(config, tokenizer, slots=2, context=1280), model, requests)
    assert [x[1] for x in gather(engine, model, requests)] == [x[1] for x in expected]


def test_what_is_no_number_ends_its_request_alone(made, tokenizer):
    """Here a cache with less room than its separators need."""
    config, model = made("separators")
    full = Request(prompt=SEPARATORS[:1] * 90, tokens=9, sampling=GREEDY)
    # room for some of the tokens that are drawn
    filling = Request(prompt=SEPARATORS[:1] * 40, tokens=30, sampling=GREEDY)
    engine = Engine(config, tokenizer, slots=2, context=CONTEXT, kept=33, steps=4)
    others = REQUESTS[:1]
    expected = gather(engine, model, others)
    found = gather(engine, model, [full, *others, filling, *others])
    assert found[0] == ("", (), (), "not finite")
    assert found[1][:2] == found[3][:2] == expected[0][:2]
    assert engine.ended["not finite"] >= 1 and engine.ended.total() == 4
    broken = jax.tree.map(lambda x: x * jnp.nan, parameters_of(model))
    pieces = engine.stream(engine.prepare(broken), others)
    assert [(piece.tokens, piece.reason) for piece in pieces] == [((), "not finite")]
    assert failures(engine.ended).startswith("1 of 1 continuations end early, as the model's")
    gather(engine, model, others)
    assert failures(engine.ended) is None


def test_a_prefix_takes_its_room(made, tokenizer):
    config, model = made("dense")
    engine = Engine(config, tokenizer, context=20)
    prefix, prompt, long = prompts(12, 5, 8)
    ((_, tokens, _, reason),) = gather(engine, model, [Request(prompt=prompt, tokens=9)], prefix)
    assert reason in ("length", "end") and len(tokens) <= 3
    with pytest.raises(UserError, match="the prompt has 8 tokens; the context of 8 leaves room"):
        gather(engine, model, [Request(prompt=long, tokens=9)], prefix)
    with pytest.raises(UserError, match="the prompt has 24 tokens; the context of 20"):
        gather(engine, model, [Request(prompt=prompt, tokens=9)], prefix * 2)
