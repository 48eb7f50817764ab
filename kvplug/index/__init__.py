"""Index stage: what is remembered of keys, by physical page and slot, to score pages."""
