"""The log-probabilities of a prompt's tokens are those of scoring it, in any chunks, beside anybody."""

import pytest
import torch

from coterie.combiners.table import make_combiner
from coterie.data.batching import TokenRow
from coterie.engine.engine import Engine
from coterie.engine.request import Request, Token
from coterie.engine.scoring import score_responses
from coterie.mixture import Mixture
from coterie.routers.base import Routing

IDS = tuple((number * number + 40) % 256 for number in range(90))


def row(ids):
    return TokenRow(tuple(ids), len(ids), (False,) * len(ids), (True,) * len(ids))


def asked(mixture: Mixture, combiner: str, shown: int | None, ids=IDS) -> Request:
    weights = torch.linspace(1, 2, len(mixture.bank.names))[None]
    routing = Routing(mixture.bank.names, weights).normalized()
    return Request(row(ids), routing, make_combiner(combiner), 2, prompt_logprobs=shown)


def begun(engine: Engine, *requests: Request):
    tokens = [token for token in engine.run(requests) if isinstance(token, Token) and token.begun]
    return [token.begun for token in sorted(tokens, key=lambda token: token.request)]


@pytest.mark.parametrize(("combiner", "chunk"), [("logits", 28), ("layers", 28), ("layers", 89), ("weights", 28)])
def test_a_prompt_in_chunks_has_the_log_probabilities_of_a_text_that_is_scored(mixture: Mixture, combiner, chunk):
    request = asked(mixture, combiner, 3)
    plan = request.combiner.plan(request.routing)
    texts = [(IDS, range(1, len(IDS)))]
    wanted = score_responses(mixture.backbone, mixture.layers, plan, [[plan[0].votes]], texts)[0][0]
    other = asked(mixture, combiner, None, IDS[:50])
    found, plain = begun(mixture.engine(chunk=chunk), request, other)
    assert [one.logprob for one in found.prompt] == pytest.approx(wanted.logprobs.tolist(), abs=1e-4)
    assert [one.logprob == one.top[0][1] for one in found.prompt] == wanted.is_greedy.tolist()
    for token, one in zip(IDS[1:], found.prompt, strict=True):
        assert len(one.top) == 3 and dict(one.top).get(token, one.logprob) == one.logprob
    assert plain.prompt == ()


def test_a_prompt_that_is_scored_is_read_though_it_is_known(mixture: Mixture):
    engine = mixture.engine(prefixes=2**24)
    first, again = begun(engine, asked(mixture, "layers", 0)), begun(engine, asked(mixture, "layers", 0))
    (later,) = begun(engine, asked(mixture, "layers", None))
    assert len(again[0].prompt) == len(first[0].prompt) == len(IDS) - 1 and again[0].cached == 0 < later.cached
