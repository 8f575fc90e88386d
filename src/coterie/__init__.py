"""Coterie trains, selects, routes, combines and serves LoRA experts for language models.

Importing the package is quick: a name loads its room when it is first used. `dir(coterie)` lists the names, and
`help(coterie.Mixture)` tells of one.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "CoterieError": "coterie.errors",
    "Example": "coterie.data.examples",
    "load_examples": "coterie.data.examples",
    "Backbone": "coterie.backbone.loading",
    "load_backbone": "coterie.backbone.loading",
    "ExpertBank": "coterie.experts.bank",
    "load_bank": "coterie.experts.bank",
    "bank_add": "coterie.methods.add_adapters",
    "bank_remove": "coterie.methods.add_adapters",
    "verify_bank": "coterie.methods.add_adapters",
    "open_bank": "coterie.experts.bank_folder",
    "find_adapters": "coterie.experts.hub_find",
    "leaks": "coterie.experts.bank_folder",
    "Routing": "coterie.routers.base",
    "Mixture": "coterie.mixture",
    "Completion": "coterie.mixture",
    "LlamaCpp": "coterie.mixture.llama_cpp",
    "export_mixture": "coterie.mixture.export",
    "push": "coterie.mixture.publish",
    "reading_for": "coterie.mixture.folder",
    "auto": "coterie.evaluation.auto",
    "fit_auto": "coterie.evaluation.auto",
    "kshot_auto": "coterie.evaluation.kshot_auto",
    "fit_kshot_auto": "coterie.evaluation.kshot_auto",
    "evaluate": "coterie.evaluation.compare",
    "HarnessModel": "coterie.evaluation.harness",
    "evaluate_folder": "coterie.evaluation.symbolic",
    "spread": "coterie.evaluation.seeds",
    "read_spread": "coterie.evaluation.seeds",
    "format_spread": "coterie.evaluation.seeds",
    "init_pool": "coterie.experts.expert_pool",
    "add_experts": "coterie.experts.expert_pool",
    "remove_experts": "coterie.experts.expert_pool",
    "read_pool": "coterie.experts.expert_pool",
    "select": "coterie.methods",
    "gather": "coterie.methods",
    "influence": "coterie.methods",
    "run_status": "coterie.methods.status",
    "write_report": "coterie.report",
    "run_server": "coterie.serve.app",
    "print_weights": "coterie.report.terminal",
}

__all__ = [*_HOMES, "methods"]  # noqa: PLE0604 - names, every one


def __getattr__(name: str) -> Any:  # noqa: ANN401 - whatever the name stands for
    """Load a public name from its room (PEP 562)."""
    if name == "methods":
        return importlib.import_module("coterie.methods")
    if name not in _HOMES:
        raise AttributeError(f"module 'coterie' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    """List the public names, loaded or not."""
    return sorted({*globals(), *__all__})
