"""Weights that follow the text: the published formula, the wrapper's laws, and parity with slow loops."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
from coterie.data.batching import TokenRow
from coterie.data.examples import load_examples
from coterie.errors import CoterieError
from coterie.experts.bank import ExpertBank
from coterie.features.embedding import HiddenStateEncoder, with_answers
from coterie.features.growing_text import AveragedStates, FeatureExtractor, WholeTexts
from coterie.routers.base import Router, RouterParts, Routing
from coterie.routers.centroid import (
    CentroidRouter,
    NullExpert,
    Weighting,
    boosted_weights,
    check_dimensions,
    null_similarity,
)
from coterie.routers.derived import DerivedRouter
from coterie.routers.feature import growing_text_extractor
from coterie.routers.fixed import uniform
from coterie.routers.table import load_router
from coterie.routers.token import TokenLevel
from helpers import close, same_answers

QUESTIONS = load_examples(tiny.make_rows(4, seed=5))
TOKENS = 7
SIZE = 16


def letters(rows) -> torch.Tensor:
    """A cheap description that every token moves: how often tokens of each residue stand in the text."""
    counts = torch.zeros(len(rows), SIZE)
    for number, row in enumerate(rows):
        for token, counted in zip(row.ids, row.is_user_text, strict=True):
            counts[number, token % SIZE] += counted
    return counts


LETTERS = FeatureExtractor("letters", letters, {})


@pytest.fixture(scope="module")
def by_letters(mixture):
    generator = torch.Generator().manual_seed(3)
    names = mixture.bank.names
    return CentroidRouter.by_similarity(
        LETTERS, {name: torch.rand(1, SIZE, generator=generator) - 0.4 for name in names}
    )


@pytest.fixture(scope="module")
def by_states(mixture):
    description, encoder = growing_text_extractor("hidden", 6, mixture.backbone)
    generator = torch.Generator().manual_seed(4)
    centroids = {name: torch.randn(2, encoder.dimensions, generator=generator) for name in mixture.bank.names}
    return CentroidRouter.by_similarity(description, centroids, weighting=Weighting(0.05))


@pytest.fixture(params=["letters", "states"])
def router(request, by_letters, by_states):
    return by_letters if request.param == "letters" else by_states


# ----------------------------------------------------------------------------------------------------- the weighting


@pytest.mark.parametrize(
    ("cosines", "weights"),
    [
        ((0.5, 0.3, 0.25, 0.2), (0.657, 0.120, 0.114, 0.109)),
        ((0.8, 0.2, 0.1, 0.1), (0.877, 0.048, 0.044, 0.044)),
    ],
)
def test_the_published_weighting_on_worked_numbers(cosines, weights):
    boosted = [4 * cosines[0], *cosines[1:]]
    total = sum(map(math.exp, boosted))
    found = boosted_weights(torch.tensor([cosines]))[0].tolist()
    assert found == pytest.approx([math.exp(value) / total for value in boosted], abs=1e-6)
    assert found == pytest.approx(weights, abs=1.5e-2)


def test_of_equal_similarities_the_first_is_boosted():
    first, second = boosted_weights(torch.tensor([[0.5, 0.5]]))[0].tolist()
    assert first == pytest.approx(math.exp(2) / (math.exp(2) + math.exp(0.5)))
    assert second < first


@pytest.mark.parametrize("cosines", [(-0.1, -0.5), (0.0, -0.2)])
def test_boosting_never_pushes_the_most_similar_expert_down(cosines):
    found = boosted_weights(torch.tensor([cosines]))[0]
    close(found, torch.tensor(cosines).softmax(dim=0))
    assert int(found.argmax()) == 0


@settings(deadline=None, max_examples=30)
@given(st.lists(st.floats(-1, 1, width=32), min_size=2, max_size=6), st.floats(0.125, 2, width=32))
def test_weights_are_a_distribution_that_keeps_the_order(cosines, temperature):
    for weighting in (Weighting(), Weighting(temperature)):
        found = weighting(torch.tensor([cosines]))[0]
        assert float(found.sum()) == pytest.approx(1, abs=1e-5)
        assert cosines[int(found.argmax())] >= max(cosines) - 1e-5  # nearer ones may get equal weights


def test_the_temperature_is_that_of_a_softmax_over_cosines():
    close(Weighting(0.25)(torch.tensor([[0.5, 0.25]])), torch.tensor([[math.e, 1.0]]) / (math.e + 1))


# -------------------------------------------------------------------------------------------------------- the router


def described(features) -> FeatureExtractor:
    return FeatureExtractor("given", lambda rows: torch.as_tensor(features, dtype=torch.float32), {})


def row(*ids: int) -> TokenRow:
    return TokenRow(ids, len(ids), (False,) * len(ids), (True,) * len(ids))


def test_an_expert_with_several_centroids_is_as_similar_as_the_nearest_or_as_all_on_average():
    centroids = {"a": torch.tensor([[1.0, 0.0], [0.0, 2.0]]), "b": torch.tensor([[-1.0, 0.0]])}
    nearest = CentroidRouter.by_similarity(described([[3.0, 4.0]]), centroids).route([row(1)])
    assert [float(nearest.similarities[name]) for name in "ab"] == pytest.approx([0.8, -0.6])
    mean = CentroidRouter.by_similarity(described([[3.0, 4.0]]), centroids, pool="mean").route([row(1)])
    assert [float(mean.similarities[name]) for name in "ab"] == pytest.approx([0.7, -0.6])


def test_the_null_expert_takes_over_where_nothing_is_similar():
    centroids = {"a": torch.tensor([[1.0, 0.0, 0.0]]), "b": torch.tensor([[0.0, 1.0, 0.0]])}
    null = NullExpert("null", 0.3)
    features = [[1.0, 0.1, 0.0], [0.1, 0.2, 1.0], [0.0, 0.0, 0.0]]
    for weighting in (Weighting(), Weighting(0.1)):
        router = CentroidRouter.by_similarity(described(features), centroids, weighting=weighting, null=null)
        found = router.route([row(1)] * 3)
        assert found.experts == ("a", "b", "null")
        assert [found.experts[i] for i in found.weights.argmax(dim=1)] == ["a", "null", "null"]


def test_the_null_similarity_leaves_the_share_that_was_asked_for_below():
    own = torch.arange(101) / 100
    assert null_similarity(own, 0.05) == pytest.approx(0.05)
    assert int((own < null_similarity(own, 0.2)).sum()) == 20


def test_permuting_experts_permutes_their_weights(by_states, mixture):
    rows = mixture.tokens(QUESTIONS)
    names = list(by_states.centroids)[::-1]
    turned = CentroidRouter.by_similarity(
        by_states.extractor, {name: by_states.centroids[name] for name in names}, weighting=by_states.weighting
    )
    one, other = by_states.route(rows), turned.route(rows)
    assert other.experts == one.experts[::-1]
    close(other.weights, one.weights.flip(1))


def test_a_centre_is_subtracted_from_every_embedding():
    centroids = {"a": torch.tensor([[1.0, 0.0]]), "b": torch.tensor([[0.0, 1.0]])}
    centred = CentroidRouter.by_similarity(described([[5.0, 4.0]]), centroids, centre=torch.tensor([5.0, 3.0])).route(
        [row(1)]
    )
    assert [float(centred.similarities[name]) for name in "ab"] == pytest.approx([0.0, 1.0])


# ------------------------------------------------------------------------------------------- weights along an answer


def layers(mixture, router, **options):
    return mixture.replace(router=TokenLevel(router, **options), combiner="layers")


def test_without_renewal_it_is_the_routing_of_the_prompt(mixture, router):
    wanted = mixture.replace(router=router, combiner="layers").generate(QUESTIONS, max_new_tokens=TOKENS)
    for found, other in zip(
        layers(mixture, router, every=None).generate(QUESTIONS, max_new_tokens=TOKENS), wanted, strict=True
    ):
        assert found == other
    late = layers(mixture, router, every=TOKENS).generate(QUESTIONS, max_new_tokens=TOKENS)
    same_answers(late, wanted)
    for found, other in zip(late, wanted, strict=True):
        assert found.weights == pytest.approx(other.weights, abs=1e-5)


def test_the_weights_do_change_and_are_shared_by_every_n_tokens(mixture, router):
    """States of a token come one step after it, so the second token still has the prompt's weights there."""
    lag = 1 if router.extractor is LETTERS else 2
    for every in (1, 2, 3):
        answer = layers(mixture, router, every=every).generate(QUESTIONS[:1], max_new_tokens=TOKENS)[0]
        weights = answer.trace.weights
        assert len(weights) == len(answer.token_ids) == len(answer.trace.pieces)
        assert "".join(answer.trace.pieces) == answer.text
        for place in range(1, len(weights)):
            assert (weights[place] == weights[place - 1]) == (place % every != 0 or place < lag)


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("cache", ["keep", "recompute"])
@pytest.mark.parametrize("combiner", ["layers", "weights"])
def test_requests_answer_alike_alone_and_together(mixture, router, every, cache, combiner):
    """Together, rows that are merged by their weights change places whenever the weights do."""
    cell = mixture.replace(router=TokenLevel(router, every, cache), combiner=combiner)
    together = cell.generate(QUESTIONS, max_new_tokens=TOKENS, batch_size=3)
    for answer, question in zip(together, QUESTIONS, strict=True):
        alone = cell.generate([question], max_new_tokens=TOKENS)[0]
        assert answer.token_ids == alone.token_ids
        close(answer.logprobs, alone.logprobs)
        close(answer.trace.weights, alone.trace.weights)


@pytest.mark.parametrize("cache", ["keep", "recompute"])
def test_requests_that_finish_leave_and_the_others_keep_their_own_weights(mixture, router, cache):
    cell = layers(mixture, router, every=1, cache=cache)
    whole = [answer.trace.pieces for answer in cell.generate(QUESTIONS, max_new_tokens=TOKENS)]
    for stop in ([piece] for pieces in whole for piece in pieces if piece):
        together = cell.generate(QUESTIONS, max_new_tokens=TOKENS, stop=stop, batch_size=len(QUESTIONS))
        if len({len(answer.token_ids) for answer in together}) > 1:
            break
    else:
        pytest.fail(f"no stop ends these answers at different times: {whole}")
    for answer, question in zip(together, QUESTIONS, strict=True):
        alone = cell.generate([question], max_new_tokens=TOKENS, stop=stop)[0]
        assert answer.token_ids == alone.token_ids
        close(answer.trace.weights, alone.trace.weights)


@pytest.mark.parametrize("every", [1, 3])
def test_a_cache_that_is_kept_or_recomputed_is_the_same_for_constant_weights(mixture, every):
    wanted = mixture.replace(router="uniform", combiner="layers").generate(QUESTIONS, max_new_tokens=TOKENS)
    for cache in ("keep", "recompute"):
        cell = layers(mixture, uniform(mixture.bank.names), every=every, cache=cache)
        same_answers(cell.generate(QUESTIONS, max_new_tokens=TOKENS), wanted)


def slow_weights(cell, question, answer) -> list[torch.Tensor]:
    """Every token's weights, by routing the text before it as a whole, in the published order of things."""
    prompt, every = cell.tokens([question])[0], cell.router.every
    texts = [prompt.extended(answer.token_ids[: every * (k // every)]) for k in range(len(answer.token_ids))]
    return [cell.router.router.route([text]).aligned(cell.bank.names).weights[0] for text in texts]


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("cache", ["keep", "recompute"])
def test_decoding_equals_a_slow_loop_without_a_cache(mixture, by_letters, every, cache):
    """Kept, every position's keys and values stem from the weights of its own time; recomputed, all from the last."""
    cell = layers(mixture, by_letters, every=every, cache=cache)
    answer = cell.generate(QUESTIONS[:1], max_new_tokens=TOKENS)[0]
    prompt = cell.tokens(QUESTIONS[:1])[0]
    weights = slow_weights(cell, QUESTIONS[0], answer)
    close(answer.trace.weights, torch.stack(weights))
    for k in range(len(answer.token_ids)):
        text = [*prompt.ids, *answer.token_ids[: k + 1]]
        earlier = weights[:1] * (len(prompt.ids) - 1) + weights[: k + 1]  # the last token is not read
        of_time = torch.stack(earlier) if cache == "keep" else weights[k].expand(len(text) - 1, -1)
        with torch.inference_mode(), cell.layers.running(cell.layers.weighted(of_time[None])):
            state = cell.backbone.hidden(torch.tensor([text[:-1]]))[0, -1]
        close(answer.logprobs[k], cell.backbone.head(state).log_softmax(dim=-1)[text[-1]])


def test_the_cache_does_matter_where_weights_change(mixture, by_letters):
    kept, anew = (
        layers(mixture, by_letters, every=1, cache=cache).generate(QUESTIONS[:1], max_new_tokens=TOKENS)[0]
        for cache in ("keep", "recompute")
    )
    assert kept.logprobs != pytest.approx(anew.logprobs, abs=1e-4)


@pytest.mark.parametrize("every", [1, 2, 5])
@pytest.mark.parametrize("cache", ["keep", "recompute"])
def test_given_answers_are_scored_as_if_they_had_been_written(mixture, router, every, cache):
    cell = layers(mixture, router, every=every, cache=cache)
    answers = cell.generate(QUESTIONS, max_new_tokens=TOKENS)
    answers[1] = cell.generate(QUESTIONS[1:2], max_new_tokens=2)[0]  # answers of unequal length
    found = cell.score_teacher_forced(cell.tokens(QUESTIONS), [answer.token_ids for answer in answers])
    for scored, answer in zip(found, answers, strict=True):
        close(scored.logprobs, answer.logprobs)
        assert bool(scored.is_greedy.all())


def test_the_likelihood_of_references_follows_the_weights(mixture, by_letters):
    rows = [mixture.prompts.row(example) for example in QUESTIONS]
    cell = layers(mixture, by_letters, every=2)
    found = cell.score_rows(rows, cell.router.route([r.prompt() for r in rows]), "test")
    prompt_only = mixture.replace(router=by_letters, combiner="layers")
    other = prompt_only.score_rows(rows, prompt_only.router.route([r.prompt() for r in rows]), "test")
    assert found.tokens.tolist() == other.tokens.tolist()
    assert not torch.allclose(found.nll, other.nll, atol=1e-4)
    alone = cell.score_rows(rows[:1], cell.router.route([rows[0].prompt()]), "test")
    close(found.nll[0, 0], alone.nll[0, 0])


def test_merging_anew_equals_mixing_in_the_layers(mixture, router):
    inside, merged = (
        mixture.replace(router=TokenLevel(router, 1), combiner=name).generate(QUESTIONS, max_new_tokens=TOKENS)
        for name in ("layers", "weights")
    )
    same_answers(inside, merged)


def test_the_published_merge_is_another_mixture(mixture, by_letters):
    cell = mixture.replace(router=TokenLevel(by_letters, 1, "recompute"), combiner="weights:peft-0.4-linear")
    exact = layers(mixture, by_letters, every=1, cache="recompute")
    one, other = (c.generate(QUESTIONS[:1], max_new_tokens=3)[0] for c in (cell, exact))
    assert one.logprobs != pytest.approx(other.logprobs, abs=1e-4)


def test_a_temperature_near_zero_is_the_most_similar_expert_alone(mixture):
    centroids = {name: torch.eye(SIZE)[place : place + 1] for place, name in enumerate(mixture.bank.names)}
    describe = FeatureExtractor("given", lambda rows: torch.eye(SIZE)[1].expand(len(rows), -1), {})
    router = TokenLevel(CentroidRouter.by_similarity(describe, centroids, weighting=Weighting(1e-4)), every=1)
    found = mixture.replace(router=router, combiner="layers").generate(QUESTIONS, max_new_tokens=TOKENS)
    wanted = mixture.replace(router=mixture.bank.names[1], combiner="logits").generate(QUESTIONS, max_new_tokens=TOKENS)
    same_answers(found, wanted)


def test_experts_are_found_by_name_in_a_bank_of_another_order(mixture, router):
    bank = mixture.bank
    turned = replace(mixture, bank=ExpertBank(bank.names[::-1], bank.adapters[::-1]))
    one, other = (layers(m, router, every=1).generate(QUESTIONS, max_new_tokens=TOKENS) for m in (mixture, turned))
    same_answers(one, other)
    for a, b in zip(one, other, strict=True):
        assert a.weights == pytest.approx(b.weights, abs=1e-5)


def test_only_the_largest_weights_are_kept_at_every_token(mixture, by_letters):
    answer = layers(mixture, by_letters, every=1).generate(QUESTIONS[:1], max_new_tokens=TOKENS, top_k_experts=1)[0]
    assert all(sum(weight > 0 for weight in weights) == 1 for weights in answer.trace.weights)


def test_any_router_of_texts_can_be_renewed(mixture):
    """ELREA's gradients, wrapped or with their weights changed, are taken of the text so far."""
    for router in (mixture.router, DerivedRouter(mixture.router, top_k=2)):
        cell = layers(mixture, router, every=3)
        answer = cell.generate(QUESTIONS[:1], max_new_tokens=4)[0]
        slow = torch.stack([weights / weights.sum() for weights in slow_weights(cell, QUESTIONS[0], answer)])
        close(answer.trace.weights, slow[:, [cell.bank.index(name) for name in answer.trace.experts]])
        assert answer.trace.weights[0] != answer.trace.weights[3]
        scored = cell.score_teacher_forced(cell.tokens(QUESTIONS[:1]), [answer.token_ids])[0]
        close(scored.logprobs, answer.logprobs)


def test_streaming_gives_the_same_tokens_and_their_weights(mixture, router):
    cell = layers(mixture, router, every=2)
    answer = cell.generate(QUESTIONS[:1], max_new_tokens=TOKENS)[0]
    tokens = list(cell.stream(QUESTIONS[0], max_new_tokens=TOKENS))
    assert [token.id for token in tokens] == list(answer.token_ids)
    close([token.weights for token in tokens], answer.trace.weights)


# ------------------------------------------------------------------------------------------------------- growing text


def test_a_growing_text_is_embedded_as_the_whole_text_is(mixture):
    """The states of an answer come from the running model; with no expert at work it is the base model itself."""
    encoder = HiddenStateEncoder(mixture.backbone, tail=True)
    full = mixture.prompts.row(QUESTIONS[0])
    counted = with_answers(full, mixture.backbone.tokenizer)
    hidden = mixture.backbone.hidden(torch.tensor([full.ids]))
    texts = AveragedStates(encoder)
    (text,) = texts.begin([full.prompt()])
    close(texts.features([text]), encoder.rows([full.prompt()]))
    places = [p for p in range(full.prompt_length, len(full.ids)) if counted.is_user_text[p]]
    assert places
    close(texts.features([texts.append_states(text, hidden[0, places])]), encoder.rows([counted]))


@pytest.mark.parametrize("window", [3, None])
def test_a_text_longer_than_the_window_still_moves_its_embedding(mixture, window):
    encoder = HiddenStateEncoder(mixture.backbone, tail=True, window=window)
    prompt = mixture.tokens(QUESTIONS[:1])
    texts = AveragedStates(encoder)
    (text,) = texts.begin(prompt)
    states = torch.randn(4, encoder.dimensions, generator=torch.Generator().manual_seed(1))
    moved = texts.features([texts.append_states(text, states)])
    assert not torch.allclose(texts.features([text]), moved, atol=1e-3)
    if window:
        close(moved[0], torch.nn.functional.normalize(states[-3:].sum(dim=0), dim=0))


def test_a_text_is_a_value_that_what_is_appended_leaves_as_it_was(mixture):
    prompts = mixture.tokens(QUESTIONS[:2])
    texts = WholeTexts(letters)
    begun = texts.begin(prompts)
    grown = [texts.append(text, [token]) for token, text in enumerate(begun, start=1)]
    close(texts.features(begun), letters(prompts))
    close(texts.features(grown), letters([prompt.extended([token]) for token, prompt in enumerate(prompts, start=1)]))


def test_a_router_without_a_way_of_its_own_routes_the_text_again(mixture):
    class Length(Router):
        kind = "length"

        def weigh(self, read):
            return Routing(mixture.bank.names[:2], torch.tensor([[float(len(p.ids)), 1.0] for p in read]))

    prompts = mixture.tokens(QUESTIONS[:2])
    texts = Length().growing
    grown = texts.append(texts.begin(prompts)[1], [3, 4])
    assert Length().weigh(texts.features([grown])).weights[0, 0] == len(prompts[1].ids) + 2


# ------------------------------------------------------------------------------------------------------ files, errors


def test_saved_and_loaded_it_routes_alike(mixture, by_states, tmp_path):
    null = NullExpert("null", 0.2)
    centre = torch.full((mixture.backbone.model.config.hidden_size,), 0.01)
    router = TokenLevel(
        CentroidRouter.by_similarity(
            by_states.extractor,
            by_states.centroids,
            weighting=Weighting(0.3),
            pool="mean",
            null=null,
            centre=centre,
        ),
        every=2,
        cache="recompute",
    )
    record = router.save(tmp_path)
    loaded = load_router(record, RouterParts(tmp_path, tmp_path, mixture.backbone, mixture.bank))
    assert isinstance(loaded, TokenLevel)
    assert (loaded.every, loaded.cache, loaded.kind) == (2, "recompute", "token-level")
    rows = mixture.tokens(QUESTIONS)
    one, other = router.route(rows), loaded.route(rows)
    assert one.experts == other.experts
    close(one.weights, other.weights)
    assert loaded.save(tmp_path / "again") == record


def test_a_missing_centroid_is_named(mixture, by_states, tmp_path):
    record = TokenLevel(by_states).save(tmp_path)
    record["of"]["experts"].append("poetry")
    with pytest.raises(CoterieError, match="lacks the tensor 'centroids.poetry'"):
        load_router(record, RouterParts(tmp_path, tmp_path, mixture.backbone, mixture.bank))


def test_an_encoder_of_another_dimension_is_refused():
    with pytest.raises(CoterieError, match=r"'minilm' gives 384 dimensions, .* of the expert 'a' have 8"):
        check_dimensions("minilm", 384, {"a": torch.ones(1, 8)})


def test_an_expert_that_the_bank_lacks_is_named(mixture):
    router = TokenLevel(CentroidRouter.by_similarity(LETTERS, {"poetry": torch.ones(1, SIZE)}))
    with pytest.raises(CoterieError, match="experts that the bank does not hold: poetry"):
        mixture.replace(router=router, combiner="layers").generate(["hi"], max_new_tokens=2)


def test_what_cannot_be_renewed_is_refused(mixture, by_letters):
    with pytest.raises(
        CoterieError, match=r"'logits' takes weights once a prompt, .*'token-level' .* use layers or weights"
    ):
        mixture.replace(router=TokenLevel(by_letters), combiner="logits")
    mixture.replace(router=TokenLevel(by_letters, every=None), combiner="logits")
    with pytest.raises(CoterieError, match="'token-level' weighs every token already"):
        TokenLevel(TokenLevel(by_letters))
    with pytest.raises(CoterieError, match="from 1 upwards, or never; got 0"):
        TokenLevel(by_letters, every=0)
    with pytest.raises(CoterieError, match="can keep or recompute what was read, got 'drop'"):
        TokenLevel(by_letters, cache="drop")
    with pytest.raises(CoterieError, match="at least one expert with a centroid"):
        CentroidRouter.by_similarity(LETTERS, {})
