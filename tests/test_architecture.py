"""The dependency table of the project, held against every import in the tree."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("aria_jax", "data_pipeline", "launch")

# Room -> rooms of the same project it may import from, besides itself. A dotted name allows one
# module only. `config`, `presets` and `sharding` are vocabulary, open to all of aria_jax.
COMMON = {
    "data_pipeline",
    "aria_jax.presets",
    "aria_jax.config",
    "aria_jax.sharding",
    "aria_jax.make_callable",
}
ALLOWED = {
    "data_pipeline": set(),
    "launch": {"data_pipeline", "aria_jax"},
    "aria_jax.config": {
        "data_pipeline.errors",
        "data_pipeline.settings",
        "data_pipeline.vocabulary",
    },
    # What `import aria_jax` offers: on top of everything but the command line.
    "aria_jax.api": COMMON
    | {f"aria_jax.{room}" for room in ("checkpoints", "train", "generate", "embed")},
    "aria_jax.presets": {"data_pipeline", "aria_jax.config"},
    "aria_jax.sharding": COMMON,
    "aria_jax.kernels": COMMON,
    "aria_jax.losses": COMMON | {"aria_jax.kernels"},
    "aria_jax.models": COMMON | {"aria_jax.kernels"},
    "aria_jax.checkpoints": COMMON | {"aria_jax.models"},
    "aria_jax.train": COMMON
    | {f"aria_jax.{r}" for r in ("models", "losses", "kernels", "checkpoints")},
    "aria_jax.generate": COMMON
    | {"aria_jax.models", "aria_jax.kernels", "aria_jax.losses", "aria_jax.checkpoints"},
    "aria_jax.embed": COMMON | {"aria_jax.models", "aria_jax.checkpoints"},
    "aria_jax.eval": COMMON
    | {f"aria_jax.{r}" for r in ("models", "losses", "embed", "checkpoints")},
    "aria_jax.report": COMMON,
    "aria_jax.serve": COMMON
    | {f"aria_jax.{r}" for r in ("models", "checkpoints", "generate", "embed")},
    # Compiles the very programs that others run.
    "aria_jax.aot": COMMON
    | {
        f"aria_jax.{r}" for r in ("models", "losses", "kernels", "checkpoints", "train", "generate")
    },
    "aria_jax.cli": COMMON
    | {"aria_jax.__version__"}
    | {
        f"aria_jax.{room}"
        for room in (
            "models",
            "losses",
            "kernels",
            "checkpoints",
            "train",
            "generate",
            "embed",
            "eval",
            "report",
            "aot",
            "serve",
        )
    },
}
NEVER_IN_DATA_PIPELINE = {"jax", "jaxlib", "flax", "optax", "orbax", "aria_jax", "launch"}


def modules() -> list[Path]:
    return [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]


def dotted(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> set[str]:
    """Every name a module imports, inside functions too, but not for type checkers only."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def within(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


def room_of(module: str) -> str:
    return (
        module
        if module in PACKAGES
        else next((room for room in ALLOWED if within(module, room)), module)
    )


@pytest.mark.parametrize("path", modules(), ids=dotted)
def test_imports_follow_the_dependency_table(path):
    module = dotted(path)
    if module == "aria_jax":
        assert not [name for name in imports(path) if within(name, "aria_jax")]
        return
    room = room_of(module)
    assert room in ALLOWED, f"{module} is in no room of the map"
    allowed = ALLOWED[room] | {room}
    local = {name for name in imports(path) if name.split(".")[0] in PACKAGES}
    wrong = {name for name in local if not any(within(name, prefix) for prefix in allowed)}
    assert not wrong, f"{module} may not import {sorted(wrong)}"


def test_data_pipeline_imports_nothing_of_jax():
    for path in modules():
        if dotted(path).split(".")[0] == "data_pipeline":
            roots = {name.split(".")[0] for name in imports(path)}
            assert not roots & NEVER_IN_DATA_PIPELINE, path


def test_there_are_no_import_cycles():
    names = {dotted(path): path for path in modules()}
    graph = {
        name: {
            target
            for imported in top_level_imports(path)
            for target in with_packages(imported)
            if target in names and not within(name, target)
        }
        for name, path in names.items()
    }
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join([*trail, name])
        if name not in done:
            for target in graph[name]:
                visit(target, (*trail, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def with_packages(imported: str) -> list[str]:
    """A name and the packages that it lies in, which are imported before it."""
    parts = imported.split(".")
    return [".".join(parts[: i + 1]) for i in range(len(parts))]


def top_level_imports(path: Path) -> set[str]:
    """What importing the module imports at once (an import inside a function makes no cycle)."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_a_fresh_interpreter_imports_data_pipeline_without_jax():
    names = [dotted(p) for p in modules() if dotted(p).split(".")[0] == "data_pipeline"]
    code = (
        "import importlib, sys\n"
        f"for name in {names!r}: importlib.import_module(name)\n"
        "print([m for m in ('jax', 'flax', 'optax', 'orbax') if m in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert result.stdout.strip() == "[]"


def test_using_a_model_imports_no_training():
    code = (
        "import importlib, pkgutil, sys\n"
        "for room in ('checkpoints', 'generate', 'embed'):\n"
        "    package = importlib.import_module(f'aria_jax.{room}')\n"
        "    for module in pkgutil.iter_modules(package.__path__, package.__name__ + '.'):\n"
        "        importlib.import_module(module.name)\n"
        "print([m for m in sys.modules if m.startswith('aria_jax.train')])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert result.stdout.strip() == "[]"


ADDITIONS = (
    "data_pipeline.storage", "data_pipeline.tokenizers", "data_pipeline.loaders.mixture",
    "aria_jax.train.goodput", "aria_jax.train.trackers", "aria_jax.checkpoints.hub",
    "aria_jax.generate.live", "aria_jax.serve", "aria_jax.cli.serve", "aria_jax.cli.tokenizers",
    "data_pipeline.build.series", "aria_jax.embed.parts", "aria_jax.embed.index",
    "data_pipeline.loaders.scores", "aria_jax.generate.given",
)  # fmt: skip
"""What the house gained after its rooms were counted: storage, tokenizers, the duet, series,
weights by name, exports that hosts share, indexes to search in, scores before performances, tracks
that are given.
"""


def test_the_product_is_not_confetti():
    """A file is one idea, and an idea is one file."""
    added = [path for path in modules() if dotted(path).startswith(ADDITIONS)]
    assert len(modules()) - len(added) <= 110
    assert len(added) <= 33


def test_no_module_is_a_crowded_room():
    crowded = {
        dotted(path): lines
        for path in modules()
        if "kernels" not in path.parts and (lines := len(path.read_text().splitlines())) > 400
    }
    assert not crowded


@pytest.mark.parametrize(
    "job, names",
    {
        "optimiser builder": ("adamw(",),
        "checkpoint manager": ("CheckpointManager(",),
        "TensorBoard set-up": ("SummaryWriter(",),
        "training step": ("apply_updates(",),
        "atomic writer": ("fsync(", "os.replace("),
    }.items(),
)
def test_each_job_is_done_in_one_module(job, names):
    users = [
        dotted(path)
        for path in modules()
        if any(name in path.read_text() for name in names) and "kernels" not in path.parts
    ]
    assert len(users) <= 1, f"{job} in {users}"
