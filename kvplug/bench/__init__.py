"""``kvplug bench``: policies against stock vLLM, one engine after the other, same prompts."""
