"""A file is there whole, or as it was before."""

import pytest

from fastvq.data.atomic import write_bytes, written_beside


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.txt"
    write_bytes(path, b"old")
    with pytest.raises(RuntimeError), written_beside(path) as beside:  # noqa: PT012
        beside.write_bytes(b"half of the n")
        assert path.read_bytes() == b"old"
        raise RuntimeError
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_new_file_has_the_usual_permissions(tmp_path):
    (tmp_path / "usual").touch()
    write_bytes(tmp_path / "made" / "a.txt", b"new")
    assert (tmp_path / "made" / "a.txt").stat().st_mode == (tmp_path / "usual").stat().st_mode
