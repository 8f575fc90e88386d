"""A mixture's card: base model, licence, data, measurements, method, and how it is loaded."""

from collections import Counter
from pathlib import Path

from coterie.artifacts import read_jsonl
from coterie.backbone.aliases import hub_name
from coterie.backbone.loading import BaseModelIdentity
from coterie.experts.bank import read_config
from coterie.experts.hub_card import OWN_TERMS, counted, front_matter, table, with_peft
from coterie.records.evaluation import OVERALL, EvaluationRecord
from coterie.records.mixture import MixtureRecord
from coterie.records.wording import nats, percent

ROWS = ("clusters.jsonl", "domains.jsonl")
"""Files that tell of every training row where it came from and which expert was trained on it."""


def mixture_card(
    record: MixtureRecord,
    folder: Path,
    base: BaseModelIdentity,
    place: str,
    licence: str | None = None,
    evaluation: EvaluationRecord | None = None,
) -> str:
    """Return the card of a mixture.

    Args:
        record: its description.
        folder: where it lies; its experts and training rows are looked up there.
        base: the base model, as others load it.
        place: what it is loaded by: the repository, or a folder.
        licence: of the experts.
        evaluation: what was measured of it.
    """
    name = hub_name(base.id)
    measured = _metadata(evaluation, record.method, place) if evaluation else {}
    text = (
        f"{front_matter(base, licence, ['mixture-of-experts', record.method], **measured)}\n"
        f"# {record.method} mixture of {len(record.experts)} LoRA experts on {name}\n\n{_experts(record, folder)}\n\n"
        f"Method: {record.method}. Router: {record.router.kind}. Combiner: {record.combiner.kind}. "
        f"Licence: {licence or OWN_TERMS}.\n\n"
        f'```python\nfrom coterie import Mixture\n\nmixture = Mixture.from_pretrained("{place}")\n'
        'print(mixture.generate(["..."])[0].text)\n```\n\n'
        f"{with_peft(base, place, record.experts[0])}"
    )
    if record.system_prompt is not None:
        text += f"\nEvery conversation needs the system prompt of the training: {record.system_prompt!r}\n"
    return text + (f"\n## Measurements\n\n{_measurements(evaluation)}\n" if evaluation else "")


def _experts(record: MixtureRecord, folder: Path) -> str:
    """List the experts: rank, and the training rows of each by where they came from, as far as that is known."""
    rows: dict[str, Counter[str]] = {}
    for file in (folder / name for name in ROWS if (folder / name).is_file()):
        for row in read_jsonl(file):
            whose = rows.setdefault(str(row.get("cluster") or row.get("expert")), Counter())
            whose[str(row.get("source") or "rows")] += 1
    if rows and "base" in record.experts:
        rows["base"] = sum(rows.values(), Counter())
    listed = [
        (f"`{name}`", read_config(folder / "experts" / name).r, counted(rows[name]) if name in rows else "not stated")
        for name in record.experts
    ]
    return table(("expert", "rank", "trained on"), listed)


def _metadata(evaluation: EvaluationRecord, method: str, place: str) -> dict[str, object]:
    """Return the measurements in the form that the hub lists."""
    from huggingface_hub import EvalResult

    task = {"task_type": "text-generation", "dataset_type": "held-out", "dataset_name": "held-out rows"}
    own = [row for row in evaluation.table if row.source == OVERALL and row.method == (evaluation.subject or method)]
    found = [("exact_match", row.accuracy) for row in own] + [("nll", row.nll) for row in own]
    results = [EvalResult(**task, metric_type=kind, metric_value=value) for kind, value in found if value is not None]
    return {"eval_results": results, "model_name": place} if results else {}


def _measurements(evaluation: EvaluationRecord) -> str:
    rows = [
        (row.method, row.rows, percent(row.accuracy), nats(row.nll), percent(row.oracle_share))
        for row in evaluation.table
        if row.source == OVERALL
    ]
    heads = ("method", "rows", "exact match", "NLL a token", "share of the oracle's gain")
    return (
        f"On {evaluation.rows} held-out rows of {', '.join(evaluation.sources)}; the control is "
        f"{evaluation.control}.\n\n{table(heads, rows)}"
    )
