"""Attend stage: a platform's own paged kernel over the rewritten page table."""
