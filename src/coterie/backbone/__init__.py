"""The frozen base model: where it comes from, what it computes, and how experts are attached to it."""
