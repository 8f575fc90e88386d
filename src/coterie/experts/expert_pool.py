"""A pool: experts of any kind by name - adapters, whole models, endpoints - listed in pool.json."""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from coterie.artifacts import FORMAT, as_path, check_kind, hash_text, locked, read_json, write_json
from coterie.backbone.aliases import named_model
from coterie.backbone.loading import local_weights
from coterie.errors import CoterieError, check_known, naming
from coterie.experts.bank import CONFIG_FILE, WEIGHTS_FILE, check_names
from coterie.experts.cards import hash_adapter
from coterie.experts.endpoints import check_address
from coterie.records.wording import columns
from coterie.settings.commands import ExpertAddSettings, ExpertPoolSettings
from coterie.settings.keywords import takes_fields

POOL_FILE = "pool.json"
FORMS = "NAME=FOLDER of an adapter, NAME=MODEL, or NAME=http://HOST/v1#MODEL"
Kind = Literal["adapter", "model", "endpoint"]


@dataclass(frozen=True)
class PoolExpert:
    """One expert of a pool.

    Attributes:
        name: its name.
        kind: adapter, model or endpoint.
        source: the adapter's folder, the model (hub id, folder, file, alias), or the server's address.
        model: the adapter's base model, the model itself, or its name at the server.
        sha256: of the adapter's files and the weights under it; None where they do not lie on this machine.
        system_prompt: what an adapter was trained with, if a mixture's folder around it says so.
    """

    name: str
    kind: Kind
    source: str
    model: str
    sha256: str | None = None
    system_prompt: str | None = None

    @property
    def identity(self) -> str:
        """What stands for the expert's weights where replies are kept."""
        weights = self.sha256 or f"{self.source}#{self.model}"
        return f"{self.kind} {weights} {self.system_prompt or ''}"


@dataclass(frozen=True)
class Pool:
    """Experts by name, in a fixed order."""

    experts: tuple[PoolExpert, ...]

    def __post_init__(self) -> None:
        """Refuse repeated names."""
        if len(set(self.names)) != len(self.names):
            raise CoterieError(f"experts need a name of their own each, got {', '.join(self.names)}")

    @property
    def names(self) -> tuple[str, ...]:
        """The experts' names."""
        return tuple(expert.name for expert in self.experts)

    @property
    def identities(self) -> dict[str, str]:
        """What stands for every expert's weights where replies are kept, by name."""
        return {expert.name: expert.identity for expert in self.experts}

    def expert(self, name: str) -> PoolExpert:
        """Return an expert by name.

        Raises:
            CoterieError: when there is none of this name.
        """
        check_known("expert", name, self.names)
        return self.experts[self.names.index(name)]

    def __str__(self) -> str:
        """List the experts, one a line."""
        lines = [("expert", "kind", "where")]
        for one in self.experts:
            where = one.model if one.kind == "model" else f"{one.source} ({one.model})"
            lines.append((one.name, one.kind, where))
        return columns(lines, "<<<")

    def record(self) -> dict[str, Any]:
        """Return the pool as plain values."""
        return {expert.name: {k: v for k, v in asdict(expert).items() if k != "name"} for expert in self.experts}


@takes_fields(ExpertPoolSettings)
def init_pool(settings: ExpertPoolSettings) -> Pool:
    """Check experts and write them to the pool's folder.

    Raises:
        CoterieError: when an expert's source is not there, two have one name, or the folder holds a pool already.
    """
    _check_new(settings)
    pool = Pool(tuple(parse_expert(text, settings.base) for text in settings.expert))
    with _writing(Path(settings.folder)) as file:
        _check_new(settings)
        _write(file, pool)
    return pool


def _check_new(settings: ExpertPoolSettings) -> None:
    file = Path(settings.folder) / POOL_FILE
    if file.exists() and not settings.overwrite:
        advice = (
            f"choose another folder, or add --overwrite to replace it; coterie experts add {settings.folder} adds to it"
        )
        raise CoterieError(f"{file} exists; {advice}")


@takes_fields(ExpertAddSettings)
def add_experts(settings: ExpertAddSettings) -> Pool:
    """Add experts to a pool's list; what is listed already with the same source stays as it is.

    Raises:
        CoterieError: as `init_pool`, or when there is no pool, or another expert has a name and is not to be replaced.
    """
    added = Pool(tuple(parse_expert(text, settings.base) for text in settings.expert))
    read_pool(settings.folder, verify=False)
    with _writing(Path(settings.folder)) as file:
        listed = {expert.name: expert for expert in read_pool(settings.folder, verify=False).experts}
        for expert in added.experts:
            if not settings.overwrite and listed.get(expert.name, expert) != expert:
                advice = "give another name, or add --overwrite to replace it"
                raise CoterieError(f"another expert is listed as {expert.name!r} in {file}; {advice}")
            listed[expert.name] = expert
        pool = Pool(tuple(listed.values()))
        _write(file, pool)
    return pool


def remove_experts(folder: str | Path, names: Sequence[str]) -> Pool:
    """Take experts out of a pool's list; their own files stay where they are.

    Raises:
        CoterieError: when there is no pool, no expert of such a name, or none would be left.
    """
    read_pool(folder, verify=False)
    with _writing(Path(folder)) as file:
        listed = read_pool(folder, verify=False)
        gone = {listed.expert(name).name for name in names}
        pool = Pool(tuple(expert for expert in listed.experts if expert.name not in gone))
        if not pool.experts:
            raise CoterieError(f"{file} would list no experts; delete {folder} instead, or add others first")
        _write(file, pool)
    return pool


@contextmanager
def _writing(folder: Path) -> Iterator[Path]:
    """Let one process at a time write a pool's list."""
    with locked(folder / ".lock", folder):
        yield folder / POOL_FILE


def _write(file: Path, pool: Pool) -> None:
    write_json(file, {"format": FORMAT, "experts": pool.record()})


def parse_expert(text: str, base: str | None = None) -> PoolExpert:
    """Read `NAME=SOURCE` and find out what the source is.

    Raises:
        CoterieError: when the form is another, or the source is not there.
    """
    name, equals, source = text.partition("=")
    if not equals or not name or not source:
        raise CoterieError(f"--expert {text!r} is not of the form {FORMS}")
    check_names([name])
    if re.match(r"[a-z]+://", source):
        address, _, model = source.partition("#")
        return _checked(PoolExpert(name, "endpoint", address.rstrip("/"), model))
    folder = as_path(source)
    if (folder / CONFIG_FILE).is_file():
        return _adapter(name, folder.resolve(), base)
    model = str(folder.resolve()) if folder.exists() else source
    return PoolExpert(name, "model", model, model, local_weights(model))


def _adapter(name: str, folder: Path, base: str | None) -> PoolExpert:
    model = base or read_json(folder / CONFIG_FILE).get("base_model_name_or_path")
    if not isinstance(model, str) or not model:
        raise CoterieError(f"{folder / CONFIG_FILE} names no base model; add --base MODEL")
    if not (folder / WEIGHTS_FILE).is_file():
        raise CoterieError(f"{folder} holds no {WEIGHTS_FILE}; get or train the adapter again")
    model = named_model(model)
    # an adapter in a mixture's `experts` folder was trained with the system prompt of that mixture
    file = folder.parent.parent / "mixture.json"
    prompt = read_json(file).get("system_prompt") if folder.parent.name == "experts" and file.is_file() else None
    prompt = prompt if isinstance(prompt, str) else None
    return PoolExpert(name, "adapter", str(folder), model, _adapter_hash(folder, model), prompt)


def _adapter_hash(folder: Path, model: str) -> str:
    return hash_text(hash_adapter(folder), local_weights(model) or model)


def read_pool(folder: str | Path, *, verify: bool = True) -> Pool:
    """Read a pool's folder and verify the experts' hashes, unless its list alone is wanted.

    Raises:
        CoterieError: when the list is missing or broken, or an adapter or model has changed or is gone.
    """
    file = Path(folder) / POOL_FILE
    check_kind(file.parent, POOL_FILE)
    if not file.exists():
        raise CoterieError(
            f"{file} does not exist; make it with: coterie experts init {folder} --expert NAME=SOURCE ..."
        )
    record = read_json(file)
    if record.get("format") != FORMAT:
        raise CoterieError(f"{file} has format {record.get('format')!r}, not {FORMAT}; make the pool again")
    return pool_from(record.get("experts"), str(file), verify=verify)


def pool_from(experts: object, place: str, *, verify: bool = True) -> Pool:
    """Build a pool from what `Pool.record` gave, and verify the experts' hashes.

    Raises:
        CoterieError: as `read_pool`.
    """
    if not isinstance(experts, dict) or not experts:
        raise CoterieError(f"{place} lists no experts; make it again with: coterie experts init")
    check_names(list(experts))
    pool = Pool(tuple(_from_record(name, entry, place) for name, entry in experts.items()))
    for expert in pool.experts if verify else ():
        if expert.kind == "endpoint" or expert.sha256 is None:
            continue
        folder = Path(expert.source)
        if expert.kind == "adapter" and not (folder / WEIGHTS_FILE).is_file():
            raise CoterieError(f"the adapter of {expert.name!r} is not in {folder} any more; make the pool again")
        found = _adapter_hash(folder, expert.model) if expert.kind == "adapter" else local_weights(expert.model)
        if found != expert.sha256:
            raise CoterieError(
                f"{expert.name!r} ({expert.source}) has other weights than when {place} was written; make the pool "
                "again with --overwrite, and its profile too"
            )
    return pool


def _from_record(name: str, entry: object, place: str) -> PoolExpert:
    try:
        if not isinstance(entry, Mapping):
            raise TypeError("it is no object")
        expert = TypeAdapter(PoolExpert).validate_python(vars(PoolExpert(name, **entry)))
    except (TypeError, ValidationError) as error:
        raise CoterieError(f"{place}: the entry of the expert {name!r} is broken; make the pool again") from error
    with naming(place):
        return _checked(expert)


def _checked(expert: PoolExpert) -> PoolExpert:
    """Refuse an endpoint's address that is none, or that has a secret in it."""
    if expert.kind == "endpoint":
        check_address(expert.name, expert.source)
        if not expert.model:
            raise CoterieError(
                f"{expert.name}: an endpoint has the form http://HOST/v1#MODEL, with the model's name there"
            )
    return expert
