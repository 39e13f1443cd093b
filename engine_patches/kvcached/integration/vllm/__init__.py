"""For vLLM."""
