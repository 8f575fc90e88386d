"""What is read beside an adapter's tensors: PEFT's `adapter_config.json`, and Adam's state of a checkpoint."""

from typing import Annotated

from pydantic import AfterValidator, Field, StrictBool, StrictStr

from coterie.records.schema import Count, Position, Record, Texts, Weight

Share = Annotated[Position, Field(ge=0, lt=1)]
LoraRank = Annotated[int, Field(strict=True, ge=1)]
Alpha = Annotated[Position, Field(ge=-1e6, le=1e6), AfterValidator(lambda n: int(n) if n.is_integer() else n)]


class AdapterConfig(Record):
    """The fields of a PEFT config that say what a LoRA adapter does.

    A pattern's key is a regular expression for the end of a layer's path.
    """

    base_model_name_or_path: StrictStr | None = None
    r: LoraRank
    lora_alpha: Alpha
    rank_pattern: dict[StrictStr, LoraRank] = {}
    alpha_pattern: dict[StrictStr, Alpha] = {}
    use_rslora: StrictBool = False
    lora_dropout: Share = 0.0
    target_modules: StrictStr | Texts | None = None


class AdamRecord(Record):
    """Adam's settings and steps when an epoch ended; its moments are tensors beside this."""

    steps: Annotated[Count, Field(le=2**53)]
    learning_rate: Weight
    betas: tuple[Share, Share]
    eps: Weight
