"""The model card that goes with a mixture's folder."""

from collections.abc import Mapping, Sequence


def model_card(method: str, base: str, experts: Sequence[str], parts: Mapping[str, str]) -> str:
    """Return a card in the hub's form.

    Args:
        method: that made the mixture.
        base: name of the base model.
        experts: names.
        parts: what else it is made of, such as its router, by what they are.
    """
    front = f"---\nlibrary_name: coterie\nbase_model: {base}\npipeline_tag: text-generation\ntags:\n- lora\n---\n"
    listed = "\n".join(f"- `{name}`" for name in experts)
    made_of = " ".join(f"{part}: {name}." for part, name in parts.items())
    return (
        f"{front}\n# {method} mixture of {len(experts)} LoRA experts on {base}\n\n{listed}\n\n"
        f"{made_of} Every folder under `experts/` is a plain PEFT adapter.\n\n"
        '```python\nfrom coterie import Mixture\n\nmixture = Mixture.from_pretrained("this-folder")\n'
        'print(mixture.generate(["..."])[0].text)\n```\n'
    )
