"""Contexts larger than memory: the paged cache in a lower tier, and a hot pool in front of it."""
