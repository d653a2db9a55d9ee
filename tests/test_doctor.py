"""Planted illnesses are named, healthy runs get no finding, in the metrics of three trainers."""

import json
import math
import sys

import pytest
import torch
from safetensors.torch import save_file

from config import RECIPES
from runtime import run
from tools import doctor
from tools.doctor import diagnose
from tools.track import Tracker
from train import TrainConfig

STEPS = 60


def healthy_rows(steps=STEPS):
    """An MPO run as it should be, one row a step under train.py's names."""
    rows = []
    for n in range(steps):
        share = n / steps
        chosen, rejected = 0.4 * share, -0.8 * share + 0.02 * math.sin(n)
        rows.append(
            {
                "step": n + 1,
                "loss": 1.63 - 0.3 * share,
                "rewards/chosen": chosen,
                "rewards/rejected": rejected,
                "rewards/margin": chosen - rejected,
                "rewards/accuracy": 0.5 + 0.25 * share + 0.05 * math.cos(n),
                "nll": 0.80 - 0.05 * share,
                "length/chosen": 210.0,
                "length/rejected": 190.0,
                "bco_shift": (chosen + rejected) / 4,
                "lr": 5e-6 * min(1, n / 3) * (1 - share),
                "grad_norm": 0.8 + 0.4 * math.sin(n),
            }
        )
    return rows


def changed(**curves):
    """A healthy run with some columns replaced: name -> function of the step from 0."""
    rows = healthy_rows()
    for name, curve in curves.items():
        for n, row in enumerate(rows):
            row[name.replace("__", "/")] = curve(n)
    return rows


def write_run(folder, rows, **flags):
    flags = {"max_grad_norm": 1.0, "loss": "mpo"} | flags
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "config.json").write_text(json.dumps(flags, default=str))
    return folder


def write_meta(folder, pairs):
    """meta.json of text pairs (chosen, rejected), each of another question."""
    lines = [
        json.dumps({"question": f"Question {n}?", "chosen": c, "rejected": r})
        for n, (c, r) in enumerate(pairs)
    ]
    (folder / "pairs.jsonl").write_text("\n".join(lines) + "\n")
    entry = {"root": ".", "annotation": "pairs.jsonl", "repeat_time": 1}
    (folder / "meta.json").write_text(json.dumps({"pairs": entry}))
    return folder / "meta.json"


def ask(capsys, folder, *flags):
    """(exit status, names of the findings)."""
    sys.argv, status = ["doctor.py", str(folder), "--json", *flags], 0
    try:
        run(doctor.main)
    except SystemExit as stop:
        status = stop.code
    out = capsys.readouterr().out
    return status, json.loads(out)["findings"] if out else []


# --------------------------------------------------------------------------- planted illnesses

CURVES = {
    "loss is 0": changed(loss=lambda n: 0.0 if n > 5 else 1.6),
    "stuck": changed(**{f"rewards__{side}": lambda n: 0.0 for side in ("chosen", "rejected")}),
    "no weight moved": changed(lr=lambda n: 0.0),
    "weights lost": changed(grad_norm=lambda n: math.nan if n > 40 else 0.8),
    "slide": changed(rewards__chosen=lambda n: -0.03 * n, rewards__margin=lambda n: 0.02 * n),
    "forgetting": changed(nll=lambda n: 0.8 + 0.01 * n),
    "too easy": changed(rewards__accuracy=lambda n: 1.0 if n > 3 else 0.6),
    "not learning": changed(
        rewards__accuracy=lambda n: 0.5 + 0.03 * math.sin(n), rewards__margin=lambda n: 0.01
    ),
    "margin explosion": changed(rewards__margin=lambda n: 0.5 * n),
    "always clipped": changed(grad_norm=lambda n: 50 + math.sin(n)),
    "length bias": changed(length__chosen=lambda n: 400.0),
    "shift drifts": changed(bco_shift=lambda n: -0.05 * n),
}


@pytest.mark.parametrize("name", CURVES)
def test_an_illness_in_the_metrics_is_named(name, tmp_path, capsys):
    status, findings = ask(capsys, write_run(tmp_path, CURVES[name]))
    assert (status, [finding["name"] for finding in findings]) == (3, [name])
    assert all(findings[0][part] for part in ("seen", "means", "try", "source"))
    assert any(letter.isdigit() for letter in findings[0]["seen"]), "no number is given"


def write_model(folder, tensors, shapes=None):
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors")
    if shapes:
        llm = {"architectures": ["Qwen3ForCausalLM"], "vocab_size": 151936, "hidden_size": 1024}
        llm |= {"intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16}
        llm |= {"num_key_value_heads": 8}
        vision = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24}
        vision |= {"num_attention_heads": 16, "image_size": 448, "patch_size": 14}
        config = {"llm_config": llm, "vision_config": vision, "template": "internvl2_5"}
        config |= {"ps_version": "v2", "dynamic_image_size": True, "use_thumbnail": True}
        (folder / "config.json").write_text(json.dumps(config | {"max_dynamic_patch": 12}))
    return folder


BAD = [
    (torch.zeros(4, 4), "1 tensors are all 0 (w)"),
    (torch.full((4, 4), math.nan), "NaN"),
    (torch.zeros(0), "1 tensors are empty (w)"),  # as ZeRO-3 leaves them
]


@pytest.mark.parametrize("bad, seen", BAD)
def test_weights_of_zeros_or_nans_or_without_a_number_are_named(bad, seen, tmp_path, capsys):
    write_model(tmp_path / "model", {"w": bad, "bias": torch.zeros(4)})
    status, findings = ask(capsys, write_run(tmp_path, healthy_rows()))
    assert (status, findings[0]["name"]) == (3, "weights lost") and seen in findings[0]["seen"]


def test_weights_equal_to_those_of_the_start_are_named(tmp_path, capsys):
    tensors = {"w": torch.ones(4, 4)}
    start = write_model(tmp_path / "start", tensors)
    write_model(tmp_path / "run/model", tensors)
    folder = write_run(tmp_path / "run", healthy_rows(), model_dir=start)
    assert [f["name"] for f in ask(capsys, folder)[1]] == ["no weight moved"]
    save_file({"w": torch.full((4, 4), 2.0)}, folder / "model/model.safetensors")
    assert ask(capsys, folder) == (0, [])


def test_the_rate_of_internvl2_is_25_times_that_of_a_later_model(tmp_path, capsys):
    start = write_model(tmp_path / "start", {"w": torch.ones(2, 2)}, shapes=True)
    folder = write_run(tmp_path / "run", healthy_rows(), model_dir=start, lr=5e-6)
    status, [finding] = ask(capsys, folder)
    assert (status, finding["name"]) == (3, "learning rate")
    assert "5e-06, 25 times the 2e-07 of InternVL3.5" in finding["seen"]
    assert RECIPES["3.5"].source in finding["seen"]
    write_run(folder, healthy_rows(), model_dir=start, lr=5e-6, lora_rank=16)
    assert ask(capsys, folder) == (0, [])


def test_repeated_pairs_and_lengths_of_the_data_are_named(tmp_path, capsys):
    rows = [{k: v for k, v in row.items() if "length" not in k} for row in healthy_rows()]
    folder = write_run(tmp_path, rows)
    meta = write_meta(tmp_path, [(f"right {n} " * 9, f"wrong {n}") for n in range(40)])
    status, findings = ask(capsys, folder, f"--meta={meta}")
    assert [finding["name"] for finding in findings] == ["length bias"]
    assert "characters" in findings[0]["seen"]
    text = (tmp_path / "pairs.jsonl").read_text().splitlines()
    (tmp_path / "pairs.jsonl").write_text("\n".join([*text, *[text[0]] * 5]) + "\n")
    names = [finding["name"] for finding in ask(capsys, folder, f"--meta={meta}")[1]]
    assert names == ["length bias", "repeated pairs"]


MARKS = {
    "length": [
        (f"{'a b c d e ' * (n % 7 + 4)}", f"{'b a d c e ' * (n % 7 + 2)}") for n in range(60)
    ],
    "the first two words": [(f"Let us {n}", f"{n} we see") for n in range(60)],
    "the final answer's form": [
        (f"{n} it is so. Final answer: {n}", f"{n} it is that, surely {n}") for n in range(60)
    ],
}


@pytest.mark.parametrize("mark", MARKS)
def test_a_surface_mark_that_makes_pairs_easy_is_named(mark, tmp_path, capsys):
    folder = write_run(tmp_path, CURVES["too easy"])
    meta = write_meta(tmp_path, MARKS[mark])
    [finding] = [f for f in ask(capsys, folder, f"--meta={meta}")[1] if f["name"] == "too easy"]
    assert f"{mark} alone tells 1" in finding["seen"] or f"{mark} alone tells 9" in finding["seen"]


def test_pairs_without_a_mark_name_none(tmp_path, capsys):
    folder = write_run(tmp_path, CURVES["too easy"])
    pairs = [(f"answer {n} is {n % 5}", f"answer {n} is {(n + 1) % 5}") for n in range(60)]
    [finding] = ask(capsys, folder, f"--meta={write_meta(tmp_path, pairs)}")[1]
    assert "alone" not in finding["seen"]


# --------------------------------------------------------------------------- healthy runs

TRL = {"lr": "learning_rate", "nll": "nll_loss", "rewards/accuracy": "rewards/accuracies"}
TRL |= {"rewards/margin": "rewards/margins"}


def foreign(rows):
    """Rows as TRL's trainers log them: every tenth step, no lengths, no shift."""
    rows = [{k: v for k, v in row.items() if "length" not in k and "bco" not in k} for row in rows]
    return [{TRL.get(k, k): v for k, v in row.items()} | {"epoch": 0.1} for row in rows[9::10]]


def test_healthy_metrics_of_three_trainers_have_no_finding(tmp_path, capsys):
    assert ask(capsys, write_run(tmp_path / "ours", healthy_rows())) == (0, [])
    rows = foreign(healthy_rows(600))
    state = tmp_path / "trl/checkpoint-600/trainer_state.json"
    state.parent.mkdir(parents=True)
    evaluation, summary = {"eval_loss": 0.0, "step": 600}, {"train_loss": 1.5, "step": 600}
    state.write_text(json.dumps({"log_history": [*rows, evaluation, summary]}))
    assert ask(capsys, tmp_path / "trl") == (0, [])
    log = tmp_path / "swift/logging.jsonl"
    log.parent.mkdir()
    for n, row in enumerate(rows):
        del row["step"]
        row["global_step/max_steps"] = f"{10 * n + 10}/600"
    log.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (log.parent / "args.json").write_text(json.dumps({"learning_rate": 5e-6, "model": "there"}))
    assert ask(capsys, log.parent) == (0, [])


def test_a_run_of_a_model_that_is_not_built_here_is_examined(tmp_path, capsys):
    state = {"log_history": foreign(CURVES["forgetting"] * 2)}
    (tmp_path / "trainer_state.json").write_text(json.dumps(state))
    (tmp_path / "config.json").write_text('{"model_type": "qwen2_5_vl", "vision_config": {}}')
    status, [finding] = ask(capsys, tmp_path)
    assert (status, finding["name"]) == (3, "forgetting")
    sys.argv = ["doctor.py", str(tmp_path)]
    with pytest.raises(SystemExit):
        run(doctor.main)
    assert "its learning rate is not judged: " in capsys.readouterr().err


def test_of_several_checkpoints_the_last_is_read_whenever_it_was_copied(tmp_path, capsys):
    for step, loss in ((1000, 1.0), (200, math.nan)):  # written in this order
        state = tmp_path / f"checkpoint-{step}/trainer_state.json"
        state.parent.mkdir()
        state.write_text(json.dumps({"log_history": [{"step": step, "loss": loss}]}))
    assert ask(capsys, tmp_path) == (0, [])


def test_a_step_is_called_by_its_number_where_not_every_one_is_logged(tmp_path, capsys):
    rows = foreign(healthy_rows(600))
    for row in rows[6:]:
        row["loss"] = 0.0
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": rows}))
    assert "at 54 steps, first at 70" in ask(capsys, tmp_path)[1][0]["seen"]
    for n, row in enumerate(rows):
        del row["step"]
        row["global_step/max_steps"] = f"{10 * n + 10}/600"
    (tmp_path / "logging.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "at 54 steps, first at 70" in ask(capsys, tmp_path / "logging.jsonl")[1][0]["seen"]
    for row in rows:
        row |= {"loss": 1.6, "rewards/accuracies": 1.0}
    (tmp_path / "logging.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    [easy] = ask(capsys, tmp_path / "logging.jsonl")[1]
    assert easy["seen"] == "accuracy is 1.0 from step 10 of 600 on"


def test_what_was_looked_at_is_told_so_that_nothing_is_skipped_in_silence(tmp_path, capsys):
    folder = write_run(tmp_path, healthy_rows(), meta="elsewhere/meta.json")
    sys.argv = ["doctor.py", str(folder)]
    run(doctor.main)
    nothing = "0 files of weights, 0 of the start's, 0 of 0 pairs"
    assert capsys.readouterr().err == f"looked at 60 rows, {nothing}\n"


def test_a_toy_run_has_no_finding(trained, capsys):
    assert ask(capsys, trained / "base") == (0, [])


@pytest.mark.parametrize("name", ["loss is 0", "slide", "weights lost", "too easy"])
def test_an_illness_is_named_in_the_metrics_of_trl(name, tmp_path, capsys):
    rows = [{TRL.get(k, k): v for k, v in row.items()} for row in CURVES[name]]
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": rows}))
    assert name in [finding["name"] for finding in ask(capsys, tmp_path)[1]]


# --------------------------------------------------------------------------- while a run goes on


def test_each_illness_is_said_once_while_the_run_goes_on(tmp_path, capsys):
    rows, cfg = [], TrainConfig(out_dir=tmp_path)
    watch = Tracker(cfg, rows, STEPS)
    for row in CURVES["forgetting"]:
        rows.append(row)
        watch()
    [line] = capsys.readouterr().err.splitlines()
    assert "diagnosis at step" in line and "forgetting: NLL" in line
    healthy = healthy_rows()
    assert not any(diagnose(healthy[: n + 1], STEPS, vars(cfg)) for n in range(STEPS))
    clipped = [row | {"grad_norm": 50.0} for row in healthy]
    assert list(diagnose(clipped, STEPS, vars(cfg))) == ["always clipped"]


# --------------------------------------------------------------------------- bad input


def test_text_is_for_people_and_bad_folders_end_with_status_2(tmp_path, capsys, monkeypatch):
    write_run(tmp_path, CURVES["slide"])
    monkeypatch.setattr(sys, "argv", ["doctor.py", str(tmp_path)])
    with pytest.raises(SystemExit) as stop:
        run(doctor.main)
    text = capsys.readouterr().out
    assert stop.value.code == 3 and "60 steps, findings: 1" in text
    assert all(f"  {part} " in text for part in ("seen", "means", "try", "source"))
    assert ask(capsys, tmp_path / "absent")[0] == 2
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    assert ask(capsys, tmp_path)[0] == 2
    (tmp_path / "model").mkdir()
    (tmp_path / "model/model.safetensors").write_bytes(b"not tensors")
    assert ask(capsys, write_run(tmp_path, healthy_rows()))[0] == 2
    (tmp_path / "trainer_state.json").write_text('{"log_history": 3}')
    assert ask(capsys, tmp_path / "trainer_state.json")[0] == 2
    odd = [row | {"step": math.nan, "length/rejected": 0.0} for row in healthy_rows()]
    assert ask(capsys, write_run(tmp_path / "odd", odd))[0] == 3  # and not a traceback
    for value in ([], {"a": 1}, "x", None):
        odd = dict.fromkeys(("model_dir", "meta", "lr", "max_grad_norm", "beta", "loss"), value)
        assert ask(capsys, write_run(tmp_path / "odd", healthy_rows(), **odd))[0] == 0
