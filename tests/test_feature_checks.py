"""The feature table: what it says of our families is so, and every "yes" leads to a test that exists."""

import json
import re
from pathlib import Path

import pytest

from benchmarks import feature_table
from benchmarks.feature_checks import CHECKS, MORE, RESULTS, examine
from benchmarks.features.models import SUBJECTS

pytestmark = pytest.mark.long

ROOT = Path(__file__).parents[1]
MEASURED = json.loads(RESULTS.read_text())
OURS = [subject for subject in SUBJECTS.values() if subject.ours]
# Seconds each. Every run has the same for the same families in tests/test_matrix_compile.py (SEA's export is here alone).
TRACING = ("compiled_prefill", "compiled_decode", "exported_fixed", "exported_dynamic")
CASES = [
    pytest.param(
        subject,
        check,
        id=f"{subject.name.lower().replace(' ', '-')}-{check}",
        marks=[pytest.mark.slow] * (check in TRACING and (subject.name, check) != ("SEA", "exported_dynamic")),
    )
    for subject in OURS
    for check in (*CHECKS, *MORE)
    if MEASURED[subject.name]["checks"][check]["passed"] is not None
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("subject", "check"), CASES)
def test_check(subject, check):
    """The check gives now what the table says."""
    found = examine(subject, [check])[check]
    assert found["passed"] == MEASURED[subject.name]["checks"][check]["passed"], found["reason"]


def test_the_page_is_up_to_date(collected_ids, monkeypatch):
    """It is what the command writes: every yes has a test that pytest collects for that family."""
    named = {test for rows in feature_table.GROUPS.values() for row in rows for test in row.tests}
    found = feature_table.by_test(collected_ids)
    if named <= set(found):  # otherwise a part of tests/ is being run, and the command asks pytest itself
        monkeypatch.setattr(feature_table, "collected", lambda: found)
    assert feature_table.main(["--check"]) == 0, "run `python -m benchmarks.feature_table`"


PAGE = feature_table.PAGE.read_text()
LINKS = dict(re.findall(r"^\[([\w.]+)\]: (\S+)$", PAGE, flags=re.M))


def test_every_yes_of_ours_leads_to_the_line_of_a_test():
    """The file is there, and the test begins near that line; no yes of ours is without a link."""
    used = set(re.findall(r"\[yes\]\[([\w.]+)\]", PAGE))
    assert used == set(LINKS)
    assert len(used) > 50
    for name, target in LINKS.items():
        file, line = re.fullmatch(r"\.\./(tests/[\w/]+\.py)#L(\d+)", target).groups()
        first = max(int(line) - feature_table.DRIFT - 1, 0)
        near = (ROOT / file).read_text().splitlines()[first : int(line) + feature_table.DRIFT]
        assert any(re.search(rf"def (test_)?{name.rpartition('.')[2]}\(", each) for each in near), (name, target)
    bare = [line for line in PAGE.splitlines() if line.startswith("| ") and re.match(r"\|[^|]*\| yes ", line)]
    assert not bare, "a yes of ours without a link"


def test_a_page_that_drifts_is_out_of_date():
    """By a word at once, by a line of a test when it is far."""
    first = next(iter(LINKS.values()))
    line = int(first.rpartition("L")[2])
    moved = {by: PAGE.replace(first, f"{first.rpartition('L')[0]}L{line + by}") for by in (5, feature_table.DRIFT + 1)}
    assert feature_table.up_to_date(moved[5], PAGE)
    assert not feature_table.up_to_date(moved[feature_table.DRIFT + 1], PAGE)
    assert not feature_table.up_to_date(PAGE.replace("yes", "maybe", 1), PAGE)


def test_every_no_of_ours_says_why():
    """Each number in a cell stands in the list below the tables."""
    used = {int(number) for number in re.findall(r"\| no \((\d+)\)", PAGE)}
    listed = {int(number) for number in re.findall(r"^(\d+)\. \S", PAGE, flags=re.M)}
    assert used == listed
    assert used


def test_the_31_checks():
    """As many as the table says."""
    assert len(CHECKS) == 31
