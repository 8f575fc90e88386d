"""A base model held in 4 bits answers, routes and describes prompts like PEFT on the same 4-bit model."""

import pytest
import torch
from peft import PeftModel

from coterie.data.examples import from_prompt
from coterie.mixture import Mixture

pytest.importorskip("bitsandbytes", reason="needs the extra 'quant'")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")


def test_experts_on_a_four_bit_base_equal_peft_on_it(run_folder):
    mixture = Mixture.from_pretrained(run_folder, device="cpu", dtype="float32", load_in_4bit=True)
    assert any(type(m).__name__ == "Linear4bit" for m in mixture.backbone.model.modules())
    answer = mixture.replace(router="cluster-1").generate(["add 3 4"], max_new_tokens=5)[0]
    weights = mixture.route(["add 3 4", "SPELL ABCD NOW"]).weights
    assert weights.shape == (2, 4) and bool((weights > 0).all())
    ids = list(mixture.prompts.row(from_prompt("add 3 4")).ids)
    peft = PeftModel.from_pretrained(mixture.backbone.model, run_folder / "experts" / "cluster-1").eval()
    for token, logprob in zip(answer.token_ids, answer.logprobs, strict=True):
        with torch.no_grad():
            expected = peft(input_ids=torch.tensor([ids])).logits[0, -1].float().log_softmax(0)
        assert token == int(expected.argmax())
        assert logprob == pytest.approx(float(expected[token]), abs=1e-3)
        ids.append(token)
