"""A mixture's folder: what it holds, how it is written, and how it is read where it may come from a stranger."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from coterie import ranks
from coterie.artifacts import (
    FORMAT,
    as_path,
    check_copy,
    check_kind,
    hub_folder,
    new_folder,
    read_json,
    sha256_of,
    write_json,
    write_text,
)
from coterie.backbone.aliases import cache_folder
from coterie.backbone.loading import Backbone, BaseModelIdentity, check_identity, load_backbone
from coterie.combiners.base import Combiner
from coterie.combiners.table import make_combiner
from coterie.data.batching import PromptFormat
from coterie.errors import CoterieError, check_known, naming, unknown_name
from coterie.experts.bank import WEIGHTS_FILE, ExpertBank, load_bank
from coterie.experts.bank_folder import load_opened, open_bank
from coterie.mixture.card import mixture_card
from coterie.mixture.publish import push
from coterie.records.mixture import MIXTURE_FILE, ExtraRecord, MixtureRecord
from coterie.records.schema import parse, read
from coterie.routers.base import Router, RouterParts
from coterie.routers.fixed import one_hot, uniform
from coterie.routers.gate import spectral_router
from coterie.routers.logo import BY_UPDATES, LOGO, LogoRouter
from coterie.routers.table import ROUTERS, load_router
from coterie.settings.groups import ModelSettings, PlacementSettings
from coterie.settings.reading import from_flat
from coterie.settings.rows import ReadingSettings

COPIED = (
    *("experts", "checkpoints", "features", "methods", "selection", "gathered", "clusters.jsonl", "domains.jsonl"),
    *("gates.json", "auto.json", "auto.md", "run.yaml", "stages.jsonl", "metrics.jsonl"),
)
"""What a saved copy takes along from the folder that a mixture was loaded from."""
SAVED = (*COPIED, "router", MIXTURE_FILE, "README.md")
"""All that a saved copy holds."""
READ_FROM_HUB = (".json", ".jsonl", ".safetensors", ".md")

Stored = TypeVar("Stored", bound="StoredMixture")


@dataclass(frozen=True)
class StoredMixture:
    """What a mixture is made of, and how that is written to a folder, read, and uploaded.

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
    folder: Path | None = None

    @classmethod
    def from_pretrained(
        cls: type[Stored],
        source: str | Path,
        *,
        revision: str | None = None,
        backbone: Backbone | None = None,
        **placement: Any,  # noqa: ANN401 - fields of PlacementSettings
    ) -> Stored:
        """Load a mixture from a folder or from the hub.

        Args:
            source: a folder, or a hub id.
            revision: of a mixture on the hub: a branch, tag or commit.
            backbone: its base model, where that is loaded already.
            **placement: fields of `PlacementSettings`: dtype, device, load_in_4bit.

        Raises:
            CoterieError: when something is missing, broken, or made for another base model, or for an unknown keyword.
        """
        where = from_flat(PlacementSettings, placement, ("revision", "backbone"))
        folder = find_mixture(source, revision)
        record = read_mixture_record(folder)
        identity = BaseModelIdentity(**dict(record.base_model))
        backbone = backbone or load_backbone(
            ModelSettings(model=identity.id, revision=identity.revision, **where.model_dump())
        )
        check_identity(identity, backbone.identity, f"{source} was trained on")
        with naming(folder):
            prompts = PromptFormat(backbone.tokenizer, record.system_prompt, record.reading, record.end_of_turn)
            bank = load_bank({name: folder / "experts" / name for name in record.experts}, backbone.model)
            router = load_router(record.router.plain(), RouterParts(folder / "router", folder, backbone, bank))
            combiner = make_combiner(record.combiner.kind)
            return cls(backbone, bank, router, combiner, prompts, record.method, folder)

    @classmethod
    def from_bank(
        cls: type[Stored],
        bank: str | Path,
        *,
        router: str = "arrow",
        names: Sequence[str] | None = None,
        system_prompt: str | None = None,
        backbone: Backbone | None = None,
        **placement: Any,  # noqa: ANN401 - fields of PlacementSettings
    ) -> Stored:
        """Make a mixture of a bank's adapters from nothing but the adapters, in memory alone.

        `coterie.methods.from_adapters` makes the same one in a folder, and can route by what adapters were trained on.

        Args:
            bank: folder of a bank, as `bank_add` makes it, or a hub id.
            router: `arrow` (arXiv 2405.11157), `spectr` (2504.03454) or `logo` (2511.07129); `replace` has others.
            names: adapters to take, in the bank's order; all by default.
            system_prompt: of every prompt; by default the chat template's own.
            backbone: the base model, where it is loaded already.
            **placement: fields of `PlacementSettings`: dtype, device, load_in_4bit.

        Raises:
            CoterieError: for a folder that is no bank, an adapter that is not there or not as it was added, another
                base model than the bank's, or an unknown router or keyword.
        """
        check_known("router that a bank alone gives", router, BY_UPDATES)
        where = from_flat(PlacementSettings, placement, ("router", "names", "system_prompt", "backbone"))
        opened = open_bank(bank, names)
        base = BaseModelIdentity(**opened.base_model)
        backbone = backbone or load_backbone(ModelSettings(model=base.id, revision=base.revision, **where.model_dump()))
        check_identity(base, backbone.identity, f"{bank} is a bank for")
        experts = load_opened(opened, backbone.model)
        prompts = PromptFormat(backbone.tokenizer, system_prompt)
        start = cls(backbone, experts, uniform(experts.names), make_combiner("layers"), prompts, router)
        return replace(start, router=start.by_updates(router))

    def named_router(self, name: str) -> Router:
        """Return a router that this mixture can have, by name.

        It may be `uniform`, an expert's name, the kind of the mixture's own router or of one that was trained for it
        (such as `loss`), or `arrow`, `spectr` or `logo`, which the bank alone gives.

        Raises:
            CoterieError: for an unknown name, or a kind of router that this mixture does not have.
        """
        own = {router.kind: router for router in (self.router.of_prompts, self.router)}
        if name == "uniform":
            return uniform(self.bank.names)
        if name in self.bank.names:
            return one_hot(name, self.bank.names)
        if name in own:
            return own[name]
        trained = self.trained_routers()
        if name in trained:
            return load_router(*trained[name])
        if name in BY_UPDATES:
            return self.by_updates(name)
        known = {"uniform", *self.bank.names, *own, *trained, *BY_UPDATES}
        if name in ROUTERS:
            raise CoterieError(f"this mixture has no router {name!r}. There are: {', '.join(sorted(known))}")
        raise unknown_name("router or expert", name, known)

    def by_updates(self, kind: str) -> Router:
        """Return the router `arrow`, `spectr` or `logo`; the first expert that changes nothing is their null expert.

        That of `logo` adds nothing and so gets no weight.
        """
        if kind == LOGO:
            return LogoRouter(self.backbone, self.bank)
        pairs = zip(self.bank.names, self.bank.adapters, strict=True)
        idle = [name for name, adapter in pairs if not any(bool(pair.up.any()) for pair in adapter.values())]
        return spectral_router(kind, self.backbone, self.bank, null=idle[0] if idle else None)

    def trained_routers(self) -> dict[str, tuple[Mapping[str, Any], RouterParts]]:
        """Return what routers are loaded from that were trained beside this one and weigh this bank's experts alone.

        Returns:
            By kind: the router's entry and its parts, of what lies in the folder's `methods/` or in the user's cache.
            A router around another one gives both.
        """
        found: dict[str, tuple[Mapping[str, Any], RouterParts]] = {}
        if self.folder is None:
            return found
        places = (self.folder, derived_folder(self.folder))
        for file in (file for place in places for file in sorted(place.glob("methods/*/ingredient.json"))):
            record = read(ExtraRecord, file, f"delete {file.parent} and train it again")
            parts = RouterParts(file.parent / "router", self.folder, self.backbone, self.bank)
            entry = record.router if set(record.experts) <= set(self.bank.names) else None
            while entry:
                found.setdefault(entry.kind, (entry.plain(), parts))
                entry = entry.of
        return found

    def save_pretrained(self, folder: str | Path, *, overwrite: bool = False) -> None:
        """Write the mixture, with what was trained beside it, to a folder that `from_pretrained` loads.

        The folder is made where there is none, whole or not at all.

        Args:
            folder: where to; an empty one will do.
            overwrite: replace a mixture that was saved there.

        Raises:
            CoterieError: when the folder holds something else, or the mixture has no files of its own yet.
        """
        target = as_path(folder)
        if self.folder is None:
            raise CoterieError("this mixture was never written to a folder, so its experts' files do not exist")
        check_copy(target, SAVED, MIXTURE_FILE, [self.folder], overwrite=overwrite)
        lacking = [name for name in self.bank.names if not (self.folder / "experts" / name).is_dir()]
        if lacking:
            raise CoterieError(f"the expert {lacking[0]!r} has no files in {self.folder}/experts; save another mixture")
        with new_folder(target) as made:
            for source in (self.folder / name for name in COPIED):
                if source.is_dir():
                    shutil.copytree(source, made / source.name)
                elif source.exists():
                    shutil.copy(source, made / source.name)
            self.write_description(made, read_json(self.folder / MIXTURE_FILE))

    def write_description(self, folder: Path, facts: Mapping[str, Any] | None = None) -> None:
        """Write `mixture.json`, the router's tensors and the model card; the experts' folders are there already.

        The facts are what else is known of the mixture and is only kept, such as how its clusters were made. Of several
        processes the first one writes.
        """
        ranks.by_first(lambda: self._write_description(folder, facts or {}))

    def _write_description(self, folder: Path, facts: Mapping[str, Any]) -> None:
        described = {
            "format": FORMAT,
            "method": self.method,
            "base_model": asdict(self.backbone.identity),
            "system_prompt": self.prompts.system_prompt,
            **self.prompts.reading.record(),
            "end_of_turn": self.prompts.end,
            "experts": list(self.bank.names),
            "router": self.router.save(folder / "router"),
            "combiner": {"kind": self.combiner.kind},
        }
        write_json(folder / MIXTURE_FILE, {**facts, **described})
        record = read(MixtureRecord, folder / MIXTURE_FILE, "make it again")
        write_text(folder / "README.md", mixture_card(record, folder, self.backbone.identity, "this-folder"))

    def push_to_hub(self, repository: str, **options: Any) -> str:  # noqa: ANN401 - fields of PushSettings
        """Publish the mixture on the hub with a card, privately unless said otherwise, and return its address.

        Args:
            repository: OWNER/NAME.
            **options: fields of `PushSettings`: licence, evaluation, base_model, public.

        Raises:
            CoterieError: when the mixture has no folder, or could not be loaded elsewhere, or the hub refuses it.
        """
        if self.folder is None:
            raise CoterieError("this mixture was never written to a folder, so there is nothing to upload")
        return push(folder=str(self.folder), repository=repository, **options)


def find_mixture(source: str | Path, revision: str | None = None) -> Path:
    """Return a mixture's folder, which may first have to be got from the hub.

    Args:
        source: a folder, or a hub id.
        revision: of a mixture on the hub: a branch, tag or commit.

    Raises:
        CoterieError: when there is none, or the folder is something else.
    """
    folder = Path(source)
    if folder.is_dir():
        check_kind(folder, MIXTURE_FILE)
        return folder
    advice = f"there is no mixture folder {source}; make one with: coterie fit elrea --output {source} ..."
    inside = [f"{name}/*{end}" for name in SAVED if "." not in name for end in READ_FROM_HUB]
    return hub_folder(str(source), [*(name for name in SAVED if "." in name), *inside], advice, revision)


def reading_for(source: str | Path, reading: ReadingSettings | None = None, **fields: Any) -> ReadingSettings:  # noqa: ANN401 - fields of ReadingSettings
    """Return how rows are read for a mixture: as those that it was fitted on, unless said otherwise.

    Args:
        source: a mixture's folder, or a hub id.
        reading: what is said otherwise.
        **fields: the same by name: map, ignore_fields, input_template.

    Raises:
        CoterieError: when there is no mixture, or its template or columns are none, or for an unknown keyword.
    """
    given = from_flat(ReadingSettings, fields) if reading is None else reading
    return given.as_fitted(read_json(find_mixture(source) / MIXTURE_FILE))


def read_mixture_record(folder: Path) -> MixtureRecord:
    """Read and check `mixture.json`.

    Raises:
        CoterieError: when it is missing, of another format, or a field is missing or wrong.
    """
    file = folder / MIXTURE_FILE
    fields = read_json(file)
    if fields.get("format") != FORMAT:
        raise CoterieError(f"{file} has format {fields.get('format')!r}, not {FORMAT}; upgrade coterie or fit again")
    if "pool" in fields:
        raise CoterieError(
            f"{folder} holds a {fields.get('method')} method, whose experts need not share a base model; "
            "coterie generate, plan and eval take it"
        )
    return parse(MixtureRecord, fields, str(file), "get the folder again")


def derived_folder(folder: Path) -> Path:
    """Return the folder in the user's cache for what is derived from a mixture, which may be a stranger's.

    A mixture of the same files has the same one, wherever it lies.
    """
    return cache_folder() / "mixtures" / hash_mixture(folder, "run.yaml")[:32]


def hash_mixture(folder: Path, *also: str) -> str:
    """Hash a mixture's description, other files where they are there, and its experts' weights."""
    files = [
        folder / MIXTURE_FILE,
        *(folder / name for name in also),
        *sorted(folder.glob(f"experts/*/{WEIGHTS_FILE}")),
    ]
    return sha256_of(*(file for file in files if file.is_file()))
