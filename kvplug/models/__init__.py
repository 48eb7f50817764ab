"""The bundled models: built on first use from a few formulas, so nothing is downloaded."""
