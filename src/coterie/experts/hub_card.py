"""Cards for people on the hub: what experts are on, made of and worth, and how they are loaded with and without us."""

from collections.abc import Mapping, Sequence
from typing import Any

from coterie.backbone.aliases import ALIASES, hub_name
from coterie.backbone.loading import BaseModelIdentity
from coterie.experts.cards import Card, short
from coterie.records.wording import printable

OWN_TERMS = "not stated; ask whoever published this, and mind the base model's own terms"


def front_matter(base: BaseModelIdentity, licence: str | None, tags: Sequence[str], **more: Any) -> str:  # noqa: ANN401
    """Return what the hub itself reads of a card; what else is given are fields of its `ModelCardData`."""
    from huggingface_hub import ModelCardData

    data = ModelCardData(
        library_name="coterie",
        base_model=hub_name(base.id),
        base_model_relation="adapter",
        license=licence,
        pipeline_tag="text-generation",
        tags=["lora", "peft", *tags],
        **more,
    )
    return f"---\n{data.to_yaml()}\n---\n"


def table(heads: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return a table of Markdown, in which nothing that a cell quotes is markup of the table."""
    cells = [[printable(str(cell), 200).replace("|", "\\|") for cell in row] for row in rows]
    lines = [list(heads), ["---"] * len(heads), *cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def with_peft(base: BaseModelIdentity, place: str, expert: str) -> str:
    """Return how one expert is loaded by PEFT alone, and what is different then."""
    name, revision = hub_name(base.id), f', revision="{base.revision}"' if base.revision else ""
    text = (
        "## One expert, with PEFT alone\n\n"
        "```python\nfrom peft import PeftModel\nfrom transformers import AutoModelForCausalLM\n\n"
        f'base = AutoModelForCausalLM.from_pretrained("{name}"{revision})\n'
        f'model = PeftModel.from_pretrained(base, "{place}", subfolder="experts/{expert}")\n```\n'
    )
    if base.id in ALIASES:
        text += (
            f"\nThe experts were trained on `{base.id}`, which Coterie makes of a quantised file of this model: on the "
            "model's own weights answers differ a little.\n"
        )
    return text


def bank_card(base: BaseModelIdentity, cards: Sequence[Card], place: str, licence: str | None) -> str:
    """Return the card of a bank: every adapter with its size, licence and data, and how it is used.

    Args:
        base: the base model, as the hub calls it.
        cards: of the adapters.
        place: the repository.
        licence: of all; by default that of the adapters, where they have the same one.
    """
    stated = {card.licence for card in cards}
    licence = licence or (cards[0].licence if len(stated) == 1 else None)
    datasets = sorted({name for card in cards for name in card.datasets})
    front = front_matter(base, licence, ["bank"], datasets=datasets or None)
    rows = [
        (f"`{c.name}`", c.rank, short(c.parameters), c.licence or "not stated", ", ".join(c.datasets) or "not stated")
        for c in cards
    ]
    heads = ("adapter", "rank", "parameters", "licence", "data")
    return (
        f"{front}\n# {len(cards)} LoRA adapters on {hub_name(base.id)}\n\n"
        f"Licence: {licence or 'each adapter has its own'}.\n\n{table(heads, rows)}\n\n"
        "## A mixture of them\n\n"
        f'```python\nfrom coterie import Mixture\n\nmixture = Mixture.from_bank("{place}")\n'
        'print(mixture.generate(["..."])[0].text)\n```\n\n'
        f"Or `coterie fit from-adapters --bank {place} --output runs/shelf`.\n\n"
        f"{with_peft(base, place, cards[0].name)}"
    )


def counted(rows: Mapping[str, int]) -> str:
    """Return how many rows each source has, the most first."""
    ordered = sorted(rows.items(), key=lambda pair: (-pair[1], pair[0]))
    return ", ".join(f"{printable(name, 100)} {count:,}" for name, count in ordered)
