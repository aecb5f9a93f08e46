"""`latest` names the newest run, by a link or by a file, and every path may lead through it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from cogview_pl.config.paths import follow_latest
from cogview_pl.durable import latest
from cogview_pl.durable.latest import LATEST, through_latest
from cogview_pl.errors import UserError


@pytest.fixture(params=[OSError(1314, "A required privilege is not held"), NotImplementedError()], ids=["nt", "none"])
def no_links(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A system without symbolic links."""

    def refuse(*arguments: object, **options: object) -> None:
        raise request.param

    monkeypatch.setattr(os, "symlink", refuse)


def runs(home: Path) -> tuple[Path, Path]:
    made = home / "style" / "2026-01-01_00-00-00", home / "style" / "2026-01-02_00-00-00"
    for run in made:
        (run / "model").mkdir(parents=True)
    return made


def test_without_links_a_file_names_the_newest_run(tmp_path: Path, no_links: None) -> None:
    first, second = runs(tmp_path)
    place = tmp_path / "style" / LATEST
    for run in (first, second):
        latest.move(place, run)
        assert not place.is_symlink() and place.read_bytes() == f"{run.name}\n".encode()
        assert latest.newest(place) == run and through_latest(place / "model") == run / "model"
    latest.require_free(place)
    assert sorted(os.listdir(tmp_path / "style")) == [first.name, second.name, LATEST]


def test_a_link_is_left_as_it_is_and_a_file_gives_way_to_it(tmp_path: Path) -> None:
    first, second = runs(tmp_path)
    place = tmp_path / "style" / LATEST
    place.write_text(f"{first.name}\n")
    latest.move(place, second)
    assert os.readlink(place) == second.name and latest.newest(place) == second
    assert through_latest(place / "model") == place / "model"


def test_every_path_of_a_configuration_leads_through_the_file(tmp_path: Path, no_links: None) -> None:
    run, _ = runs(tmp_path)
    latest.move(tmp_path / "style" / LATEST, run)
    given = f"{tmp_path}/style/latest"
    config = OmegaConf.create(
        {
            "outputs": str(tmp_path),
            "init_from": "${outputs}/style/latest",
            "resume": f"{given}/checkpoints/last.ckpt",
            "evaluate": {"compare": [given, "elsewhere/latest"], "features": None},
            "prompts": ["the latest/greatest"],
            "seed": "???",
        }
    )
    follow_latest(config)
    assert config.init_from == str(run) and config.resume == f"{run}/checkpoints/last.ckpt"
    assert config.evaluate.compare == [str(run), "elsewhere/latest"]
    assert config.prompts == ["the latest/greatest"] and config.outputs == str(tmp_path)


@pytest.mark.parametrize("content", [b"", b"\n", b"one\ntwo\n", b"\xff", b"a\0b", b"x" * 5000])
def test_a_file_that_names_no_run_is_refused(tmp_path: Path, content: bytes) -> None:
    place = tmp_path / LATEST
    place.write_bytes(content)
    for use in (latest.require_free, latest.newest, through_latest):
        with pytest.raises(UserError, match=r"latest must name the newest run, as a link or in one line of text"):
            use(place)


def test_no_run_is_named_by_nothing(tmp_path: Path) -> None:
    place = tmp_path / LATEST
    assert latest.newest(place) is None
    place.write_text("gone\n")
    assert latest.newest(place) is None
    latest.require_free(place)
    place.unlink()
    place.symlink_to("gone")
    assert latest.newest(place) is None
    latest.require_free(place)
