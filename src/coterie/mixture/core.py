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
from coterie.engine.decoding import DecodingBatch, Token
from coterie.errors import CoterieError, unknown_name
from coterie.experts.bank import ExpertBank, load_bank
from coterie.mixture.loading import RouterParts, load_router, local_folder, read_mixture_record
from coterie.routers.base import Router, Routing
from coterie.routers.fixed import FixedRouter, one_hot, uniform
from coterie.settings import ModelSettings, PlacementSettings, SamplingSettings

Prompt = str | Example | Sequence[Mapping[str, str]]
"""A question, an example (its answer is not looked at), or a conversation as a list of {role, content}."""

CARRIED = ("experts", "checkpoints", "clusters.jsonl", "run.yaml", "metrics.jsonl")
"""What a saved copy takes along from the folder that a mixture was loaded from; the router writes itself."""


@dataclass(frozen=True)
class Completion:
    """An answer.

    Attributes:
        prompt: the question, as given by the user.
        text: the answer.
        token_ids: its tokens, with the one that ended it.
        logprobs: natural log of each token's probability under the combined distribution.
        finish_reason: stop or length.
        weights: normalised routing weights by expert name.
    """

    prompt: str
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: str
    weights: Mapping[str, float]

    def record(self) -> dict[str, Any]:
        """Return the object that `generate --json` prints."""
        return {
            "prompt": self.prompt,
            "text": self.text,
            "token_ids": list(self.token_ids),
            "logprobs": list(self.logprobs),
            "finish_reason": self.finish_reason,
            "routing": {"weights": dict(self.weights)},
        }


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
        return self._route(self.tokens(prompts), top_k_experts)

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
        settings = SamplingSettings(**sampling)
        rows = self.tokens(prompts)
        routing = self._route(rows, top_k_experts) if routing is None else routing
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
        routing = self.router.route(rows)
        return self._completions([""] * len(rows), rows, routing, SamplingSettings(**sampling), batch_size)

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
        routing = self._route(rows, None) if routing is None else routing
        return self._drawn(self.combiner, prompts, rows, routing, SamplingSettings(**sampling), batch_size)

    def _drawn(
        self,
        combiner: TextCombiner,
        prompts: Sequence[Prompt],
        rows: Sequence[TokenRow],
        routing: Routing,
        settings: SamplingSettings,
        batch_size: int,
    ) -> list[list[Completion]]:
        samples = [
            self._completions(_questions(prompts), rows, routing, sample, batch_size)
            for sample in combiner.draws(settings)
        ]
        return [list(answers) for answers in zip(*samples, strict=True)]

    def _completions(
        self,
        questions: Sequence[str],
        rows: Sequence[TokenRow],
        routing: Routing,
        settings: SamplingSettings,
        batch_size: int,
    ) -> list[Completion]:
        aligned = routing.aligned(self.bank.names)
        shares = routing.normalized()
        found: dict[int, list[Token]] = {}
        for start in range(0, len(rows), batch_size):
            batch = range(start, min(start + batch_size, len(rows)))
            decoding = self._decoding([rows[i] for i in batch], aligned.take(batch), settings)
            for token in decoding.run():
                found.setdefault(start + token.request, []).append(token)
        return [_completion(question, found[i], shares.row(i)) for i, question in enumerate(questions)]

    def stream(self, prompt: Prompt, *, top_k_experts: int | None = None, **sampling: Any) -> Iterator[Token]:  # noqa: ANN401
        """Answer one prompt, giving each token with its text as soon as it is certain.

        Raises:
            CoterieError: for an empty prompt, or a combiner that needs finished answers.
        """
        if isinstance(self.combiner, TextCombiner):
            raise CoterieError("combiner 'texts' lets finished answers vote, so it cannot stream; leave --stream out")
        rows = self.tokens([prompt])
        routing = self._route(rows, top_k_experts).aligned(self.bank.names)
        yield from self._decoding(rows, routing, SamplingSettings(**sampling)).run()

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

    def _route(self, rows: Sequence[TokenRow], top_k_experts: int | None) -> Routing:
        routing = self.router.route(rows)
        return routing if top_k_experts is None else routing.top(top_k_experts)

    def _decoding(self, rows: Sequence[TokenRow], routing: Routing, settings: SamplingSettings) -> DecodingBatch:
        prompts = [row.ids for row in rows]
        return DecodingBatch(self.backbone, self.layers, self.combiner, prompts, routing, settings)

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
        base = self.backbone.identity.id
        front = f"---\nlibrary_name: coterie\nbase_model: {base}\npipeline_tag: text-generation\ntags:\n- lora\n---\n"
        experts = "\n".join(f"- `{name}`" for name in self.bank.names)
        return (
            f"{front}\n# {self.method} mixture of {len(self.bank)} LoRA experts on {base}\n\n{experts}\n\n"
            f"Router: {self.router.kind}. Combiner: {self.combiner.kind}. "
            "Every folder under `experts/` is a plain PEFT adapter.\n\n"
            '```python\nfrom coterie import Mixture\n\nmixture = Mixture.from_pretrained("this-folder")\n'
            'print(mixture.generate(["..."])[0].text)\n```\n'
        )

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


def _completion(prompt: str, tokens: Sequence[Token], weights: Mapping[str, float]) -> Completion:
    return Completion(
        prompt=prompt,
        text="".join(token.text for token in tokens),
        token_ids=tuple(token.id for token in tokens),
        logprobs=tuple(token.logprob for token in tokens),
        finish_reason=tokens[-1].finish_reason or "length",
        weights=weights,
    )
