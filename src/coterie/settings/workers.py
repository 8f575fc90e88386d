"""Settings of work that a cluster shares."""

from pydantic import Field

from coterie.settings.reading import Settings


class WorkerSettings(Settings):
    """Workers on a Ray cluster."""

    idle_with = {"workers": ("ray", (False,))}

    ray: bool = Field(
        False,
        description="let workers share the work, on the Ray cluster that RAY_ADDRESS names or one of this machine "
        "alone; needs the extra 'ray'",
    )
    workers: int = Field(2, ge=1, description="processes that work at once, each with its own models and a GPU, if any")
