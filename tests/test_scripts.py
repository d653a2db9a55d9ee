"""Every command of the README, run as it stands there on the toy world."""

import ast
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tomllib

import pytest
from conftest import ROOT, start_forks
from test_layout import FOLDERS, ORDER

from losses import LOSSES

README = (ROOT / "README.md").read_text()
# The toy is small and so is the test machine.  Nothing else of a command is changed.
SHORTER = {
    "train.py": ["--max_steps", "2", "--batch_size", "16"],
    "train.py all": ["--max_steps", "8", "--batch_size", "8", "--lr", "4e-3", "--save_every", "9"],
    "toy.py": ["--pairs", "16"],
    "toy.py --demo": ["--pairs", "8", "--out", "demo"],  # the other commands keep their world
    "paper.story": ["--tiny", "--seeds", "6"],  # a base that leaves the format
    "sample": ["--prompts", "none", "--num_samples", "6", "--max_new_tokens", "48"],
    "dropout_ntp": ["--max_new_tokens", "48"],
    "eval.py generate": ["--max_new_tokens", "16"],
    "generate.py": ["--max_new_tokens", "16"],
    "tools/race.py": ["--tiny", "--seconds", "1"],
}


def shorter(command):
    """The flags of the most specific entry whose words all stand in the command."""
    fitting = [key for key in SHORTER if set(key.split()) <= set(command)]
    return SHORTER[max(fitting, key=len)] if fitting else []


def commands():
    """Indented lines of the README that start a script, without their comments."""
    for line in README.splitlines():
        line = line.split("    # ")[0] if line.startswith("    ") else line
        if re.match(r"    (python|torchrun|\.venv/bin/(python|torchrun)) ", line):
            yield line.strip().removeprefix(".venv/bin/")


def python_files():
    """{file name: text} of the README's indented Python blocks: `def name(logps` -> my_loss.py."""
    block = re.search(r"((?:    .*\n|\n)+?)(?=\S)", README[README.index("    import torch.nn") :])
    text = "\n".join(
        line[4:] for line in block[1].splitlines() if not line.startswith("    python")
    )
    return {"my_loss.py": text}


@pytest.fixture(scope="module")
def world(trained, tmp_path_factory):
    """A folder in which the README's relative paths exist."""
    folder = tmp_path_factory.mktemp("readme")
    run(folder, ["python", "toy.py", "--out", "toy"])
    for name in ("weights/InternVL2-8B", "toy/run/model", "runs/mpo/model"):
        shutil.copytree(trained / "base/model", folder / name)
    for name in ("config.json", "metrics.jsonl"):
        shutil.copy(trained / "base" / name, folder / "runs/mpo")
    (folder / "MMPR").symlink_to(folder / "toy")
    (folder / "cat.png").symlink_to(folder / "toy/images/square-00000.png")
    rows = [json.loads(line) for line in (folder / "toy/toy_steps.jsonl").read_text().splitlines()]
    with open(folder / "questions.jsonl", "w") as questions:
        for r in rows:
            line = {"image": r["image"], "question": r["question"], "answer": r["answer_gt"]}
            questions.write(json.dumps(line) + "\n")
    with open(folder / "m3cot_test.jsonl", "w") as benchmark:
        for n, r in enumerate(rows[:8]):
            line = {"id": f"q{n}", "image": r["image"], "question": r["question"][8:], "hint": ""}
            line |= {"choices": ["0", "1", "2", "3"], "answer": min(3, int(r["answer_gt"]))}
            benchmark.write(json.dumps(line) + "\n")
    for name, text in python_files().items():
        (folder / name).write_text(text)
    return folder


def run(folder, words, extra=None):
    """The command in `folder`, in processes forked with torch already loaded; its output."""
    words = [w for w in words if not w.startswith("--standalone")]
    processes = 2 if any(w.startswith("--nproc_per_node=") for w in words) else 1
    words = [w for w in words if not w.startswith("--nproc_per_node=") and w != "-m"][1:]
    script, *flags = words
    flags += shorter(words) if extra is None else extra
    out = folder / ".output"
    forks = start_forks(processes, run_script, script, flags, folder, out)
    for fork in forks:
        fork.join(240)
    text = out.with_suffix(".stdout").read_text(), out.with_suffix(".stderr").read_text()
    assert [fork.exitcode for fork in forks] == [0] * processes, f"{shlex.join(words)}\n{text}"
    return text


def run_script(script, flags, folder, out):
    os.chdir(folder)
    for number, name in ((1, ".stdout"), (2, ".stderr")):
        how = os.O_CREAT | os.O_WRONLY | os.O_APPEND
        if os.environ["RANK"] == "0":
            out.with_suffix(name).unlink(missing_ok=True)
        os.dup2(os.open(out.with_suffix(name), how), number)
    sys.argv = [script, *flags]
    if os.environ["WORLD_SIZE"] == "1":  # as plain `python`, without torchrun's variables
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
            del os.environ[name]
    if script.endswith(".py"):
        runpy.run_path(str(ROOT / script), run_name="__main__")
    else:  # python -m
        runpy.run_module(script, run_name="__main__")


def test_the_readme_s_lines_of_python_give_logits(world):
    lines = re.search(r"```python\n(.*?)```", README, re.S)[1]
    (world / "snippet.py").write_text(lines + "print(tuple(logits.shape))\n")
    stdout, _ = run(world, ["python", str(world / "snippet.py")])
    assert re.fullmatch(r"\(1, \d+, \d+\)\n", stdout)


def test_the_readme_has_commands():
    assert len(list(commands())) >= 20


def long(command: str) -> bool:
    """Whether it takes more than 20 seconds on two cores."""
    return "--loss all" in command or "--quick" in command


@pytest.mark.parametrize(
    "command",
    [pytest.param(c, marks=[pytest.mark.long] * long(c)) for c in dict.fromkeys(commands())],
)
def test_a_command_of_the_readme_runs(world, command):
    stdout, stderr = run(world, shlex.split(command))
    if "generate.py" in command and "--question" in command:
        assert stdout.endswith("\n") and "<|im_end|>" not in stdout  # may be empty: 2 steps
    if "tools/lab.py" in command:
        check_lab(world / "losses.png", stdout)
    if "--loss all" in command:
        check_rows(stdout)
    if "paper.story" in command:
        check_story(world / "toy/story", stdout, ["simpo"] if "--mine" in command else [])
    if "train.py" in command and "--plan" not in command:
        assert "read back and equal to the trained policy" in stderr


def check_lab(png, stdout):
    """Every objective is drawn, tabulated and checked, and the five lines of the user, too."""
    assert png.read_bytes().startswith(b"\x89PNG")
    row = re.search(r"^simpo .*", stdout, re.M)[0].split()
    assert row[1] == "passed" and row[-2:] == ["no", "pair"]
    for name in LOSSES:
        assert re.search(rf"^{name} +passed ", stdout, re.M), name
    assert stdout.splitlines()[-1] == "13 objectives, every check passed"


def check_story(folder, stdout, mine):
    """Base, pairs, three objectives and the report; one seed decides no claim."""
    results, rows = json.loads((folder / "results.json").read_text()), ["base", "SFT", "DPO", "MPO"]
    assert [row["row"] for row in results["rows"]] == rows + mine
    assert all(row["seeds"] == [6] for row in results["rows"])
    assert results["pairs"]["6"]["correctness"]["pairs"] > 8
    assert "| undecided |" in stdout and "agrees |" not in stdout
    log = (folder / "seed-6/rows/MPO/log.txt").read_text()
    assert "start check: rewards are 0" in log
    assert "<h2>All rows</h2>" in (folder / "report.html").read_text()


def check_rows(table):
    """8 steps of each row: the margin grows, or by its own measure (NLL) the row learns."""
    rows = {line.split()[0]: line.split()[1:] for line in table.splitlines()[1:]}
    assert len(rows) == 17
    start = 5.0  # nats a token of an untrained toy
    for name, (loss, chosen, rejected, margin, accuracy, nll) in rows.items():
        assert "nan" not in (loss, chosen, rejected, margin, accuracy, nll)
        assert float(nll) < start if margin == "-" else float(margin) > 0, name


def test_the_two_first_commands_are_those_that_ci_runs():
    first = re.findall(r"^    (make \w+)", README, re.M)[:2]
    assert first == ["make demo", "make test"]
    ci = (ROOT / ".ci" / "run").read_text()
    assert all(command in ci for command in first)
    makefile = (ROOT / "Makefile").read_text()
    for line in README.splitlines():
        if line.startswith("    .venv/bin/"):
            script = re.search(r"\w+\.py", line)[0]
            assert script in makefile, line


def table_of_files():
    """The README's table: every flat file in reading order, its lines, what it owns."""
    header = ["| file | lines | owns |", "| --- | --- | --- |"]
    rows = []
    for name in ["plain", *(n for n in ORDER if n != "plain")]:
        text = (ROOT / f"{name}.py").read_text()
        owns = text.split("\n")[0].lstrip('r"').rstrip(".")
        rows.append(f"| `{name}.py` | {text.count(chr(10))} | {owns} |")
    return "\n".join(header + rows)


PROGRAMS = "python3?|torchrun|srun|make|pip|internvl-mpo|lm_eval"
# Every command of README or docs that is not run above as it stands -> the test that runs it.
RUN_BY = {
    "make demo": ".ci/run: make demo",
    "make test": ".ci/run: make test",
    "make quick": ".ci/run: make quick",
    "make paper": "test_story.py: test_a_story_has_every_row_of_the_paper",  # hours: its plan
    "make gpu": "test_gpu_check.py: test_every_part_runs_at_toy_size",
    "tools/gpu_check.py": "test_gpu_check.py: test_every_part_runs_at_toy_size",
    "python3 -m venv": ".ci/run: make .venv/installed",
    "pip install": "test_scripts.py: test_an_installed_command_runs_the_script_of_its_name",
    "internvl-mpo": "test_scripts.py: test_an_installed_command_runs_the_script_of_its_name",
    "tools/lecture.py": "test_lecture.py: test_every_cell_runs_and_the_page_shows",
    "eval.py judge": "test_eval.py: test_judging_goes_through_files",
    "lm_eval": "test_export.py: test_transformers_loads_the_language_model_alone",
    "tools/look.py check": "test_look.py: test_check_passes_a_good_set",
    "train.py --bench": "test_plan.py: test_the_bench_prints_both_tables",
    "train.py --nnodes": "test_strength.py: test_replicas_train_as_one_process",
    "train.py --help": "test_runtime.py: test_help_has_a_line_a_flag_under_headings",
    "train.py --heldout": "test_heldout.py: test_heldout_metrics_are_those_of_the_plain_way",
    "train.py --tensorboard": "test_sweep.py: test_each_row_goes_to_tensorboard_and_wandb",
    "train.py": "test_train.py: test_the_exported_model_is_the_trained_one",
    "tools/race.py": "test_scripts.py: test_a_command_of_the_readme_runs",
    "pairs.py correctness": "test_scripts.py: test_a_command_of_the_readme_runs",
    "tools/export.py --checkpoint": "test_strength.py: test_adapters_train_alone",
    "tools/convert.py": "test_convert.py: test_every_program_s_record_becomes_the_same_pair",
    "tools/convert.py --to": "test_convert.py: test_mmpr_goes_out_and_comes_back",
    "tools/rlaifv.py": "test_rlaifv.py: test_divide_and_conquer_runs_from_samples_to_pairs",
    "tools/sweep.py": "test_sweep.py: test_a_sweep_shares_one_cache",
    "tests/load_memory.py": "test_strength.py: test_loading_holds_one_tensor",  # the same, small
    "tests/kill_test.py": "test_heldout.py: test_ctrl_c_saves",  # one kill; twenty are by hand
    "pytest": ".ci/run: make test",
}


def test_every_command_of_readme_and_docs_is_run_by_a_test():
    run_here, missing, used = set(commands()), [], set()
    for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for command in written_commands(path.read_text()):
            words = set(command.split())
            keys = [key for key in RUN_BY if set(key.split()) <= words]
            used |= set(keys)
            if not keys and command.removeprefix(".venv/bin/") not in run_here:
                missing.append(f"{path.name}: {command}")
    assert missing == [] and used == set(RUN_BY)
    for test in RUN_BY.values():
        file, name = test.split(": ")
        path = ROOT / file if file.startswith(".") else ROOT / "tests" / file
        assert name in path.read_text(), test


def test_every_flag_in_the_docs_is_one_of_the_scripts():
    sources = [*ROOT.glob("*.py"), *ROOT.glob("tools/*.py"), *ROOT.glob("tests/*.py")]
    known = set(re.findall(r"^    (\w+): ", "\n".join(p.read_text() for p in sources), re.M))
    known |= {"help", *re.findall(r'"--(\w+)"', (ROOT / "tests/kill_test.py").read_text())}
    for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for command in written_commands(path.read_text()):
            flags = re.findall(
                r" --(\w+)", re.split(r"\w\.py |paper\.story |$", command, maxsplit=1)[1]
            )
            assert set(flags) <= known, f"{path.name}: {command}"


def written_commands(text):
    """Indented lines and `code` that start a program with at least one word after it."""
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    for line in text.replace("\\\n", "").splitlines():
        for code in [line.strip()] if line.startswith("    ") else re.findall("`([^`]+)`", line):
            for command in code.split("   #")[0].split(";"):
                if re.match(rf"(\.venv/bin/)?({PROGRAMS}|[\w/]+\.py) ", command.strip()):
                    yield command.strip()


def test_an_installed_command_runs_the_script_of_its_name():
    about = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert about["project"]["scripts"] == {"internvl-mpo": "internvl_mpo.tools.command:main"}
    packages = ["internvl_mpo", *(f"internvl_mpo.{folder}" for folder in sorted(FOLDERS))]
    assert about["tool"]["setuptools"]["packages"] == packages
    start = "import sys; from tools.command import main; sys.argv[1:] = {}; main()"
    for words, said in (
        (["train", "--help"], "usage: train.py"),
        (["trian"], "did you mean train"),
    ):
        command = [sys.executable, "-c", start.format(words)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert said in done.stdout + done.stderr


def test_the_readme_tells_each_file_s_lines():
    """`PYTHONPATH=. python tests/test_scripts.py` writes the table anew."""
    assert table_of_files() in README


def with_lines(text):
    """Each [`file.name`](file.py#L1) with the line where that name is defined."""

    def link(match):
        tree = ast.parse((ROOT / f"{match[1]}.py").read_text())
        line = next(n.lineno for n in tree.body if getattr(n, "name", "") == match[2])
        return f"[`{match[1]}.{match[2]}`]({match[1]}.py#L{line})"

    return re.sub(r"\[`(\w+)\.(\w+)`\]\(\w+\.py#L\d+\)", link, text)


def test_the_readme_s_links_lead_to_the_lines_of_the_equations():
    assert with_lines(README) == README and README.count(".py#L") >= 10


def test_the_readme_is_short():
    assert len(README.split()) <= 1800


if __name__ == "__main__":
    table = re.compile(r"(\| file \| lines \| owns \|\n(\|.*\n)*|<!-- lines -->\n)")
    text = with_lines(table.sub(lambda _: table_of_files() + "\n", README))
    (ROOT / "README.md").write_text(text)
