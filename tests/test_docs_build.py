"""docs/build.py: the site holds every page and every public name, no link of it is dead, and dead links are found."""

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

import minipeft

ROOT = Path(__file__).resolve().parents[1]
pytest.importorskip("pdoc")


@pytest.fixture(scope="module")
def build() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_build", ROOT / "docs" / "build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_the_site(build: ModuleType, tmp_path: Path) -> None:
    """`main` raises where a link is dead; each public name, and the help of an option, is in the reference."""
    site = tmp_path / "site"
    build.main(["--out", str(site)])
    for page in build.list_pages(ROOT):
        assert (site / build.place(page)).exists()
    text = (site / "api/minipeft.html").read_text(encoding="utf-8")
    assert set(minipeft.__all__) <= set(re.findall(r'<section id="(\w+)">', text))
    assert "initialization of A and B: uniform, gaussian, orthogonal, pissa, olora" in text
    assert 'href="minipeft/models/decoder.html#Decoder"' in text
    assert not re.findall(r'(?:src|href)="https?://(?!pdoc\.dev)', re.sub(r"<p>.*?</p>", "", text))


def test_dead_links_are_found(build: ModuleType, tmp_path: Path) -> None:
    root, site = tmp_path / "root", tmp_path / "site"
    (root / "docs").mkdir(parents=True)
    (root / "README.md").write_text(
        "# One\n[a](docs/two.md#here-it-is) [b](docs/two.md#gone) [c](none.md) ![d](none.png) [e](#one) [f](#two)\n"
        "[g](https://example.org/x) [h](LICENSE) [i](../out.md) [j](docs)\n"
    )
    (root / "docs/two.md").write_text("## Here `it` is!\n## Here it is\n[a](#here-it-is-1) [b](../README.md#one)\n")
    (root / "LICENSE").write_text("free")
    (tmp_path / "out.md").write_text("outside")
    build.build_pages(root, site)
    heads = ["api/minipeft.html", "docs/index.html"]  # of the pages' navigation, not built here
    dead = [line for line in build.find_dead_links(site) if not line.endswith(tuple(heads))]
    addresses = ("#two", "../out.md", "docs", "docs/two.html#gone", "none.md", "none.png")
    assert dead == [f"index.html: {address}" for address in addresses]
    assert (site / "LICENSE").read_text() == "free"


def test_a_folder_of_other_files_is_not_replaced(build: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("x")
    with pytest.raises(SystemExit, match="is not empty, and holds no earlier build"):
        build.main(["--out", str(tmp_path)])
    assert (tmp_path / "mine").read_text() == "x"
