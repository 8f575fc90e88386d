"""What somebody meets who looks around in a session of Python: names, and objects that print in a few lines."""

import pydoc

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

import coterie
import tiny
from conftest import write_rows
from coterie.data.batching import TokenRow
from coterie.data.examples import Example, load_examples
from coterie.data.forms import Message
from coterie.errors import CoterieError
from coterie.evaluation.compare import evaluate
from coterie.methods import load_grid
from coterie.mixture import Completion
from coterie.records.evaluation import Trace
from coterie.routers.base import Routing


def test_what_a_session_prints_is_a_few_lines(mixture, run_folder):
    routing = mixture.route(["add 3 4"] * 9)
    pairs = next(adapter for adapter in mixture.bank.adapters if adapter)
    grid = load_grid(mixture, ["elrea"])
    for shown in (mixture, grid, mixture.bank, mixture.backbone, routing, mixture.router, next(iter(pairs.values()))):
        text = repr(shown)
        assert len(text.splitlines()) <= 20 and len(text) < 2000, type(shown)
    text = repr(mixture)
    assert text.startswith(f"Mixture({run_folder})\n") and len(text.splitlines()) == 4
    assert all(name in text for name in mixture.bank.names) and "router=" in text and "combiner=logits" in text
    assert mixture.backbone.identity.id in text and "float32, cpu" in text


def test_a_routing_prints_its_largest_weights_and_how_many_it_has():
    weights = torch.tensor([[0.25, 0.75]]).repeat(7, 1)
    lines = repr(Routing(("a", "b"), weights)).splitlines()
    assert lines == ["Routing(requests=7, experts=2)", *["  b 0.750, a 0.250"] * 5, "  and 2 more"]


def test_a_completion_prints_its_words_not_its_numbers():
    trace = Trace(experts=("a",), pieces=("x",) * 4000, weights=((1.0,),) * 4000)
    answer = Completion("p", "text", (1,) * 4000, (-0.5,) * 4000, "stop", {"a": 1.0}, trace)
    assert repr(answer) == "Completion(prompt='p', text='text', finish_reason='stop', weights={'a': 1.0})"


def test_a_mixture_has_the_names_that_users_of_transformers_look_for(mixture):
    assert mixture.tokenizer is mixture.backbone.tokenizer
    assert mixture.device == torch.device("cpu")


def test_every_public_name_is_listed_and_explained():
    assert set(coterie.__all__) <= set(dir(coterie)) and "__version__" in dir(coterie)
    page = pydoc.plain(pydoc.render_doc(coterie))
    assert [name for name in coterie.__all__ if name not in page] == []


def test_a_score_is_the_probability_that_the_expert_alone_gives(mixture, run_folder, model_folder):
    prompts, responses = ["add 3 4", "SPELL ABCD NOW"], ["\\boxed{7}", "a b c d"]
    found = mixture.replace(router="cluster-0").score(prompts, responses)
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, run_folder / "experts" / "cluster-0").eval()
    for number, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        row = mixture.prompts.row(Example("0", (Message("user", prompt), Message("assistant", response))))
        with torch.inference_mode():
            each = model(torch.tensor([row.ids])).logits[0].log_softmax(dim=-1)
        places = range(row.prompt_length, len(row.ids))
        assert found.logprobs[number].item() == pytest.approx(
            sum(each[place - 1, row.ids[place]].item() for place in places), abs=1e-3
        )
        assert found.tokens[number] == len(places)


def test_a_greedy_answer_is_as_likely_as_its_tokens_were_also_where_weights_change(mixture):
    for cell in (mixture, mixture.replace(router="uniform"), mixture.rerouted(2, combiner="layers")):
        answer = cell.generate("add 3 4", max_new_tokens=12)[0]
        row = cell.tokens("add 3 4")[0]
        whole = TokenRow(
            (*row.ids, *answer.token_ids),
            len(row.ids),
            (*row.is_response, *[True] * len(answer.token_ids)),
            (*row.is_user_text, *[False] * len(answer.token_ids)),
        )
        found = cell.score_rows([whole], cell.route("add 3 4"))
        assert -(found.nll[0, 0] * found.tokens[0]).item() == pytest.approx(sum(answer.logprobs), abs=1e-3)
        one, two = cell.score("add 3 4", "x y"), cell.score(["add 3 4"] * 2, ["x y", "7"])
        assert one.logprobs[0].item() == pytest.approx(two.logprobs[0].item(), abs=1e-4)


@pytest.mark.parametrize(
    ("prompts", "responses", "told"),
    [
        (["a", "b"], "c", "2 have 1"),
        ("a", ["c", "d"], "1 have 2"),
        (["a", "b"], ["c", " "], "response 2 is empty"),
        (["a", ""], ["c", "d"], "prompt 2 is empty"),
    ],
)
def test_scores_of_what_does_not_fit_are_refused(mixture, prompts, responses, told):
    with pytest.raises(CoterieError, match=told):
        mixture.score(prompts, responses)
    with pytest.raises(CoterieError, match="scores none"):
        mixture.replace(combiner="texts").score("a", "b")


@pytest.mark.parametrize(
    ("call", "meant"),
    [
        (lambda mixture, folder: mixture.generate("a", max_new_token=3), "max_new_tokens"),
        (lambda mixture, folder: mixture.generate("a", batchsize=3), "batch_size"),
        (lambda mixture, folder: list(mixture.stream("a", temprature=1)), "temperature"),
        (lambda mixture, folder: mixture.complete(mixture.tokens("a"), batchsize=3), "batch_size"),
        (lambda mixture, folder: coterie.Mixture.from_pretrained(folder, devise="cpu"), "device"),
        (lambda mixture, folder: list(coterie.verify_bank(folder, dtyp="float32")), "dtype"),
        (lambda mixture, folder: coterie.evaluate(mixture, [], resample=100), "resamples"),
        (lambda mixture, folder: coterie.methods.elrea("m", "d", output=folder / "x", cluster=3), "clusters"),
        (lambda mixture, folder: coterie.methods.token_level("m", {}, output=folder / "x", ranks=3), "rank"),
        (lambda mixture, folder: coterie.methods.kshot("b", "s", output=folder / "x", pools=3), "pool"),
        (lambda mixture, folder: coterie.methods.symbolic("p", output=folder / "x", recruit=3), "recruits"),
        (lambda mixture, folder: coterie.methods.from_adapters("b", output=folder / "x", windows=3), "window"),
        (lambda mixture, folder: coterie.bank_add(folder / "b", "a", modle="m"), "model"),
        (lambda mixture, folder: coterie.select("b", "s", output=folder / "x", keeps=3), "keep"),
        (lambda mixture, folder: coterie.gather("s", "p", output=folder / "x", budgets=3), "budget"),
    ],
)
def test_an_unknown_keyword_is_told_with_the_one_that_was_meant(mixture, tmp_path, call, meant):
    with pytest.raises(CoterieError, match=f"Did you mean '{meant}'"):
        call(mixture, tmp_path)


def test_weights_stand_in_a_router_s_place(mixture):
    routing = mixture.replace(router={"cluster-0": 0.75, "base": 0.25}).route("add 3 4")
    assert routing.row(0) == {"cluster-0": 0.75, "base": 0.25}
    with pytest.raises(CoterieError, match="Did you mean 'base'"):
        mixture.replace(router={"bsae": 1.0})


def test_a_folder_and_a_file_are_evaluated_as_what_is_in_them(mixture, run_folder, tmp_path):
    file = write_rows(tmp_path / "test.jsonl", tiny.make_rows(3, seed=4))
    how = {"methods": ["base", "elrea"], "max_new_tokens": 2, "device": "cpu"}
    wanted = evaluate(mixture, load_examples(file), **how)
    assert evaluate(run_folder, file, **how).row_records == wanted.row_records
    assert evaluate(str(run_folder), str(file), **how, limit=2).record.rows == 2
