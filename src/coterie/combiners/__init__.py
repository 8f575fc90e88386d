"""Combiners: at which depth experts meet."""
