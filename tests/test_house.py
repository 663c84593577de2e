"""The house rules that a machine can check: files of one idea stay short, and calls stay readable."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
LONGEST = 400  # lines
MOST_POSITIONAL = 8

# What is launched on a device takes its arguments by name, in one place on the host side; names cost nothing there.
LAUNCHED = {"forward_tile", "backward_tile", "aggregate_forward", "aggregate_backward"}
LAUNCHED |= {"finish_lines", "pack_lines", "inner_products", "merge_partials", "spread_gradient"}
LAUNCHED |= {"forward_strips", "largest_norms", "one_reference"}

# Signatures of another library, which a drop-in repeats.
DROP_INS = {f"gcl_kernels/integrations/{library}/losses.py" for library in ("open_clip", "sentence_transformers")}


def sources(*folders):
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def test_no_file_is_long():
    long = {
        str(path.relative_to(ROOT))
        for path in sources("gcl_kernels", "reference", "bench", "tests")
        if len(path.read_text(encoding="utf-8").splitlines()) > LONGEST
    }
    assert not long, f"over {LONGEST} lines: {sorted(long)}"


def test_no_function_takes_many_positional_arguments():
    found = []
    for path in sources("gcl_kernels", "reference"):
        if path.relative_to(ROOT).as_posix() in DROP_INS:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.name not in LAUNCHED:
                count = len(node.args.posonlyargs) + len(node.args.args)
                if count > MOST_POSITIONAL:
                    found.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.name} takes {count}")
    assert not found, found


def test_text_files_name_their_encoding():
    """Without one it is the machine's: cp1252 on Windows, ASCII in a C locale."""
    found = []
    for path in sources("gcl_kernels/training", "reference"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            text = isinstance(node, ast.Call) and reads_or_writes_text(node)
            if text and not any(keyword.arg == "encoding" for keyword in node.keywords):
                found.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert not found, found


def reads_or_writes_text(call):
    """Whether a call is `open`, `.open`, `.read_text` or `.write_text`, and not of bytes; other libraries' `open` is none."""
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    if name in ("read_text", "write_text"):
        return True
    of_library = isinstance(call.func, ast.Attribute) and getattr(call.func.value, "id", "") in (
        "Image",
        "os",
        "tarfile",
    )
    words = [*call.args, *(keyword.value for keyword in call.keywords if keyword.arg == "mode")]
    modes = [word.value for word in words if isinstance(word, ast.Constant) and set(str(word.value)) <= set("rwxabt+")]
    return name == "open" and not of_library and not any("b" in mode for mode in modes)


def test_what_counts_as_text():
    for code, expected in (
        ("open(p)", True), ("open(p, 'rb')", False), ("p.open('w', newline='')", True), ("p.open(mode='r+b')", False),
        ("Image.open(p)", False), ("os.open(p, 0)", False), ("p.write_text(t)", True),
    ):  # fmt: skip
        assert reads_or_writes_text(ast.parse(code).body[0].value) == expected, code
