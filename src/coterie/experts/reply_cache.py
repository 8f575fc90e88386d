"""Replies that are there already, by the hash of what was asked: in a file that grows line by line."""

import json
import threading
from contextlib import suppress
from pathlib import Path

from pydantic import StrictStr, ValidationError

from coterie.artifacts import append_text, open_regular, parse_json
from coterie.errors import CoterieError
from coterie.experts.answering import FinishReason, Reply
from coterie.records.recruits import ReplyRecord

LONGEST_LINE = 2**25  # bytes; of the largest answer each may be written in six


class KeptReply(ReplyRecord):
    """A line of the file: a reply that did not fail, by the hash of what was asked."""

    key: StrictStr
    finish_reason: FinishReason = "stop"
    seconds: float = 0.0
    error: None = None


class ReplyCache:
    """Keeps replies; those of a run that was killed are there again when the file is opened anew.

    Failed replies are not kept, so they are asked for again. A line that was cut off by a kill, or is no reply, is
    skipped.
    """

    def __init__(self, path: Path | None = None, *, read_only: bool = False) -> None:
        """Read the replies of an earlier run; without a file, or `read_only`, new ones are kept in memory alone.

        Raises:
            CoterieError: when the file is no regular one, or has a line that is longer than any reply.
        """
        self.path = None if read_only else path
        self._lock = threading.Lock()
        self._replies: dict[str, Reply] = {}
        self._torn = False
        if path is not None and path.exists():
            self._read(path)

    def __len__(self) -> int:
        """Count the replies."""
        return len(self._replies)

    def _read(self, path: Path) -> None:
        with open_regular(path) as file:
            while line := file.readline(LONGEST_LINE + 1):
                if len(line) > LONGEST_LINE:
                    raise CoterieError(f"{path} has a line of more than {LONGEST_LINE:,} bytes; remove the file")
                self._torn = not line.endswith(b"\n")
                with suppress(CoterieError, ValidationError, ValueError):
                    record = KeptReply.model_validate(parse_json(line.decode(), str(path)))
                    self._replies[record.key] = Reply(**record.model_dump(exclude={"key"}))

    def get(self, key: str) -> Reply | None:
        """Return the reply to what has this hash, if it is there."""
        return self._replies.get(key)

    def add(self, key: str, reply: Reply) -> None:
        """Keep a reply, on disk before this returns.

        Raises:
            CoterieError: when it cannot be written.
        """
        if reply.error is not None:
            return
        line = json.dumps({"key": key, **vars(reply)}, ensure_ascii=False) + "\n"
        with self._lock:
            self._replies[key] = reply
            if self.path is None:
                return
            append_text(self.path, "\n" + line if self._torn else line)
            self._torn = False
