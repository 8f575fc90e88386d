"""An OpenAI-compatible server that mixes experts for every request."""
