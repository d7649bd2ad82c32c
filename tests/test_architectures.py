"""Models as users have them are compressed, reported, saved and loaded; see ``benchmarks/architectures.py``."""

import pytest

from benchmarks.architecture_cases import CASES
from benchmarks.architectures import check

pytestmark = pytest.mark.timeout(600)  # most of it is for the import of the libraries


def _parameter(case):
    marks = () if case.fast else (pytest.mark.slow,)
    return pytest.param(case, id=f"{case.library}-{case.name}", marks=marks)


@pytest.mark.parametrize("case", [_parameter(case) for case in CASES])
def test_architecture(case, tmp_path):
    pytest.importorskip(case.library)
    row = check(case, tmp_path / "compressed")
    assert row.factorized > 0


def test_there_are_enough_of_each_library():
    names = [(case.library, case.name) for case in CASES]
    assert len(set(names)) == len(names) >= 100
    for library in ("timm", "torchvision", "transformers"):
        assert sum(case.library == library for case in CASES) >= 15
