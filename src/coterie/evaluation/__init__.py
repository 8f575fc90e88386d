"""Grading of answers, paired statistics and the records that reports are made of."""
