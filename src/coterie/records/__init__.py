"""What one part of the library writes and another reads: one schema for both, and the words that it is told in."""
