"""Lets counters of worker processes reach vLLM's ``/metrics``.

prometheus_client adds up the counters of all processes if a folder is named before it is imported,
and vLLM's endpoint reads that folder. ``kvplug serve`` names one; who starts vLLM himself sets the
variable himself, to an empty folder.
"""

from __future__ import annotations

import atexit
import os
import tempfile

VARIABLE = "PROMETHEUS_MULTIPROC_DIR"


def share_metrics() -> None:
    """Names a folder, removed when the process ends, unless one is named."""
    if not os.environ.get(VARIABLE):
        folder = tempfile.TemporaryDirectory(prefix="kvplug-metrics-", ignore_cleanup_errors=True)
        os.environ[VARIABLE] = folder.name
        atexit.register(folder.cleanup)
