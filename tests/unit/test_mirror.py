"""Every module of megalite/ has a unit test: a test imports it, or is listed here for it.

An import proves little, but reveals a new module without a test. `THROUGH` has modules that are tested through others,
`WITH_RANKS` those that need several processes: both name the test.
"""

import ast
from pathlib import Path

from megalite.model.families import FAMILIES
from tests.families import FAMILY_CONFIGS
from tests.ranks import REPOSITORY

TESTS = REPOSITORY / "tests"
RULES = "unit/config/test_config.py"  # each rule by its error line
PLAN = "unit/plan/test_plan.py"  # by its bytes, seconds and lines
RACES = "unit/races/test_races.py"  # its long form starts every contender

THROUGH = {
    "__main__": "unit/commands/test_commands.py",
    **dict.fromkeys(
        (
            "config.context_rules", "config.data_rules", "config.document",
            "config.optimizer_keys", "config.optimizer_rules", "config.parallel_keys", "config.pipe_rules",
            "config.rules", "config.stack_rules",
        ),
        RULES,
    ),
    **dict.fromkeys(
        ("config.batch_plan", "config.rate_rules", "config.rate_schedules"), "unit/config/test_schedules.py"
    ),
    **dict.fromkeys(("config.expert_rules", "config.router_section"), "unit/config/test_expert_rules.py"),
    "config.length_rules": "unit/config/test_length_rules.py",
    "config.foreign": "unit/config/test_foreign_configs.py",
    "config.masks": "unit/data/test_masking.py",
    "data.masking": "unit/data/test_masking.py",
    **dict.fromkeys(
        ("data.pairs", "data.partial", "data.tasks", "data.workers"), "unit/data/test_preprocess.py"
    ),
    "data.source_target": "unit/data/test_source_target.py",
    # DeepSpeed's optimizers need a world: the dry run builds them on groups that send nothing.
    **dict.fromkeys(
        ("engine.over_fakes", "engine.device_streams"),
        "unit/prove/test_dry_run.py",
    ),
    **dict.fromkeys(("model.block", "model.mlp", "model.router"), "unit/model/test_experts.py"),
    "model.head": "unit/model/test_families.py",
    **dict.fromkeys(
        (
            "plan.advice", "plan.bounds", "plan.least_memory", "plan.least_time", "plan.sent", "plan.sharing",
            "plan.work",
        ),
        PLAN,
    ),
    "plan.waiting_tables": "unit/plan/test_kept.py",
    "plan.stacks": "unit/prove/test_dry_run.py",
    **dict.fromkeys(
        (
            "prove.context_mutants", "prove.expert_mutants", "prove.pipe_mutants", "prove.planting",
            "prove.resume_mutants", "prove.step_mutants", "prove.tensor_mutants",
        ),
        "unit/prove/test_mutants.py",
    ),
    "ranks.standard_streams": "unit/ranks/test_startup.py",  # by startup
    "report.page": "unit/report/test_report.py",
    "training.epochs": "unit/training/test_epochs.py",
    "training.events": "unit/training/test_metrics.py",
}  # fmt: skip
WITH_RANKS = {
    "engine.tensor_copies": "distributed/test_tensor_copies.py",
    "inference.harness": "distributed/test_harness.py",  # needs the extra `eval`
    "prove.benchmark_rank": "distributed/test_benchmark.py",
    **dict.fromkeys(
        ("prove.calibrate_rank", "prove.machine_rates", "prove.ranking_rank", "prove.step_turns"),
        "distributed/test_calibration.py",
    ),
    "prove.verify_rank": "distributed/test_verify.py",
    **dict.fromkeys(
        (f"races.{name}" for name in ("deepspeed_pipe", "dtensor", "fsdp", "ours", "torch_pipe", "trainer")), RACES
    ),
    "training.watching": "distributed/test_watching.py",
}  # fmt: skip


def modules() -> set[str]:
    """The modules by their names within megalite, without packages and families; one test covers all families."""
    package = REPOSITORY / "megalite"
    paths = [path for path in package.rglob("*.py") if path.name != "__init__.py"]
    names = {".".join(path.relative_to(package).with_suffix("").parts) for path in paths}
    return {name for name in names if not name.startswith("model.families.")}


def imported(path: Path) -> set[str]:
    """Modules of megalite that a file imports or names in a string, such as `-m megalite.x.y`."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found |= {word for word in node.value.split() if word.startswith("megalite.")}
    return {name.removeprefix("megalite.") for name in found if name.startswith("megalite.")}


def tried() -> set[str]:
    return set().union(*(imported(path) for path in (TESTS / "unit").rglob("*.py")))


def test_every_module_has_a_test() -> None:
    assert sorted(modules() - tried() - THROUGH.keys() - WITH_RANKS.keys()) == []


def test_no_exception_is_obsolete() -> None:
    """A module with its own test, or one that no longer exists, must not be listed."""
    named = THROUGH | WITH_RANKS
    assert len(named) == len(THROUGH) + len(WITH_RANKS)
    assert sorted(named.keys() - modules()) == [] and sorted(named.keys() & tried()) == []
    assert [test for test in set(named.values()) if not (TESTS / test).is_file()] == []


def test_every_family_has_a_config_for_tests() -> None:
    assert set(FAMILIES) == {config["model_type"] for config in FAMILY_CONFIGS.values()}


def test_folders_of_tests_are_the_rooms() -> None:
    rooms = {path.parent.name for path in (REPOSITORY / "megalite").glob("*/__init__.py")}
    assert rooms == {path.parent.name for path in (TESTS / "unit").glob("*/__init__.py")}
    assert all(any((TESTS / "unit" / room).glob("test_*.py")) for room in rooms)
