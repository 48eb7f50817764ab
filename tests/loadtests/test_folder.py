"""A folder gives back what it was given, and a run that was killed can still be drawn."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvplug.errors import KvplugError
from kvplug.loadtests.folder import Folder
from kvplug.loadtests.outputs import write_all
from kvplug.loadtests.records import Appender
from kvplug.loadtests.slo import Slo
from tests.loadtests.made_up import EXACT, record, run_of


def test_what_goes_in_comes_out(tmp_path: Path) -> None:
    for run in (run_of("a", "b", slo=Slo(gap=0.5)), run_of("a", calibration=None, is_over=False)):
        folder = Folder(tmp_path / f"{len(run.setups)}")
        folder.create(run)
        found, records, samples = folder.read()
        assert found == run
        assert (records, samples) == ([], [])


def test_no_run_is_written_over(tmp_path: Path) -> None:
    folder = Folder(tmp_path / "x")
    folder.create(run_of("a"))
    with pytest.raises(KvplugError, match="holds a load test already"):
        folder.create(run_of("b"))
    assert folder.read()[0].setups == ["a"]


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(KvplugError, match="cannot be written"):
        Folder(tmp_path / "file" / "x").create(run_of("a"))


@pytest.mark.parametrize("text", ["", "{}", '{"version": 99}', "[]"])
def test_other_folders_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(KvplugError, match="is not a load test of this version"):
        Folder(tmp_path).read()
    with pytest.raises(KvplugError, match="is not a load test"):
        Folder(tmp_path / "nothing").read()


def test_a_killed_run_is_partial_and_whole_up_to_there(tmp_path: Path) -> None:
    folder = Folder(tmp_path / "x")
    folder.create(run_of("a", "b", is_over=False, calibration=EXACT))
    requests = Appender(folder.requests_path)
    for session in range(3):
        requests.add(record(session=session))
    requests.close()
    with folder.requests_path.open("a") as file:
        file.write(json.dumps({"setup": "a"})[:8])
    report = write_all(folder, [])
    assert report.run.is_partial
    assert [(s.setup, s.requests) for s in report.summaries] == [("a", 3)]
    assert "did not end by itself" in (folder.path / "report.html").read_text()
    assert json.loads((folder.path / "report.json").read_text())["partial"] is True
