"""The report room: records of an evaluation become one self-contained HTML file.

It reads `evaluation.json` and `rows.jsonl`, never a model, so a report can be made again anywhere, at any time.
"""

from coterie.report.page import write_report

__all__ = ["write_report"]
