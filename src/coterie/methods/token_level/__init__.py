"""Token-level adaptation (arXiv 2311.10847): one adapter per domain, re-routed while the answer is written."""
