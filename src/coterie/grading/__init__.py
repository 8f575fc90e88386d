"""Grading of answers: mathematics by value, options by letter, short text over references, code by its tests."""
