"""What a prompt looks like to a router: its gradient, seen through a random projection."""
