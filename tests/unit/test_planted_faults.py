"""A deliberate fault belongs to a function and an expression, wherever they are (tests/faults)."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.fault import Fault, Stale

FAULT = Fault(
    name="beta", file="alignment/a.py", function="Loss.of", old="beta=self.beta", new="beta=1.0", tests="tests"
)


@pytest.mark.parametrize("file", ["alignment/a.py", "alignment/b/c.py"])
@pytest.mark.parametrize("call", ["f(x, beta=self.beta)", "f(  # why\n            x, beta = self.beta,\n        )"])
def test_a_fault_is_planted_in_its_function_whatever_its_file_and_layout(tmp_path: Path, file: str, call: str) -> None:
    source = f"g(beta=self.beta)\nclass Loss:\n    def of(self, x):\n        return 'é', {call}\n"
    (tmp_path / file).parent.mkdir(parents=True)
    (tmp_path / file).write_text(source, encoding="utf-8")
    path, before = FAULT.apply(tmp_path)
    changed = path.read_text(encoding="utf-8")
    assert (path, before) == (tmp_path / file, source)
    assert changed.startswith("g(beta=self.beta)\n")
    assert changed.count("beta=1.0") == 1
    assert len(changed) < len(source)


@pytest.mark.parametrize("body", ["return f(x)", "return f(beta=self.beta) + f(beta=self.beta)"])
def test_a_fault_that_has_no_single_place_is_stale(tmp_path: Path, body: str) -> None:
    (tmp_path / "alignment").mkdir()
    (tmp_path / "alignment/a.py").write_text(f"class Loss:\n    def of(self, x):\n        {body}\n")
    with pytest.raises(Stale):
        FAULT.apply(tmp_path)
