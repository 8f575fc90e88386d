"""The playground: a page at `/` that asks this server, and shows which expert leads every token."""
