"""A conversation as text: what the chat template makes of it, where its answers stand, and what ends them.

Templates are programs, so nothing is known of them but what they write: each is asked once what it does with marked
turns, and every conversation is rendered whole.
"""

import re
from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from coterie.data.control_tokens import Span
from coterie.data.examples import Message
from coterie.errors import CoterieError

USER_MARK, ANSWER_MARK = "\ufdd0", "\ufdd1"
"""Stand in the user's and in the model's place where a template's own words are looked up; no text holds them."""

SYSTEM_IN_QUESTION = "the chat template takes no system prompt, so it stands before the first question"
LAST_ANSWER_ONLY = (
    "the chat template shows earlier answers otherwise than they are written, so only the last is trained"
)
EMPTY_THOUGHT = "the chat template opens a thought and the answer has none, so an empty one is trained before it"

OPENED_THOUGHT = r"<(think\w*|thought|reason\w*)>\s*$"


class ChatText(NamedTuple):
    """Text of a conversation.

    Attributes:
        prompt: what is read before the answer is written, the same in training and in generation.
        answer: the last answer with what ends its turn; empty where the conversation ends with a question.
        questions: where the prompt holds what the user wrote.
        earlier: where it holds answers that are trained too, each with what ends its turn.
        notes: what had to be done otherwise than the conversation says.
    """

    prompt: str
    answer: str
    questions: list[Span]
    earlier: list[Span]
    notes: tuple[str, ...]


class ChatTemplate:
    """Renders conversations with the tokenizer's chat template, or as lines of plain text where it has none."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, end: str | None = None) -> None:
        """Store the tokenizer; `end` is the token that ends a turn, where that is not to be read off the template."""
        self._tokenizer = tokenizer
        self._given_end = end

    def text(self, messages: Sequence[Message]) -> ChatText:
        """Render a conversation.

        Where the template's own text of the whole conversation goes on from the prompt, the answer is what it says.
        Elsewhere (DeepSeek-R1 opens a thought in the prompt that its text of the whole does not have) the prompt is
        trusted, since answers will be written after it, and the answer is the row's own.

        Raises:
            CoterieError: when the template refuses the conversation, or changes what a user or the system wrote.
        """
        notes: list[str] = []
        preface = ""
        if messages[0].role == "system" and not self._takes_system:
            notes.append(SYSTEM_IN_QUESTION)
            preface, messages = messages[0].content.strip(), messages[1:]
            preface = preface and f"{preface}\n\n"
        answered = messages[-1].role == "assistant"
        shown = _prefaced(preface, messages)
        asked = shown[:-1] if answered else shown
        prompt = self._prompt(asked)
        questions = self._questions(messages[: len(asked)], preface, prompt)
        earlier = self._earlier(asked, prompt)
        if earlier is None:
            notes.append(LAST_ANSWER_ONLY)
        answer, has_empty_thought = self._answer(shown, prompt) if answered else ("", False)
        if has_empty_thought:
            notes.append(EMPTY_THOUGHT)
        return ChatText(prompt, answer, questions, earlier or [], tuple(notes))

    @cached_property
    def end(self) -> str:
        """The token that ends a turn: the first special one that the template writes after an answer.

        That need not be the tokenizer's end of text: Gemma's turns end with `<end_of_turn>`. Where the template writes
        none, it is the end of text; empty where the tokenizer has none either.
        """
        if self._given_end is not None:
            return self._given_end
        added = self._tokenizer.added_tokens_decoder.values()
        special = {token.content for token in added if token.content.strip()}
        found = [(self._after.index(token), -len(token), token) for token in special if token in self._after]
        return min(found)[2] if found else str(self._tokenizer.eos_token or "")

    @cached_property
    def _after(self) -> str:
        """What the template writes after an answer."""
        return self._probe((Message("user", USER_MARK), Message("assistant", ANSWER_MARK))).partition(ANSWER_MARK)[2]

    @cached_property
    def _header(self) -> str:
        """What stands between a question and its answer in a template that has no words of its own for a prompt.

        A space at its end is left to the answer, whose first word it belongs to in most vocabularies.
        """
        question = (Message("user", USER_MARK),)
        asked = self._probe(question, generation=True)
        whole = self._probe((*question, Message("assistant", ANSWER_MARK)))
        if asked != self._probe(question) or not whole.startswith(asked):
            return ""
        header = whole[len(asked) :].partition(ANSWER_MARK)[0].rstrip(" ")
        return header if header.strip() else ""

    @cached_property
    def _takes_system(self) -> bool:
        return ANSWER_MARK in self._probe((Message("system", ANSWER_MARK), Message("user", USER_MARK)), generation=True)

    def _probe(self, messages: Sequence[Message], *, generation: bool = False) -> str:
        """Render marked turns; empty where the template refuses them."""
        try:
            return self._render(messages, generation=generation)
        except CoterieError:
            return ""

    def _render(self, messages: Sequence[Message], *, generation: bool) -> str:
        if self._tokenizer.chat_template is None:
            ends = {"assistant": str(self._tokenizer.eos_token or "\n")}
            return "".join(m.content + ends.get(m.role, "\n") for m in messages)
        turns = [{"role": m.role, "content": m.content} for m in messages]
        try:
            return str(self._tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=generation))
        except Exception as error:  # a template raises whatever its author chose, for instance for a system role
            raise CoterieError(f"this model's chat template does not take such a conversation: {error}") from error

    def _prompt(self, messages: Sequence[Message]) -> str:
        return self._render(messages, generation=True) + self._header

    def _answer(self, messages: Sequence[Message], prompt: str) -> tuple[str, bool]:
        """Return the last answer, up to the end of its turn, and whether an empty thought was put before it."""
        content = messages[-1].content
        whole = self._render(messages, generation=False)
        tail = whole[len(prompt) :]
        is_ended = self.end != "" and self.end in self._after
        if whole.startswith(prompt) and "".join(content.split()) in "".join(tail.split()):
            if is_ended:
                return tail[: tail.rindex(self.end)] + self.end, False
            blank = len(self._after) - len(self._after.rstrip())  # white space that only parts turns
            return tail[: len(tail) - blank] + self.end, False
        opened = re.search(OPENED_THOUGHT, prompt)
        is_empty = opened is not None and f"</{opened[1]}>" not in content
        if opened:
            content = re.sub(rf"^\s*<{opened[1]}>\n?", "", content)
        thought = f"\n</{opened[1]}>\n\n" if opened and is_empty else ""
        closing = self._after.partition(self.end)[0] if is_ended else self._after.rstrip()
        return thought + content + closing + self.end, is_empty

    def _earlier(self, asked: Sequence[Message], prompt: str) -> list[Span] | None:
        """Find the answers before the last question; None where some are not shown as they were written."""
        spans = []
        for place, message in enumerate(asked):
            if message.role != "assistant":
                continue
            try:
                before = self._prompt(asked[:place])
                written = before + self._answer(asked[: place + 1], before)[0]
            except CoterieError:  # what a template takes as a whole it may refuse in part
                return None
            if not prompt.startswith(written):
                return None
            spans.append((len(before), len(written)))
        return spans

    def _questions(self, asked: Sequence[Message], preface: str, prompt: str) -> list[Span]:
        """Find what the user wrote.

        Searching would find the same words in the template or the system prompt; so the template is rendered once more
        with a mark in the user's place, and what stands around the marks tells where the user's text is.
        """
        lost = next((m for m in asked if m.role == "system" and m.content.strip() not in prompt), None)
        contents = [message.content for message in asked if message.role == "user"]
        if lost is None:
            marked = [Message(m.role, USER_MARK) if m.role == "user" else m for m in asked]
            around = self._prompt(_prefaced(preface, marked)).split(USER_MARK)
            for as_written in (str, str.strip, str.lstrip, str.rstrip):  # templates differ in what they trim
                places = _places(prompt, around, [as_written(content) for content in contents])
                if places is not None:
                    return places
        who, what = ("user", contents[0]) if lost is None else ("system", lost.content)
        raise CoterieError(f"this model's chat template changes what a {who} wrote: {what[:40]!r}")


def _prefaced(preface: str, messages: Sequence[Message]) -> list[Message]:
    """Put a text before the first question."""
    first = next((place for place, message in enumerate(messages) if message.role == "user"), None)
    return [Message(m.role, preface + m.content) if place == first else m for place, m in enumerate(messages)]


def _places(text: str, around: Sequence[str], contents: Sequence[str]) -> list[Span] | None:
    """Return where the contents stand in a text between the words around them, without white space at their ends.

    None where the text is not made of these words and contents.
    """
    woven = (words + content for words, content in zip(around, [*contents, ""], strict=False))
    if len(around) != len(contents) + 1 or text != "".join(woven):
        return None
    places = []
    cursor = 0
    for words, content in zip(around, contents, strict=False):  # the last words follow all contents
        cursor += len(words)
        places.append((cursor + len(content) - len(content.lstrip()), cursor + len(content.rstrip())))
        cursor += len(content)
    return places
