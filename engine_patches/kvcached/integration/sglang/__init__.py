"""For SGLang."""
