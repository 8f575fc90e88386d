"""On a GPU, where there is one: the answers of the CPU, and no more waiting than the rehearsal counts."""

import warnings

import pytest
import torch

from coterie.data.batching import TokenRow
from coterie.engine.request import Failure
from coterie.mixture import Mixture
from coterie.settings.sampling import SamplingSettings
from helpers import same_answers

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")

PROMPTS = ["add 3 4", "SPELL ABCD NOW", "?? (A) one (B) two ??"]


@pytest.fixture(scope="module")
def there(run_folder):
    return Mixture.from_pretrained(run_folder, device="cuda", dtype="float32")


@pytest.mark.parametrize("speculate", ["off", "lookup", "base", "merged", "blocks:1"])
@pytest.mark.parametrize("combiner", ["logits", "layers", "weights", "weights:svd"])
def test_a_gpu_writes_what_the_cpu_writes(mixture, there, combiner, speculate):
    options = {"max_new_tokens": 12, "temperature": 0.8, "seed": 3}
    wanted = mixture.replace(combiner=combiner).generate(PROMPTS, **options)
    same_answers(there.replace(combiner=combiner).generate(PROMPTS, speculate=speculate, **options), wanted)


def test_a_gpu_routes_as_the_cpu_does(mixture, there):
    torch.testing.assert_close(there.route(PROMPTS).weights, mixture.route(PROMPTS).weights, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("combiner", ["logits", "layers"])
def test_a_step_waits_for_the_gpu_once(there, combiner):
    """As torch itself counts, which warns of whatever makes it wait."""
    mixture = there.replace(combiner=combiner)
    engine = mixture.engine()
    rows: list[TokenRow] = mixture.tokens(PROMPTS)
    for request in mixture.requests(rows, [12] * len(rows), [SamplingSettings(temperature=0.8, top_p=0.9)]):
        engine.submit(request)
    waits = []
    while not engine.is_idle:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                assert not any(isinstance(token, Failure) for token in engine.step())
            finally:
                torch.cuda.set_sync_debug_mode("default")
        waits.append(sum("synchroniz" in str(own.message) for own in told))
    assert waits[1:] == [1] * (len(waits) - 1)
