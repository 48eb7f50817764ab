"""Select stage: from page scores to the far pages that a window attends to."""
