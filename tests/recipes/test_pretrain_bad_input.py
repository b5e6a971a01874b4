"""A mistake ends the run with one line on standard error, and touches no checkpoint. The cases: bad_input_cases.py."""

import re
import shutil

import pytest
from bad_input_cases import CASES, DOCUMENT, HEADING, Case, Place
from training_runs import file_bytes

# what must be one sentence, whoever wrote its words
MUST = {
    "unknown key",
    "whole number expected",
    "missing file",
    "empty corpus",
    "corpus shorter than one row",
    "tokenizer larger than the vocabulary",
    "checkpoint of another model",
    "truncated checkpoint",
    "full disk while saving a checkpoint",
}


def without_quotes(row: str) -> str:
    """Without the words of other libraries, which change with their versions."""
    return re.sub(r"could not be opened: .*|Error while serializing: .*?; ", "", row)


DOCUMENTED = {without_quotes(line) for line in DOCUMENT.read_text().splitlines()}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.what)
def test_one_line_and_nothing_touched(case: Case, trainer, finished_run, tmp_path):
    place = Place(tmp_path / "run", tmp_path / "files", trainer.corpus)
    place.files.mkdir()
    if case.in_a_run:
        shutil.copytree(finished_run, place.run)
    arguments = case.arguments(place)
    before = file_bytes(place.run / "checkpoints")
    done = trainer.run(place.run, *arguments, file_limit=case.file_limit)
    assert done.code == case.code
    assert re.fullmatch(r"error: [^\n]+\n", done.err), done.err
    assert "Traceback" not in done.out
    assert case.what not in MUST or not re.search(r"[.!?] +[A-Z]", done.err), f"several sentences: {done.err}"
    assert file_bytes(place.run / "checkpoints") == before
    assert bool(before) == case.in_a_run
    if case.code == 2:
        assert done.out == "" and not place.run.exists()
    row = case.row(place, arguments, done)
    assert without_quotes(row) in DOCUMENTED, (
        f"docs/bad_input.md has another line; bad_input_cases.py writes it:\n{row}"
    )


def test_the_document_lists_these_cases():
    assert {case.what for case in CASES} >= MUST
    text = DOCUMENT.read_text()
    assert text.startswith(HEADING)
    rows = text.removeprefix(HEADING).splitlines()
    assert [row.split(" | ")[0].removeprefix("| ") for row in rows] == [case.what for case in CASES]


def test_the_plain_command_prints_the_same(trainer, tmp_path):
    done = trainer.subprocess(*trainer.arguments(tmp_path / "run", f"data.files=[{tmp_path}/nothing.txt]"))
    assert done.code == 1 and done.out == ""
    assert re.fullmatch(r"error: data\.files: [^\n]*nothing\.txt' does not exist[^\n]*\n", done.err)
    assert not (tmp_path / "run").exists()


def test_a_traceback_when_asked_for(trainer, tmp_path):
    done = trainer.run(tmp_path / "run", "model.vocab_size=200", QLATRAIN_TRACEBACK="1")
    assert (
        done.code == 1
        and "Traceback (most recent call last)" in done.err
        and "ValueError: model.vocab_size=200" in done.err
    )
