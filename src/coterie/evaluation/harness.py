"""A mixture as a model of lm-evaluation-harness: `lm_eval.simple_evaluate(model=HarnessModel(mixture), tasks=[...])`.

The harness gives texts; they are continued as they stand, unless it is told to apply the chat template itself.
"""

import logging
from collections.abc import Sequence
from typing import Any

from coterie.data.batching import TokenRow
from coterie.engine.scoring import ScoredTokens, score_responses
from coterie.errors import CoterieError, missing_extra
from coterie.mixture import Mixture
from coterie.settings.reading import from_flat
from coterie.settings.sampling import SamplingSettings

try:
    from jinja2 import TemplateError
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import has_bos_prefix, normalize_gen_kwargs, resolve_max_length
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as error:
    raise missing_extra("lm-eval", "eval") from error

logger = logging.getLogger(__name__)

UNDERSTOOD = {"until", "max_gen_toks", "do_sample", "temperature", "top_p", "top_k", "repetition_penalty"}
NO_OPTION = {"num_beams": 1, "early_stopping": False}


class HarnessModel(TemplateLM):
    """Routes every context on its own, and answers or scores with the mixture's combiner.

    Texts are cut into tokens, borders, windows and what is too long as the harness does it for a model of the hub
    (`lm_eval.models.huggingface.HFLM`), so that one expert alone gets the numbers that its adapter gets there.
    Requests have the harness' arguments: (context, continuation), (text,) or (context, options).
    """

    def __init__(self, mixture: Mixture, *, batch_size: int = 8, max_new_tokens: int = 256) -> None:
        """Wrap a mixture.

        Args:
            mixture: any cell of the grid that does not vote on finished answers.
            batch_size: texts run together.
            max_new_tokens: longest answer where a task sets no limit.
        """
        super().__init__()
        self.mixture = mixture
        self.tokenizer: Any = mixture.backbone.tokenizer
        self._batch_size = batch_size
        self._max_new_tokens = max_new_tokens

    @property
    def tokenizer_name(self) -> str:
        """Name that the harness keys its cache by."""
        return self.mixture.backbone.identity.id.replace("/", "__")

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """The token that stands where a context is empty.

        Raises:
            CoterieError: when the tokenizer has no token for the beginning or the end of a text.
        """
        found = [token for token in (self.tokenizer.bos_token_id, self.eot_token_id) if token is not None]
        if not found:
            raise CoterieError("this model's tokenizer has neither bos nor eos, so nothing can stand before a text")
        return found[0]

    @property
    def max_length(self) -> int:
        """The most tokens that are read; longer contexts lose their beginning."""
        return resolve_max_length(self.mixture.backbone.model.config, self.tokenizer)

    def chat_template(self, chat_template: bool | str = False) -> str:
        """Return the template that the harness records."""
        return (self.tokenizer.chat_template or "") if chat_template else ""

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Render a conversation, when the harness is told to do so; without its system prompt if that is not taken."""
        ends = {"add_generation_prompt": add_generation_prompt, "continue_final_message": not add_generation_prompt}
        try:
            return str(self.tokenizer.apply_chat_template(chat_history, tokenize=False, **ends))
        except TemplateError:
            logger.warning("this model's chat template takes no system prompt, so it is left out")
            turns = [turn for turn in chat_history if turn["role"] != "system"]
            return str(self.tokenizer.apply_chat_template(turns, tokenize=False, **ends))

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Tokenise a text with what the tokenizer adds itself, unless the text begins with it already."""
        if add_special_tokens is None:
            add_special_tokens = not has_bos_prefix(string, self.tokenizer.bos_token or self.tokenizer.eos_token)
        return list(self.tokenizer.encode(string, add_special_tokens=add_special_tokens))

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Return the log-probability of whole texts, in windows that the model reads; each is routed by itself."""
        windows = []
        for request in requests:
            tokens = self.tok_encode(request.args[0])
            rolling = get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, context_len=1)
            windows.append([(list(before), list(after)) for before, after in map(make_disjoint_window, rolling)])
        found = iter(self._scored([window for own in windows for window in own]))
        return [sum(float(next(found).logprobs.sum()) for _ in own) for own in windows]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Answer every context until a stop text, greedily unless the task samples."""
        rows, settings = [], []
        for request in requests:
            arguments: Any = request.args
            settings.append(self._sampling(arguments[1]))
            asked = settings[-1].max_new_tokens or self._max_new_tokens
            if (longest := self.max_length - asked) < 1:
                raise CoterieError(f"the task asks for {asked} new tokens, but the base model reads {self.max_length}")
            rows.append(_row(self.tok_encode(arguments[0])[-longest:]))
        return [answer.text for answer in self.mixture.complete(rows, settings, batch_size=self._batch_size)]

    def _sampling(self, options: dict[str, Any]) -> SamplingSettings:
        """Translate the harness' options.

        Raises:
            CoterieError: for one that is not understood, rather than leaving it out.
        """
        given: dict[str, Any] = dict(normalize_gen_kwargs(options, self._max_new_tokens))
        strange = [k for k, v in given.items() if k not in UNDERSTOOD and NO_OPTION.get(k, object()) != v]
        if strange:
            raise CoterieError(f"the task asks for {strange[0]}={given[strange[0]]!r}, which is not understood here")
        config = self.mixture.backbone.model.generation_config
        penalty = getattr(config, "repetition_penalty", None)  # some models ask it
        asked = {
            "repetition_penalty": float(given.get("repetition_penalty", penalty or 1.0)),
            "max_new_tokens": given["max_gen_toks"],
            "stop": [text for text in given["until"] or [] if text],
            "temperature": float(given.get("temperature", 1.0)) if given["do_sample"] else 0.0,
            "top_p": float(given.get("top_p", 1.0)),
            "top_k": int(given.get("top_k", 0)),
        }
        return from_flat(SamplingSettings, asked)

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        """Score continuations; of a text that is too long the beginning is left out.

        Raises:
            CoterieError: for a continuation that adds no token to its context, or is too long by itself.
        """
        longest = self.max_length
        for (_context, text), _before, after in requests:
            if not 0 < len(after) <= longest:
                raise CoterieError(f"the continuation {text[:40]!r} has {len(after)} tokens, not 1 to {longest}")
        pairs = [(before[-(longest + 1 - len(after)) :], after) for _, before, after in requests]
        return [(float(scored.logprobs.sum()), bool(scored.is_greedy.all())) for scored in self._scored(pairs)]

    def _scored(self, texts: Sequence[tuple[list[int], list[int]]]) -> list[ScoredTokens]:
        """Score continuations, texts of similar length together; an empty context is routed by the continuation."""
        order = sorted(range(len(texts)), key=lambda i: -len(texts[i][0]) - len(texts[i][1]))
        found: dict[int, ScoredTokens] = {}
        for start in range(0, len(order), self._batch_size):
            numbers = order[start : start + self._batch_size]
            found |= dict(zip(numbers, self._batch([texts[i] for i in numbers]), strict=True))
        return [found[i] for i in range(len(texts))]

    def _batch(self, texts: Sequence[tuple[list[int], list[int]]]) -> list[ScoredTokens]:
        mixture = self.mixture
        if mixture.reroutes:
            return mixture.score_teacher_forced([_row(before) for before, _ in texts], [after for _, after in texts])
        contexts = [_row(before if len(before) > 1 else after) for before, after in texts]
        plan = mixture.combiner.plan(mixture.router.start(contexts).aligned(mixture.bank.names))
        rows = [([*before, *after], range(len(before), len(before) + len(after))) for before, after in texts]
        return score_responses(mixture.backbone, mixture.layers, plan, [[own.votes for own in plan]], rows)[0]


def _row(ids: Sequence[int]) -> TokenRow:
    """Take all tokens for the user's own words."""
    return TokenRow(tuple(ids), len(ids), (False,) * len(ids), (True,) * len(ids))
