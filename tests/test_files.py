"""A file appears whole or not at all."""

import pytest

from slimllm_nb.files import ROOT, replacing, write_text


def test_the_old_file_stays_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / "made" / "a.txt"
    write_text(path, "old")
    with pytest.raises(OSError, match="full"), replacing(path) as partial:
        partial.write_text("ne")
        raise OSError("full")
    assert path.read_text() == "old"
    with replacing(path) as partial:
        partial.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new" and [one.name for one in path.parent.iterdir()] == ["a.txt"]


def test_the_root_is_the_repository():
    assert (ROOT / "pyproject.toml").is_file()
