"""Budget stage: how many far pages a window may select."""
