"""All ingredients that methods may need, by name."""

from collections.abc import Mapping

from coterie.methods.cluster_kinds import CLUSTER_KINDS
from coterie.methods.ingredients import Kind
from coterie.methods.task_kinds import TASK_KINDS

KINDS: Mapping[str, Kind] = {**CLUSTER_KINDS, **TASK_KINDS}
