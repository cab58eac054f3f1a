"""The house keeps its shape: imports run one way, names stay, importing does nothing."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import hotweights

ROOT = Path(hotweights.__file__).parent

# A file may import from those above it, and a package's `__init__` stands for the package. Data flows downwards.
ORDER = """
collection interruptions errors manifest regions ranges progress devices guards memory
sources.contracts sources.streams sources.parts sources.header sources.file sources.reading sources.checkpoint
sources.files sources.state sources.iterators sources.readers.reader sources.readers.fastsafetensors
sources.readers.runai sources.readers.safetensors sources.readers.torch sources.readers sources
casts operations steps document validation planfile plan snapshot
aliases anchors threads standins recorder bypasses tracing lowering sharing drafting modules fit cache replay
copying execute report arguments engines engines.torchao engines.transformers trace fallback verify load
routing handing route
live.spans live.serving live.accounting live.compiled live.wrappers live.holders live.layers live.differences
live.report live.units live.plans live.ways live.processing live.wishes live.work live.update live.known live.state
live.opening live.hooks live.model live
transfer.messages transfer.states transfer.ballot transfer.slots transfer.address transfer.channel transfer.waiting
transfer.parts transfer.packing transfer.report transfer.group transfer.round transfer.sender transfer.uplink
transfer.arrival transfer.private transfer.taking transfer.receiver transfer
engines.vllm.options engines.vllm.attached engines.vllm.guarded engines.vllm.layers engines.vllm.loader
engines.vllm.ranks engines.vllm.worker engines.vllm.engine engines.vllm
testing.checks testing.checkpoints testing.engine testing.faults testing.sources testing.pools testing.vision
testing.processed testing.transports testing
cli.outcome cli.quiet cli.inspect cli.plan cli.load cli.send cli.receive cli.fused_bert cli.demo_live
cli.demo_quantised cli.demo_transfer cli.demo cli
""".split()


def modules():
    return sorted(
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in ROOT.rglob("*.py")
    )


def imports(module):
    """The modules of ours that ``module`` imports, at the top or within a function."""
    path = ROOT / Path(*module.split("."))
    is_package = path.is_dir()
    tree = ast.parse((path / "__init__.py" if is_package else path.with_suffix(".py")).read_text())
    package = module.split(".") if is_package else module.split(".")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            assert not any(alias.name.startswith("hotweights") for alias in node.names), "import relatively"
        if not isinstance(node, ast.ImportFrom):
            continue
        assert node.level or not (node.module or "").startswith("hotweights"), "import relatively"
        if node.level:
            base = package[: len(package) - node.level + 1] + (node.module.split(".") if node.module else [])
            for alias in node.names:
                inner = ".".join([*base, alias.name])
                yield inner if inner in ORDER else ".".join(base)


def test_every_file_has_its_place():
    assert sorted([*ORDER, "__init__", "__main__"]) == sorted(modules())


@pytest.mark.parametrize("module", ORDER)
def test_imports_run_one_way(module):
    above = set(ORDER[: ORDER.index(module)])
    package = module.rpartition(".")[0]
    wrong = [name for name in imports(module) if name not in above and not (name == package == "engines")]
    if module == "engines":  # The table names its engines, and imports each only when it is asked for.
        wrong = [name for name in wrong if not name.startswith("engines.")]
    assert not wrong, f"{module} imports {wrong}, which stand below it"


def test_the_public_words_are_these():
    assert hotweights.__all__ == sorted(hotweights.__all__)
    words = """
    from_iterator load open trace Manifest TensorSpec OpaqueDtype Lease Pool PoolStats Fate LoadPlan LoadReport
    route Component RouteReport RoutingError
    HotweightsError CheckpointError CheckpointChanged UnsupportedDtype PlanError PlanFileError PlanDiffers
    LiveModel State Update UpdateReport Digest UpdateAborted CommitHookError
    TiedWeightsDiffer IncompleteLoad PoolTimeout UsageError StaleLease BorrowedTensor Closed UnknownName
    MissingPackage NoManifest SourceError
    Sender Receiver SendReport TransferError TransferAborted TransferIncomplete TransferTimeout PeerLost ProtocolError
    AddressTaken
    """
    assert set(hotweights.__all__) == set(words.split())
    assert all(hasattr(hotweights, name) for name in hotweights.__all__)


def test_every_error_stands_in_the_drawn_tree():
    from hotweights import errors

    for name in errors.__all__:
        assert name in errors.__doc__
        assert issubclass(getattr(errors, name), (errors.HotweightsError, errors.UsageError))


def test_importing_does_nothing():
    """No optional package, no thread, no CUDA, no handler."""
    code = (
        "import logging, sys, threading, torch; before = set(sys.modules);"
        "import hotweights;"
        "new = {name.partition('.')[0] for name in set(sys.modules) - before};"
        "bad = new & {'transformers', 'safetensors', 'numpy', 'matplotlib', 'typer', 'runai_model_streamer', 'ray',"
        "             'fastsafetensors', 'torchao'};"
        "assert not bad, bad;"
        "assert threading.active_count() == 1; assert not torch.cuda.is_initialized();"
        "assert not logging.getLogger('hotweights').handlers"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, timeout=60)


def test_every_public_function_is_documented():
    for name in hotweights.__all__:
        assert (getattr(hotweights, name).__doc__ or "").strip(), name
