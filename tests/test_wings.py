"""The house keeps its shape: imports run one way, names stay, importing does nothing."""

import ast
import collections
import graphlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import hotweights
import hotweights.sources

ROOT = Path(hotweights.__file__).parent

# The wings, lowest first: a wing may import the words of the root, itself, and the wings before it.
WINGS = """
memory plan sources model transfer tracing loading routing live engines testing cli
""".split()
WORDS = """
errors dtypes manifest sharding boxes ranges arguments text progress timeline notices forked gc_pause signals names
failure rename on_demand shell
""".split()


def modules():
    """Every module by its dotted name below the package; a package stands for its ``__init__``."""
    names = (".".join(path.relative_to(ROOT).with_suffix("").parts) for path in ROOT.rglob("*.py"))
    return sorted(name.removesuffix(".__init__") for name in names)


MODULES = [name for name in modules() if name not in ("__init__", "__main__")]


def running(tree):
    """Every node of the code that runs: imports for types only tie no file to another."""
    for node in ast.iter_child_nodes(tree):
        if not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"):
            yield node
            yield from running(node)


def imports(module):
    """The modules of ours that ``module`` imports, at the top or within a function."""
    path = ROOT / Path(*module.split("."))
    is_package = path.is_dir()
    tree = tree_of(module)
    package = module.split(".") if is_package else module.split(".")[:-1]
    for node in running(tree):
        if isinstance(node, ast.Import):
            assert not any(alias.name.startswith("hotweights") for alias in node.names), "import relatively"
        if not isinstance(node, ast.ImportFrom):
            continue
        assert node.level or not (node.module or "").startswith("hotweights"), "import relatively"
        if node.level:
            base = package[: len(package) - node.level + 1] + (node.module.split(".") if node.module else [])
            for alias in node.names:
                inner = ".".join([*base, alias.name])
                yield inner if inner in MODULES else ".".join(base)


def wing_of(module):
    return module.partition(".")[0]


def test_every_file_has_its_place():
    assert {wing_of(name) for name in MODULES} == {*WORDS, *WINGS}


@pytest.mark.parametrize("module", MODULES)
def test_imports_run_one_way(module):
    wing = wing_of(module)
    below = WORDS if wing in WORDS else [*WORDS, *WINGS[: WINGS.index(wing) + 1]]
    wrong = [name for name in imports(module) if wing_of(name) not in below]
    assert not wrong, f"{module} imports {wrong}, which stand above it"


def test_no_file_imports_itself_in_a_circle():
    sorter = graphlib.TopologicalSorter({name: set(imports(name)) for name in MODULES})
    sorter.prepare()


def tree_of(module):
    path = ROOT / Path(*module.split("."))
    return ast.parse((path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text())


@pytest.mark.parametrize("module", MODULES)
def test_private_names_stay_in_their_file(module):
    tree = tree_of(module)
    aliases = [
        alias for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level for alias in node.names
    ]
    taken = {alias.name for alias in aliases if alias.name.startswith("_")}
    modules = {alias.asname or alias.name for alias in aliases if alias.name.islower()}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules:
            taken |= {node.attr} if node.attr.startswith("_") and not node.attr.startswith("__") else set()
    assert not taken, f"{module} takes {sorted(taken)} from another file; a name that two files use is not private"


# What gives a mode of torch that belongs to a thread, and whose ``with`` a signal must not cut short.
OF_THE_THREAD = set("no_grad inference_mode enable_grad writing_mode in_every_thread autocast _no_autocast".split())
NEVER_INTERRUPTED = {"cli.demo.demo"}  # A command that ends by Ctrl-C.


@pytest.mark.parametrize("module", MODULES)
def test_what_turns_autograd_off_finishes_its_own_lines(module):
    """A signal between the end of a ``with torch.no_grad()`` and its ``__exit__`` leaves autograd off for ever."""
    if module in NEVER_INTERRUPTED or module.startswith("testing."):
        return
    tree = tree_of(module)
    parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or ast.unparse(node.func).rpartition(".")[2] not in OF_THE_THREAD:
            continue
        inside = node
        while inside in parents and not isinstance(inside, ast.FunctionDef):
            inside = parents[inside]
        marks = {ast.unparse(mark).rpartition(".")[2] for mark in getattr(inside, "decorator_list", ())}
        returned = isinstance(parents[node], (ast.Return, ast.IfExp))  # Its caller enters it.
        assert returned or marks & {"held", "whole", "watched"}, f"{module}:{node.lineno} is not in a held function"


def test_two_classes_have_two_names():
    homes = collections.defaultdict(list)
    for module in MODULES:
        for node in ast.walk(tree_of(module)):
            if isinstance(node, ast.ClassDef):
                homes[node.name].append(module)
    shared = {name: where for name, where in homes.items() if len(where) > 1}
    assert not shared, "a reader takes one for the other: " + "; ".join(f"{k} in {v}" for k, v in shared.items())


def test_no_two_files_of_a_wing_differ_by_an_ending_only():
    """``file`` and ``files``, ``trace`` and ``tracing`` beside each other are taken for one another."""
    stems = collections.defaultdict(set)
    for module in MODULES:
        folder, _, name = module.rpartition(".")
        stems[folder, re.sub(r"(?<=\w\w\w)(s|es|e|ing)$", "", name)].add(module)
    wrong = {frozenset(names) for names in stems.values() if len(names) > 1}
    assert not wrong, wrong


def test_the_public_words_are_these():
    assert hotweights.__all__ == sorted(hotweights.__all__)
    words = """
    build from_iterator load open save trace Manifest TensorSpec OpaqueDtype Lease Pool PoolStats Fate LoadPlan
    LoadReport
    route Component RouteReport RoutingError
    HotweightsError CheckpointError CheckpointChanged UnsupportedDtype PlanError PlanFileError PlanDiffers
    LiveModel LiveModelError State Update UpdateReport Digest UpdateAborted CommitHookError
    TiedWeightsDiffer IncompleteLoad PoolTimeout UsageError StaleLease BorrowedTensor Closed UnknownName
    MissingPackage NoManifest SourceError StoreError SaveError SaveReport
    Sender Receiver SendReport TransferError TransferAborted TransferIncomplete TransferTimeout PeerLost ProtocolError
    TransferInDoubt AddressTaken follow Version Versions Shard
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


def test_the_package_shows_its_public_words_only():
    import hotweights.plan  # A folder, which is an attribute from now on.

    assert {name for name in dir(hotweights) if not name.startswith("__")} == set(hotweights.__all__)
    assert (
        hotweights.__version__
        == re.search(r'^version = "(.+)"', (ROOT.parents[1] / "pyproject.toml").read_text(), re.M)[1]
    )


def test_torch_is_imported_when_it_is_needed():
    """``hotweights inspect`` lists a file in milliseconds so."""
    code = (
        "import sys, hotweights, hotweights.sources.files.listing;"
        "assert 'torch' not in sys.modules; hotweights.load; assert 'torch' in sys.modules"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, timeout=60)


@pytest.mark.parametrize("package", [hotweights, hotweights.sources])
def test_names_that_are_imported_on_demand_lie_where_type_checkers_find_them(package):
    tree = ast.parse(Path(package.__file__).read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    said = {alias.name: node.module for node in block.body for alias in node.names}
    assert said == package._HOMES
    with pytest.raises(AttributeError, match="has no attribute 'lode'"):
        getattr(package, "lo" + "de")


def test_every_public_function_is_documented():
    for name in hotweights.__all__:
        assert (getattr(hotweights, name).__doc__ or "").strip(), name
