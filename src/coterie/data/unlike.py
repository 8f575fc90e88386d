"""A small sample of requests of many kinds, unlike most training data, that comes with this project."""

from pathlib import Path

UNLIKE = Path(__file__).with_suffix(".jsonl")
"""56 rows that this project wrote: knowledge, languages, code, letters, poems, recipes, small talk, riddles."""
