"""Replies that are there already, by the hash of what was asked: in a file that grows line by line."""

import json
import threading
from dataclasses import fields
from pathlib import Path

from coterie.artifacts import append_text
from coterie.experts.answering import Reply

FIELDS = {field.name for field in fields(Reply)}


class ReplyCache:
    """Keeps replies; those of a run that was killed are there again when the file is opened anew.

    Failed replies are not kept, so they are asked for again. A line that was cut off by a kill is skipped.
    """

    def __init__(self, path: Path | None = None, *, read_only: bool = False) -> None:
        """Read the replies of an earlier run; without a file, or `read_only`, new ones are kept in memory alone."""
        self.path = None if read_only else path
        self._lock = threading.Lock()
        self._replies: dict[str, Reply] = {}
        lines = path.read_bytes().splitlines(keepends=True) if path is not None and path.exists() else []
        self._torn = bool(lines) and not lines[-1].endswith(b"\n")
        for line in lines:
            try:
                record = json.loads(line)
            except ValueError:  # cut off
                continue
            if isinstance(record, dict) and {"key", *FIELDS} <= set(record):
                self._replies[record["key"]] = Reply(**{name: record[name] for name in FIELDS})

    def __len__(self) -> int:
        """Count the replies."""
        return len(self._replies)

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
