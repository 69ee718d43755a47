"""Tests of the house: where files are, how long they are, who imports whom, and whether the documents' links lead on.

Each check is a function from a folder to a list of complaints. It is tried on a small made-up tree that breaks the
rule, so that it is known to fail when it should, and then on this repo, where it must find nothing.
"""

import ast
import re
import shlex
import subprocess
import unicodedata
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# Of the product, with the top-level scripts:
PACKAGES = ("engine", "rewards", "tracking", "analysis", "distillation", "games", "models")
MAX_LINES, MAX_LINES_ELSEWHERE = 500, 700  # of a Python file: of the product; of tests, benchmarks and plots
MAX_README_LINES = 220
TOP_LEVEL = {
    *("README.md", "LICENSE", "Makefile", "pyproject.toml", "requirements.txt", ".gitignore", ".ci"),
    *("main.py", "grpo.py", "update.py", "rollout.py", "dynamic_sampling.py", "soft_thinking.py", "evaluator.py"),
    *("rldatasets.py", "llms.py", "token_analysis.py", "run_token_analysis.sh", "distill.py", "pipeline.py"),
    *("self_play.py", "test_soft_thinking.py", "walkthrough.ipynb"),
    *(*PACKAGES, "docs", "benchmarks", "plots", "tests"),
}


def tree(folder: Path, files: dict[str, str]) -> Path:
    """Writes a made-up repo: {path: text}."""
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def product_files(root: Path) -> list[Path]:
    return [*sorted(root.glob("*.py")), *sorted(file for name in PACKAGES for file in (root / name).rglob("*.py"))]


def other_files(root: Path) -> list[Path]:
    return sorted(file for name in ("tests", "benchmarks", "plots") for file in (root / name).rglob("*.py"))


def documents(root: Path) -> list[Path]:
    return [root / "README.md", *sorted((root / "docs").rglob("*.md"))]


def read(file: Path) -> str:
    return file.read_text(encoding="utf-8")


# ---------------------------------------------------------------- length


def too_long(root: Path) -> list[str]:
    limits = {file: MAX_LINES for file in product_files(root)} | {f: MAX_LINES_ELSEWHERE for f in other_files(root)}
    lengths = {file: len(read(file).splitlines()) for file in limits}
    return [f"{file.relative_to(root)}: {n} lines" for file, n in lengths.items() if n > limits[file]]


def test_long_files_are_found(tmp_path):
    files = {"a.py": "\n" * 501, "engine/b.py": "\n" * 500, "tests/test_c.py": "\n" * 600, "plots/x/d.py": "\n" * 701}
    assert too_long(tree(tmp_path, files)) == ["a.py: 501 lines", "plots/x/d.py: 701 lines"]


def test_no_python_file_is_too_long():
    assert too_long(ROOT) == []


def test_the_readme_is_short():
    assert len(read(ROOT / "README.md").splitlines()) <= MAX_README_LINES


# ---------------------------------------------------------------- imports


def module_name(file: Path, root: Path) -> str:
    parts = file.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def module_level(body: list[ast.stmt]):
    """The statements that run on import: not those inside functions, nor those for type checkers alone."""
    for node in body:
        yield node
        for name in ("body", "orelse", "finalbody", "handlers"):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or is_type_checking(node):
                break
            yield from module_level(getattr(node, name, []))


def imports(root: Path) -> dict[str, set[str]]:
    """Which product modules each product module imports when it is imported itself."""
    modules = {module_name(file, root): file for file in product_files(root)}
    graph: dict[str, set[str]] = {}
    for name, file in modules.items():
        package = name if file.name == "__init__.py" else name.rpartition(".")[0]
        found: set[str] = set()
        for node in module_level(ast.parse(read(file)).body):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                base = node.module or ""
                if node.level:
                    above = package.split(".")[: len(package.split(".")) - node.level + 1]
                    base = ".".join([*above, base]).strip(".")
                inside = {f"{base}.{alias.name}" for alias in node.names}
                # `from tracking import report` needs tracking.report; tracking itself is loaded before.
                found |= inside if inside <= modules.keys() else inside | {base}
        # Importing a.b imports a first, unless the importing module is in a, which is being imported already.
        packages = {other.rpartition(".")[0] for other in found}
        found |= {other for other in packages if not f"{name}.".startswith(f"{other}.")}
        graph[name] = (found & modules.keys()) - {name}
    return graph


def import_circle(root: Path) -> list[str]:
    """The modules of one circle, the first one again at the end; empty if there is none."""
    graph, done = imports(root), set()

    def visit(name: str, path: list[str]) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return []
        for other in sorted(graph[name]):
            if circle := visit(other, [*path, name]):
                return circle
        done.add(name)
        return []

    return next((circle for name in sorted(graph) if (circle := visit(name, []))), [])


@pytest.mark.parametrize(
    "files",
    [
        {"a.py": "import b", "b.py": "import a"},
        {"a.py": "from engine import fast", "engine/__init__.py": "", "engine/fast.py": "from engine.slow import f"}
        | {"engine/slow.py": "try:\n    import a\nexcept ImportError:\n    pass"},
        {"engine/__init__.py": "", "engine/a.py": "from . import b", "engine/b.py": "from .a import f"},
        {"engine/__init__.py": "from engine.a import f", "engine/a.py": "from engine import f"},
        {"a.py": "class A:\n    import b", "b.py": "from a import A"},
        {"a.py": "import engine.fast", "engine/__init__.py": "import a", "engine/fast.py": ""},
    ],
)
def test_circles_of_imports_are_found(tmp_path, files):
    assert import_circle(tree(tmp_path, files))


def test_imports_inside_functions_and_for_type_checkers_make_no_circle(tmp_path):
    late = "def f():\n    import a\nif TYPE_CHECKING:\n    import a\n"
    files = {
        "a.py": "import b\nimport os",
        "b.py": late,
        "engine/__init__.py": "",
        "engine/c.py": "from engine import d",
    }
    assert import_circle(tree(tmp_path, files | {"engine/d.py": "import a"})) == []


def test_no_circle_among_the_imports_of_the_product():
    assert import_circle(ROOT) == []


# ---------------------------------------------------------------- pages are not in Python strings

PAGE_CODE = re.compile(
    r"<!doctype|</?(?:html|head|body|style|script|div|span|table|svg|button|ul|li|h[1-6])\b[^<]*?>"
    r"|function\s*\w*\s*\(|=>\s*\{|\bdocument\.\w|addEventListener"  # JavaScript
    r"|\{\s*[a-z-]+:\s*[^{};]+;",  # CSS
    re.IGNORECASE,
)


def page_code(root: Path) -> list[str]:
    """HTML, CSS and JavaScript in string constants of the product: it belongs into files of its own. Tags of the
    reasoning format, such as <reasoning> and <answer>, are none of it; docstrings may speak of anything."""
    found = []
    for file in product_files(root):
        syntax = ast.parse(read(file))
        docstrings = {
            id(node.body[0].value)
            for node in ast.walk(syntax)
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
            and node.body
            and isinstance(node.body[0], ast.Expr)
        }
        for node in ast.walk(syntax):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
                if match := PAGE_CODE.search(node.value):
                    found.append(f"{file.relative_to(root)}:{node.lineno}: {match[0]}")
    return found


@pytest.mark.parametrize(
    "text",
    ["<!DOCTYPE html>", '<div class="a">', "<style>p {}</style>", "<script>", "function f(x) {", "x => { y }"]
    + ["document.title = 1", "{% if x %}<html>{% endif %}", "p { color: red; }"],
)
def test_page_code_is_found(tmp_path, text):
    assert page_code(tree(tmp_path, {"tracking/a.py": f"def f():\n    return g(f'{{x}}', {text!r})"}))
    assert page_code(tree(tmp_path, {"tracking/a.py": f"PAGE = f{text.replace('{', '{{').replace('}', '}}')!r}"}))


def test_reasoning_tags_and_docstrings_are_no_page_code(tmp_path):
    code = '"""Writes <div>s."""\nTAG = "</reasoning>\\n<answer>"\nTHINK = "<think>"\nMARK = "<|im_start|>"\n'
    code += 'HELP = "the function of x, and its document"\n'
    assert page_code(tree(tmp_path, {"a.py": code + 'LINE = "{loss:.3f}; {lr:.1e}"'})) == []


def test_no_page_code_in_python():
    assert page_code(ROOT) == []


# ---------------------------------------------------------------- the top level


def tracked_files(root: Path) -> list[str]:
    """What git knows of. Skips the test where git or its folder is missing."""
    command = ["git", "-C", str(root), "ls-files", "-z"]
    try:
        result = subprocess.run(command, capture_output=True, check=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        pytest.skip("git ls-files does not answer here")
    return [name for name in result.stdout.decode().split("\0") if name]


def unplanned(tracked: list[str]) -> set[str]:
    return {name.split("/")[0] for name in tracked} - TOP_LEVEL


def test_unplanned_entries_are_found():
    assert unplanned(["main.py", "engine/head.py", "helpers.py", "misc/a.py"]) == {"helpers.py", "misc"}


def test_the_top_level_holds_only_what_is_planned():
    assert unplanned(tracked_files(ROOT)) == set()


# ---------------------------------------------------------------- links


def without_code(text: str) -> str:
    """The text without fenced blocks and inline code."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"`[^`\n]*`", "", text)


def anchors(text: str) -> set[str]:
    """GitHub's anchors of the headings: lower case, punctuation left out, spaces to hyphens; a second one of the same
    name gets -1, and so on."""
    found: set[str] = set()
    for heading in re.findall(r"^#{1,6} +(.+?) *#*$", re.sub(r"^```.*?^```", "", text, flags=re.S | re.M), re.M):
        heading = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()  # a link shows its text
        kept = (c for c in heading if c in " -_" or unicodedata.category(c)[0] in "LNM")
        anchor = name = "".join(kept).replace(" ", "-")
        number = 0
        while anchor in found:
            number += 1
            anchor = f"{name}-{number}"
        found.add(anchor)
    return found


def broken_links(root: Path) -> list[str]:
    """Relative links and images in the documents that lead nowhere."""
    broken = []
    for document in documents(root):
        # Code in a link's text may stand between brackets: only the target matters.
        for target in re.findall(r"\]\(\s*<?([^)\s>]+)>?[^)]*\)", without_code(read(document))):
            if re.match(r"[a-z]+:", target):
                continue  # elsewhere: http, mailto
            path, _, anchor = target.partition("#")
            file = (document.parent / path).resolve() if path else document
            if not file.is_relative_to(root.resolve()) or not file.exists():
                broken.append(f"{document.relative_to(root)}: {target}")
            elif anchor and (file.suffix != ".md" or anchor not in anchors(read(file))):
                broken.append(f"{document.relative_to(root)}: {target}: no such heading")
    return broken


def test_broken_links_are_found(tmp_path):
    files = {
        "README.md": "# A & B: `c`, d\n\n[here](a.py) [`f` in a](a.py) ![no](plots/no.png) "
        "[p](docs/p.md#the-gradient-1)\n"
        "[no](docs/p.md#nothing) [self](#a--b-c-d) [no](#a-b) [out](../x) [web](https://a.b/c)\n"
        "```\n[code](nowhere)\n```\n",
        "a.py": "",
        "docs/p.md": "## The gradient\n## The gradient\n[up](../README.md) [no](README.md)\n```\n# nothing\n```\n",
    }
    bad = [link.split(": ", 1)[1] for link in broken_links(tree(tmp_path, files))]
    assert bad == [
        "plots/no.png", "docs/p.md#nothing: no such heading", "#a-b: no such heading", "../x", "README.md"
    ]  # fmt: skip


def test_all_links_of_the_documents_lead_somewhere():
    assert broken_links(ROOT) == []


# ---------------------------------------------------------------- commands

# Modules that are not ours; and launchers, whose first argument that ends in .py is the script.
FOREIGN_MODULES = ("pytest", "pip", "venv", "torch", "accelerate")
LAUNCHERS = ("torchrun", "accelerate")


def commands(text: str) -> list[list[str]]:
    """The words of every command in fenced blocks and inline code that starts a Python program or a shell script."""
    lines = [line for block in re.findall(r"^```\w*\n(.*?)^```", text, re.S | re.M) for line in block.splitlines()]
    lines += re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.S | re.M))
    found = []
    for line in lines:
        try:
            words = shlex.split(line, comments=True)
        except ValueError:  # the first line of a longer command
            continue
        while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
            words = words[1:]
        if len(words) > 1 and words[0] in ("python", "python3", "sh", "bash", *LAUNCHERS):
            found.append(words)
        elif words and words[0].startswith("./"):
            found.append(["sh", *words])
    return found


def program(words: list[str]) -> str | None:
    """The file that a command starts, relative to the repo; None if it is none of ours."""
    if words[1] == "-m":
        module = words[2]
        return None if module.split(".")[0] in FOREIGN_MODULES else module.replace(".", "/") + ".py"
    if words[0] in LAUNCHERS:
        return next((word for word in words if word.endswith(".py")), None)
    return None if words[1].startswith("-") else words[1]


def missing_programs(root: Path) -> list[str]:
    return [
        f"{document.relative_to(root)}: {' '.join(words)}"
        for document in documents(root)
        for words in commands(read(document))
        if (file := program(words)) and not (root / file).is_file()
    ]


def test_commands_for_missing_files_are_found(tmp_path):
    text = (
        "Run `python main.py --help`, `python -m tracking.report x` or `python old.py`.\n```\n"
        "OMP_NUM_THREADS=1 python gone.py --x    # comment\nHEAD=a bash docs/launch/1.sh\ntorchrun --n 2 lost.py --y\n"
        'python -m tracking.lost\npython -c "print(1)"\npython -m pytest -q\n./none.sh\nmake train\n```\n'
    )
    files = {"README.md": text, "main.py": "", "tracking/report.py": "", "docs/launch/1.sh": ""}
    bad = [complaint.split(": ", 1)[1] for complaint in missing_programs(tree(tmp_path, files))]
    assert sorted(bad) == sorted(
        ["python old.py", "python gone.py --x", "torchrun --n 2 lost.py --y", "python -m tracking.lost", "sh ./none.sh"]
    )


def test_every_command_of_the_documents_names_a_program_that_exists():
    assert missing_programs(ROOT) == []
