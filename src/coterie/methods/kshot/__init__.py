"""K-shot expertise (arXiv 2408.15915): a task's mixture from a few examples, a bank and open data."""
