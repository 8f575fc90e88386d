"""ELREA (arXiv 2502.00089): experts of clusters, found by gradient features, ensembled in the logits."""
