"""What others took is what is left of the machine's time; a program beside the run is seen."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

from kvplug.loadtests import others
from kvplug.loadtests.others import Spent, share_of_others, spent


@pytest.mark.parametrize(
    ("machine", "mine", "share"),
    [(20.0, 20.0, 0.0), (20.0, 15.0, 0.25), (20.0, 0.0, 1.0), (10.0, 10.5, 0.0), (90.0, 0.0, 1.0)],
)
def test_shares(monkeypatch: pytest.MonkeyPatch, machine: float, mine: float, share: float) -> None:
    monkeypatch.setattr(others, "num_threads", lambda: 2)
    assert share_of_others(Spent(5.0, 7.0, 3.0), Spent(15.0, 7.0 + machine, 3.0 + mine)) == share
    assert share_of_others(Spent(5.0, 1.0, 0.0), Spent(5.0, 1.0, 0.0)) == 0.0


def test_the_servers_time_is_mine_and_a_strangers_is_not() -> None:
    """Both burn a second or so; only the one that is named as the server is taken off."""
    burn = "import time\nend = time.process_time() + 0.5\nwhile time.process_time() < end: pass\n"
    command = [sys.executable, "-c", f"{burn}print(flush=True); time.sleep(600)"]
    begun = spent(os.getpid()).mine
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(0.05)
        itself, without = spent(process.pid).mine, spent(2**22 + 1).mine
        assert itself - without >= 0.5
        assert without >= 0
        assert spent(os.getpid()).mine >= begun + 0.5
    finally:
        process.kill()
        process.communicate()
