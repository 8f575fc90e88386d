"""Decoding an ensemble equals the slow and obvious way: separate PEFT models, no cache, one prompt at a time."""

import copy
from dataclasses import replace

import pytest
import torch
from peft import PeftModel

from coterie.combiners.layers import LayerCombiner
from coterie.combiners.logits import LogitCombiner
from coterie.combiners.table import COMBINERS
from coterie.data.examples import load_examples
from coterie.engine.scoring import score_responses
from coterie.engine.text import TextStream
from coterie.errors import CoterieError
from coterie.experts.bank import ExpertBank
from coterie.mixture import Completion, Mixture
from coterie.mixture.core import elected
from coterie.routers.base import Routing
from coterie.routers.fixed import FixedRouter
from coterie.routers.token import TokenLevel
from helpers import same_answers
from tiny import delta

EXACT = [name for name in COMBINERS if ":" not in name and name != "texts"]
"""Combiners that mix without any approximation and without chance: the laws below hold for them to the last digit."""

PROMPTS = ["add 3 4", "SPELL ABCD NOW", "?? (A) one (B) two ??", "add 11 25 and tell"]


@pytest.fixture(scope="module")
def peft_models(mixture, run_folder):
    """Every expert as PEFT itself loads it, each in a base model of its own."""
    return {
        name: PeftModel.from_pretrained(copy.deepcopy(mixture.backbone.model), run_folder / "experts" / name).eval()
        for name in mixture.bank.names
    }


def naive_logits(peft_models, ids, weights):
    """The next token's, from the full text through every PEFT model, summed."""
    total, text = sum(weights.values()), torch.tensor([ids])
    return sum(w / total * peft_models[name](input_ids=text).logits[0, -1].float() for name, w in weights.items())


@torch.no_grad()
def naive(mixture, peft_models, prompt, weights, steps):
    """Greedy tokens and log-probabilities, the full text anew at every step."""
    ids = list(mixture.tokens([prompt])[0].ids)
    start = len(ids)
    logprobs = []
    while len(ids) - start < steps:
        logits = naive_logits(peft_models, ids, weights)
        ids.append(int(logits.argmax()))
        logprobs.append(float(logits.log_softmax(0)[ids[-1]]))
        if ids[-1] in mixture.backbone.stop_ids:
            break
    return ids[start:], logprobs


@pytest.mark.parametrize("prompt", PROMPTS)
def test_the_routed_ensemble_equals_an_uncached_loop_over_peft_models(mixture, peft_models, prompt):
    answer = mixture.generate([prompt], max_new_tokens=10)[0]
    tokens, logprobs = naive(mixture, peft_models, prompt, answer.weights, 10)
    assert list(answer.token_ids) == tokens
    torch.testing.assert_close(torch.tensor(answer.logprobs), torch.tensor(logprobs), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("combiner", EXACT)
@pytest.mark.parametrize("name", ["base", "cluster-0", "cluster-2"])
def test_one_hot_routing_is_that_expert_alone(mixture, peft_models, combiner, name):
    answer = mixture.replace(router=name, combiner=combiner).generate([PROMPTS[0]], max_new_tokens=8)[0]
    tokens, logprobs = naive(mixture, peft_models, PROMPTS[0], {name: 1.0}, 8)
    assert list(answer.token_ids) == tokens
    torch.testing.assert_close(torch.tensor(answer.logprobs), torch.tensor(logprobs), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("combiner", EXACT)
@pytest.mark.parametrize("batch_size", [1, 3, 4])
def test_answers_do_not_depend_on_the_batch(mixture, combiner, batch_size):
    cell = mixture.replace(combiner=combiner)
    alone = [cell.generate([prompt], max_new_tokens=12)[0] for prompt in PROMPTS]
    together = cell.generate(PROMPTS, max_new_tokens=12, batch_size=batch_size)
    assert [a.token_ids for a in together] == [a.token_ids for a in alone]
    for one, other in zip(together, alone, strict=True):
        torch.testing.assert_close(torch.tensor(one.logprobs), torch.tensor(other.logprobs), rtol=1e-4, atol=1e-5)


def test_requests_that_finish_leave_and_the_others_go_on_unchanged(mixture):
    long = mixture.generate(PROMPTS, max_new_tokens=24)
    stops = [answer.text[1:3] for answer in long[:2]]
    stopped = mixture.generate(PROMPTS, max_new_tokens=24, stop=stops)
    lengths = {len(answer.token_ids) for answer in stopped}
    assert len(lengths) > 1, "the test wants requests of different lengths"
    for short, full in zip(stopped, long, strict=True):
        assert short.token_ids == full.token_ids[: len(short.token_ids)]


def with_bank(mixture, names, adapters, weights, combiner="logits"):
    bank = ExpertBank(tuple(names), tuple(adapters))
    changed = replace(mixture, bank=bank, router=FixedRouter(dict(zip(names, weights, strict=True))))
    return changed.replace(combiner=combiner)


@pytest.mark.parametrize("combiner", EXACT)
def test_copies_of_one_expert_are_that_expert(mixture, combiner):
    adapter = mixture.bank.adapters[1]
    one = with_bank(mixture, ["x"], [adapter], [1.0], combiner).generate(PROMPTS, max_new_tokens=6)
    many = with_bank(mixture, ["x", "y", "z"], [adapter] * 3, [0.2, 0.3, 0.5], combiner).generate(
        PROMPTS, max_new_tokens=6
    )
    assert [a.token_ids for a in one] == [a.token_ids for a in many]
    for a, b in zip(one, many, strict=True):
        torch.testing.assert_close(torch.tensor(a.logprobs), torch.tensor(b.logprobs), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("combiner", EXACT)
def test_the_order_of_experts_does_not_matter(mixture, combiner):
    names, adapters = list(mixture.bank.names), list(mixture.bank.adapters)
    weights = [0.1, 0.6, 0.2, 0.4]
    forward = with_bank(mixture, names, adapters, weights, combiner).generate(PROMPTS, max_new_tokens=6)
    back = with_bank(mixture, names[::-1], adapters[::-1], weights[::-1], combiner).generate(PROMPTS, max_new_tokens=6)
    for a, b in zip(forward, back, strict=True):
        torch.testing.assert_close(torch.tensor(a.logprobs), torch.tensor(b.logprobs), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_an_expert_that_changes_nothing_is_the_base_model(mixture):
    ids = list(mixture.tokens([PROMPTS[0]])[0].ids)
    answer = with_bank(mixture, ["null", "x"], [{}, mixture.bank.adapters[1]], [1.0, 0.0]).generate(
        [PROMPTS[0]], max_new_tokens=1
    )[0]
    expected = mixture.backbone.model(input_ids=torch.tensor([ids])).logits[0, -1].log_softmax(0)
    assert answer.token_ids[0] == int(expected.argmax())
    assert answer.logprobs[0] == pytest.approx(float(expected.max()), abs=1e-5)


@torch.no_grad()
def test_mixing_in_layers_equals_the_dense_weighted_sum_of_updates(mixture):
    weights = [0.3, 0.1, 0.5, 0.2]
    cell = with_bank(mixture, mixture.bank.names, mixture.bank.adapters, weights, "layers")
    dense = copy.deepcopy(mixture.backbone.model)
    for adapter, weight in zip(mixture.bank.adapters, weights, strict=True):
        for path, pair in adapter.items():
            dense.get_submodule(path).weight += weight * delta(pair)
    answer = cell.generate([PROMPTS[1]], max_new_tokens=6)[0]
    ids = list(mixture.tokens([PROMPTS[1]])[0].ids)
    for token, logprob in zip(answer.token_ids, answer.logprobs, strict=True):
        expected = dense(input_ids=torch.tensor([ids])).logits[0, -1].log_softmax(0)
        assert token == int(expected.argmax())
        assert logprob == pytest.approx(float(expected[token]), abs=1e-4)
        ids.append(token)


def test_a_soft_cap_on_logits_is_applied_before_they_are_summed(mixture, peft_models, monkeypatch):
    monkeypatch.setattr(mixture.backbone.model.config, "final_logit_softcapping", 2.0, raising=False)
    answer = mixture.generate([PROMPTS[0]], max_new_tokens=1)[0]
    ids = torch.tensor([mixture.tokens([PROMPTS[0]])[0].ids])
    with torch.no_grad():
        logits = sum(
            weight * torch.tanh(peft_models[name](input_ids=ids).logits[0, -1] / 2.0) * 2.0
            for name, weight in answer.weights.items()
        )
    assert answer.logprobs[0] == pytest.approx(float(logits.log_softmax(0).max()), abs=1e-4)


def test_dropped_experts_are_not_run_and_the_rest_is_renormalised(mixture):
    routing = mixture.route(PROMPTS, top_k_experts=2)
    assert (routing.weights > 0).sum(dim=1).tolist() == [2] * len(PROMPTS)
    plan = LogitCombiner().plan(routing.aligned(mixture.bank.names))
    assert [len(own.votes) for own in plan] == [2] * len(PROMPTS)
    kept = mixture.generate([PROMPTS[0]], max_new_tokens=6, top_k_experts=2)[0]
    by_hand = replace(mixture, router=FixedRouter(routing.row(0))).generate([PROMPTS[0]], max_new_tokens=6)[0]
    assert kept.token_ids == by_hand.token_ids
    torch.testing.assert_close(torch.tensor(kept.logprobs), torch.tensor(by_hand.logprobs), rtol=1e-4, atol=1e-5)


def test_rows_with_different_experts_decode_together_as_alone(mixture):
    alone = [mixture.generate([p], max_new_tokens=8, top_k_experts=1)[0] for p in PROMPTS]
    together = mixture.generate(PROMPTS, max_new_tokens=8, top_k_experts=1)
    assert [a.token_ids for a in together] == [a.token_ids for a in alone]


def test_more_experts_than_there_are_cannot_be_kept(mixture):
    with pytest.raises(CoterieError, match="between 1 and 4"):
        mixture.generate(["hi"], top_k_experts=5)


def test_sampling_follows_its_seed_and_not_its_batch(mixture):
    options = {"max_new_tokens": 8, "temperature": 1.0, "top_p": 0.9, "top_k": 40}
    alone = [mixture.generate([p], seed=7, **options)[0].token_ids for p in PROMPTS]
    together = [a.token_ids for a in mixture.generate(PROMPTS, seed=7, **options)]
    assert together == alone
    assert together != [a.token_ids for a in mixture.generate(PROMPTS, seed=8, **options)]


def test_equal_prompts_get_equal_answers_and_n_asks_for_several(mixture):
    options = {"max_new_tokens": 12, "temperature": 1.0}
    assert len({answer.token_ids for answer in mixture.generate([PROMPTS[0]] * 5, **options)}) == 1
    several = mixture.generate([PROMPTS[0]], n=5, **options)
    assert len({answer.token_ids for answer in several}) == 5
    same_answers(several[:1], mixture.generate([PROMPTS[0]], **options))


def test_several_answers_at_temperature_0_are_refused(mixture):
    with pytest.raises(CoterieError, match="at temperature 0 all 3 answers to a prompt are equal; give a temperature"):
        mixture.generate(PROMPTS, n=3)


def positions_read(mixture, monkeypatch, **options) -> list[int]:
    """Over how many positions each forward pass went, padding included."""
    passes = []
    model = type(mixture.backbone)
    original = model.hidden

    def counted(self, ids, *args, **kwargs):
        passes.append(ids.numel())
        return original(self, ids, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(model, "hidden", counted)
        mixture.generate(**options)
    return passes


@pytest.mark.parametrize("combiner", ["texts", "logits"])
def test_a_prompt_is_read_once_for_all_of_its_samples(mixture, monkeypatch, combiner):
    """Five samples of four tokens: one pass over the prompt and three over the last tokens of those still going on."""
    cell = mixture.replace(router="base", combiner=combiner)
    options = {"prompts": [PROMPTS[0]], "max_new_tokens": 4, "temperature": 1.0, "n": 1 if combiner == "texts" else 5}
    length = len(mixture.tokens([PROMPTS[0]])[0].ids)
    first, *others = positions_read(cell, monkeypatch, **options)
    assert first == length and len(others) == 3 and max(others) <= 5


def test_prompts_of_similar_length_are_read_together_and_answers_keep_their_order(mixture, monkeypatch):
    short, long = "add 1 2", "SPELL " + "ABCDEFGH" * 12 + " NOW"
    prompts, options = [short, long] * 2, {"max_new_tokens": 3, "batch_size": 2}
    cell = mixture.replace(router="base")
    lengths = [len(row.ids) for row in mixture.tokens([short, long])]
    passes = positions_read(cell, monkeypatch, prompts=prompts, **options)
    assert sorted(passes)[-2:] == [2 * length for length in lengths]
    found = cell.generate(prompts, **options)
    assert [answer.prompt for answer in found] == prompts
    alone = [cell.generate([prompt], max_new_tokens=3)[0] for prompt in prompts]
    assert [answer.token_ids for answer in found] == [answer.token_ids for answer in alone]


def test_what_is_read_in_answers_votes_and_not_their_whole_text(mixture):
    """Two are read as 7, one as 12; two are the same text, in which nothing can be read."""
    texts = ["Add 3 and 4.\nThat makes 7", "The answer is \\boxed{7}.", "12", "<think> 12", "<think> 12"]
    answers = [Completion("add 3 4", text, (), (), "stop", {}) for text in texts]
    question = load_examples([{"instruction": "add 3 4"}], need_response=False)[0]
    assert {elected(question, answers[:3], seed).text for seed in range(9)} == {texts[0]}
    assert {elected(question, answers, seed).text for seed in range(30)} == {texts[0], texts[3]}
    code = replace(question, tests={"assert": "f(1) == 2"})
    assert {elected(code, answers, seed).text for seed in range(9)} == {texts[3]}


def test_a_given_routing_keeps_only_the_experts_that_were_asked_for(mixture):
    routing, options = mixture.route(PROMPTS), {"max_new_tokens": 5, "top_k_experts": 1}
    given, routed = mixture.generate(PROMPTS, routing=routing, **options), mixture.generate(PROMPTS, **options)
    same_answers(given, routed)
    assert [answer.weights for answer in given] == [answer.weights for answer in routed]
    assert all(sorted(answer.weights.values()) == [0.0, 0.0, 0.0, 1.0] for answer in given)


def test_a_given_routing_that_would_not_act_is_refused(mixture):
    routing = mixture.route(PROMPTS)
    with pytest.raises(CoterieError, match="the routing is of 4 prompts, but 3 are given"):
        mixture.generate(PROMPTS[:3], routing=routing)
    renewed = replace(mixture, router=TokenLevel(mixture.router, 2), combiner=LayerCombiner())
    with pytest.raises(CoterieError, match="re-routes while it answers, so a given routing would not last"):
        renewed.generate(PROMPTS, routing=routing)
    same_answers(
        renewed.rerouted(None).generate(PROMPTS, routing=routing, max_new_tokens=3),
        mixture.replace(combiner="layers").generate(PROMPTS, routing=routing, max_new_tokens=3),
    )
    gated = mixture.replace(router="arrow", combiner="layers").route(PROMPTS)
    with pytest.raises(CoterieError, match="by gates in every layer, which combiner 'logits' does not follow; use lay"):
        mixture.generate(PROMPTS, routing=gated)


@pytest.mark.parametrize("call", ["generate", "stream", "complete"])
def test_a_setting_that_does_not_fit_is_told_in_one_line(mixture, call):
    first = {"generate": PROMPTS, "stream": PROMPTS[0], "complete": mixture.tokens(PROMPTS)}[call]
    for options, told in (
        ({"max_tokens": 3}, "no setting is called 'max_tokens'. Did you mean 'max_new_tokens'"),
        ({"temperature": -1}, "--temperature: .* got -1"),
    ):
        with pytest.raises(CoterieError, match=told):
            list(getattr(mixture, call)(first, **options))


@torch.no_grad()
def test_sampled_tokens_have_the_combined_distribution(mixture, peft_models):
    """Frequencies of the first token over many seeds, against the probabilities."""
    drawn = mixture.generate([PROMPTS[0]], n=300, batch_size=300, max_new_tokens=1, temperature=1.0)
    logits = naive_logits(peft_models, list(mixture.tokens([PROMPTS[0]])[0].ids), drawn[0].weights)
    counts = torch.bincount(torch.tensor([answer.token_ids[0] for answer in drawn]), minlength=len(logits))
    likeliest = logits.softmax(0).topk(5)
    expected = 300 * likeliest.values
    difference = (counts[likeliest.indices] - expected).abs()
    assert (difference < 4 * (expected * (1 - expected / 300)).sqrt() + 1).all()


def test_a_repetition_penalty_acts_on_the_requests_own_text_without_padding(mixture):
    options = {"max_new_tokens": 10, "repetition_penalty": 1.7}
    alone = [mixture.generate([p], **options)[0].token_ids for p in PROMPTS]
    assert [a.token_ids for a in mixture.generate(PROMPTS, **options)] == alone


@pytest.mark.parametrize("prompt", PROMPTS)
def test_streamed_pieces_are_the_text(mixture, prompt):
    whole = mixture.generate([prompt], max_new_tokens=16)[0]
    pieces = list(mixture.stream(prompt, max_new_tokens=16))
    assert "".join(piece.text for piece in pieces) == whole.text
    assert tuple(piece.id for piece in pieces) == whole.token_ids
    assert pieces[-1].finish_reason == whole.finish_reason


def test_text_ends_before_a_stop_string_and_never_shows_its_beginning(backbone):
    tokenizer = backbone.tokenizer
    stream = TextStream(tokenizer, ["END"])
    pieces = [stream.push(token) for token in tokenizer("abcEN-xENDyz", add_special_tokens=False)["input_ids"]]
    assert "".join(pieces) == "abcEN-x"
    assert stream.stopped and stream.finish() == ""


def test_half_a_character_is_held_back(backbone):
    tokenizer = backbone.tokenizer
    stream = TextStream(tokenizer)
    pieces = [stream.push(token) for token in tokenizer("aé€b", add_special_tokens=False)["input_ids"]]
    assert pieces == ["a", "", "é", "", "", "€", "b"]


def test_an_unfinished_stop_string_comes_out_at_the_end(backbone):
    stream = TextStream(backbone.tokenizer, ["END"])
    pieces = [stream.push(token) for token in backbone.tokenizer("xEN", add_special_tokens=False)["input_ids"]]
    assert "".join(pieces) == "x" and stream.finish() == "EN"


def test_the_end_of_turn_token_ends_an_answer(mixture):
    end = mixture.backbone.tokenizer.eos_token_id
    tokens = list(mixture.stream(PROMPTS[0], logit_bias={end: 100}))
    assert [(t.id, t.text, t.finish_reason) for t in tokens] == [(end, "", "stop")]


def test_the_likeliest_tokens_are_shown_beside_those_that_are_drawn(mixture):
    options = {"max_new_tokens": 3, "temperature": 1.5, "seed": 2}
    plain, shown = (
        mixture.generate(PROMPTS[:1], **options)[0],
        mixture.generate(PROMPTS[0], top_logprobs=2, **options)[0],
    )
    assert shown.token_ids == plain.token_ids and plain.top_logprobs is None and "top_logprobs" not in plain.record()
    assert [len(top) for top in shown.top_logprobs] == [2] * len(shown.token_ids)
    for token, logprob, ((first, highest), (_, second)) in zip(
        shown.token_ids, shown.logprobs, shown.top_logprobs, strict=True
    ):
        assert highest >= second and (token == first) == (logprob == highest)
    assert shown.record()["top_logprobs"] == [[list(pair) for pair in top] for top in shown.top_logprobs]


def test_a_bias_of_a_token_that_the_model_lacks_costs_nothing(mixture, monkeypatch):
    monkeypatch.setattr(type(mixture.backbone), "hidden", None)
    with pytest.raises(CoterieError, match="--logit-bias 99999: the model's tokens have the ids 0 to"):
        mixture.generate(PROMPTS, routing=Routing(mixture.bank.names, torch.ones(4, 4)), logit_bias={99999: 1})


def test_likelihoods_equal_those_of_the_summed_peft_models(mixture, peft_models):
    rows = [mixture.prompts.row(example) for example in examples()]
    routing = mixture.router.route([row.prompt() for row in rows]).aligned(mixture.bank.names)
    weights, plan = routing.weights, LogitCombiner().plan(routing)
    texts = [(row.ids, list(range(row.prompt_length, len(row.ids)))) for row in rows]
    uniform = torch.ones_like(weights)
    even = [LogitCombiner.votes(own.weights, row) for own, row in zip(plan, uniform, strict=True)]
    votes = [[own.votes for own in plan], even]
    found = score_responses(mixture.backbone, mixture.layers, plan, votes, texts)
    for number, row in enumerate(rows):
        for place, share in enumerate([weights[number] / weights[number].sum(), uniform[number] / 4]):
            with torch.no_grad():
                logits = sum(
                    w * peft_models[name](input_ids=torch.tensor([row.ids])).logits[0].float()
                    for name, w in zip(mixture.bank.names, share, strict=True)
                )
            expected = [float(logits[t - 1].log_softmax(0)[row.ids[t]]) for t in texts[number][1]]
            torch.testing.assert_close(found[place][number].logprobs, torch.tensor(expected), rtol=1e-4, atol=1e-4)


def examples():
    import tiny

    return load_examples(tiny.make_rows(3, seed=5))


def test_votes_on_an_expert_that_is_not_run_are_refused():
    plan = LogitCombiner().plan(Routing(("a", "b", "c"), torch.tensor([[0.5, 0.5, 0.0]])))
    with pytest.raises(ValueError, match="does not run"):
        LogitCombiner.votes(plan[0].weights, torch.tensor([0.2, 0.2, 0.6]))


def test_a_saved_copy_routes_and_answers_as_the_mixture(mixture, tmp_path):
    mixture.save_pretrained(tmp_path / "copy")
    other = Mixture.from_pretrained(tmp_path / "copy", device="cpu")
    assert other.generate(PROMPTS, max_new_tokens=5) == mixture.generate(PROMPTS, max_new_tokens=5)
    uniform = mixture.replace(router="uniform", combiner="layers")
    uniform.save_pretrained(tmp_path / "uniform")
    again = Mixture.from_pretrained(tmp_path / "uniform", device="cpu")
    assert again.generate(PROMPTS, max_new_tokens=5) == uniform.generate(PROMPTS, max_new_tokens=5)


@pytest.mark.parametrize("n", [1, 3])
def test_progress_counts_the_prompts_that_are_answered(mixture, n):
    counts: list[int] = []
    answers = mixture.generate(PROMPTS, n=n, temperature=1.0, batch_size=2, max_new_tokens=3, progress=counts.append)
    assert counts == [1] * len(PROMPTS) and len(answers) == n * len(PROMPTS)
