"""What others took is what is left of the machine's time; a program beside the run is seen."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

from kvplug.loadtests import others
from kvplug.loadtests.others import Spent, share_of_others, spent

BURNT_S = 0.45
"""Half a second, less what the kernel's ticks of 10 ms may miss."""


@pytest.mark.parametrize(
    ("machine", "mine", "share"),
    [(20.0, 20.0, 0.0), (20.0, 15.0, 0.25), (20.0, 0.0, 1.0), (10.0, 10.5, 0.0), (90.0, 0.0, 1.0)],
)
def test_shares(monkeypatch: pytest.MonkeyPatch, machine: float, mine: float, share: float) -> None:
    monkeypatch.setattr(others, "num_threads", lambda: 2)
    assert share_of_others(Spent(5.0, 7.0, 3.0), Spent(15.0, 7.0 + machine, 3.0 + mine)) == share
    assert share_of_others(Spent(5.0, 1.0, 0.0), Spent(5.0, 1.0, 0.0)) == 0.0


def test_the_servers_time_is_mine_and_a_strangers_is_not() -> None:
    """A child that still runs is no one's until it is named."""
    burn = "import time\nend = time.process_time() + 0.5\nwhile time.process_time() < end: pass\n"
    command = [sys.executable, "-c", f"{burn}print(flush=True); time.sleep(600)"]
    begun = spent(os.getpid()).mine
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(0.05)
        # No process has the first id: the kernel's highest is 2**22.
        without, itself = spent(2**22 + 1).mine, spent(process.pid).mine
        assert itself - without >= BURNT_S
        assert without >= 0
        assert spent(os.getpid()).mine >= begun + BURNT_S
    finally:
        process.kill()
        process.communicate()
