"""The tests of every op, compiled for a chip and run on the PTX machine, which fails them for what it finds."""

from types import SimpleNamespace

import pytest

from tests.helpers import on_machine
from tests.helpers.kernels import CUDA
from tests.kernels.ops.conftest import pytest_collection_modifyitems


@pytest.mark.skipif(CUDA, reason="they run on the GPU")
@pytest.mark.parametrize("file", on_machine.FILES)
def test_compiled_for_sm_90(file):
    done = on_machine.run_tests(file, on_machine.SHARE if on_machine.is_recorded() else 1)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


def test_a_record_fits_until_code_changes(tmp_path, monkeypatch):
    monkeypatch.setattr(on_machine, "RECORD", tmp_path / "on_machine.json")
    assert not on_machine.is_recorded()
    monkeypatch.setattr(on_machine, "FILES", [])
    assert on_machine.main() == 0 and on_machine.is_recorded()
    for name, value in (("digest_sources", lambda: "other kernels"), ("OPS", tmp_path)):
        with monkeypatch.context() as context:
            context.setattr(on_machine, name, value)
            assert not on_machine.is_recorded()


def test_a_share_of_the_tests_is_kept(monkeypatch):
    config = SimpleNamespace(hook=SimpleNamespace(pytest_deselected=lambda items: left_out.extend(items)))
    left_out = []
    for share, kept in (("1", [0, 1, 2, 3, 4]), ("2", [0, 2, 4])):
        monkeypatch.setenv("CRIA_TEST_SHARE", share)
        items = list(range(5))
        pytest_collection_modifyitems(config, items)
        assert items == kept
    assert left_out == [1, 3]


def test_a_failure_is_told_and_not_recorded(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(on_machine, "FILES", ["test_that_is_not_there.py"])
    monkeypatch.setattr(on_machine, "RECORD", tmp_path / "on_machine.json")
    assert on_machine.main() == 1 and not on_machine.RECORD.exists()
    assert "test_that_is_not_there.py" in capsys.readouterr().out
