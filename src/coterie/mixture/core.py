"""A mixture is a bank of experts, a router and a combiner on one base model."""

import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from coterie.artifacts import FORMAT, write_json, write_text
from coterie.backbone.layers import ExpertLayers
from coterie.backbone.loading import Backbone, check_identity, identity_from, identity_record, load_backbone
from coterie.combiners.base import Combiner
from coterie.combiners.table import check_fit, make_combiner
from coterie.combiners.texts import TextCombiner, majority
from coterie.data.batching import PromptFormat, TokenRow
from coterie.data.examples import Example, from_prompt, load_examples
from coterie.engine.decoding import DecodingBatch, ScoredTokens, Token
from coterie.engine.rerouting import Renewal
from coterie.engine.rows import CachedRows
from coterie.engine.teacher_forcing import score_forced
from coterie.errors import CoterieError, unknown_name
from coterie.experts.bank import ExpertBank, load_bank
from coterie.mixture.card import model_card
from coterie.mixture.completion import Completion, completion
from coterie.mixture.loading import RouterParts, load_router, local_folder, read_mixture_record
from coterie.routers.base import Router, Routing
from coterie.routers.derived import keep_top
from coterie.routers.fixed import FixedRouter, one_hot, uniform
from coterie.routers.token import TokenLevel
from coterie.settings.groups import ModelSettings, PlacementSettings, SamplingSettings

Prompt = str | Example | Sequence[Mapping[str, str]]
"""A question, an example (its answer is not looked at), or a conversation as a list of {role, content}."""

CARRIED = (
    "experts",
    "checkpoints",
    "selection",
    "gathered",
    "clusters.jsonl",
    "domains.jsonl",
    "gates.json",
    "run.yaml",
    "metrics.jsonl",
)
"""What a saved copy takes along from the folder that a mixture was loaded from; the router writes itself."""


@dataclass(frozen=True)
class Mixture:
    """A bank, a router and a combiner on one base model.

    Attributes:
        backbone: the frozen base model.
        bank: the experts.
        router: weighs experts for every prompt.
        combiner: says at which depth experts meet.
        prompts: renders prompts as they were rendered for training.
        method: name of the method that made it.
        folder: where it was loaded from or made.
    """

    backbone: Backbone
    bank: ExpertBank
    router: Router
    combiner: Combiner
    prompts: PromptFormat
    method: str
    folder: Path | None = field(default=None)

    def __post_init__(self) -> None:
        """Refuse a combiner that cannot read the router's weights.

        Raises:
            CoterieError: naming the combiners that can.
        """
        check_fit(self.router.kind, self.router.axes, self.combiner)

    @cached_property
    def layers(self) -> ExpertLayers:
        """The bank, stacked for the base model."""
        return ExpertLayers(self.backbone.model, self.bank.adapters)

    def tokens(self, prompts: Sequence[Prompt]) -> list[TokenRow]:
        """Tokenise prompts, without answers.

        Raises:
            CoterieError: when a prompt is empty, or the chat template does not take it.
        """
        return [self.prompts.row(example).prompt() for example in map(as_example, prompts, range(len(prompts)))]

    def route(self, prompts: Sequence[Prompt], top_k_experts: int | None = None) -> Routing:
        """Weigh the experts for every prompt, in batches; axes (request, expert).

        Raises:
            CoterieError: for an empty prompt, or more experts asked for than there are.
        """
        routing = self.router.route(self.tokens(prompts))
        return routing if top_k_experts is None else routing.top(top_k_experts)

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        batch_size: int = 8,
        top_k_experts: int | None = None,
        routing: Routing | None = None,
        **sampling: Any,  # noqa: ANN401 - fields of SamplingSettings
    ) -> list[Completion]:
        """Answer prompts, several together.

        Args:
            prompts: questions.
            batch_size: prompts decoded together; it does not change the answers.
            top_k_experts: keep only the experts with the largest weights.
            routing: weights of these prompts, if they are known already; they are computed otherwise.
            **sampling: fields of `SamplingSettings`, such as max_new_tokens, temperature, top_p, seed.

        Raises:
            CoterieError: for an empty prompt.
        """
        if top_k_experts is not None:
            return self._keeping(top_k_experts).generate(prompts, batch_size=batch_size, routing=routing, **sampling)
        settings = SamplingSettings(**sampling)
        rows = self.tokens(prompts)
        if isinstance(self.combiner, TextCombiner):
            drawn = self._drawn(self.combiner, prompts, rows, routing, settings, batch_size)
            return [answers[majority([a.text.strip() for a in answers], settings.seed)] for answers in drawn]
        return self._completions(_questions(prompts), rows, routing, settings, batch_size)

    def complete(self, rows: Sequence[TokenRow], *, batch_size: int = 8, **sampling: Any) -> list[Completion]:
        """Continue rows of tokens as they stand: no template is put around them, and `prompt` stays empty.

        Args:
            rows: texts to continue.
            batch_size: rows decoded together; it does not change the answers.
            **sampling: fields of `SamplingSettings`.

        Raises:
            CoterieError: for a combiner that needs finished answers.
        """
        if isinstance(self.combiner, TextCombiner):
            raise CoterieError("combiner 'texts' lets finished answers vote, so it continues no text; use another one")
        return self._completions([""] * len(rows), rows, None, SamplingSettings(**sampling), batch_size)

    def drawn(
        self, prompts: Sequence[Prompt], *, batch_size: int = 8, routing: Routing | None = None, **sampling: Any
    ) -> list[list[Completion]]:
        """Return every prompt's sampled answers, which a `texts` combiner lets vote; arguments as for `generate`.

        Raises:
            CoterieError: for an empty prompt, or another combiner.
        """
        if not isinstance(self.combiner, TextCombiner):
            raise CoterieError(f"combiner {self.combiner.kind!r} draws no answers that could vote; use texts")
        rows = self.tokens(prompts)
        return self._drawn(self.combiner, prompts, rows, routing, SamplingSettings(**sampling), batch_size)

    def _drawn(
        self,
        combiner: TextCombiner,
        prompts: Sequence[Prompt],
        rows: Sequence[TokenRow],
        routing: Routing | None,
        settings: SamplingSettings,
        batch_size: int,
    ) -> list[list[Completion]]:
        routing = self.router.route(rows) if routing is None else routing
        samples = [
            self._completions(_questions(prompts), rows, routing, sample, batch_size)
            for sample in combiner.draws(settings)
        ]
        return [list(answers) for answers in zip(*samples, strict=True)]

    def _completions(
        self,
        questions: Sequence[str],
        rows: Sequence[TokenRow],
        routing: Routing | None,
        settings: SamplingSettings,
        batch_size: int,
    ) -> list[Completion]:
        if self.renews:
            routing = None  # each batch starts from the weights that it goes on with
        elif routing is None:
            routing = self.router.route(rows)
        shares = routing.normalized() if routing else None
        found: dict[int, list[Token]] = {}
        for start in range(0, len(rows), batch_size):
            batch = range(start, min(start + batch_size, len(rows)))
            decoding = self._decoding([rows[i] for i in batch], routing and routing.take(batch), settings)
            for token in decoding.run():
                found.setdefault(start + token.request, []).append(token)
        weights = [shares.row(i) if shares else None for i in range(len(rows))]
        return [completion(q, found[i], weights[i], self.bank.names) for i, q in enumerate(questions)]

    def stream(self, prompt: Prompt, *, top_k_experts: int | None = None, **sampling: Any) -> Iterator[Token]:  # noqa: ANN401
        """Answer one prompt, giving each token with its text as soon as it is certain.

        Raises:
            CoterieError: for an empty prompt, or a combiner that needs finished answers.
        """
        if isinstance(self.combiner, TextCombiner):
            raise CoterieError("combiner 'texts' lets finished answers vote, so it cannot stream; leave --stream out")
        mixture = self if top_k_experts is None else self._keeping(top_k_experts)
        yield from mixture._decoding(self.tokens([prompt]), None, SamplingSettings(**sampling)).run()

    @property
    def renews(self) -> bool:
        """Whether weights change while an answer is written."""
        return isinstance(self.router, TokenLevel) and self.router.every is not None

    def renewed(
        self, every: int | None, *, cache: str | None = None, combiner: Combiner | str | None = None
    ) -> "Mixture":
        """Return the same mixture with its weights renewed at every n-th token of an answer.

        Args:
            every: tokens that share weights; None for the prompt's weights all along.
            cache: `keep` what earlier weights left in the KV cache, or `recompute` it; as it is by default.
            combiner: another one, where the mixture's own cannot change its weights meanwhile.

        Raises:
            CoterieError: for a combiner or a router that cannot change its weights meanwhile, or `every` below 1.
        """
        router = self.router
        if not isinstance(router, TokenLevel):
            return self.replace(router=TokenLevel(router, every, cache or "keep"), combiner=combiner)
        return self.replace(router=TokenLevel(router.router, every, cache or router.cache), combiner=combiner)

    def score_forced(self, prompts: Sequence[TokenRow], answers: Sequence[Sequence[int]]) -> list[ScoredTokens]:
        """Score the tokens of given answers where weights change along them (see `renews`)."""
        renewal = self._renewal(prompts)
        rows = CachedRows(self.backbone, self.layers, self.combiner, renewal.routing())
        texts = [(prompt.ids, answer) for prompt, answer in zip(prompts, answers, strict=True)]
        return score_forced(self.backbone, rows, renewal, texts)

    def _renewal(self, rows: Sequence[TokenRow]) -> Renewal:
        router = self.router
        assert isinstance(router, TokenLevel)
        assert router.every is not None
        return Renewal(router.follow(rows), self.bank.names, router.every, router.cache == "recompute")

    def replace(self, *, router: Router | str | None = None, combiner: Combiner | str | None = None) -> "Mixture":
        """Return another cell of the grid: another router or combiner on the same bank; nothing is trained.

        Args:
            router: a router, `uniform`, or the name of one expert.
            combiner: a combiner or its name.

        Raises:
            CoterieError: for an unknown name.
        """
        changed = replace(
            self,
            router=self._router_named(router) if isinstance(router, str) else router or self.router,
            combiner=make_combiner(combiner) if isinstance(combiner, str) else combiner or self.combiner,
        )
        if "layers" in self.__dict__:  # stacked already: the bank is the same
            changed.__dict__["layers"] = self.layers
        return changed

    def _router_named(self, name: str) -> FixedRouter:
        if name == "uniform":
            return uniform(self.bank.names)
        if name not in self.bank.names:
            raise unknown_name("router or expert", name, ["uniform", *self.bank.names])
        return one_hot(name, self.bank.names)

    def _keeping(self, top_k_experts: int) -> "Mixture":
        return self.replace(router=keep_top(self.router, top_k_experts))

    def _decoding(self, rows: Sequence[TokenRow], routing: Routing | None, settings: SamplingSettings) -> DecodingBatch:
        renewal = self._renewal(rows) if self.renews else None
        if renewal:
            routing = renewal.routing()
        elif routing is None:
            routing = self.router.route(rows)
        prompts, aligned = [row.ids for row in rows], routing.aligned(self.bank.names)
        return DecodingBatch(self.backbone, self.layers, self.combiner, prompts, aligned, settings, renewal)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the mixture to a folder that `from_pretrained` loads.

        Raises:
            CoterieError: when the folder holds something already, or the mixture has no files of its own yet.
        """
        target = Path(folder)
        if target.exists() and any(target.iterdir()):
            raise CoterieError(f"{target} is not empty; choose another folder")
        if self.folder is None:
            raise CoterieError("this mixture was never written to a folder, so its experts' files do not exist")
        lacking = [name for name in self.bank.names if not (self.folder / "experts" / name).is_dir()]
        if lacking:
            raise CoterieError(f"the expert {lacking[0]!r} has no files in {self.folder}/experts; save another mixture")
        target.mkdir(parents=True, exist_ok=True)
        for name in CARRIED:
            source = self.folder / name
            if source.is_dir():
                shutil.copytree(source, target / name)
            elif source.exists():
                shutil.copy(source, target / name)
        self.write_description(target)

    def write_description(self, folder: Path, facts: Mapping[str, Any] | None = None) -> None:
        """Write `mixture.json`, the router's tensors and the model card; the experts' folders are there already.

        Args:
            folder: where to.
            facts: what else is known of the mixture and is only kept, such as how its clusters were made.
        """
        write_json(
            folder / "mixture.json",
            {
                "format": FORMAT,
                "method": self.method,
                "base_model": identity_record(self.backbone.identity),
                "system_prompt": self.prompts.system_prompt,
                "experts": list(self.bank.names),
                "router": self.router.save(folder / "router"),
                "combiner": {"kind": self.combiner.kind},
                **(facts or {}),
            },
        )
        write_text(folder / "README.md", self.card())

    def card(self) -> str:
        """Return a model card in the hub's form."""
        parts = {"Router": self.router.kind, "Combiner": self.combiner.kind}
        return model_card(self.method, self.backbone.identity.id, self.bank.names, parts)

    @classmethod
    def from_pretrained(cls, source: str | Path, **placement: Any) -> "Mixture":  # noqa: ANN401 - fields of PlacementSettings
        """Load a mixture from a folder or from the hub.

        Args:
            source: a folder, or a hub id.
            **placement: fields of `PlacementSettings`: dtype, device, load_in_4bit.

        Raises:
            CoterieError: when something is missing, broken, or made for another base model.
        """
        folder = local_folder(str(source))
        record = read_mixture_record(folder)
        identity = identity_from(record["base_model"])
        model = ModelSettings(
            model=identity.id, revision=identity.revision, **PlacementSettings(**placement).model_dump()
        )
        backbone = load_backbone(model)
        check_identity(identity, backbone.identity, str(source))
        prompts = PromptFormat(backbone.tokenizer, record.get("system_prompt"))
        bank = load_bank({name: folder / "experts" / name for name in record["experts"]}, backbone.model)
        router = load_router(record["router"], RouterParts(folder / "router", folder, backbone, bank))
        return cls(backbone, bank, router, make_combiner(record["combiner"]["kind"]), prompts, record["method"], folder)

    def push_to_hub(self, repo_id: str, *, private: bool = True) -> str:
        """Upload the mixture's folder to the hub and return its address.

        Raises:
            CoterieError: when the mixture was never written to a folder.
        """
        from huggingface_hub import HfApi

        if self.folder is None:
            raise CoterieError("this mixture was never written to a folder, so there is nothing to upload")
        hub = HfApi()
        hub.create_repo(repo_id, private=private, exist_ok=True)
        allowed = [f"{name}*" if "." in name else f"{name}/**" for name in (*CARRIED, "router")]
        info = hub.upload_folder(
            repo_id=repo_id, folder_path=self.folder, allow_patterns=[*allowed, "mixture.json", "README.md"]
        )
        return str(info)


def as_example(prompt: Prompt, number: int = 0) -> Example:
    """Take a prompt in any of its forms.

    Raises:
        CoterieError: when it is empty.
    """
    if isinstance(prompt, Example):
        return prompt
    if isinstance(prompt, str):
        return from_prompt(prompt, number)
    return load_examples([{"messages": list(prompt)}], need_response=False)[0]


def _questions(prompts: Sequence[Prompt]) -> list[str]:
    return [as_example(prompt).instruction for prompt in prompts]
