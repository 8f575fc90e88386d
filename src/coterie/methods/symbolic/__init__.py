"""Symbolic recruiting (arXiv 2503.05641): experts of any kind, recruited for every question by the skills it needs."""
