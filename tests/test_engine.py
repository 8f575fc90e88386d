"""The engine: whatever joins, leaves, breaks or is given up beside it, a request gets the tokens that it gets alone."""

import itertools
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule

from coterie.backbone.layers import ExpertLayers
from coterie.backbone.linear_layers import linear_shapes
from coterie.backbone.loading import Backbone
from coterie.backbone.slots import Slots
from coterie.combiners.logits import LogitCombiner
from coterie.combiners.table import make_combiner
from coterie.data.batching import PromptFormat, TokenRow
from coterie.engine import engine as engine_module
from coterie.engine.engine import Engine
from coterie.engine.request import Failure, Request, Rerouting, Token
from coterie.errors import CoterieError
from coterie.experts.bank import ExpertBank
from coterie.features.growing_text import WholeTexts
from coterie.lora import LoraPair
from coterie.mixture import Mixture
from coterie.routers.base import Routing
from coterie.routers.fixed import uniform
from coterie.serve.catalogue import open_engine
from coterie.settings.sampling import SamplingSettings
from coterie.settings.serving import CapacitySettings
from slow_slots import SlowSlots

NAMES = ("one", "two", "three", "four")
GREEDY = SamplingSettings()
LONG = tuple(range(40, 240))


def row(ids: Sequence[int]) -> TokenRow:
    return TokenRow(tuple(ids), len(ids), (False,) * len(ids), (True,) * len(ids))


def drawn(**options: Any) -> SamplingSettings:
    return SamplingSettings(temperature=1.0, **{"speculate": "lookup", **options})


def by_counts(rows: Sequence[TokenRow]) -> Routing:
    """Weights that every token moves: how many of a text's tokens have each remainder by four."""
    counts = [[1.0 + sum(token % 4 == place for token in own.ids) for place in range(4)] for own in rows]
    return Routing(NAMES, torch.tensor(counts))


class Kinds:
    """Requests of every kind on one mixture, each with what it is answered alone in an engine of its own."""

    def __init__(self, mixture: Mixture) -> None:
        self.mixture = mixture
        names = mixture.bank.names
        self.keeping = Rerouting(WholeTexts(by_counts), lambda routing: routing, names, every=1)
        self.anew = replace(self.keeping, every=2, recompute=True)
        gated = mixture.replace(router="arrow", combiner="layers").router.start([row([1])]).aligned(names)
        self.requests = [
            self.request(1, [0.0, 1.0, 0.0, 0.0], "logits", 5),
            self.request(2, [0.4, 0.1, 0.2, 0.3], "logits", 7, drawn(seed=3)),
            self.request(3, [0.0, 0.5, 0.5, 0.0], "layers", 3, SamplingSettings(repetition_penalty=1.5)),
            self.request(4, [1.0, 0.2, 0.0, 0.4], "weights", 6, drawn(top_p=0.8, seed=5)),
            self.request(5, [0.3, 0.3, 0.4, 0.0], "weights:svd:1", 4),
            self.request(6, gated, "layers", 5),
            self.request(7, self.keeping, "layers", 6),
            self.request(8, self.anew, "weights", 5, drawn(top_k=20)),
            self.request(9, [0.0, 0.0, 0.6, 0.4], "logits", 4, drawn(seed=1), drawn(seed=2), drawn(seed=3)),
        ]
        self._alone: dict[int, list[tuple[Any, ...]]] = {}

    def request(
        self,
        number: int,
        weights: list[float] | Routing | Rerouting,
        combiner: str,
        limit: int,
        *draws: SamplingSettings,
    ) -> Request:
        """A request of its own prompt; the longer ones are read in several chunks."""
        ids = [(number * 37 + place * place) % 256 for place in range(3 + 4 * number)]
        routing = Routing(self.mixture.bank.names, torch.tensor([weights])) if isinstance(weights, list) else weights
        return Request(row(ids), routing, make_combiner(combiner), limit, draws or (GREEDY,))

    def engine(self, slots: Any = None, **options: Any) -> Engine:
        return Engine(self.mixture.backbone, self.mixture.layers, slots, **options)

    def slow_slots(self) -> SlowSlots:
        return SlowSlots(self.mixture.backbone)

    def alone(self, kind: int) -> list[Token]:
        if kind not in self._alone:
            self._alone[kind] = [
                token for token in self.engine().run([self.requests[kind]]) if isinstance(token, Token)
            ]
        return self._alone[kind]


@pytest.fixture(scope="module")
def kinds(backbone: Backbone) -> Kinds:
    """Four random experts, which nothing needs to be trained for."""
    generator = torch.Generator().manual_seed(0)
    shapes = {path: shape for path, shape in linear_shapes(backbone.model).items() if "lm_head" not in path}

    def adapter() -> dict[str, LoraPair]:
        return {
            path: LoraPair(torch.randn(2, i, generator=generator) / 8, torch.randn(2, o, generator=generator) / 8)
            for path, (i, o) in shapes.items()
        }

    bank = ExpertBank(NAMES, tuple(adapter() for _ in NAMES))
    prompts = PromptFormat(backbone.tokenizer)
    return Kinds(Mixture(backbone, bank, uniform(NAMES), LogitCombiner(), prompts, "uniform"))


def by_draw(tokens: Iterable[Token]) -> dict[int, list[Token]]:
    found: dict[int, list[Token]] = {}
    for token in tokens:
        found.setdefault(token.draw, []).append(token)
    return found


def same(found: Iterable[Token], wanted: Iterable[Token], *, is_cut: bool = False) -> None:
    """The same tokens with the same texts, ends, log-probabilities and weights; of what was cut off, the beginning."""
    left, right = by_draw(found), by_draw(wanted)
    assert is_cut or left.keys() == right.keys()
    for draw, own in left.items():
        others = right[draw][: len(own)] if is_cut else right[draw]
        assert [(t.id, t.text, t.finish_reason) for t in own] == [(t.id, t.text, t.finish_reason) for t in others]
        assert [t.logprob for t in own] == pytest.approx([t.logprob for t in others], rel=1e-4, abs=1e-5)
        for one, other in zip(own, others, strict=True):
            assert (one.weights is None) == (other.weights is None)
            assert one.weights is None or one.weights == pytest.approx(other.weights, rel=1e-4, abs=1e-5)


def answered(found: Iterable[Token | Failure]) -> dict[int, list[Token]]:
    """The tokens of every request, none of which failed."""
    result: dict[int, list[Token]] = {}
    for token in found:
        assert isinstance(token, Token), token.error
        result.setdefault(token.request, []).append(token)
    return result


# ------------------------------------------------------------------------------------------------ joining, leaving


class Arrivals(RuleBasedStateMachine):
    """Requests of any kind come, are answered for a while and are cancelled, in any order."""

    kinds: Kinds

    def __init__(self) -> None:
        super().__init__()
        self.slots = Slots(self.kinds.mixture.backbone)
        self.engine = self.kinds.engine(self.slots, places=4, chunk=24)
        self.asked: dict[int, int] = {}
        self.found: dict[int, list[Token]] = {}
        self.cancelled: set[int] = set()

    @rule(kind=st.integers(0, 8))
    def submit(self, kind: int) -> None:
        handle = self.engine.submit(self.kinds.requests[kind])
        assert handle not in self.asked
        self.asked[handle], self.found[handle] = kind, []

    @rule(times=st.integers(1, 3))
    def step(self, times: int) -> None:
        for _ in range(times):
            for handle, tokens in answered(self.engine.step()).items():
                assert handle not in self.cancelled
                self.found[handle] += tokens

    @precondition(lambda self: self.asked)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        handle = data.draw(st.sampled_from(sorted(self.asked)))
        self.engine.cancel(handle)
        self.cancelled.add(handle)

    def teardown(self) -> None:
        while not self.engine.is_idle:
            self.step(1)
        for handle, kind in self.asked.items():
            same(self.found[handle], self.kinds.alone(kind), is_cut=handle in self.cancelled)
        assert self.slots.claimed == 0


def test_requests_that_come_and_go_in_any_order_get_what_they_get_alone(kinds):
    Arrivals.kinds = kinds
    Arrivals.TestCase.settings = settings(max_examples=12, stateful_step_count=30, deadline=None)
    Arrivals.TestCase().runTest()


@pytest.mark.parametrize("kind", [0, 1, 2, 3, 4, 5, 7, 8])
def test_a_cache_gives_what_reading_every_text_anew_gives(kinds, kind):
    """Not for weights that change over a kept cache, which are another mixture than the last weights alone."""
    slow = kinds.engine(kinds.slow_slots()).run([kinds.requests[kind]])
    same(kinds.alone(kind), answered(slow)[0])


@pytest.mark.parametrize("chunk", [1, 5, 64])
def test_prompts_read_in_chunks_give_what_they_give_at_once(kinds, chunk):
    found = answered(kinds.engine(places=20, chunk=chunk).run(kinds.requests))
    for kind in range(len(kinds.requests)):
        same(found[kind], kinds.alone(kind))


@pytest.mark.parametrize(("asked", "chunk"), [(16, 16), (None, 128)])
def test_who_writes_gets_a_token_at_every_step_while_a_long_prompt_is_read(kinds, monkeypatch, asked, chunk):
    passes: list[int] = []
    original = type(kinds.mixture.backbone).hidden

    def counted(self, ids, *args):
        passes.append(ids.numel())
        return original(self, ids, *args)

    monkeypatch.setattr(type(kinds.mixture.backbone), "hidden", counted)
    engine = open_engine(kinds.mixture, CapacitySettings(prefill_chunk=asked))
    writing = engine.submit(replace(kinds.requests[0], limit=400, end_ids=frozenset()))
    while not engine.step():
        pass
    long = engine.submit(replace(kinds.requests[3], prompt=row(LONG), draws=(GREEDY,)))
    found: list[int] = []
    longest: list[int] = []
    while long not in found:
        passes.clear()
        found = [token.request for token in engine.step()]
        assert found[:1] == [writing] and passes[:1] == [1] and len(passes) <= 2
        longest.append(max(passes))
    assert max(longest) == chunk


def test_a_prompt_is_read_once_for_all_of_its_answers(kinds):
    slots = kinds.slow_slots()
    request = kinds.requests[8]
    tokens = answered(kinds.engine(slots).run([request]))[0]
    rows, length = 2, len(request.prompt.ids)
    assert slots.read_tokens == rows * (length + len(tokens) - len(request.draws))
    assert slots.claimed == 0
    for draw, settings_ in enumerate(request.draws):
        single = answered(kinds.engine().run([replace(request, draws=(settings_,))]))[0]
        same([token._replace(draw=0) for token in tokens if token.draw == draw], single)


def test_a_request_that_is_cancelled_after_any_number_of_steps_leaves_no_trace(kinds):
    lengths = range(12)
    for steps in lengths:
        slots = kinds.slow_slots()
        engine = kinds.engine(slots, places=5, chunk=16)
        handles = [engine.submit(kinds.requests[kind]) for kind in (0, 8, 3)]
        found = [token for _ in range(steps) for token in engine.step()]
        engine.cancel(handles[1])
        engine.cancel(handles[1])
        found += engine.run()
        tokens = answered(found)
        same(tokens[handles[0]], kinds.alone(0))
        same(tokens[handles[2]], kinds.alone(3))
        same(tokens.get(handles[1], []), kinds.alone(8), is_cut=True)
        assert slots.claimed == 0


def test_the_load_of_an_engine_is_what_waits_and_what_is_written_and_nothing_in_the_end(kinds):
    engine = kinds.engine(places=3)
    handles = [engine.submit(kinds.requests[kind]) for kind in (0, 3, 8, 4)]  # the third wants three places at once
    assert engine.load == (4, 0, 0.0, 0)
    engine.step()
    assert engine.load[:2] == (2, 2) and 0 < engine.load.cache <= 1
    engine.cancel(handles[2])
    engine.step()
    assert engine.load[:2] == (0, 3)
    list(engine.run())
    assert engine.load[:3] == (0, 0, 0.0)


def test_the_load_of_an_engine_counts_the_tokens_that_its_steps_read(kinds):
    engine, request = kinds.engine(chunk=16), kinds.requests[4]  # 23 tokens, in one row
    engine.submit(request)
    for read in (16, 23, 24, 25, 26):
        engine.step()
        assert engine.load.tokens == read


def test_the_first_token_of_every_answer_tells_when_its_request_joined(kinds, monkeypatch):
    clock = itertools.count(1.0)
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    tokens = list(kinds.engine(places=3).run([kinds.requests[0], kinds.requests[8]]))
    first = {(token.request, token.draw): token.begun for token in tokens if token.begun}
    assert first.keys() == {(token.request, token.draw) for token in tokens}
    assert len([token for token in tokens if token.begun]) == 4
    assert first[0, 0].joined < first[1, 0].joined and len({first[1, draw] for draw in range(3)}) == 1


# ------------------------------------------------------------------------------------------------ what breaks


def test_a_deadline_ends_a_request_that_waits_or_writes_and_no_other(kinds, monkeypatch):
    now = 100.0
    monkeypatch.setattr(engine_module.time, "monotonic", lambda: now)
    engine = kinds.engine(places=2)
    first = engine.submit(kinds.requests[0])
    late = [engine.submit(replace(kinds.requests[kind], deadline=101.0)) for kind in (1, 2)]
    found = [token for _ in range(2) for token in engine.step()]
    assert {token.request for token in found} == {first, late[0]}, "the last one waits for a place"
    now = 101.0
    ended = [failure for failure in engine.step() if isinstance(failure, Failure)]
    assert [failure.request for failure in ended] == [late[1], late[0]]
    assert all(isinstance(failure.error, TimeoutError) for failure in ended)
    found += engine.run()
    assert {token.request for token in found} == {first, late[0]}


def test_a_router_that_breaks_ends_its_own_request_only(kinds):
    def weigh(routing: Routing) -> Routing:
        if any(float(weights.sum()) > 50 for weights in routing.weights):
            raise RuntimeError("this text is too long for me")
        return routing

    rerouting = replace(kinds.keeping, weigh=weigh)
    short = replace(kinds.requests[6], prompt=row([9, 8, 7]), routing=rerouting)
    long = replace(short, prompt=row(LONG[:44]), limit=8)  # its text becomes too long while it is answered
    later = replace(short, prompt=row(LONG[:60]))
    found = list(kinds.engine().run([short, long, later, kinds.requests[0]]))
    failures = {token.request: token for token in found if isinstance(token, Failure)}
    tokens = answered(token for token in found if isinstance(token, Token))
    assert failures.keys() == {1, 2} and "too long for me" in str(failures[1].error)
    same(tokens[0], answered(kinds.engine().run([replace(short, routing=kinds.keeping)]))[0])
    same(tokens[1], answered(kinds.engine().run([replace(long, routing=kinds.keeping)]))[0], is_cut=True)
    same(tokens[3], kinds.alone(0))
    assert len(tokens[1]) == 3


@pytest.mark.parametrize("at", range(6))
def test_a_pass_that_breaks_once_is_made_up_for(kinds, monkeypatch, at):
    """Want of memory for all together, say: everybody goes on from what was read before."""
    original, count = type(kinds.mixture.backbone).hidden, 0

    def breaks_once(self, ids, *args):
        nonlocal count
        count += len(ids) > 6  # more rows than one request has
        result = original(self, ids, *args)  # what was read is written down already
        if count == at + 1 and len(ids) > 6:
            raise MemoryError("no memory for so many")
        return result

    wanted = [kinds.alone(kind) for kind in range(len(kinds.requests))]
    engine = kinds.engine(places=20, chunk=200)
    monkeypatch.setattr(type(kinds.mixture.backbone), "hidden", breaks_once)
    found = answered(engine.run(kinds.requests))
    for kind in range(len(kinds.requests)):
        same(found[kind], wanted[kind])


def test_a_pass_that_breaks_whenever_it_is_large_keeps_nobody_from_being_answered(kinds, monkeypatch):
    original = type(kinds.mixture.backbone).hidden

    def breaks(self, ids, *args):
        if len(ids) > 6:
            raise MemoryError("no memory for so many")
        return original(self, ids, *args)

    wanted = [kinds.alone(kind) for kind in range(len(kinds.requests))]
    monkeypatch.setattr(type(kinds.mixture.backbone), "hidden", breaks)
    found = answered(kinds.engine(places=20, chunk=24).run(kinds.requests))
    for kind in range(len(kinds.requests)):
        same(found[kind], wanted[kind])


def test_an_engine_belongs_to_the_thread_that_is_in_its_step(kinds):
    errors: list[CoterieError] = []
    engine = kinds.engine()

    def intrude() -> None:
        for call in (engine.step, lambda: engine.submit(kinds.requests[0]), lambda: engine.cancel(0)):
            try:
                call()
            except CoterieError as error:
                errors.append(error)

    def weigh(routing: Routing) -> Routing:
        thread = threading.Thread(target=intrude)
        thread.start()
        thread.join()
        return routing

    request = replace(kinds.requests[6], routing=replace(kinds.keeping, weigh=weigh), limit=1)
    assert [token.id for token in answered(engine.run([request]))[0]] == [kinds.alone(6)[0].id]
    assert len(errors) == 3 and all("let one thread own the engine" in str(error) for error in errors)


def test_a_model_that_others_run_is_told_to_whoever_takes_the_step_and_costs_no_request(kinds):
    engine, layers = kinds.engine(), kinds.mixture.layers
    engine.submit(kinds.requests[0])
    found = engine.step()
    with (
        layers.running(layers.weighted(torch.ones(1, 4))),
        pytest.raises(CoterieError, match="in use by other experts"),
    ):
        engine.step()
    same(answered([*found, *engine.run()])[0], kinds.alone(0))


@pytest.mark.parametrize("weights", [[0.0, 0.0, 0.0, 0.0, 1.0], [0.0, 0.2, 0.0, 0.3, 0.5]])
@pytest.mark.parametrize("steps", [1, 3, 6])
def test_numbers_that_are_not_finite_stay_with_their_request(kinds, weights, steps):
    """Neither its company nor those who take over its rows of the cache notice, whenever it ends."""
    own = kinds.mixture
    broken = {path: LoraPair(pair.down / 0, pair.up) for path, pair in own.bank.adapters[0].items()}
    bank = ExpertBank((*NAMES, "broken"), (*own.bank.adapters, broken))
    wide = [replace(one, routing=one.routing.aligned(bank.names)) for one in kinds.requests[:5]]
    layers = ExpertLayers(own.backbone.model, bank.adapters)
    engine = Engine(own.backbone, layers, places=5, chunk=24)
    handles = {engine.submit(wide[kind]): kind for kind in (0, 2, 3)}
    bad = replace(kinds.request(20, [1.0] * 4, "layers", 5), routing=Routing(bank.names, torch.tensor([weights])))
    found, ends = engine.step(), engine.submit(bad)
    for _ in range(steps):
        found += engine.step()
    if steps < 6:
        engine.cancel(ends)
    handles |= {engine.submit(wide[kind]): kind for kind in (2, 1, 3, 4)}
    found += engine.run()
    failures = [token for token in found if isinstance(token, Failure)]
    assert bool(failures) == (steps >= 5)
    assert all(own.request == ends and "no longer finite" in str(own.error) for own in failures)
    tokens = answered(token for token in found if isinstance(token, Token))
    for handle, kind in handles.items():
        same(tokens[handle], kinds.alone(kind))


# ------------------------------------------------------------------------------------------------ what fits


def test_requests_wait_for_memory_in_their_order_and_all_are_answered(kinds):
    backbone = kinds.mixture.backbone
    budget = Slots(backbone).bytes_for(6, 128)
    slots = Slots(backbone, budget)
    engine = kinds.engine(slots, places=20)
    handles = [engine.submit(request) for request in kinds.requests]
    begun: dict[int, None] = {}
    found: list[Token | Failure] = []
    while not engine.is_idle:
        found += engine.step()
        assert slots.bytes <= budget
        begun = dict.fromkeys([*begun, *(token.request for token in found)])
    assert list(begun) == handles, "nobody overtakes"
    for handle, kind in zip(handles, range(9), strict=True):
        same(answered(found)[handle], kinds.alone(kind))


def test_what_can_never_be_answered_is_refused_when_it_comes(kinds):
    backbone = kinds.mixture.backbone
    request = kinds.requests[0]
    engine = kinds.engine(Slots(backbone, Slots(backbone).bytes_for(2, 64)))
    with pytest.raises(CoterieError, match="takes .* bytes, more than the .* that it may have; ask for fewer tokens"):
        engine.submit(replace(request, limit=2000))
    with pytest.raises(CoterieError, match="takes .* bytes, more than the"):
        engine.submit(replace(request, draws=(drawn(),) * 9))
    with pytest.raises(CoterieError, match="a prompt of at least one token"):
        engine.submit(replace(request, prompt=row([])))
    with pytest.raises(CoterieError, match="combiner 'logits' does not follow weights that change"):
        engine.submit(replace(request, routing=kinds.keeping))
    with pytest.raises(CoterieError, match="--logit-bias 99999"):
        engine.submit(replace(request, draws=(SamplingSettings(logit_bias={99999: 1}),)))
    assert engine.is_idle
    same(answered(engine.run([request])).popitem()[1], kinds.alone(0))
