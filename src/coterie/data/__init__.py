"""Examples, and the tokens, masks and batches made from them."""
