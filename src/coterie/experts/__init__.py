"""Experts: clustering the data they are for, training them, and the bank that holds them."""
