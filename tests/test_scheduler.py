"""The batch scheduler: loads are counted, memory is kept, failures cost their own answers, nothing finished is lost."""

import json
import os
import threading
from collections.abc import Callable, Sequence

import pytest
import torch

from coterie.backbone.layers import ExpertLayers
from coterie.data.batching import PromptFormat
from coterie.data.examples import Message, from_prompt, load_examples
from coterie.errors import CoterieError
from coterie.experts.answering import Done, ExpertGroup, Question, Reply
from coterie.experts.bank import ExpertBank
from coterie.experts.expert_pool import init_pool, read_pool
from coterie.experts.reply_cache import ReplyCache
from coterie.lora import LoraPair
from coterie.mixture import Mixture
from coterie.mixture.local_answers import LocalAnswerer, LocalExpert, load_local
from coterie.mixture.memory import budget_of, groups_of
from coterie.mixture.scheduler import ExpertScheduler
from coterie.settings.commands import ExpertPoolSettings
from coterie.settings.groups import ExpertServingSettings, PlacementSettings, SamplingSettings
from stub_server import completion, serving


def ask(expert: str, text: str, **sampling: object) -> Question:
    return Question(expert, from_prompt(text).messages, SamplingSettings(**sampling))


class Machine:
    """Fake models that tell what is loaded, and what was asked of them."""

    def __init__(self) -> None:
        self.held: dict[str, int] = {}
        self.most = 0
        self.loaded: list[str] = []
        self.asked: list[tuple[str, str]] = []

    def group(
        self, name: str, size: int | None, *experts: str, fault: Callable[[Question], None] | None = None
    ) -> ExpertGroup:
        return ExpertGroup(name, experts or (name,), lambda: self.load(name, size or 0, fault), size)

    def load(self, name: str, size: int, fault: Callable[[Question], None] | None) -> "Fake":
        self.loaded.append(name)
        self.held[name] = size
        self.most = max(self.most, sum(self.held.values()))
        return Fake(self, name, fault)


class Fake:
    def __init__(self, machine: Machine, name: str, fault: Callable[[Question], None] | None) -> None:
        self.machine, self.name, self.fault = machine, name, fault

    def answer(self, questions: Sequence[Question], done: Done) -> None:
        for number, given in enumerate(questions):
            self.machine.asked.append((given.expert, given.messages[-1].content))
            if self.fault:
                self.fault(given)
            done(number, Reply(f"{given.expert}: {given.messages[-1].content}"))

    def close(self) -> None:
        del self.machine.held[self.name]


def new_scheduler(*groups: ExpertGroup, budget: int | None = None, cache: ReplyCache | None = None) -> ExpertScheduler:
    names = {name: name for group in groups for name in group.experts}
    return ExpertScheduler(groups, names, ReplyCache() if cache is None else cache, budget)


def texts(replies: Sequence[Reply]) -> list[str]:
    return [reply.text for reply in replies]


def test_every_model_is_loaded_once_however_the_questions_are_mixed():
    machine = Machine()
    groups = [machine.group("small", 1, "a", "b"), machine.group("large", 5), machine.group("idle", 3)]
    asks = [ask(name, f"q{number}") for number in range(4) for name in ("a", "large", "b")]
    with new_scheduler(*groups) as scheduler:
        replies = scheduler.ask(asks)
        assert texts(replies) == [f"{given.expert}: {given.messages[-1].content}" for given in asks]
        assert scheduler.loads == {"small": 1, "large": 1}
    assert machine.loaded == ["large", "small"], "the largest comes first, and what nobody asks is not loaded"
    assert machine.held == {}


def test_models_that_fit_together_stay_and_the_budget_is_kept():
    machine = Machine()
    groups = [machine.group(name, size) for name, size in (("a", 4), ("b", 3), ("c", 6), ("d", 2))]
    with new_scheduler(*groups, budget=10) as scheduler:
        scheduler.ask([ask(name, "one") for name in "abcd"])
        assert machine.loaded == ["c", "a", "b", "d"] and machine.most == 10
        assert set(machine.held) == {"a", "b", "d"}, "only what was loaded longest went, when room was needed"
        scheduler.ask([ask(name, "two") for name in "abd"])
        assert machine.loaded == ["c", "a", "b", "d"], "they were still there"
    assert machine.most <= 10


def test_without_a_budget_one_model_is_loaded_at_a_time():
    machine = Machine()
    with new_scheduler(machine.group("a", 4), machine.group("b", None), machine.group("c", 3)) as scheduler:
        scheduler.ask([ask(name, "one") for name in "abc"])
    assert machine.most == 4


def test_a_model_of_unknown_size_is_loaded_alone():
    machine = Machine()
    with new_scheduler(machine.group("a", 4), machine.group("b", None), budget=10) as scheduler:
        scheduler.ask([ask("a", "one"), ask("b", "one")])
        assert len(machine.held) == 1


def test_what_is_needed_afterwards_is_asked_last_and_stays_loaded():
    machine = Machine()
    groups = [machine.group("judge", 9), machine.group("a", 5), machine.group("b", 6)]
    with new_scheduler(*groups, budget=10) as scheduler:
        scheduler.ask([ask(name, "one") for name in ("judge", "a", "b")], last=["judge"])
        scheduler.ask([ask("judge", "which?")])
        assert scheduler.loads == {"judge": 1, "a": 1, "b": 1} and machine.loaded[-1] == "judge"


def test_what_is_needed_afterwards_stays_while_others_come_and_go():
    machine = Machine()
    groups = [machine.group("judge", 4), machine.group("a", 5), machine.group("b", 6)]
    with new_scheduler(*groups, budget=10) as scheduler:
        scheduler.loaded("judge")
        scheduler.ask([ask(name, "one") for name in ("judge", "a", "b")], last=["judge"])
        scheduler.ask([ask("judge", "which?")])
        assert scheduler.loads == {"judge": 1, "a": 1, "b": 1} and machine.most == 10


def test_a_model_that_never_fits_is_refused_before_anything_is_asked():
    machine = Machine()
    groups = [machine.group("a", 1), machine.group("b", 5 * 2**30)]
    with new_scheduler(*groups, budget=2**30) as scheduler:
        with pytest.raises(CoterieError, match=r"^b needs about 5 GiB, and there may be 1; raise --memory"):
            scheduler.ask([ask("a", "one"), ask("b", "one")])
    assert machine.asked == []


def test_equal_questions_are_asked_once():
    machine = Machine()
    with new_scheduler(machine.group("a", 1)) as scheduler:
        again = [ask("a", "one"), ask("a", "one", seed=5), ask("a", "two")]
        assert texts(scheduler.ask(again)) == ["a: one", "a: one", "a: two"]
        assert len(machine.asked) == 2, "a seed does nothing to greedy decoding"
        scheduler.ask([ask("a", "one", temperature=1.0, seed=seed) for seed in (1, 2)])
        assert len(machine.asked) == 4
        scheduler.ask([ask("a", "one", max_new_tokens=5)])
        assert len(machine.asked) == 5


def crash(given: Question) -> None:
    if given.messages[-1].content == "q2":
        raise RuntimeError("CUDA error: out of memory\nmore")


def test_an_expert_that_crashes_costs_only_its_own_answers():
    machine = Machine()
    groups = [machine.group("a", 3, fault=crash), machine.group("b", 2), machine.group("c", 1)]

    def load() -> Fake:
        raise OSError("no such file")

    groups[2] = ExpertGroup("c", ("c",), load, 1)
    asks = [ask(name, f"q{number}") for number in range(4) for name in "abc"]
    with new_scheduler(*groups) as scheduler:
        replies = scheduler.ask(asks)
    found = {name: [r for r, a in zip(replies, asks, strict=True) if a.expert == name] for name in "abc"}
    assert texts(found["a"]) == ["a: q0", "a: q1", "", ""]
    assert [r.error for r in found["a"]] == [None, None, *["CUDA error: out of memory"] * 2]
    assert texts(found["b"]) == ["b: q0", "b: q1", "b: q2", "b: q3"]
    assert {r.error for r in found["c"]} == {"no such file"} and {r.finish_reason for r in found["c"]} == {"failed"}


def test_a_reply_that_cannot_be_written_ends_the_work(tmp_path):
    (tmp_path / "file").write_text("in the way")
    machine = Machine()
    with new_scheduler(machine.group("a", 1), cache=ReplyCache(tmp_path / "file" / "replies.jsonl")) as scheduler:
        with pytest.raises(CoterieError, match="cannot be written"):
            scheduler.ask([ask("a", "one"), ask("a", "two")])
    assert len(machine.asked) == 1


def test_endpoints_answer_while_models_do():
    machine = Machine()
    met = threading.Barrier(2, timeout=60)
    here = machine.group("a", 1, fault=lambda given: met.wait() and None)
    away = machine.group("big", 0, fault=lambda given: met.wait() and None)
    with new_scheduler(here, ExpertGroup("big", ("big",), away.load, 0, is_remote=True)) as scheduler:
        assert texts(scheduler.ask([ask("a", "one"), ask("big", "one")])) == ["a: one", "big: one"]


def test_an_endpoint_that_breaks_costs_only_its_own_answers():
    machine = Machine()
    away = machine.group("big", 0, fault=crash)
    with new_scheduler(machine.group("a", 1), ExpertGroup("big", ("big",), away.load, 0, is_remote=True)) as scheduler:
        replies = scheduler.ask([ask("a", "q2"), ask("big", "q2")])
    assert texts(replies) == ["a: q2", ""] and replies[1].error == "CUDA error: out of memory"


def test_a_run_that_was_killed_asks_only_for_what_is_missing(tmp_path):
    def killed(given: Question) -> None:
        if given.messages[-1].content == "q2":
            raise KeyboardInterrupt

    first, second = Machine(), Machine()
    asks = [ask("a", f"q{number}") for number in range(5)]
    path = tmp_path / "replies.jsonl"
    with (
        new_scheduler(first.group("a", 1, fault=killed), cache=ReplyCache(path)) as scheduler,
        pytest.raises(KeyboardInterrupt),
    ):
        scheduler.ask(asks)
    with path.open("a") as file:
        file.write('{"key": "half a li')  # a kill in the middle of writing
    with new_scheduler(second.group("a", 1), cache=ReplyCache(path)) as scheduler:
        assert texts(scheduler.ask(asks)) == [f"a: q{number}" for number in range(5)]
    assert [question for _, question in second.asked] == ["q2", "q3", "q4"]
    assert len(ReplyCache(path)) == 5, "the torn line did not swallow the one after it"
    with new_scheduler(Machine().group("a", 1), cache=ReplyCache(path)) as scheduler:
        scheduler.ask(asks)
        assert scheduler.loads == {}


def test_failed_replies_are_asked_for_again(tmp_path):
    path = tmp_path / "replies.jsonl"
    with new_scheduler(Machine().group("a", 1, fault=crash), cache=ReplyCache(path)) as scheduler:
        assert scheduler.ask([ask("a", "q2")])[0].error
    with new_scheduler(Machine().group("a", 1), cache=ReplyCache(path)) as scheduler:
        assert texts(scheduler.ask([ask("a", "q2")])) == ["a: q2"]


def test_replies_of_other_weights_are_not_taken(tmp_path):
    cache = ReplyCache()
    for identity, asked in (("one", 1), ("one", 0), ("two", 1)):
        machine = Machine()
        ExpertScheduler([machine.group("a", 1)], {"a": identity}, cache).ask([ask("a", "q")])
        assert len(machine.asked) == asked


# ------------------------------------------------------------------------------------------------------ real models


@pytest.fixture
def local(mixture: Mixture) -> LocalAnswerer:
    """The fitted run's experts and the base model itself, as a pool's group."""
    bank = ExpertBank((*mixture.bank.names, "plain"), (*mixture.bank.adapters, {}))
    return LocalAnswerer(mixture.backbone, bank, dict.fromkeys(bank.names, mixture.prompts), batch_size=4)


QUESTIONS = ["add 3 4", "SPELL ABCD NOW", "?? (A) one (B) two ??"]


def answers(answerer: LocalAnswerer, asks: Sequence[Question]) -> list[Reply]:
    found: dict[int, Reply] = {}
    answerer.answer(asks, found.__setitem__)
    assert sorted(found) == list(range(len(asks)))
    return [found[number] for number in range(len(asks))]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_experts_in_one_batch_answer_as_each_does_alone(local, mixture, temperature):
    asks = [
        ask(name, text, max_new_tokens=5, temperature=temperature, seed=3)
        for text in QUESTIONS
        for name in ("cluster-0", "plain", "base")
    ]
    found = answers(local, asks)
    for given, reply in zip(asks, found, strict=True):
        bank = ExpertBank((given.expert,), (local.bank.adapters[local.bank.index(given.expert)],))
        alone = LocalAnswerer(mixture.backbone, bank, {given.expert: mixture.prompts})
        assert answers(alone, [given])[0].text == reply.text
    single = mixture.replace(router="cluster-0").generate(QUESTIONS, max_new_tokens=5, temperature=temperature, seed=3)
    own = [reply for reply, given in zip(found, asks, strict=True) if given.expert == "cluster-0"]
    assert texts(own) == [completed.text for completed in single]
    assert [reply.tokens for reply in own] == [len(completed.token_ids) for completed in single]
    assert [reply.prompt_tokens for reply in own] == [len(row.ids) for row in mixture.tokens(QUESTIONS)]
    assert len(set(texts(found))) > 3, "the experts differ, so mixing them up would show"


def test_a_question_too_long_or_broken_fails_alone(local, mixture):
    asks = [ask("base", "x" * 600), ask("base", "add 1 2", max_new_tokens=3)]
    bad, good = answers(local, asks)
    assert "tokens, the model reads 512" in bad.error and good.error is None


def test_an_adapter_for_another_model_fails_alone(model_folder, run_folder, tmp_path):
    folder = tmp_path / "odd"
    folder.mkdir()
    (folder / "adapter_config.json").write_text('{"r": 1, "lora_alpha": 1}')
    experts = {"good": LocalExpert(run_folder / "experts" / "base"), "odd": LocalExpert(folder)}
    placement = PlacementSettings(device="cpu")
    answerer = load_local(str(model_folder), experts, placement, 8)
    good, odd = answers(answerer, [ask("good", "add 1 2", max_new_tokens=3), ask("odd", "add 1 2")])
    assert good.error is None and "adapter_model.safetensors does not exist" in odd.error
    with pytest.raises(CoterieError, match="does not exist"):
        load_local(str(model_folder), {"odd": LocalExpert(folder)}, placement, 8)


def test_an_expert_that_breaks_costs_its_own_questions_alone(local, monkeypatch):
    original, place = ExpertLayers.mix, local.bank.index("cluster-1")

    def mix(self, requests):
        if any(own.weights[:, place].any() for own in requests):
            raise RuntimeError("no memory for this one")
        return original(self, requests)

    asks = [ask(name, text, max_new_tokens=3) for name in ("cluster-0", "cluster-1") for text in QUESTIONS[:2]]
    wanted = answers(local, asks)
    monkeypatch.setattr(ExpertLayers, "mix", mix)
    found = answers(local, asks)
    assert [reply.error for reply in found] == [None, None, *["no memory for this one"] * 2]
    assert texts(found[:2]) == texts(wanted[:2])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_an_expert_that_gives_no_numbers_costs_its_own_questions_alone(local, mixture, temperature):
    broken = {path: LoraPair(pair.down * float("nan"), pair.up) for path, pair in local.bank.adapters[1].items()}
    bank = ExpertBank((*local.bank.names, "broken"), (*local.bank.adapters, broken))
    answerer = LocalAnswerer(mixture.backbone, bank, dict.fromkeys(bank.names, mixture.prompts), batch_size=4)
    names = ("cluster-0", "broken", "base")
    asks = [ask(name, QUESTIONS[0], max_new_tokens=3, temperature=temperature) for name in names]
    first, bad, last = answers(answerer, asks)
    assert "no longer finite" in bad.error
    assert texts([first, last]) == texts(answers(local, [asks[0], asks[2]]))


def test_options_have_the_probabilities_of_the_next_token(local, mixture):
    found = local.option_logprobs("cluster-0", QUESTIONS, ["A", "B", "C"])
    single = mixture.replace(router="cluster-0")
    for question, row in zip(QUESTIONS, found, strict=True):
        ids = torch.tensor([single.tokens([question])[0].ids])
        plan = single.combiner.plan(single.route([question]).aligned(single.bank.names))
        with single.layers.running(single.layers.mix(plan)):
            logprobs = mixture.backbone.head(mixture.backbone.hidden(ids))[0, -1].log_softmax(-1)
        wanted = [float(logprobs[mixture.backbone.tokenizer(letter)["input_ids"][0]]) for letter in "ABC"]
        assert row.tolist() == pytest.approx(wanted, abs=1e-4)
    with pytest.raises(CoterieError, match="begin with the same token"):
        local.option_logprobs("base", QUESTIONS, ["ab", "ac"])


def test_the_likelihood_of_references_is_each_expert_s_own(local, mixture):
    rows = load_examples([{"instruction": q, "response": f"answer {n}"} for n, q in enumerate(QUESTIONS)])
    found = local.likelihoods(rows)
    assert list(found) == list(local.bank.names)
    other = LocalAnswerer(
        local.backbone,
        local.bank,
        {
            name: PromptFormat(mixture.backbone.tokenizer, "Be brief." if name == "base" else None)
            for name in local.bank.names
        },
    ).likelihoods(rows)
    near = {name: torch.allclose(found[name], other[name], atol=1e-5) for name in found}
    assert near == {name: name != "base" for name in local.bank.names}
    ids = mixture.prompts.row(rows[0])
    logprobs = local.backbone.model(input_ids=torch.tensor([ids.ids])).logits[0].log_softmax(-1)
    wanted = [float(logprobs[p - 1, ids.ids[p]]) for p in range(len(ids.ids)) if ids.is_response[p]]
    assert float(found["plain"][0]) == pytest.approx(sum(wanted) / len(wanted), abs=1e-4)


def test_a_pool_of_every_kind_answers(tmp_path, model_folder, run_folder):
    adapters = [f"{name}={run_folder / 'experts' / name}" for name in ("base", "cluster-0")]
    with serving(lambda got: completion(f"re {got.question}")) as stub:
        settings = ExpertPoolSettings(
            folder=str(tmp_path), expert=[*adapters, f"plain={model_folder}", f"big={stub.url}#m"]
        )
        init_pool(settings)
        pool = read_pool(tmp_path)
        groups = groups_of(pool, PlacementSettings(device="cpu"), ExpertServingSettings())
        assert [group.experts for group in groups] == [("base", "cluster-0", "plain"), ("big",)]
        with ExpertScheduler(
            groups, {e.name: e.identity for e in pool.experts}, ReplyCache(tmp_path / "l.jsonl")
        ) as scheduler:
            replies = scheduler.ask([ask(name, "add 1 2", max_new_tokens=4) for name in pool.names])
            assert scheduler.loads == {str(model_folder): 1}
    assert [reply.error for reply in replies] == [None] * 4 and replies[-1].text == "re add 1 2"
    assert (
        Mixture.from_pretrained(run_folder, device="cpu")
        .replace(router="cluster-0")
        .generate(["add 1 2"], max_new_tokens=4)[0]
        .text
        == replies[1].text
    )


def test_the_budget_is_what_was_asked_for_or_a_part_of_what_is_free():
    here = PlacementSettings(device="cpu")
    assert budget_of(ExpertServingSettings(memory=1.5), here) == 3 * 2**29
    free = budget_of(ExpertServingSettings(), here)
    assert free is None or 2**20 < free < os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def test_a_reply_cache_holds_what_it_was_given_and_no_failure(tmp_path):
    path = tmp_path / "deep" / "replies.jsonl"
    cache = ReplyCache(path)
    cache.add("one", Reply("ä\n\u2028", 1, 2, "length", 0.5))
    cache.add("two", Reply("", error="no", finish_reason="failed"))
    assert cache.get("one") == ReplyCache(path).get("one") == Reply("ä\n\u2028", 1, 2, "length", 0.5)
    assert ReplyCache(path).get("two") is None and len(path.read_text().split("\n")) == 2
    path.write_text(json.dumps({"key": "x"}) + "\n[]\n" + path.read_text())
    assert len(ReplyCache(path)) == 1


def test_the_hash_of_a_question_is_of_all_that_its_reply_depends_on():
    given = ask("a", "q", temperature=1.0, seed=1)
    others = [
        ask("a", "r", temperature=1.0, seed=1),
        ask("a", "q", temperature=1.0, seed=2),
        Question("a", (Message("system", "s"), *given.messages), given.sampling),
    ]
    keys = {given.key("w"), given.key("other weights"), *(other.key("w") for other in others)}
    assert len(keys) == 5 and given.key("w") == ask("b", "q", temperature=1.0, seed=1).key("w")


KEPT = {"key": "x", **vars(Reply("t", 1, 2, "stop", 0.5))}


@pytest.mark.parametrize(
    "line",
    [
        b"[" * 100_000,
        json.dumps({**KEPT, "text": 3}).encode(),
        json.dumps({**KEPT, "key": ["x"]}).encode(),
        json.dumps({**KEPT, "tokens": 10**400}).encode(),
        json.dumps({**KEPT, "tokens": -1}).encode(),
        json.dumps({**KEPT, "seconds": "long"}).encode(),
        json.dumps({**KEPT, "finish_reason": "bored"}).encode(),
        json.dumps({**KEPT, "error": "no"}).encode(),
        b'{"key": "x", "text": "\\ud800"}',
        json.dumps({**KEPT, "text": "ä"}, ensure_ascii=False).encode()[:-60],
        b"\xff\xfe",
    ],
    ids=lambda line: ascii(line[:60]),
)
def test_a_line_that_is_no_reply_is_skipped(tmp_path, line):
    path = tmp_path / "replies.jsonl"
    path.write_bytes(
        json.dumps({**KEPT, "key": "a"}).encode() + b"\n" + line + b"\n" + json.dumps(KEPT).encode() + b"\n"
    )
    cache = ReplyCache(path)
    assert len(cache) == 2 and cache.get("x") == Reply("t", 1, 2, "stop", 0.5)
