"""Every mistake a user can make on the command line: one line on stderr, exit code 2, no traceback, nothing
written."""

from __future__ import annotations

import errno
import json
import os
import re
from pathlib import Path

import pytest

from tests.cli.conftest import FAST, TINY, CommandLine

HEAD = TINY.split("model = Net")[0]
NO_DATA = f"{HEAD}\nmodel = Net\n"

# name, the model file, what the line has to say
FILES = [
    (
        "no model",
        "import torch\nsize = 3\n",
        r"net\.py: no model in it; define `model` .* The file defines: size",
    ),
    ("nothing", "", r"no model in it; .* The file defines: nothing"),
    (
        "two modules",
        "from torch import nn\none = nn.Linear(1, 1)\ntwo = nn.Linear(1, 1)\n",
        r"2 candidates for the model: one, two; say which one, for example with `model = two`",
    ),
    (
        "two classes",
        "from torch import nn\nclass A(nn.Module): pass\nclass B(nn.Module): pass\n",
        r"2 candidates for the model: A, B",
    ),
    (
        "wrong model",
        "model = 3\n",
        r"'model' is a int, expected a torch\.nn\.Module, its class, or a function",
    ),
    ("factory of nonsense", "def model(): return 7\n", r"'model' gives a int, expected a torch\.nn\.Module"),
    ("syntax", "x = 1\nmodel = (\n", r"net\.py, line 2: SyntaxError: '\(' was never closed"),
    ("import error", "\nimport no_such_package\n", r"net\.py, line 2: ModuleNotFoundError: No module named"),
    ("name error", "x = 1\ny = undefined\n", r"net\.py, line 2: NameError: name 'undefined' is not defined"),
    ("exit", "raise SystemExit('needs scikit-learn')\n", r"net\.py, line 1: SystemExit: needs scikit-learn"),
    (
        "broken factory",
        "def model():\n    return [][1]\n",
        r"net\.py, line 2: model: IndexError: list index out of range",
    ),
    ("no choices", f"{TINY}\nmodel = nn.Linear(6, 3)\n", r"'model' \(Linear\) has no choices to search"),
    (
        "no data",
        NO_DATA,
        r"no data to search with; define `dataset_train`.*The file defines: Net, data, model",
    ),
    ("empty data", f"{NO_DATA}dataset_train = []\n", r"'dataset_train' is empty"),
    (
        "data of a wrong kind",
        f"{NO_DATA}dataset_train = 5\n",
        r"'dataset_train' is a int, expected a data set",
    ),
    ("no loss", f"{TINY}\nloss = 3\n", r"'loss' is a int, expected a function of \(output, target\)"),
    ("no optimizer", f"{TINY}\noptimizer = 3\n", r"'optimizer' is a int, expected a torch\.optim\.Optimizer"),
    ("wrong optimizer", f"{TINY}\ndef optimizer(net): return 3\n", r"'optimizer' is a int, expected a torch"),
    (
        "wrong example",
        f"{TINY}\nexample_inputs = 3\n",
        r"'example_inputs' is a int, expected a tensor or a tuple",
    ),
    ("wrong options", f"{TINY}\nsearch_options = 3\n", r"'search_options' is 3, expected a dict"),
    (
        "unknown method in options",
        f"{TINY}\nsearch_options = {{'drats': {{}}}}\n",
        r"unknown method 'drats'; known: darts, darts-unrolled, enas, random",
    ),
    (
        "unknown option",
        f"{TINY}\nsearch_options = {{'darts': {{'arc_lr': 1}}}}\n",
        r"search_options\['darts'\] has 'arc_lr'; DartsTrainer takes: .*arc_learning_rate",
    ),
    (
        "different shapes",
        TINY.replace("nn.Linear(8, 8), nn.Identity()]", "nn.Linear(8, 8), nn.Linear(8, 7)]"),
        r'choice "second": candidate "1" returns \(\d+, 7\), "0" returns \(\d+, 8\)',
    ),
    (
        "a choice from an unknown source",
        TINY.replace("InputChoice(n_candidates=1,", "InputChoice(choose_from=['nowhere'],"),
        r"'nowhere' required by 'skip' not found",
    ),
]


@pytest.mark.parametrize(("text", "says"), [row[1:] for row in FILES], ids=[row[0] for row in FILES])
def test_a_wrong_model_file_is_one_line(cli: CommandLine, text: str, says: str) -> None:
    line = cli.bad(cli.write(text), "--out", "out", *FAST)
    assert re.search(says, line), line
    assert not Path("out").exists()


def test_an_error_in_a_neighbour_of_the_file_names_its_own_line(cli: CommandLine) -> None:
    cli.write("x = 1\n1 / 0\n", "neighbour_of_net.py")
    line = cli.bad(cli.write("\n\nimport neighbour_of_net\n"), *FAST)
    assert re.search(r"net\.py, line 3: ZeroDivisionError: division by zero", line)


def test_an_error_in_the_models_forward_is_one_line(cli: CommandLine) -> None:
    text = TINY.replace("return self.head(", "return self.head.no_such_thing(")
    assert "no_such_thing" in cli.bad(cli.write(text), "--out", "out", *FAST)
    assert not Path("out").exists()


# arguments after the file, what the line has to say
OPTIONS = [
    (("--method", "evolution"), r"unknown method 'evolution'; known: darts, darts-unrolled, enas, random"),
    (("--precision", "fp8"), r"unknown precision 'fp8'; known: no, bf16, fp16"),
    (("--precision", "fp16"), r"fp16.* needs a CUDA device"),
    (("--format", "tflite"), r"unknown format 'tflite'; known: torchscript, pt2, onnx"),
    (("--device", "tpu"), r"device is 'tpu', expected one of: auto, cpu, cuda"),
    (("--device", "cuda:99"), r"cuda:99"),
    (("--epochs", "0"), r"epochs is 0, expected at least 1"),
    (("--epochs", "many"), r"Invalid value for '--epochs': .*integer"),
    (("--batch-size", "0"), r"batch-size is 0, expected at least 1"),
    (("--retrain", "-1"), r"retrain is -1, expected at least 0"),
    (("--workers", "-1"), r"workers is -1"),
    (("--seed", "-1"), r"seed is -1"),
    (("--no-such-option",), r"No such option: --no-such-option"),
    (("another.py",), r"unexpected extra argument"),
    (("--resume", "--overwrite"), r"--resume and --overwrite exclude each other"),
    (("--resume",), r"nothing to resume: 'out' holds no run"),
]


@pytest.mark.parametrize(("args", "says"), OPTIONS, ids=[" ".join(args) for args, _ in OPTIONS])
def test_a_wrong_option_is_one_line(cli: CommandLine, args: tuple[str, ...], says: str) -> None:
    line = cli.bad(cli.write(), "--out", "out", *FAST, *args)
    assert re.search(says, line), line
    assert not Path("out").exists()


def test_a_missing_file_is_named(cli: CommandLine) -> None:
    assert cli.bad("nowhere.py") == "model file 'nowhere.py' does not exist"


def test_a_mistyped_command_lists_the_commands(cli: CommandLine) -> None:
    line = cli.bad("explian", "net.py")
    assert re.search(r"'explian' is neither a command nor a file; commands: search, explain", line)


def test_a_file_that_is_no_python_is_refused(cli: CommandLine) -> None:
    assert "expected a path that ends in .py" in cli.bad(cli.write("{}", "net.json"))


def test_an_output_folder_in_use_is_refused(cli: CommandLine) -> None:
    Path("out").mkdir()
    Path("out/mine.txt").write_text("keep")
    line = cli.bad(cli.write(), "--out", "out")
    assert "output folder 'out' is not empty: it holds no run to continue; choose another with --out" in line
    assert "is not empty" in cli.bad(cli.write(), "--out", "out", "--overwrite")
    assert Path("out/mine.txt").read_text() == "keep"


def test_an_output_folder_that_is_a_file_is_refused(cli: CommandLine) -> None:
    Path("out").write_text("")
    assert "output folder 'out' is a file" in cli.bad(cli.write(), "--out", "out")


def test_an_output_folder_without_permission_is_refused(
    cli: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = os.mkdir

    def refuse(path: str | Path, *args: int) -> None:
        if Path(path).name == "out":
            # what the system says; as root no folder is locked
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        make(path, *args)

    monkeypatch.setattr(os, "mkdir", refuse)
    assert "cannot write 'out': Permission denied" in cli.bad(cli.write(), "--out", "out", *FAST)


def test_an_output_folder_below_a_file_is_refused(cli: CommandLine) -> None:
    Path("file").write_text("")
    assert "cannot write 'file/out': Not a directory" in cli.bad(cli.write(), "--out", "file/out", *FAST)


ARCHITECTURES = [
    ({"first": 0}, r"Missing keys in fixed architecture: second, skip"),
    (
        {"first": 0, "second": 0, "skip": [], "third": 1},
        r"Unexpected keys found in fixed architecture: third",
    ),
    ({"first": 7, "second": 0, "skip": []}, r"key 'first': index 7 is out of range, expected 0 to 1"),
    ([1], r"holds a list, expected an object of keys"),
]


@pytest.mark.parametrize(("content", "says"), ARCHITECTURES)
@pytest.mark.parametrize("command", ["prune", "export"])
def test_the_architecture_of_another_model_is_refused(
    cli: CommandLine, command: str, content: object, says: str
) -> None:
    Path("arc.json").write_text(json.dumps(content))
    line = cli.bad(command, cli.write(), "arc.json")
    assert re.search(says, line), line
    assert sorted(os.listdir()) == ["arc.json", "net.py"]


def test_a_missing_or_broken_architecture_file_is_named(cli: CommandLine) -> None:
    assert "'arc.json' cannot be read: No such file" in cli.bad("prune", cli.write(), "arc.json")
    Path("arc.json").write_text("{")
    assert "'arc.json' is not valid JSON" in cli.bad("count", cli.write(), "-a", "arc.json")


def test_commands_without_training_need_example_inputs(cli: CommandLine) -> None:
    assert re.search(r"needs `example_inputs` .* or `dataset_train`", cli.bad("count", cli.write(NO_DATA)))


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("draw", "net.py", "-o", "space.jpg"), r"ends in '\.jpg', expected one of: \.svg, \.png"),
        (("export", "net.py", "arc.json", "-o", "lean.tflite"), r"ends in '\.tflite', expected one of: \.pt"),
        (
            ("prune", "net.py", "arc.json", "-o", "lean.pth"),
            r"ends in '\.pth', expected one of: \.safetensors",
        ),
        (
            ("prune", "net.py", "arc.json", "--weights", "none"),
            r"weights file 'none' cannot be read: No such",
        ),
        (("prune", "net.py"), r"Missing argument 'ARCHITECTURE\.json'"),
    ],
)
def test_wrong_arguments_of_the_other_commands(cli: CommandLine, args: tuple[str, ...], says: str) -> None:
    cli.write()
    Path("arc.json").write_text(json.dumps({"first": 0, "second": 1, "skip": 0}))
    line = cli.bad(*args)
    assert re.search(says, line), line


def test_weights_of_another_model_are_refused(cli: CommandLine) -> None:
    from safetensors.torch import save_file
    from torch import zeros

    save_file({"other.weight": zeros(2)}, "other.safetensors")
    Path("damaged.safetensors").write_bytes(b"\xff" * 40)
    Path("arc.json").write_text(json.dumps({"first": 0, "second": 1, "skip": 0}))
    line = cli.bad("prune", cli.write(), "arc.json", "--weights", "other.safetensors")
    assert re.search(r"'other\.safetensors' does not fit the model: missing: first\.0\.weight", line), line
    assert "is damaged" in cli.bad("prune", cli.write(), "arc.json", "--weights", "damaged.safetensors")


def test_our_own_bugs_keep_their_traceback(cli: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(model: object) -> dict[str, object]:
        raise AssertionError("a bug")

    monkeypatch.setattr("nascompile.compiler.architecture.search_space", broken)
    with pytest.raises(AssertionError, match="a bug"):
        cli("space", cli.write())


def test_debug_shows_the_traceback_of_a_users_error(cli: CommandLine) -> None:
    from nascompile.compiler.errors import NascompileError

    with pytest.raises(NascompileError, match="does not exist"):
        cli("--debug", "nowhere.py")
