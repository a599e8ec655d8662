"""megalite/engine/seams.py compared with the installed DeepSpeed, whose source is read but not imported."""

import ast
import functools
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from megalite.engine.seams import SEAMS, Seam

PACKAGE = Path(__file__).parents[3] / "megalite"
TOUCHING = [*sorted((PACKAGE / "engine").glob("*.py")), PACKAGE / "ranks" / "accelerator.py"]
DOCUMENTED = {  # the imports of DeepSpeed that are allowed in every room
    ("deepspeed", ""),
    ("deepspeed.accelerator", "get_accelerator"),
    ("deepspeed.accelerator", "set_accelerator"),
}
FREE_ROOMS = {"engine", "races"}  # races/ runs DeepSpeed's own pipeline for comparison


def deepspeed_file(name: str) -> Path:
    spec = importlib.util.find_spec("deepspeed")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent / name


@functools.cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def class_named(name: str, file: str) -> tuple[ast.ClassDef, str] | None:
    """A class and its file, found in `file` or in the DeepSpeed modules that it imports."""
    module = tree(deepspeed_file(file))
    for node in ast.walk(module):
        if isinstance(node, ast.ClassDef) and node.name == name:
            return node, file
    for node in ast.walk(module):
        if isinstance(node, ast.ImportFrom) and any(alias.name == name for alias in node.names):
            source = (node.module or "").removeprefix("deepspeed.").replace(".", "/")
            for candidate in (f"{source}.py", f"{source}/__init__.py"):
                if candidate != file and deepspeed_file(candidate).is_file():
                    return class_named(name, candidate)
    return None


def family(name: str, file: str) -> Iterator[ast.ClassDef]:
    """A class of DeepSpeed and its base classes."""
    found = class_named(name, file)
    if found is None:
        return
    node, where = found
    yield node
    for base in node.bases:
        yield from family(
            base.attr if isinstance(base, ast.Attribute) else ast.unparse(base), where
        )


def assigned(node: ast.AST) -> Iterator[tuple[str, str]]:
    """(object, attribute) of each `object.attribute = …`, and ("", name) of each `name = …`."""
    for part in ast.walk(node):
        targets: list[ast.expr] = []
        if isinstance(part, ast.Assign):
            targets = part.targets
        elif isinstance(part, ast.AnnAssign | ast.AugAssign):
            targets = [part.target]
        for target in targets:
            for one in target.elts if isinstance(target, ast.Tuple) else [target]:
                if isinstance(one, ast.Attribute):
                    yield ast.unparse(one.value), one.attr
                elif isinstance(one, ast.Name):
                    yield "", one.id


def form_of(function: ast.FunctionDef) -> str:
    arguments = function.args
    return ", ".join(a.arg for a in (*arguments.posonlyargs, *arguments.args))


def fits(found: str, wanted: str) -> bool:
    if wanted.endswith("…"):
        return found.startswith(wanted.removesuffix("…").rstrip(", "))
    return found == wanted


def complaint(seam: Seam) -> str | None:
    """What is wrong with a seam; None if DeepSpeed has it in the expected form."""
    owner, _, member = seam.name.rpartition(".")
    path = deepspeed_file(seam.file)
    if not path.is_file():
        return "no such file"
    if owner == "*":
        there = any(name == member for _, name in assigned(tree(path)))
        return None if there else "is set nowhere in the file"
    if not owner:
        for node in tree(path).body:
            if isinstance(node, ast.ClassDef) and node.name == member:
                return None
            if isinstance(node, ast.FunctionDef) and node.name == member:
                found = form_of(node)
                return None if fits(found, seam.form) else f"takes ({found})"
        return "no such class or function"
    classes = list(family(owner, seam.file))
    if not classes:
        return "no such class"
    for node in classes:
        for part in node.body:
            if isinstance(part, ast.FunctionDef) and part.name == member and seam.form:
                found = form_of(part)
                return None if fits(found, seam.form) else f"takes ({found})"
        if not seam.form and any(
            name == member and who in ("self", "") for who, name in assigned(node)
        ):
            return None
        properties = [part.name for part in node.body if isinstance(part, ast.FunctionDef)]
        if not seam.form and member in properties:
            return "is a method"
    return "the class has no such attribute" if not seam.form else "the class has no such method"


@pytest.mark.parametrize("seam", SEAMS, ids=lambda seam: seam.name)
def test_deepspeed_has_it_in_this_form(seam: Seam) -> None:
    wrong = complaint(seam)
    assert wrong is None, f"deepspeed/{seam.file}: {seam.name}({seam.form}): {wrong}; {seam.why}"


@pytest.mark.parametrize(
    ("name", "form", "wrong"),
    [
        ("DeepSpeedEngine.step_", "self", "no such method"),
        ("DeepSpeedEngine.step", "self", "takes (self, lr_kwargs)"),
        ("DeepSpeedEngine._no_such", "", "no such attribute"),
        ("NoEngine", "", "no such class"),
        ("*.no_such_attribute", "", "set nowhere"),
    ],
)
def test_a_moved_seam_is_named(name: str, form: str, wrong: str) -> None:
    assert wrong in (complaint(Seam("runtime/engine.py", name, form, "", "")) or "")


def our_classes() -> Iterator[tuple[Path, ast.ClassDef, list[tuple[str, str]]]]:
    """The classes of megalite that inherit from DeepSpeed's, with those (class, file)."""
    homes = {seam.name: seam.file for seam in SEAMS if "." not in seam.name}
    for path in TOUCHING:
        for node in tree(path).body:
            if isinstance(node, ast.ClassDef):
                bases = [ast.unparse(base) for base in node.bases]
                known = [(base, homes[base]) for base in bases if base in homes]
                if known:
                    yield path, node, known


OURS = list(our_classes())
LISTED = {seam.name.rpartition(".")[2] for seam in SEAMS}


def test_our_subclasses_are_found() -> None:
    assert {node.name for _, node, _ in OURS} >= {
        "Engine", "ShardedOptimizer", "FullyShardedOptimizer", "CPUAccelerator",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("path", "ours", "bases"), OURS, ids=lambda value: getattr(value, "name", "")
)
def test_every_override_and_every_use_is_listed(
    path: Path, ours: ast.ClassDef, bases: list[tuple[str, str]]
) -> None:
    theirs = [node for base in bases for node in family(*base)]
    methods = {p.name for node in theirs for p in node.body if isinstance(p, ast.FunctionDef)}
    own = {part.name for part in ours.body if isinstance(part, ast.FunctionDef)}
    mixed_in = [
        node
        for node in tree(path).body + tree(PACKAGE / "engine" / "zero.py").body
        if isinstance(node, ast.ClassDef) and node.name in [ast.unparse(b) for b in ours.bases]
    ]
    own |= {p.name for node in mixed_in for p in node.body if isinstance(p, ast.FunctionDef)}
    dunder = {name for name in own if name.startswith("__")}
    assert (own - dunder) & methods <= LISTED, "an override that seams.py does not list"
    known = own | own_fields([ours, *mixed_in]) | OF_TORCH
    for name in uses(ours) - LISTED:
        assert name in known, f"{name}: a name of DeepSpeed's that seams.py does not list"


OF_TORCH = {"state", "param_groups", "defaults"}  # of every optimizer


def own_fields(classes: list[ast.ClassDef]) -> set[str]:
    """Names that megalite's classes declare, set in `__init__` or `adopt`, or define as methods."""
    declared = {name for node in classes for who, name in assigned(node) if not who}
    inside = {
        name
        for node in classes
        for part in node.body
        if isinstance(part, ast.FunctionDef) and part.name in ("__init__", "adopt")
        for who, name in assigned(part)
    }
    methods = {
        part.name for _, node, _ in OURS for part in node.body if isinstance(part, ast.FunctionDef)
    }
    return declared | inside | methods


def uses(ours: ast.ClassDef) -> set[str]:
    """Attributes that a class reads from itself or from the engine's optimizer, as the class that has them names
    them: outside it `__name` is `_Class__name`."""
    mine = ("self", "optimizer", "self.optimizer")
    return {
        re.sub(r"^_[A-Za-z]+(?=__)", "", node.attr)
        for node in ast.walk(ours)
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) in mine
    }


def test_every_import_in_engine_is_listed() -> None:
    files = {seam.file for seam in SEAMS}
    for path in TOUCHING:
        for module, name in deepspeed_imports(path):
            inner = module.removeprefix("deepspeed").removeprefix(".").replace(".", "/")
            of_a_module = f"{inner}/{name}.py" in files or (
                not name and f"{inner}/" in " ".join(files)
            )
            assert name in LISTED or (module, name) in DOCUMENTED or of_a_module, (
                path,
                module,
                name,
            )


def deepspeed_imports(path: Path) -> Iterator[tuple[str, str]]:
    """(module, name) of a file's imports from DeepSpeed; name is empty for `import module`."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "deepspeed":
            yield from ((node.module or "", alias.name) for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from ((a.name, "") for a in node.names if a.name.split(".")[0] == "deepspeed")


def others() -> list[Path]:
    """Files of the other rooms and of the programs."""
    paths = [
        path
        for path in sorted(PACKAGE.rglob("*.py"))
        if path not in TOUCHING and path.relative_to(PACKAGE).parts[0] not in FREE_ROOMS
    ]
    root = PACKAGE.parent
    return paths + sorted((root / "launcher").glob("*.py")) + sorted((root / "tools").glob("*.py"))


def test_no_other_room_imports_inner_modules() -> None:
    for path in others():
        if "deepspeed" in path.read_text():  # parsing all of them takes seconds
            assert set(deepspeed_imports(path)) <= DOCUMENTED, path


def test_no_other_room_touches_inner_names() -> None:
    """Names that only DeepSpeed has: private ones, its attributes of parameters, the fields of its ZeRO optimizers."""
    inner = {
        seam.name.rpartition(".")[2]
        for seam in SEAMS
        if "." in seam.name
        and (
            seam.file.startswith(("runtime/zero/", "runtime/fp16/", "utils/"))
            or seam.name.rpartition(".")[2].startswith("_")
        )
    }
    general = {  # names that other rooms use with their own meaning
        "step", "optimizer", "device", "overflow", "start", "numel", "all_gather", "loss_scale", "offload_optimizer",
        "offload_param",
        "__init__", "partition", "overlap_comm", "contiguous_gradients", "wait",
    }  # fmt: skip
    wanted = inner - general
    for path in others():
        words = set(re.findall(r"\w+", path.read_text()))
        for node in ast.walk(tree(path)) if words & wanted else ():
            if isinstance(node, ast.Attribute):
                assert node.attr not in wanted, f"{path}:{node.lineno}: {node.attr}"
