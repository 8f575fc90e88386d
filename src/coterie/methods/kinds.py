"""All ingredients that methods may need, by name."""

from collections.abc import Mapping

from coterie.methods.elrea.extras import CLUSTER_KINDS
from coterie.methods.extras import Kind
from coterie.methods.kshot.extras import TASK_KINDS

KINDS: Mapping[str, Kind] = {**CLUSTER_KINDS, **TASK_KINDS}
