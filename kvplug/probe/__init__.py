"""Probe stage: what stands for a window's queries when pages are scored."""
