"""Choosing tokens for a batch at once: each request as alone, its distribution as transformers filters it."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from scipy.stats import chisquare
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from coterie.engine import sampling_stages
from coterie.engine.sampling import BatchSampler, check_biases
from coterie.engine.sampling_stages import STAGES, Noise, SampledText, gumbel
from coterie.errors import CoterieError
from coterie.settings.sampling import SamplingSettings

VOCABULARY = 67
few = settings(max_examples=40, deadline=None)

SAMPLINGS = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.0, 0.3, 1.0, 1.7]),
        "top_k": st.sampled_from([0, 1, 5, 40, 1000]),
        "top_p": st.sampled_from([1.0, 0.9, 0.5, 0.01]),
        "min_p": st.sampled_from([0.0, 0.05, 0.5, 1.0]),
        "repetition_penalty": st.sampled_from([1.0, 1.3, 0.8]),
        "presence_penalty": st.sampled_from([0.0, 0.7, -0.5]),
        "frequency_penalty": st.sampled_from([0.0, 0.4]),
        "logit_bias": st.sampled_from([[], ["3=7.5"], ["0=-100", "66=4"]]),
        "seed": st.sampled_from([0, 1, 2**40, 2**70]),
        "top_logprobs": st.sampled_from([0, 0, 3]),
    }
)
TEXTS = st.lists(st.integers(0, VOCABULARY - 1), max_size=12)


@pytest.fixture(scope="module", autouse=True)
def small_looks():
    """A small vocabulary is looked at in parts too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling_stages, "FEW", 3)
        patch.setattr(sampling_stages, "SOME", 20)
        yield


def logits_of(seed, *shape):
    return 3 * torch.randn(*shape, VOCABULARY, generator=torch.Generator().manual_seed(seed))


def stages_of(text, logits):
    return [stage([0], [text], logits) for stage in STAGES if stage.needed(text.settings)]


def filtered(text, logits):
    """What one request's logits become before noise is added."""
    scores = logits[None, None]
    for stage in stages_of(text, scores):
        if not isinstance(stage, Noise):
            scores = stage(scores, None)
    return scores[0, 0]


def text_of(own, prompt, answer=()):
    text = SampledText(own, [*prompt])
    text.ids += answer
    return text


def alone(own, prompt, logits, steps):
    """Tokens of a request that is by itself."""
    sampler, text, found = BatchSampler(), text_of(own, prompt), []
    for step in range(steps):
        found += sampler.choose([text], logits[None, step : step + 1])[0]
        text.ids.append(found[-1].id)
    return found


# ------------------------------------------------------------------------------------- the distribution, as elsewhere


@few
@given(own=SAMPLINGS, prompt=TEXTS, answer=TEXTS, seed=st.integers(0, 999))
def test_what_is_left_to_draw_from_is_what_the_processors_of_transformers_leave(own, prompt, answer, seed):
    elsewhere = {"presence_penalty": 0.0, "frequency_penalty": 0.0, "logit_bias": []}
    own = SamplingSettings(**{**own, **elsewhere, "temperature": own["temperature"] or 0.6})
    processors = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(own.repetition_penalty)])
    processors.append(TemperatureLogitsWarper(own.temperature))
    processors += [TopKLogitsWarper(own.top_k)] if own.top_k else []
    processors += [TopPLogitsWarper(own.top_p)] if own.top_p < 1 else []
    processors += [MinPLogitsWarper(own.min_p)] if own.min_p else []
    logits = logits_of(seed)
    text = torch.tensor([[*prompt, *answer]], dtype=torch.long)
    wanted = processors(text, logits[None].clone())[0].softmax(-1)
    found = filtered(text_of(own, prompt, answer), logits).softmax(-1)
    assert torch.equal(found > 0, wanted > 0)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-7)


def test_presence_and_frequency_penalties_are_those_of_openai():
    own = SamplingSettings(presence_penalty=0.5, frequency_penalty=0.25)
    logits = logits_of(1)
    found = filtered(text_of(own, [9, 9, 9], [4, 4, 4, 7]), logits)
    wanted = logits.clone()
    wanted[4] -= 3 * 0.25 + 0.5
    wanted[7] -= 0.25 + 0.5  # and the prompt does not count
    torch.testing.assert_close(found, wanted)


def test_a_bias_is_added_to_the_logit_and_no_log_probability_shows_it():
    logits = logits_of(2, 1)
    (token,) = alone(SamplingSettings(logit_bias={"5": 100}), [], logits, 1)
    assert token.id == 5 and token.logprob == pytest.approx(float(logits[0].log_softmax(-1)[5]))


def test_log_probabilities_and_the_likeliest_tokens_are_those_before_temperature_and_penalties():
    logits = logits_of(3, 1)
    logprobs = logits[0].log_softmax(-1)
    own = SamplingSettings(temperature=0.5, top_k=3, repetition_penalty=1.5, top_logprobs=4, seed=1)
    (token,) = alone(own, list(range(40)), logits, 1)
    values, ids = logprobs.topk(4)
    assert token.logprob == float(logprobs[token.id])
    assert token.top == tuple(zip(ids.tolist(), values.tolist(), strict=True))


@pytest.mark.parametrize(
    ("top_p", "looks", "count"), [(0.3, [3], 2), (0.5, [3, 20], 4), (0.99, [3, 20, 30], 21), (1.0, [], 30)]
)
def test_as_few_of_the_likeliest_tokens_are_sorted_as_hold_the_mass(monkeypatch, top_p, looks, count):
    """30 tokens, each a fifth less likely than the one before: 3 have 49% of the mass, 4 have 59%, 20 have 99%."""
    seen, topk = [], torch.Tensor.topk
    monkeypatch.setattr(torch.Tensor, "topk", lambda own, k, **kw: seen.append(k) or topk(own, k, **kw))
    logits = 0.8 ** torch.arange(30.0)[torch.randperm(30, generator=torch.Generator().manual_seed(1))]
    kept = filtered(SampledText(SamplingSettings(temperature=1.0, top_p=top_p), []), logits.log()) > -math.inf
    assert seen == looks
    assert int(kept.sum()) == count


# ------------------------------------------------------------------------------------------------------------- noise


@pytest.mark.parametrize("own", [{}, {"temperature": 0.5}, {"top_k": 6}, {"top_p": 0.7, "temperature": 1.5}], ids=str)
def test_tokens_are_drawn_with_their_probabilities(own):
    logits = 2 * torch.randn(12, generator=torch.Generator().manual_seed(4))
    text = SampledText(SamplingSettings(**{"temperature": 1.0, **own}), [])
    wanted = filtered(text, logits).double().softmax(-1)
    draws = 4000
    texts = [SampledText(text.settings.model_copy(update={"seed": seed}), []) for seed in range(draws)]
    drawn = torch.tensor([token.id for (token,) in BatchSampler().choose(texts, logits.expand(draws, 1, -1))])
    counts = drawn.bincount(minlength=12)
    assert not counts[wanted == 0].any()
    expected = draws * wanted / wanted.sum()
    often = expected >= 5  # the others count as one
    pools = [torch.cat([values[often], values[~often].sum()[None]]) for values in (counts, expected)]
    is_open = pools[1] > 0
    assert chisquare(pools[0][is_open], pools[1][is_open]).pvalue > 0.01


def test_the_places_of_one_answer_are_drawn_independently():
    """Pairs of neighbouring tokens, which one seed draws from a flat distribution of four, are all as frequent."""
    draws = 4000
    drawn = [token.id for token in alone(SamplingSettings(temperature=1.0), [], torch.zeros(draws, 4), draws)]
    pairs = torch.tensor([4 * a + b for a, b in pairwise(drawn)])
    assert chisquare(pairs.bincount(minlength=16)).pvalue > 0.01


def test_noise_is_finite_and_reaches_into_the_tail():
    """Of 400,000 draws the largest lies near log(400,000) = 12.9; noise of few bits has no such tail."""
    noise = gumbel(torch.tensor([0, 1]), torch.tensor([[0], [5]]), 200_000)
    assert noise.isfinite().all() and 11 < noise.max() < 25
    assert noise.mean() == pytest.approx(0.5772, abs=0.01) and noise.var() == pytest.approx(1.645, abs=0.03)


def splitmix64(counter, key):
    """The hash in Python's own integers."""
    x = (counter * 0x9E3779B97F4A7C15 + key) % 2**64
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
    return x ^ x >> 31


def test_noise_is_a_hash_of_seed_place_and_token():
    noise = gumbel(torch.tensor([7, 2**40]), torch.tensor([[3], [0]]), 5)
    for row, (seed, place) in enumerate([(7, 3), (2**40, 0)]):
        uniform = [(splitmix64(token + 1, splitmix64(place + 1, seed)) >> 1) / 2**63 for token in range(5)]
        wanted = [-math.log(-math.log1p(-u)) for u in uniform]
        assert noise[row, 0].tolist() == pytest.approx(wanted, rel=1e-5)


# ----------------------------------------------------------------------------------------------------- each as alone


@few
@given(data=st.data())
def test_a_batch_of_mixed_settings_gives_each_what_it_gets_alone(data):
    """Bit for bit, log-probabilities and all, whoever joins and leaves meanwhile, in whatever order."""
    count, steps = data.draw(st.integers(1, 5)), 6
    own = [SamplingSettings(**one) for one in data.draw(st.lists(SAMPLINGS, min_size=count, max_size=count))]
    prompts = data.draw(st.lists(TEXTS, min_size=count, max_size=count))
    logits = logits_of(data.draw(st.integers(0, 99)), count, steps + 1)
    starts = [data.draw(st.integers(0, 3)) for _ in range(count)]
    ends = [data.draw(st.integers(start + 1, steps + 1)) for start in starts]
    sampler, found = BatchSampler(), [[] for _ in range(count)]
    texts = [text_of(*pair) for pair in zip(own, prompts, strict=True)]
    for moment in range(steps + 1):
        there = [number for number in range(count) if starts[number] <= moment < ends[number]]
        if numbers := data.draw(st.permutations(there)):
            rows = torch.stack([logits[number, len(found[number])] for number in numbers])
            chosen = sampler.choose([texts[number] for number in numbers], rows[:, None])
            for number, (token,) in zip(numbers, chosen, strict=True):
                found[number].append(token)
                texts[number].ids.append(token.id)
    for number in range(count):
        assert len(found[number]) == ends[number] - starts[number]
        assert found[number] == alone(own[number], prompts[number], logits[number], len(found[number]))


@few
@given(own=SAMPLINGS, prompt=TEXTS, seed=st.integers(0, 99), data=st.data())
def test_drafts_are_taken_as_far_as_they_are_what_one_step_after_the_other_chooses(own, prompt, seed, data):
    """With the same tokens and log-probabilities, whatever is proposed and however much of it."""
    steps, own = 7, SamplingSettings(**own)
    logits = logits_of(seed, steps)
    wanted = alone(own, prompt, logits, steps)
    sampler, found = BatchSampler(), []
    texts = [SampledText(SamplingSettings(temperature=1.0), []), text_of(own, prompt)]
    while len(found) < steps:
        ahead = data.draw(st.integers(0, steps - len(found) - 1))
        good = data.draw(st.integers(0, ahead))
        drafts = [token.id for token in wanted[len(found) :][:good]]
        drafts += [data.draw(st.integers(-1, VOCABULARY - 1)) for _ in range(ahead - good)]
        rows = logits[len(found) : len(found) + ahead + 1]
        proposed = torch.tensor([[-1] * ahead, drafts]).long().view(2, ahead)
        other, tokens = sampler.choose(texts, torch.stack([torch.zeros_like(rows), rows]), proposed if ahead else None)
        assert len(other) == 1 and len(tokens) > good
        found += tokens
        texts[0].ids.append(other[0].id)
        texts[1].ids += [token.id for token in tokens]
    assert found == wanted[: len(found)]


def test_the_coldest_temperature_is_greedy():
    logits = logits_of(6, 5)
    assert alone(SamplingSettings(temperature=1e-45), [], logits, 5) == alone(SamplingSettings(), [], logits, 5)


def test_greedy_requests_need_no_stage():
    assert [stage for stage in STAGES if stage.needed(SamplingSettings(top_k=3, top_p=0.5, min_p=0.1))] == []


# ------------------------------------------------------------------------------------------------------ what is given


@pytest.mark.parametrize(
    "given",
    [
        {"min_p": 1.1},
        {"presence_penalty": 2.1},
        {"frequency_penalty": float("nan")},
        {"temperature": float("inf")},
        {"repetition_penalty": float("inf")},
        {"top_logprobs": 21},
        {"logit_bias": ["five=3"]},
        {"logit_bias": ["5"]},
        {"logit_bias": ["5=nan"]},
        {"logit_bias": ["5=101"]},
        {"logit_bias": ["-5=1"]},
        {"logit_bias": ["5=1", "05=2"]},
        {"logit_bias": {"٣": 1}},
    ],
    ids=str,
)
def test_a_setting_that_does_not_fit_is_refused(given):
    with pytest.raises(ValidationError):
        SamplingSettings(**given)


def test_biases_are_read_from_flags_and_from_what_a_server_is_sent():
    assert SamplingSettings(logit_bias=["12=-3.5", "0=100"]).biases() == {12: -3.5, 0: 100.0}
    assert SamplingSettings(logit_bias={"12": -3.5, 0: 100}).biases() == {12: -3.5, 0: 100.0}


def test_a_bias_of_a_token_that_the_model_lacks_is_refused():
    check_biases(SamplingSettings(logit_bias=["66=1"]), VOCABULARY)
    with pytest.raises(CoterieError, match="--logit-bias 67: the model's tokens have the ids 0 to 66"):
        check_biases(SamplingSettings(logit_bias=["66=1", "67=1"]), VOCABULARY)


def test_what_is_keyed_by_settings_is_found_again_when_there_are_more_of_them():
    acting = ("max_new_tokens", "temperature", "top_p", "top_k", "repetition_penalty", "stop", "seed")
    assert tuple(SamplingSettings().acting()) == acting
    assert SamplingSettings(min_p=0.1).acting()["min_p"] == 0.1
