"""Speculation changes no token: proposals, how many of them pay, and answers with and without."""

import copy
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from coterie.backbone.slots import Slots
from coterie.engine import proposing as proposals
from coterie.engine.engine import Engine
from coterie.engine.proposing import first_blocks
from coterie.engine.speculation import LENGTHS, Drafting, PassCosts, PromptLookup, draft_length
from coterie.errors import CoterieError
from coterie.routers.fixed import one_hot
from coterie.settings.sampling import SamplingSettings
from helpers import close, same_answers

few = settings(max_examples=60, deadline=None)
TEXTS = st.lists(st.integers(0, 3), max_size=40)


def looked_up(ids, count):
    """The slow and obvious way: go back from the end until the last tokens stand there."""
    for size in PromptLookup.SIZES:
        for end in range(len(ids) - 1, size - 1, -1):
            if ids[end - size : end] == ids[len(ids) - size :]:
                whole = list(ids)
                for place in range(count):
                    whole.append(whole[end + place])
                return whole[len(ids) :]
    return []


@few
@given(ids=TEXTS, count=st.integers(1, 9), data=st.data())
def test_a_look_up_finds_what_followed_the_last_tokens_last_time(ids, count, data):
    """However often it was asked while the text grew."""
    lookup = PromptLookup()
    for length in sorted(data.draw(st.sets(st.integers(0, len(ids)), max_size=5))):
        assert lookup.propose(ids[:length], count) == looked_up(ids[:length], count)


def test_a_look_up_goes_round_where_a_text_repeats_itself():
    assert PromptLookup().propose([7, 1, 2, 3, 1, 2, 3, 1, 2], 7) == [3, 1, 2, 3, 1, 2, 3]
    assert PromptLookup().propose([1, 2, 3, 4], 5) == []


@few
@given(
    chances=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 12)), min_size=1, max_size=4),
    slope=st.floats(0.01, 2),
)
def test_as_many_tokens_are_proposed_as_bring_most_a_second(chances, slope):
    def tokens(length):
        """By the geometric series: the proposals that are right, and the token behind them."""
        sums = []
        for a, most in chances:
            n = min(length, most) + 1
            sums.append(n if a == 1 else (1 - a**n) / (1 - a))
        return sum(sums) / (1 + slope * length)

    found = draft_length(chances, lambda positions: 1 + slope * (positions - 1))
    assert tokens(found) == pytest.approx(max(tokens(length) for length in LENGTHS))


def test_nothing_is_proposed_where_it_loses():
    assert draft_length([(0.7, 8)], lambda positions: 1.0 if positions == 1 else 2.6 * positions) == 0
    assert draft_length([(1.0, 0)], lambda positions: 1.0) == 0
    assert draft_length([(0.9, 12)], lambda positions: 1.0) == 12


def test_passes_cost_what_was_measured():
    costs = PassCosts()
    assert costs.of(9, 1) == 1 and costs.of(9, 6) == 2.0  # a guess, so that it is tried
    for seconds in (5.0, 0.2, 0.3):
        costs.note(9, 1, seconds)  # other work on the machine only adds to it
    assert costs.of(9, 1) == 1 and costs.of(9, 6) == 2.0
    costs.note(9, 3, 0.6)
    assert costs.of(9, 3) == pytest.approx(3.0) and costs.of(9, 2) == pytest.approx(1.2)
    assert costs.of(9, 6) == pytest.approx(3.6)  # not less than what is shorter
    costs.note(9, 6, 0.7)
    assert costs.of(9, 6) == pytest.approx(3.5)
    assert costs.of(1, 1) == 1 and costs.of(1, 6) == 6.0  # a lone row is read in a cheaper form
    assert costs.of(200, 6) == 2.0  # of other sizes nothing is known by that
    for _ in range(100):
        costs.note(9, 1, 0.2)
    assert costs.of(9, 6) == pytest.approx(2.0)  # which may have been a mistake


def test_a_pass_costs_the_same_beside_prompts_that_are_read(mixture, monkeypatch):
    """On a clock that goes on by one for every token of every row."""
    clock, noted, hidden = [0.0], [], type(mixture.backbone).hidden

    def ticking(self, ids, *given):
        clock[0] += ids.numel()
        return hidden(self, ids, *given)

    monkeypatch.setattr(type(mixture.backbone), "hidden", ticking)
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    monkeypatch.setattr(PassCosts, "note", lambda self, *own: noted.append(own))
    engine, rows = mixture.engine(chunk=16), mixture.tokens(["add 3 4", "a much longer prompt " * 9])
    first, second = mixture.requests(rows, [40, 1], [SamplingSettings()])
    engine.submit(first)
    while not engine.step():
        pass
    assert noted == []
    engine.submit(second)
    beside = 0
    while engine._answers[1:] or not beside:
        beside += len(engine.step())
    experts = len(mixture.bank.names)
    assert beside > 9 and noted == [(experts, 1, float(experts))] * len(noted) and len(noted) >= beside - 1


def test_proposals_are_trusted_as_they_were_right():
    good, bad = Drafting(), Drafting()
    good.proposed, bad.proposed = [1, 2], [1, 2]
    for _ in range(20):
        good.learn([1, 2, 3])
        bad.learn([3])
    assert good.chance > 0.9 and bad.chance < 0.1
    before = bad.checked
    bad.proposed = [5, 6, 7]
    bad.learn([5, 9])  # one was right, one was wrong, and of the last nothing is known
    assert bad.checked == pytest.approx(0.9 * (0.9 * before + 1) + 1)
    bad.proposed = []
    bad.learn([4])
    assert bad.checked == pytest.approx(0.9 * (0.9 * before + 1) + 1)


# ---------------------------------------------------------------------------------------------------- the same answers


class Knowing:
    """Proposes what will be chosen, with some mistakes; it is told the answers before."""

    answers: dict[tuple[int, ...], tuple[int, ...]] = {}

    def __init__(self):
        self.random = random.Random(1)

    def propose(self, ids, count):
        for prompt, answer in self.answers.items():
            whole = [*prompt, *answer]
            if whole[: len(ids)] == list(ids) and len(ids) >= len(prompt):
                found = whole[len(ids) :][:count]
                return [token if self.random.random() < 0.8 else self.random.randrange(30) for token in found]
        return [self.random.randrange(30) for _ in range(count)]


@pytest.fixture
def proposing(monkeypatch):
    """Speculation that proposes right and wrong tokens, of any number at any time, whatever they cost."""
    chance = random.Random(0)
    monkeypatch.setattr(proposals, "draft_length", lambda chances, cost: chance.choice(LENGTHS))
    monkeypatch.setattr(Knowing, "answers", {})
    plain = Drafting.__init__
    monkeypatch.setattr(Drafting, "__init__", lambda self, **given: plain(self, **{"proposer": Knowing(), **given}))
    return Knowing.answers


PROMPTS = ["add 3 4", "SPELL ABCD NOW", "?? (A) one (B) two ??", "add 11 25 and tell"]
SAMPLINGS = {
    "greedy": {},
    "greedy with penalties": {"repetition_penalty": 1.3, "frequency_penalty": 0.4, "presence_penalty": -0.3},
    "sampled": {"temperature": 1.0, "seed": 3},
    "sampled with all": {"temperature": 1.3, "top_k": 20, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.2},
    "ended by a text": {"temperature": 1.0, "stop": ["e", "1"]},
}


def check_speculation(mixture, known, **options):
    """Whatever is proposed, the answers are those without; and some of it was right."""
    plain = mixture.generate(PROMPTS, speculate="off", batch_size=3, **options)
    rows = mixture.tokens(PROMPTS)
    known |= {tuple(row.ids): answer.token_ids for row, answer in zip(rows, plain, strict=True)}
    found = mixture.generate(PROMPTS, speculate="lookup", batch_size=3, **options)
    same_answers(found, plain)
    assert [(one.text, one.finish_reason) for one in found] == [(one.text, one.finish_reason) for one in plain]
    assert all(one.speculated == (0, 0) for one in plain)
    return [sum(counts) for counts in zip(*(one.speculated for one in found), strict=True)]


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_speculation_changes_no_token_however_tokens_are_chosen(mixture, proposing, sampling):
    proposed, right = check_speculation(mixture, proposing, max_new_tokens=24, **SAMPLINGS[sampling])
    assert proposed > right > 0


@pytest.mark.parametrize("combiner", ["layers", "weights", "weights:svd:2"])
def test_speculation_changes_no_token_wherever_experts_meet(mixture, proposing, combiner):
    assert check_speculation(mixture.replace(combiner=combiner), proposing, max_new_tokens=20, temperature=0.8)[1]


def test_speculation_changes_no_token_under_gates(grid, proposing):
    assert check_speculation(grid.cell("mole"), proposing, max_new_tokens=16, temperature=0.8)[1]


@pytest.mark.parametrize("cache", ["keep", "recompute"])
def test_speculation_stays_between_two_reroutings(mixture, proposing, cache):
    """With the same weights at the same tokens; where every token is weighed anew, nothing is proposed."""
    cell = mixture.rerouted(4, combiner="layers", cache=cache)
    assert check_speculation(cell, proposing, max_new_tokens=18, temperature=0.8)[1]
    plain = cell.generate(PROMPTS[0], speculate="off", max_new_tokens=18)[0]
    found = cell.generate(PROMPTS[0], speculate="lookup", max_new_tokens=18)[0]
    for one, other in zip(found.trace.weights, plain.trace.weights, strict=True):
        assert one == pytest.approx(other, abs=1e-5)
    always = mixture.rerouted(1, combiner="layers", cache=cache)
    assert check_speculation(always, proposing, max_new_tokens=6) == [0, 0]


def test_a_look_up_in_a_text_that_repeats_itself_is_right(mixture, monkeypatch):
    """With tokens that are chosen by a bias, so that every model repeats itself."""
    monkeypatch.setattr(PassCosts, "of", lambda self, rows, positions: 1.0)
    options = {"max_new_tokens": 30, "logit_bias": {20: 100}}
    plain, found = (mixture.generate(PROMPTS[0], speculate=how, **options)[0] for how in ("off", "lookup"))
    same_answers([found], [plain])
    proposed, right = found.speculated
    assert right >= 20 and found.record()["speculation"] == {"proposed": proposed, "accepted": right}
    assert "speculation" not in plain.record()


# ------------------------------------------------------------------------------------------------------ cheaper models


MODELS = ["base", "merged", "blocks:1"]


@pytest.fixture
def any_length(monkeypatch):
    """Proposals of any number at any time, whatever they cost."""
    chance = random.Random(0)
    monkeypatch.setattr(proposals, "draft_length", lambda chances, cost: chance.choice(LENGTHS))


def check_model(mixture, proposer, **options):
    """The same answers, whatever a model proposes; how many tokens it proposed, and how many were right."""
    plain = mixture.generate(PROMPTS, batch_size=3, **options)
    found = mixture.generate(PROMPTS, batch_size=3, speculate=proposer, **options)
    same_answers(found, plain)
    assert [(one.text, one.finish_reason) for one in found] == [(one.text, one.finish_reason) for one in plain]
    return [sum(counts) for counts in zip(*(one.speculated for one in found), strict=True)]


@pytest.mark.parametrize(
    ("proposer", "sampling"),
    [*(("merged", name) for name in SAMPLINGS), ("base", "sampled with all"), ("blocks:1", "sampled with all")],
)
def test_no_model_that_proposes_changes_a_token(mixture, any_length, proposer, sampling):
    proposed, right = check_model(mixture, proposer, max_new_tokens=20, **SAMPLINGS[sampling])
    assert proposed > 0
    assert right > 0 or proposer == "blocks:1"


@pytest.mark.parametrize("proposer", MODELS)
def test_models_propose_under_gates_across_reroutings_and_for_several_draws(mixture, grid, any_length, proposer):
    assert check_model(grid.cell("mole"), proposer, max_new_tokens=12, temperature=0.8)[0]
    assert check_model(mixture.rerouted(4, combiner="layers"), proposer, max_new_tokens=14)[0]
    assert check_model(mixture, proposer, max_new_tokens=12, temperature=1.0, n=3)[0]


@pytest.mark.parametrize(
    ("proposer", "sampling"), [("base", "greedy with penalties"), ("merged", "sampled with all"), ("base", "sampled")]
)
def test_a_model_that_is_the_mixture_is_always_right(mixture, any_length, proposer, sampling):
    """It chooses with the same noise, penalties and limits, however many of its tokens are taken at a time."""
    alone = mixture.replace(router=one_hot("base", mixture.bank.names))
    proposed, right = check_model(alone, proposer, max_new_tokens=24, **SAMPLINGS[sampling])
    assert proposed == right > 20


def test_first_blocks_give_what_a_model_of_these_blocks_gives(backbone):
    shorter = copy.deepcopy(backbone.model)
    del shorter.model.layers[1:]
    ids = torch.arange(14).view(2, 7)
    with torch.no_grad():
        wanted = shorter.model(input_ids=ids, use_cache=False).last_hidden_state
        with first_blocks(backbone, 1):
            found = backbone.hidden(ids)
        assert not torch.allclose(backbone.hidden(ids), wanted, atol=1e-3)
    close(found, wanted)


@pytest.mark.parametrize(("right", "verifying", "drafting", "gain"), [(2.6, 2.5, 0.40, 0.88), (2.6, 2.5, 0, 1.44)])
def test_a_model_proposes_where_the_formula_says_that_it_pays(right, verifying, drafting, gain):
    """Measured with nine experts: (a + 1) / (k c + v), four tokens by the base adapter, and by nobody at all."""
    chance = next(a / 1000 for a in range(1000) if sum((a / 1000) ** n for n in range(1, 5)) >= right)
    assert (right + 1) / (4 * drafting + verifying) == pytest.approx(gain, abs=0.01)
    found = draft_length([(chance, 4)], lambda size: 1.0 if size == 1 else verifying + drafting * (size - 1))
    assert (found > 0) == (gain > 1)


def test_nothing_is_proposed_before_passes_over_one_token_were_measured(mixture, any_length, monkeypatch):
    costs = PassCosts()
    for _ in range(2):
        costs.note(9, 1, 0.2)
        costs.note(9, 3, 0.2)
    assert not costs.knows(9)
    costs.note(9, 1, 0.2)
    assert costs.knows(9) and costs.knows(8) and not costs.knows(7)
    monkeypatch.setattr(PassCosts, "knows", lambda self, rows: False)
    assert check_model(mixture, "merged", max_new_tokens=12) == [0, 0]


def test_proposed_tokens_cost_what_was_measured():
    costs = PassCosts()
    assert costs.of_drafts("base", 1, 9) == 0.3  # a guess, so that it is tried
    costs.note_drafts("base", 1, 0.1)
    costs.note(9, 1, 0.2)
    assert costs.of_drafts("base", 1, 9) == pytest.approx(0.5)
    assert costs.of_drafts("blocks:2", 1, 9) == costs.of_drafts("base", 8, 9) == 0.3
    for _ in range(100):
        costs.note(9, 1, 0.2)
    assert costs.of_drafts("base", 1, 9) == 0.3  # which may have been a mistake


def test_a_model_that_costs_too_much_is_asked_once(mixture, monkeypatch):
    noted = []
    monkeypatch.setattr(PassCosts, "note_drafts", lambda self, *own: noted.append(own))
    monkeypatch.setattr(PassCosts, "of", lambda self, rows, size: 1.0)
    monkeypatch.setattr(PassCosts, "of_drafts", lambda self, *own: 9.0 if noted else 0.1)
    assert check_model(mixture, "base", max_new_tokens=20)[0] > 0
    assert len(noted) == 1


def test_a_model_that_fails_costs_its_proposals_alone(mixture, any_length, monkeypatch):
    monkeypatch.setattr(proposals.Proposing, "_draft", lambda *given: 1 / 0)
    assert check_model(mixture, "merged", max_new_tokens=12) == [0, 0]


def test_the_row_of_a_model_is_in_the_budget(mixture):
    rows = mixture.tokens(PROMPTS[:1])

    def asked(speculate, count):
        settings = [SamplingSettings(speculate=speculate)]
        size = Slots(mixture.backbone).bytes_for(count, len(rows[0].ids) + 7)
        engine = Engine(mixture.backbone, mixture.layers, Slots(mixture.backbone, size))
        return engine, mixture.requests(rows, [8], settings)[0]

    experts = len(mixture.bank.names)
    engine, request = asked("base", experts)
    with pytest.raises(CoterieError, match=f"the cache of {experts + 1} rows"):
        engine.submit(request)
    engine, request = asked("base", experts + 1)
    assert len(list(engine.run([request]))) > 1
    engine, request = asked("off", experts)
    assert len(list(engine.run([request]))) > 1
    assert engine._reader.slots.claimed == 0  # nor is anything of a model left


def test_a_proposer_that_there_is_not_is_refused(mixture):
    with pytest.raises(CoterieError, match=r"blocks:2: the base model has 2 blocks; .* such as blocks:1"):
        mixture.generate(PROMPTS, speculate="blocks:2")
    with pytest.raises(CoterieError, match="give off, lookup, base, merged or blocks:K"):
        mixture.generate(PROMPTS, speculate="blocks:0")
