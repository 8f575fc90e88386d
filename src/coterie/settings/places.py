"""Which settings name places: what a command reads, and what it writes."""

from coterie.settings.reading import Settings, flat_values

READ = (
    *("mixture", "mixtures", "folder", "experts", "bank", "adapter", "adapters", "expert", "model", "base", "data"),
    *("centroid_data", "trained_on", "shots", "pool", "selected", "gathered", "exclude", "few_shot", "encoder"),
    *("embeddings", "rationales", "gguf", "api_key_file", "unlike", "target_rows", "allow_folder", "evaluation"),
)
"""Settings that name what is read: a folder, a file, or what the hub or an endpoint has; some as NAME=SOURCE."""
WRITTEN_IN_PLACE = {
    **dict.fromkeys(("bank add", "bank remove", "experts init", "experts add", "experts remove", "profile"), "folder"),
    "train-extras": "mixture",
}
"""The setting that names what a command adds to; all others write a new --output."""


def sources(settings: Settings) -> dict[str, list[str]]:
    """Return what a command reads, by the setting that names it, as it was given."""
    flat = flat_values(settings.model_dump())
    named = {name: flat[name] for name in READ if flat.get(name)}
    return {name: [value] if isinstance(value, str) else list(value) for name, value in named.items()}


def target(settings: Settings) -> str | None:
    """Return the folder or file that a command writes; None where it only prints."""
    flat = flat_values(settings.model_dump())
    return flat.get(WRITTEN_IN_PLACE.get(settings.command, "output"))
