"""A mixture as a model of lm-evaluation-harness: `lm_eval.simple_evaluate(model=HarnessModel(mixture), tasks=[...])`.

The harness gives texts; they are continued as they stand, unless it is told to apply the chat template itself.
"""

from collections.abc import Sequence
from typing import Any

from coterie.data.batching import TokenRow
from coterie.engine.decoding import ScoredTokens, score_responses
from coterie.errors import CoterieError, missing_extra
from coterie.mixture import Mixture

try:
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import LM
except ImportError as error:
    raise missing_extra("lm-eval", "eval") from error

UNDERSTOOD = {"until", "max_gen_toks", "max_new_tokens", "do_sample", "temperature", "top_p", "top_k"}
NO_OPTION = {"num_beams": 1, "repetition_penalty": 1.0, "early_stopping": False}


class HarnessModel(LM):
    """Routes every context on its own, and answers or scores with the mixture's combiner.

    Args of requests are those of the harness: (context, continuation), (text,) or (context, options).
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

    def chat_template(self, chat_template: bool | str = False) -> str:
        """Return the template that the harness records."""
        return (self.tokenizer.chat_template or "") if chat_template else ""

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Render a conversation, when the harness is told to do so."""
        ends = {"add_generation_prompt": add_generation_prompt, "continue_final_message": not add_generation_prompt}
        return str(self.tokenizer.apply_chat_template(chat_history, tokenize=False, **ends))

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Return the log-probability of every continuation after its context, and whether it is the greedy one."""
        texts = [self._pair(*request.args) for request in requests]
        return [(float(scored.logprobs.sum()), bool(scored.is_greedy.all())) for scored in self._scored(texts)]

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """Return the log-probability of whole texts; each is routed by itself."""
        texts = [self._pair("", request.args[0]) for request in requests]
        return [float(scored.logprobs.sum()) for scored in self._scored(texts)]

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Answer every context until a stop text, greedily unless the task samples."""
        groups: dict[str, tuple[dict[str, Any], list[int]]] = {}
        for number, request in enumerate(requests):
            arguments: Any = request.args
            options = self._sampling(arguments[1])
            groups.setdefault(repr(options), (options, []))[1].append(number)
        found: dict[int, str] = {}
        for options, numbers in groups.values():
            rows = [_row(self._tokens(requests[i].args[0])) for i in numbers]
            answers = self.mixture.complete(rows, batch_size=self._batch_size, **options)
            found |= {i: answer.text for i, answer in zip(numbers, answers, strict=True)}
        return [found[i] for i in range(len(requests))]

    def _sampling(self, options: dict[str, Any]) -> dict[str, Any]:
        """Translate the harness' options.

        Raises:
            CoterieError: for one that is not understood, rather than leaving it out.
        """
        strange = [k for k, v in options.items() if k not in UNDERSTOOD and NO_OPTION.get(k, object()) != v]
        if strange:
            raise CoterieError(f"the task asks for {strange[0]}={options[strange[0]]!r}, which is not understood here")
        until = options.get("until") or []
        longest = options.get("max_gen_toks", options.get("max_new_tokens", self._max_new_tokens))
        sampled = options.get("do_sample", options.get("temperature", 0) > 0)
        return {
            "max_new_tokens": int(longest),
            "stop": [until] if isinstance(until, str) else list(until),
            "temperature": float(options.get("temperature", 1.0)) if sampled else 0.0,
            "top_p": float(options.get("top_p", 1.0)),
            "top_k": int(options.get("top_k", 0)),
        }

    def _tokens(self, text: str) -> list[int]:
        """Tokenise a text; an empty one becomes the token that texts begin with."""
        ids = list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        first = self.tokenizer.bos_token_id
        return ids or [self.tokenizer.eos_token_id if first is None else first]

    def _pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Tokenise both as one text, so that the words at their border are cut as in training.

        Spaces that end the context go to the continuation, as the harness does it for other models.
        """
        border = len(context) - len(context.rstrip())
        if border:
            context, continuation = context[:-border], context[-border:] + continuation
        before = self._tokens(context)
        if not context:
            return before, list(self.tokenizer(continuation, add_special_tokens=False)["input_ids"])
        return before, list(self.tokenizer(context + continuation, add_special_tokens=False)["input_ids"])[
            len(before) :
        ]

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
        return score_responses(mixture.backbone, mixture.layers, plan, [plan.votes], rows)[0]


def _row(ids: Sequence[int]) -> TokenRow:
    """Take all tokens for the user's own words."""
    return TokenRow(tuple(ids), len(ids), (False,) * len(ids), (True,) * len(ids))
