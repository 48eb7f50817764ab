"""The quality lab: what retrieval costs in answers, on any model."""
