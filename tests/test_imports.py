"""Imports go down, and what is not needed is not imported."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "conceptx"
# A module may import from lower floors and from its own part; parts on one floor do not import each other.
FLOORS = (
    {"progress", "places", "settings", "store", "words"},
    {"concept"},
    {"geometry"},
    {"edit"},
    {"train"},
    {"testbeds"},
    {"models"},
    {"attacks", "dictionaries"},
    {"eraser"},
    {"methods", "evaluation"},
    {"capabilities", "sklearn", "tuning", "comparing"},
    {"demo"},
    {"cli"},
    {"__main__"},
)
FLOOR = {part: number for number, parts in enumerate(FLOORS) for part in parts}
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def parts_imported(path):
    """The parts of conceptx that a module names in its import statements, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        yield from (name.split(".")[1] for name in names if name.startswith("conceptx."))


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down(path):
    part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    upwards = {other for other in parts_imported(path) if other != part and FLOOR[other] >= FLOOR[part]}
    assert not upwards


HEAVY = {
    "PIL", "accelerate", "cvxpy", "datasets", "diffusers", "gguf", "huggingface_hub", "lm_eval", "matplotlib", "numpy",
    "pandas", "peft", "pydantic", "rich", "safetensors", "scipy", "sklearn", "tokenizers", "torch", "transformers",
}  # fmt: skip


@pytest.mark.parametrize(
    "module,allowed",
    [
        ("conceptx", set()),
        ("conceptx.cli", set()),
        ("conceptx.methods", set()),
        ("conceptx.capabilities", set()),
        ("conceptx.concept", {"pydantic"}),
        ("conceptx.models", {"torch", "numpy", "safetensors"}),
        ("conceptx.methods.elm", {"torch", "numpy", "safetensors", "pydantic"}),
        ("conceptx.methods.pisces", {"torch", "numpy", "safetensors", "pydantic"}),
        ("conceptx.dictionaries", {"torch", "numpy", "safetensors", "pydantic"}),
        ("conceptx.attacks", set()),
        ("conceptx.comparing", {"torch", "numpy", "safetensors", "pydantic"}),
        ("conceptx.tuning", {"torch", "numpy", "safetensors", "pydantic"}),
        ("conceptx.methods.budgeted", {"torch", "numpy", "safetensors", "pydantic"}),
        ("conceptx.methods.itd", {"torch", "numpy", "safetensors", "pydantic"}),
        ("conceptx.methods.mace", {"torch", "numpy", "safetensors", "pydantic"}),
        ("conceptx.methods.speed", {"torch", "numpy", "safetensors", "pydantic"}),
        ("conceptx.methods.uce", {"torch", "numpy", "safetensors", "pydantic"}),
        ("conceptx.methods.esd", {"torch", "numpy", "safetensors", "pydantic"}),
        ("conceptx.evaluation.lm_eval", {"torch", "numpy", "safetensors"}),
        ("conceptx.evaluation.images", {"torch", "numpy", "safetensors", "pydantic"}),
        ("conceptx.testbeds.emoji", set()),
    ],
)
def test_only_what_is_needed_is_imported(module, allowed):
    code = f"import sys, {module}; print(*({HEAVY!r} & sys.modules.keys()))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert set(found) <= allowed


def test_public_names_resolve_and_are_sorted():
    import conceptx
    from conceptx import methods

    for module in (conceptx, methods):
        assert all(getattr(module, name).__name__ for name in module.__all__)
        assert set(module.__all__) == set(module.MODULES) and set(module.__all__) <= set(dir(module))
        with pytest.raises(AttributeError, match=f"available: .*{module.__all__[0]}"):
            module.Nothing  # noqa: B018
    assert conceptx.__all__ == sorted(conceptx.__all__)
