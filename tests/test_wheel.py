"""The wheel is what users get: it must hold all of the package, and need nothing that it does not ask for."""

import ast
import email
import re
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "shohin"
#: import name -> distribution name, where they differ
DISTRIBUTIONS = {"jinja2": "jinja2", "yaml": "pyyaml"}
#: never imported at the top of a file: extras that the user may not have
EXTRAS = {"openvino", "executorch", "litert", "ai_edge_litert", "ray", "mlflow", "transformers", "timm", "accelerate", "optuna"}
DEVELOPMENT = {"pytest", "xdist", "_pytest", "hypothesis", "mypy", "ruff", "build"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from this checkout with the build tools at hand (no download)."""
    out = tmp_path_factory.mktemp("dist")
    done = subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(ROOT)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (found,) = out.glob("shohin-*.whl")
    return found


def requirements(wheel: Path) -> set[str]:
    """Distributions that the wheel asks for without extras."""
    with zipfile.ZipFile(wheel) as z:
        (name,) = (n for n in z.namelist() if n.endswith(".dist-info/METADATA"))
        metadata = email.message_from_string(z.read(name).decode())
    return {
        re.split(r"[\s<>=!~;\[(]", r)[0].lower().replace("_", "-") for r in metadata.get_all("Requires-Dist", []) if "extra ==" not in r
    }


def imports(path: Path, everywhere: bool) -> set[str]:
    """Top names of the absolute imports of a file; only those that run when it is imported, unless ``everywhere``."""
    tree = ast.parse(path.read_text())
    stack: list[ast.AST] = list(tree.body)
    out = set()
    while stack:
        node = stack.pop()
        if isinstance(node, ast.Import):
            out |= {a.name.split(".")[0] for a in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            out.add(node.module.split(".")[0])
        elif everywhere or not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            stack.extend(ast.iter_child_nodes(node))
    return out


def third_party(everywhere: bool) -> set[str]:
    """Distributions that the package imports."""
    names = set().union(*(imports(p, everywhere) for p in SOURCE.rglob("*.py"))) - set(sys.stdlib_module_names) - {"shohin"}
    return {DISTRIBUTIONS.get(n, n).lower().replace("_", "-") for n in names}


def leftover(path: Path) -> bool:
    """True for caches that tools leave beside the sources."""
    return any(part == "__pycache__" or part.startswith(".") for part in path.relative_to(SOURCE).parts)


def test_it_holds_every_file_of_the_package(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as z:
        held = set(z.namelist())
    here = {p.relative_to(SOURCE.parent).as_posix() for p in SOURCE.rglob("*") if p.is_file() and not leftover(p)}
    assert {"shohin/py.typed", "shohin/report/page.html.j2", "shohin/report/page.css"} <= here
    assert here - held == set()
    assert [n for n in held if n.startswith(("tests", "examples"))] == []


def test_it_asks_for_everything_that_it_imports(wheel: Path) -> None:
    asked, extras = requirements(wheel), {e.replace("_", "-") for e in EXTRAS}
    assert "torch" in asked
    assert third_party(everywhere=True) - asked - extras == set()
    assert third_party(everywhere=False) & extras == set()
    assert asked & DEVELOPMENT == set()


def test_it_imports_in_an_environment_of_its_own_without_the_development_tools(wheel: Path, tmp_path: Path) -> None:
    # A new environment with the wheel in it. Its dependencies are lent from this one, behind a finder that hides the
    # development tools and this checkout, so that nothing is downloaded and nothing else can help.
    home = tmp_path / "venv"
    venv.create(home, with_pip=False)
    python = home / ("Scripts" if sys.platform == "win32" else "bin") / "python"
    (site,) = (p for p in home.rglob("site-packages") if p.is_dir())
    with zipfile.ZipFile(wheel) as z:
        z.extractall(site)
    lent = next(p for p in map(Path, sys.path) if (p / "torch").is_dir())
    code = f"""
import importlib, pkgutil, sys
hidden = {sorted(DEVELOPMENT | EXTRAS)!r}
class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in hidden:
            raise ModuleNotFoundError(f"{{name}} is hidden", name=name)
sys.meta_path.insert(0, Hide())
sys.path.append({str(lent)!r})
import shohin
for module in pkgutil.walk_packages(shohin.__path__, "shohin."):
    if not module.name.startswith("shohin.integrations."):
        importlib.import_module(module.name)
assert not any(name.split(".")[0] in hidden for name in sys.modules)
from pathlib import Path
from shohin.report import render
render({{}}, Path({str(tmp_path / "page.html")!r}))
print(shohin.__file__)
"""
    done = subprocess.run([str(python), "-I", "-c", code], capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert Path(done.stdout.strip()).is_relative_to(site)
