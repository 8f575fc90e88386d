"""The catalogue: what answers as which model id."""

import time
from collections import Counter
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path

from coterie.artifacts import may_be_on_hub
from coterie.backbone.loading import Backbone, BaseModelIdentity
from coterie.combiners.table import make_combiner
from coterie.data.batching import PromptFormat
from coterie.engine.engine import Engine
from coterie.errors import CoterieError, shortened, unknown_name
from coterie.experts.bank import ExpertBank, read_config
from coterie.experts.bank_folder import open_bank
from coterie.experts.names import BACKBONE
from coterie.lora import Adapter
from coterie.methods.family import MethodGrid
from coterie.methods.registry import family_of, load_grid
from coterie.methods.symbolic.fit import is_symbolic, load_symbolic
from coterie.mixture import Mixture
from coterie.mixture.folder import find_mixture, read_mixture_record
from coterie.mixture.scheduler import GIB
from coterie.records.schema import is_folder_name
from coterie.routers.fixed import one_hot
from coterie.serve.recruits import RecruitCell, open_recruits, recruit_cells
from coterie.serve.token_bytes import TokenBytes
from coterie.settings.keywords import names_in
from coterie.settings.serving import CapacitySettings, ServeSettings


@dataclass(frozen=True, eq=False)
class Desk:
    """A loaded mixture, with the engine that answers all that is asked of it, its experts and its base model.

    Attributes:
        name: the mixture's id.
        grid: its methods on one bank, in which the untouched base model is an expert that changes nothing.
        methods: those that it can answer as, beside its own.
        engine: answers requests to all of its cells.
        path: where an adapter lies that was loaded by itself and answers alone; None for a mixture.
        loaded: when, in seconds since 1970.
    """

    name: str
    grid: MethodGrid
    methods: tuple[str, ...]
    engine: Engine
    path: str | None = None
    loaded: int = field(default_factory=lambda: int(time.time()))

    @cached_property
    def base(self) -> str:
        """The base model's id; of one on this machine, the last part of its path."""
        name = self.grid.own.backbone.identity.id
        return Path(name).name if Path(name).exists() else name

    @cached_property
    def vocabulary(self) -> TokenBytes:
        """The bytes of the base model's tokens."""
        return TokenBytes(self.grid.own.tokenizer)

    @property
    def experts(self) -> list[str]:
        """The names of its own experts; an adapter by itself has the name of its desk."""
        return [] if self.path else [name for name in self.grid.own.bank.names if name != BACKBONE]

    def single(self, expert: str) -> Mixture:
        """Return what answers with one expert alone."""
        return self.grid.mixture.replace(router=one_hot(expert, self.grid.mixture.bank.names), combiner="layers")


@dataclass(frozen=True, eq=False)
class Cell:
    """What a model id stands for: a mixture as one of its methods, one of its experts, or its base model.

    Attributes:
        id: the one that is listed.
        root: what it is called where it comes from.
        parent: id of the base model; None for that itself.
        desk: where it is answered.
        make: makes what answers, when it is asked for first.
        variants: what answers with other routers or combiners, by what requests wanted.
    """

    id: str
    root: str
    parent: str | None
    desk: Desk
    make: Callable[[], Mixture] = field(repr=False)
    variants: dict[Hashable, Mixture] = field(default_factory=dict, repr=False)

    @cached_property
    def mixture(self) -> Mixture:
        """What answers; to be had where the base model may be run."""
        return self.make()


class UnknownModel(CoterieError):
    """No model has the id that was asked for."""


class Catalogue:
    """Model ids and what answers to them: a table that is replaced as a whole, so that any thread may read it."""

    def __init__(self, settings: ServeSettings) -> None:
        """Begin empty."""
        self._settings = settings
        self._desks: dict[str, Desk] = {}
        self._cells: dict[str, Cell] = {}
        self._recruits: dict[str, RecruitCell] = {}

    @property
    def recruits(self) -> list[RecruitCell]:
        """Every run that recruits experts, and what else it answers as."""
        return list(self._recruits.values())

    @property
    def desks(self) -> tuple[Desk, ...]:
        """The mixtures."""
        return tuple(self._desks.values())

    @property
    def loaded(self) -> dict[str, str | None]:
        """Under which names something was loaded; an adapter by itself from where."""
        return {desk.name: desk.path for desk in self.desks} | {cell.desk.name: None for cell in self.recruits}

    @property
    def listed(self) -> list[Cell]:
        """Every cell once, base models first."""
        return sorted(dict.fromkeys(self._cells.values()), key=lambda cell: cell.parent is not None)

    def find(self, name: str) -> "Cell | RecruitCell":
        """Return what a model id stands for.

        Raises:
            UnknownModel: when it stands for nothing.
        """
        if (found := self._recruits.get(name) or self._cells.get(name)) is None:
            known = [*dict.fromkeys(cell.id for cell in self._recruits.values()), *(cell.id for cell in self.listed)]
            raise UnknownModel(str(unknown_name("model", shortened(name, 80), known)))
        return found

    def resolve(self, name: str) -> Cell:
        """Return which mixture on a base model an id stands for.

        Raises:
            UnknownModel: when it stands for nothing.
            CoterieError: when it stands for recruited experts.
        """
        if not isinstance(found := self.find(name), Cell):
            raise CoterieError(f"{name!r} recruits experts of any kind, so it has no base model; ask it by a chat")
        return found

    def load_all(self) -> None:
        """Load the mixtures of the settings.

        Raises:
            CoterieError: as `load`, or when two have one name.
        """
        named = [name_and_source(text) for text in self._settings.mixtures]
        for name, count in Counter(name for name, _ in named).items():
            if count > 1:
                raise CoterieError(f"{count} mixtures are called {name!r}; give them names of their own: NAME=FOLDER")
        for name, source in named:
            self.load(name, source)

    def check(self) -> None:
        """Look at the folders of the settings before anything is loaded; what may be on the hub is left alone.

        Raises:
            CoterieError: for a name that cannot be one, or a folder that is no mixture, bank or run.
        """
        for name, source in map(name_and_source, self._settings.mixtures):
            check_id(name)
            if not (Path(source) / "bank.json").is_file() and not may_be_on_hub(source):
                find_mixture(source)

    def load(self, name: str, source: str) -> None:
        """Load a mixture, or a bank as one, where base models may be run; what has its name answers nothing new then.

        Raises:
            CoterieError: as `Mixture.from_pretrained`, or for a method that the mixture does not have.
        """
        check_id(name)
        if is_symbolic(source):
            desk = open_recruits(name, load_symbolic(source), self._settings)
            self._recruits = {**self._recruits_beside(name), **recruit_cells(desk)}
            self._show({own: other for own, other in self._desks.items() if own != name})
            return
        mixture = self._open(source)
        if self._settings.upstream:
            mixture = mixture.replace(combiner="layers")
        methods = ready_methods(mixture) if self._settings.methods is None else names_in(self._settings.methods)
        grid = load_grid(mixture, methods)
        desk = Desk(name, grid, tuple(methods), open_engine(grid.mixture, self._settings.capacity))
        self._show({**self._desks, name: desk})
        self._recruits = self._recruits_beside(name)

    def base_of(self, adapter: Path) -> Backbone:
        """Return the base model that is served and that an adapter in a folder was made for, by what it says itself.

        Raises:
            CoterieError: when several are served, and it names none of them.
        """
        bases = {id(desk.grid.own.backbone): desk for desk in self.desks}
        named = read_config(adapter).base_model_name_or_path
        fitting = [desk for desk in bases.values() if named in (desk.base, desk.grid.own.backbone.identity.id)]
        if len(chosen := fitting or list(bases.values())) != 1:
            known = ", ".join(desk.base for desk in bases.values())
            raise CoterieError(f"the adapter was made for {named!r}, and the base models that are served are: {known}")
        return chosen[0].grid.own.backbone

    def add(self, name: str, adapter: Adapter, path: str, backbone: Backbone) -> None:
        """Let an adapter answer by itself, under its name; what had the name answers nothing new then.

        Raises:
            CoterieError: for a name that cannot be one, or stands for something else than such an adapter.
        """
        check_id(name)
        if name in {*self._cells, *self._recruits} and self.loaded.get(name) is None:
            raise CoterieError(f"{name!r} is the id of another model that is served; give the adapter another name")
        bank = ExpertBank((name,), (adapter,))
        prompts, combiner = PromptFormat(backbone.tokenizer), make_combiner("layers")
        mixture = Mixture(backbone, bank, one_hot(name, bank.names), combiner, prompts, "arrow")
        grid = MethodGrid(mixture, {}, family_of(mixture))
        desk = Desk(name, grid, (), open_engine(grid.mixture, self._settings.capacity), path)
        self._show({**self._desks, name: desk})

    def remove(self, name: str) -> None:
        """Let nothing new be asked of a mixture, or of a run that recruits experts."""
        self._recruits = self._recruits_beside(name)
        self._show({own: desk for own, desk in self._desks.items() if own != name})

    def _open(self, source: str) -> Mixture:
        """Load a mixture on the base model of another one, where that is the same."""
        is_bank = (Path(source) / "bank.json").is_file()
        base = open_bank(source).base_model if is_bank else dict(read_mixture_record(find_mixture(source)).base_model)
        loaded = (desk.grid.own.backbone for desk in self.desks)
        backbone = next((one for one in loaded if one.identity == BaseModelIdentity(**base)), None)
        load = Mixture.from_bank if is_bank else Mixture.from_pretrained
        return load(source, backbone=backbone, **self._settings.placement.model_dump())

    def _recruits_beside(self, name: str) -> dict[str, RecruitCell]:
        return {own: cell for own, cell in self._recruits.items() if cell.desk.name != name}

    def _show(self, desks: dict[str, Desk]) -> None:
        """Let these be what is asked."""
        self._desks, self._cells = desks, cells_of(desks.values())


def name_and_source(text: str) -> tuple[str, str]:
    """Read NAME=FOLDER, or a folder, which has its own name then."""
    name, equals, source = text.partition("=")
    return (name, source) if equals else (Path(text).resolve().name, text)


def check_id(name: str) -> None:
    """Refuse what cannot be a model's id.

    Raises:
        CoterieError: saying what can.
    """
    if not is_folder_name(name) or ":" in name:
        raise CoterieError(f"{name!r} cannot be a model's id; give one of letters, digits, '-' and '_': NAME=FOLDER")


def ready_methods(mixture: Mixture) -> list[str]:
    """Return the methods that a mixture can answer prompts as, for which nothing more was to be trained."""
    family = family_of(mixture)
    lacking = family.lacks(mixture)
    ready = {
        name: method.by_prompt and method.make_router and not method.needs for name, method in family.methods.items()
    }
    return [name for name, is_ready in ready.items() if is_ready and name not in lacking]


def open_engine(mixture: Mixture, capacity: CapacitySettings) -> Engine:
    """Return an engine of a mixture, within what it may take."""
    budget = None if capacity.memory is None else int(capacity.memory * GIB)
    prefixes = int(capacity.prefix_memory * GIB)
    return mixture.engine(places=capacity.places, chunk=capacity.prefill_chunk, budget=budget, prefixes=prefixes)


def cells_of(desks: Iterable[Desk]) -> dict[str, Cell]:
    """Name all that can be asked: mixtures, their methods and experts, base models.

    An expert is called by its own name, or after its base model, unless two mixtures have one of that name; after its
    mixture, always.
    """
    desks = list(desks)
    cells: dict[str, Cell] = {}
    bases = [base_cell(desk, cells, {own.name for own in desks}) for desk in desks]
    for desk, base in zip(desks, bases, strict=True):
        if desk.path:
            cell = Cell(desk.name, desk.path, base.id, desk, lambda desk=desk: desk.grid.mixture)
            cells |= {desk.name: cell, f"{desk.base}:{desk.name}": cell}
            continue
        add = partial(Cell, parent=base.id, desk=desk)
        cells[desk.name] = add(desk.name, desk.name, make=lambda desk=desk: desk.grid.mixture)
        for method in (one for one in desk.methods if one not in (desk.grid.own.method, BACKBONE, *desk.experts)):
            name = f"{desk.name}:{method}"
            cells[name] = add(name, method, make=partial(desk.grid.cell, method))
        cells |= {f"{desk.name}:{desk.grid.own.method}": cells[desk.name], f"{desk.name}:{BACKBONE}": base}
    counts = Counter([*cells, *(name for desk in desks for name in desk.experts)])
    for desk, base in zip(desks, bases, strict=True):
        for expert in desk.experts:
            full = f"{desk.name}:{expert}"
            name = expert if counts[expert] == 1 else full
            cell = Cell(name, expert, base.id, desk, partial(desk.single, expert))
            cells |= dict.fromkeys({name, full, full if name == full else f"{desk.base}:{expert}"}, cell)
    return cells


def base_cell(desk: Desk, cells: dict[str, Cell], taken: set[str]) -> Cell:
    """Return what answers as a mixture's base model, which others may share; it is put among the cells."""
    known = cells.get(desk.base)
    if known and known.desk.grid.own.backbone.identity == desk.grid.own.backbone.identity:
        return known
    name = f"{desk.name}:{BACKBONE}" if known or desk.base in taken else desk.base
    cells[name] = Cell(name, desk.base, None, desk, partial(desk.single, BACKBONE))
    return cells[name]
