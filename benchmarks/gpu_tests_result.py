"""One result file of the GPU tests: what ran and how it ended, on what, and how close errors came to their bars.

    QLATRAIN_ERRORS_JSON=/tmp/errors.json python -m pytest -m gpu tests/kernels -n 4 --junitxml=/tmp/tests.xml
    python benchmarks/gpu_tests_result.py --commit "$(git rev-parse HEAD)" --command "pytest …" \\
        --junit /tmp/tests.xml --errors /tmp/errors.json* > benchmarks/results/hopper_gpu_tests_COMMIT.json
"""

import argparse
import json
import sys
from pathlib import Path
from xml.etree import ElementTree


def outcomes(paths: list[Path]) -> dict:
    """Numbers of tests that passed, failed and were skipped, and the names of the latter two with the reason. A test
    skipped in one file and run in another counts as run."""
    found: dict[str, tuple[str, str]] = {}
    for path in paths:
        for case in ElementTree.parse(path).iter("testcase"):
            name = f"{case.get('classname')}::{case.get('name')}"
            bad = case.find("failure") if case.find("failure") is not None else case.find("error")
            skipped = case.find("skipped")
            outcome = ("passed", "")
            if bad is not None:
                outcome = ("failed", bad.get("message", "").splitlines()[0])
            elif skipped is not None:
                outcome = ("skipped", skipped.get("message", ""))
            if outcome[0] != "skipped" or name not in found:
                found[name] = outcome
    result = {kind: sum(x[0] == kind for x in found.values()) for kind in ("passed", "failed", "skipped")}
    named = {kind: {n: reason for n, (k, reason) in found.items() if k == kind} for kind in ("failed", "skipped")}
    return result | {f"{kind}_tests": tests for kind, tests in named.items()}


def errors(paths: list[Path]) -> dict:
    """The records of all workers: for each tensor the test that came closest to its bar."""
    records = [json.loads(path.read_text()) for path in paths]
    closest: dict[str, dict] = {}
    for record in records:
        for name, x in record["closest_to_the_bar"].items():
            if name not in closest or not x["fraction_of_bar"] <= closest[name]["fraction_of_bar"]:
                closest[name] = x
    tests = {test: tensors for record in records for test, tensors in record["tests"].items()}
    return {"versions": records[0]["versions"], "closest_to_the_bar": closest, "tests": dict(sorted(tests.items()))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--commit", required=True)
    parser.add_argument("--command", required=True)
    parser.add_argument("--junit", type=Path, nargs="+", required=True)
    parser.add_argument("--errors", type=Path, nargs="+", required=True)
    arguments = parser.parse_args()
    result = {"command": arguments.command, "commit": arguments.commit}
    json.dump(result | outcomes(arguments.junit) | errors(arguments.errors), sys.stdout, indent=1)
    print()


if __name__ == "__main__":
    main()
