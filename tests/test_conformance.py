"""Every architecture of the table: what a mixture computes is what PEFT computes without cache, padding or company."""

import pytest

import architectures
from architectures import ARCHITECTURES, REFUSED
from coterie.backbone.loading import load_backbone
from coterie.errors import CoterieError
from coterie.settings.groups import ModelSettings


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_computed_right_is_refused_by_name_when_it_is_loaded(name, tmp_path):
    folder = architectures.save_model(tmp_path, name)
    with pytest.raises(CoterieError, match=ARCHITECTURES[name].refusal) as refused:
        load_backbone(ModelSettings(model=str(folder), device="cpu"))
    assert name in str(refused.value)
    assert str(folder) in str(refused.value)
