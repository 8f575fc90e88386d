"""Gates read off the experts' own updates: the inputs that an update acts on most (Arrow), or all of them (SpectR).

Ostapenko et al. 2024, arXiv 2405.11157; Fleshman and Van Durme 2025, arXiv 2504.03454.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize
from torch.nn.utils.rnn import pad_sequence

from coterie.errors import check_known
from coterie.lora import LoraPair, svd

PROTOTYPES: dict[str, Callable[[Tensor], Tensor]] = {
    "arrow": lambda spectra: normalize(spectra[:, 0], dim=-1),
    "spectr": lambda spectra: spectra,
}
"""What each way to route keeps of the experts' spectra (expert, rank, in): the strongest direction, or all of them."""


def prototypes(kind: str, pairs: Sequence[LoraPair | None]) -> Tensor:
    """Return one layer's gate from the updates of its experts; the dense updates are never formed.

    Where U S V^T is the singular value decomposition of an update, its scaling included, the prototype is the first row
    of V^T (`arrow`, either sign) or S V^T (`spectr`; its product with x is as long as the update's). An expert without
    an update of the layer gets zeros, and so do the ranks that an expert has less than others.

    Shapes: E pairs (R_e, I), (R_e, O) -> (E, I) for arrow, (E, max R, I) for spectr.

    Raises:
        CoterieError: for another kind.
        ValueError: when no expert changes the layer.
    """
    check_known("way to route by spectra", kind, PROTOTYPES)
    width = next((pair.down.shape[1] for pair in pairs if pair is not None), None)
    if width is None:
        raise ValueError("no expert changes this layer")
    spectra = []  # S V^T of every update, strongest direction first
    for pair in pairs:
        if pair is None:
            spectra.append(torch.zeros(1, width))
        else:
            _, values, directions = svd(pair)
            spectra.append((values[:, None] * directions).float())
    return PROTOTYPES[kind](pad_sequence(spectra, batch_first=True))
