"""A2 line 15: prompts of tokens with echo and log-probabilities, as lm-evaluation-harness asks for them.

If echo is ignored, every score is 0 and results are exactly chance, silently: ggml-org/llama.cpp#27174.
"""

import pytest
from lm_eval.api.instance import Instance
from lm_eval.models.openai_completions import LocalCompletionsAPI

from coterie.data.batching import TokenRow
from coterie.engine.scoring import score_responses
from coterie.evaluation.harness import HarnessModel
from coterie.mixture import Mixture
from served import frames_of

PAIRS = [("add 3 4 gives", " 7"), ("the word", " is A B"), ("xy", "yé"), ("add 11 25", " 36 and no more")]


def asked(client, prompt, **fields):
    body = {"model": "elrea", "prompt": prompt, "echo": True, "logprobs": 1, "max_tokens": 1, "temperature": 0}
    answer = client.post("/v1/completions", json=body | fields)
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_a_prompt_of_tokens_comes_back_with_the_log_of_every_token_but_the_first(client, mixture: Mixture):
    ids = mixture.tokenizer("add é 3")["input_ids"]
    choice = asked(client, ids)["choices"][0]
    logs = choice["logprobs"]
    assert choice["text"].startswith("add é 3")
    assert len(logs["tokens"]) == len(ids) + 1 and logs["token_logprobs"][0] is None and logs["top_logprobs"][0] is None
    for name, own, top in zip(logs["tokens"][1:], logs["token_logprobs"][1:], logs["top_logprobs"][1:], strict=True):
        assert top[name] == own <= max(top.values()) and len(top) in (1, 2)
    assert logs["text_offset"][:6] == [0, 1, 2, 3, 4, 5]


def row(ids):
    return TokenRow(tuple(ids), len(ids), (False,) * len(ids), (True,) * len(ids))


@pytest.mark.parametrize("model", ["cluster-0", "elrea"])
def test_tokens_of_a_prompt_have_the_logs_that_they_have_in_python(client, mixture: Mixture, model):
    """What routes does so by all of the prompt: no client says where a context ends and a continuation begins."""
    cell = mixture if model == "elrea" else mixture.replace(router=model, combiner="layers")
    ids = mixture.tokenizer("add 3 4 gives 7")["input_ids"]
    plan = cell.combiner.plan(cell.router.start([row(ids)]).aligned(mixture.bank.names))
    votes = [[own.votes for own in plan]]
    wanted = score_responses(mixture.backbone, mixture.layers, plan, votes, [(ids, range(1, len(ids)))])[0][0]
    found = asked(client, ids, model=model)["choices"][0]["logprobs"]["token_logprobs"]
    assert found[1:-1] == pytest.approx(wanted.logprobs.tolist(), abs=1e-4)


def test_the_token_that_ends_a_text_is_told_too(client, mixture: Mixture):
    """Lm-eval leaves out the last entry: it must be the token that was written, whatever that is."""
    ids = mixture.tokenizer("add 3")["input_ids"]
    end = mixture.tokenizer.eos_token_id
    choice = asked(client, ids, logit_bias={str(end): 100})["choices"][0]
    assert choice["finish_reason"] == "stop" and len(choice["logprobs"]["tokens"]) == len(ids) + 1
    assert choice["logprobs"]["tokens"][-1] == "<e>" and choice["text"] == "add 3"


def test_a_prompt_can_be_scored_without_writing_anything(client, mixture: Mixture):
    ids = mixture.tokenizer("add 3")["input_ids"]
    answer = asked(client, ids, max_tokens=0)
    assert len(answer["choices"][0]["logprobs"]["tokens"]) == len(ids) and answer["choices"][0]["text"] == "add 3"
    assert answer["usage"]["completion_tokens"] == 0 and answer["choices"][0]["finish_reason"] == "length"


def test_a_stream_gives_the_prompt_back_as_the_whole_answer_does(client):
    whole = asked(client, ["add 3", "é"], n=2, temperature=1, seed=3, max_tokens=3)
    body = {"model": "elrea", "prompt": ["add 3", "é"], "echo": True, "logprobs": 1, "max_tokens": 3, "n": 2, "seed": 3}
    raw = client.post("/v1/completions", json={**body, "stream": True})
    for choice in whole["choices"]:
        parts = [frame["choices"][0] for frame in frames_of(raw) if frame["choices"][0]["index"] == choice["index"]]
        assert "".join(part["text"] for part in parts) == choice["text"]
        for field in ("tokens", "text_offset"):
            assert [one for part in parts if part["logprobs"] for one in part["logprobs"][field]] == choice["logprobs"][
                field
            ]


@pytest.fixture(scope="module")
def harness(server, model_folder):
    def of(model: str, **options) -> LocalCompletionsAPI:
        how = {"tokenizer": str(model_folder), "tokenizer_backend": "huggingface", "max_length": 512}
        return LocalCompletionsAPI(base_url=f"{server.url}/v1/completions", model=model, **how | options)

    return of


def instances(kind, *arguments):
    return [Instance(request_type=kind, doc={}, arguments=one, idx=number) for number, one in enumerate(arguments)]


@pytest.mark.parametrize("method", ["base", "uniform-weights"])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_lm_eval_over_http_has_the_numbers_of_the_evaluation_in_process(harness, mixture, method, batch_size):
    own = HarnessModel(mixture.replace(router="uniform" if method == "uniform-weights" else method))
    remote = harness(f"elrea:{method}" if method == "uniform-weights" else method, batch_size=batch_size)
    asked = instances("loglikelihood", *PAIRS)
    for there, here in zip(remote.loglikelihood(asked), own.loglikelihood(asked), strict=True):
        assert there[0] == pytest.approx(here[0], abs=1e-3) and there[1] == here[1]
    texts = instances("loglikelihood_rolling", *[(f"{before}{after}",) for before, after in PAIRS])
    assert remote.loglikelihood_rolling(texts) == pytest.approx(own.loglikelihood_rolling(texts), abs=1e-3)
    until = instances("generate_until", *[(before, {"until": ["7", "\n"], "max_gen_toks": 6}) for before, _ in PAIRS])
    assert remote.generate_until(until) == own.generate_until(until)
