import copy
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
import yaml

from eval.checkpoint import Checkpoint, CheckpointError
from eval.studies.plots import apart
from eval.studies.results import Results, fingerprint, record_of, start_of
from eval.studies.tables import cells_of, score_table, tables
from eval.study import check_names, finish, main, runs_of, train
from eval.tasks.built_in import questions_of
from models import StagePlan
from models.cost import plan_cost
from models.schedules import ScheduleError
from recipes.resolved import dump_recipe
from recipes.schema import load_recipe
from recipes.study import load_study

ROOT = Path(__file__).resolve().parents[1]
STUDY = {
    "name": "tiny",
    "recipe": "recipes/quickstart.yaml",
    "set": ["align=null", "train.max_seconds=null", "train.max_steps=2", "train.precision=fp32", "train.log_steps=1"],
    "seeds": [0, 1],
    "tasks": ["easy_vqa"],
    "reference": "dense",
    "arms": {"dense": {"set": ["model.stages=null"]}, "window": {"set": ["model.stages={enter: 0, exit: 3}"]}},
}


@pytest.fixture
def study(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    file = tmp_path / "study.yaml"
    file.write_text(yaml.safe_dump({**STUDY, "results": str(tmp_path / "results")}))
    return file


def record(arm, seed, right, *, flops=1e12):
    """A result whose answers are right where `right` says so."""
    score = sum(map(int, right)) / len(right)
    phase = {"phase": "tune", "steps": 2, "samples": 64, "tokens": 640, "seconds": 1.0, "precision": "fp32", "ranks": 1}
    return {
        "arm": arm,
        "seed": seed,
        "recipe": "x",
        "limit": None,
        "date": "2026-01-02",
        "device": "CPU",
        "versions": {"torch": "1", "transformers": "2"},
        "phases": [{**phase, "flops": flops, "dense_flops": 2e12}],
        "curve": [[flops / 2, 3.0], [flops, 2.0]],
        "scores": {
            "easy_vqa": {
                "trained": {
                    "score": score,
                    "metrics": {"accuracy": score, "shape": 0.5},
                    "right": right,
                    "flops": flops,
                    "dense_flops": 2e12,
                }
            }
        },
    }


def finish_run(study, out, arm):
    """Leaves what a finished training of an arm leaves of its recipe."""
    loaded = load_study(study)
    [run] = runs_of(loaded, out, [arm], [0])
    (run.folder / "final").mkdir(parents=True)
    (run.folder / "final/recipe.yaml").write_text(dump_recipe(run.recipe))


def test_a_finished_run_of_another_recipe_is_not_scored(study, capsys, monkeypatch):
    monkeypatch.setattr("eval.study.score", lambda *_, **__: pytest.fail("scored"))
    out = study.parent / "out"
    finish_run(study, out, "window")
    fields = yaml.safe_load(study.read_text())
    fields["arms"]["window"]["set"].append("train.learning_rate.projector=0.5")
    study.write_text(yaml.safe_dump(fields))
    assert main([str(study), "--out", str(out), "--arms", "window", "--seeds", "0"]) == 1
    told = capsys.readouterr().err
    assert "window-seed0: got a run with train.learning_rate.projector: 0.001, expected 0.5; move it away" in told


def test_the_studies_of_the_repository_are_valid(monkeypatch):
    monkeypatch.chdir(ROOT)
    files = sorted((ROOT / "recipes/studies").glob("*.yaml"))
    assert files
    for file in files:
        study = load_study(file)
        check_names(study)
        runs = runs_of(study, Path("outputs"), list(study.arms), study.seeds[:1])
        assert [run.arm for run in runs] == list(study.arms)
        results = Results(Path(study.results))
        assert all(results.file(run.arm, run.seed).is_relative_to("docs/results") for run in runs)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"reference": "none"}, "reference: got 'none', expected an arm: dense, window"),
        ({"tasks": ["pope"]}, "tasks: got 'pope', expected easy_vqa, scenes, scenes_compositional"),
        ({"seeds": []}, "seeds: got []"),
        ({"seeds": [0, 1, 0]}, "seeds: got 0 twice, expected each once"),
        ({"tasks": ["scenes", "scenes"]}, "tasks: got scenes twice, expected each once"),
        (
            {"arms": {"dense": {"schedules": ["vtw", "trained", "vtw"]}}},
            "arms.dense.schedules: got vtw twice, expected each once",
        ),
        ({"picture": ["dense", "kv"]}, "picture: got 'kv', expected an arm: dense, window"),
        ({"seed": [0]}, "seed: unknown key; did you mean 'seeds'?"),
        ({"arms": {"dense": {"sett": []}}}, "arms.dense.sett: unknown key; did you mean 'set'?"),
        (
            {"reference": "dense", "arms": {"dense": {"schedules": ["best"]}}},
            "schedules: got 'best', expected trained, ",
        ),
        (  # which reads a text tower that no study gives it
            {"arms": {"dense": {"schedules": ["trained", "cdpruner"]}}},
            "arms.dense.schedules: 'cdpruner': schedule CDPruner: got a checkpoint without the text tower",
        ),
        (
            {"arms": {"dense": {"set": ["model.config=recipes/configs/qwen2.5-vl-3b"], "schedules": ["visionzip"]}}},
            "arms.dense.schedules: 'visionzip': schedule VisionZip: got ",
        ),
        ({"arms": {"dense": {}, "x/y": {}}}, "arms.x/y: got 'x/y', expected letters, digits"),
        ({"arms": {"dense": {}, "..": {}}}, "got '..', expected letters, digits"),
        ({"name": "a/b"}, "name: got 'a/b', expected letters, digits"),
        ({"set": ["seed=3"]}, "set: got 'seed=3', which the study sets for each run, expected other keys"),
        (
            {"arms": {"dense": {"set": ["output = x"]}}},
            "arms.dense.set: got 'output = x', which the study sets for each run",
        ),
        (
            {"arms": {"dense": {"set": ["data.format=plain"]}}},
            "arms.dense: data.format: got plain, which has no questions, expected vicuna_v1 or chat_template",
        ),
        (
            {"arms": {"dense": {"set": ["model.stages=[{name: a, plan: null}, {name: vtw, plan: null}]"]}}},
            "arms.dense: model: plans: got the name 'vtw'",
        ),
    ],
)
def test_a_wrong_study_is_one_line(study, change, words, capsys):
    study.write_text(yaml.safe_dump({**yaml.safe_load(study.read_text()), **change}))
    assert main([str(study), "--out", str(study.parent / "out")]) == 2
    told = capsys.readouterr().err.strip()
    assert told.count("\n") == 0
    assert words in told


@pytest.mark.parametrize("option", [("--report",), ("--reference", "dense")])
def test_tables_of_no_results_are_refused(study, capsys, option):
    assert main([str(study), *option]) == 2
    assert capsys.readouterr().err.strip() == (
        f"results: got {study.parent}/results, expected the folder of a study's results"
    )
    assert not (study.parent / "results").exists()
    (study.parent / "results").mkdir()
    assert main([str(study), *option]) == 2
    assert capsys.readouterr().err.strip() == (
        f"{study.parent}/results: got no result of the study's runs, expected some"
    )


def test_a_wrong_arm_is_found_before_anything_is_trained(study, capsys):
    fields = yaml.safe_load(study.read_text())
    fields["arms"]["window"]["set"] = ["model.stages={enter: 5, exit: 3}"]
    study.write_text(yaml.safe_dump(fields))
    assert main([str(study), "--out", str(study.parent / "out")]) == 2
    assert "exit" in capsys.readouterr().err
    assert not (study.parent / "out/runs").exists()
    fields["arms"]["window"]["set"] = []
    study.write_text(yaml.safe_dump(fields))
    assert main([str(study), "--out", str(study.parent / "out"), "--arms", "narrow"]) == 2
    assert capsys.readouterr().err.strip() == "--arms: got 'narrow', expected dense, window"


def test_a_result_of_another_recipe_is_refused(study, capsys):
    results = Results(study.parent / "results")
    results.folder.mkdir()
    results.write(record("dense", 0, "10"))
    assert main([str(study), "--out", str(study.parent / "out"), "--report"]) == 2
    told = capsys.readouterr().err
    assert "dense-seed0.json: got a result of another recipe" in told


def test_a_result_of_another_start_model_is_refused(study, capsys):
    start = study.parent / "start"
    shutil.copytree(ROOT / "recipes/configs/quickstart", start)
    fields = yaml.safe_load(study.read_text())
    study.write_text(yaml.safe_dump({**fields, "seeds": [0], "set": [f"model.checkpoint={start}", "align=null"]}))
    command = [str(study), "--out", str(study.parent / "out")]
    keep_results(study, ["dense", "window"])
    assert main(command) == 0  # it is not here: whatever it was
    (start / "model.safetensors").write_bytes(b"one")
    assert main(command) == 2
    told = capsys.readouterr().err
    assert "dense-seed0.json: got a result of another start model" in told
    assert main([*command, "--report"]) == 0  # of the results alone
    keep_results(study, ["dense", "window"])
    assert main(command) == 0
    (start / "model.safetensors").write_bytes(b"another")
    assert main(command) == 2
    capsys.readouterr()
    (study.parent / "mine").mkdir()
    assert main([*command, "--results", str(study.parent / "mine"), "--report"]) == 2
    assert "mine: got no result of the study's runs" in capsys.readouterr().err  # and none of another start


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"arm": "dense", "se', None, json.dumps(record("dense", 1, "10"))]
)
def test_a_result_that_is_none_is_named(study, capsys, content):
    file = study.parent / "results/dense-seed0.json"
    file.parent.mkdir()
    if content is None:
        file.mkdir()
    else:
        file.write_text(content)
    assert main([str(study), "--out", str(study.parent / "out"), "--report"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{file}: got no result of dense, seed 0; expected ")


@pytest.mark.parametrize("name", ["results/table.md", "results/curves.png", "out/harness.log"])
def test_a_folder_in_the_way_of_a_study_is_named(study, capsys, name):
    (study.parent / name).mkdir(parents=True)
    assert main([str(study), "--out", str(study.parent / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"got a folder named {study.parent / name}, expected none" in line


def test_a_study_of_the_first_questions_asks_those_and_says_so(study, monkeypatch, capsys):
    fields = {**yaml.safe_load(study.read_text()), "limit": 3, "seeds": [0]}
    study.write_text(yaml.safe_dump(fields))
    asked = []

    def scored(study, run, *, limit, **_):
        asked.append(limit)
        return {**record(run.arm, run.seed, "101"), "recipe": fingerprint(run.recipe), "limit": limit}

    monkeypatch.setattr("eval.study.score", scored)
    for arm in ("dense", "window"):
        finish_run(study, study.parent / "out", arm)
    assert main([str(study), "--out", str(study.parent / "out")]) == 0
    told = capsys.readouterr().out
    assert asked == [3, 3]
    assert "| window | 1 | 66.67 % |" in told
    assert "Tested on the first 3 questions." in told
    written = (study.parent / "results/table.md").read_text()
    assert main([str(study), "--out", str(study.parent / "out"), "--reference", "window"]) == 0
    assert "| to window, points |" in capsys.readouterr().out
    assert (study.parent / "results/table.md").read_text() == written
    assert main([str(study), "--out", str(study.parent / "out"), "--reference", "narrow"]) == 2
    assert "--reference: got 'narrow', expected dense, window" in capsys.readouterr().err
    study.write_text(yaml.safe_dump({**fields, "limit": 4}))
    assert main([str(study), "--out", str(study.parent / "out"), "--report"]) == 2
    assert "dense-seed0.json: got a result of another limit" in capsys.readouterr().err


def test_the_table_counts_seeds_and_pairs_questions():
    ours = [record("window", seed, right, flops=5e11) for seed, right in enumerate(("1110", "1111"))]
    theirs = [record("dense", seed, right) for seed, right in enumerate(("1100", "1100", "0000"))]
    cells = cells_of("easy_vqa", ["dense", "window", "absent"], ours + theirs)
    assert [(cell.arm, cell.seeds) for cell in cells] == [("dense", [0, 1, 2]), ("window", [0, 1])]
    heading, dense, window = score_table(cells, "dense", ["a", "a", "b", "b"])
    row = dict(zip(heading, window, strict=True))
    assert row["seeds"] == "2"
    assert row["accuracy"] == "87.50 ± 12.50 %"
    # of the seeds that both have: +25 and +50 points; image a adds 0, image b 75
    assert row["to dense, points"] == "+37.50 ± 12.50"
    assert row["over images"] == "+0.00 to +75.00"
    assert (row["training"], row["of dense"], row["prompt of dense"]) == ("0.5 TFLOP", "25.0 %", "25.0 %")
    assert dict(zip(heading, dense, strict=True))["to dense, points"] == "reference"


def test_a_shorter_run_is_named_and_costs_less_than_dense():
    shorter = record("shorter", 0, "10", flops=1e12)
    shorter["phases"] = [{**shorter["phases"][0], "steps": 1, "dense_flops": 1e12}]
    told = tables("tiny", "dense", ["dense", "shorter"], [record("dense", 0, "11", flops=2e12), shorter])
    assert "| 2.0 TFLOP | 100.0 % | 100.0 % |" in told
    assert "| 1.0 TFLOP | 50.0 % | 50.0 % |" in told
    assert "All runs took 2 optimizer steps, except shorter (1)." in told


def test_a_task_or_schedule_that_is_new_in_a_study_is_asked_of_the_kept_run(study, monkeypatch, capsys):
    fields = yaml.safe_load(study.read_text())
    fields["arms"]["window"]["schedules"] = ["dense", "trained"]
    study.write_text(yaml.safe_dump({**fields, "seeds": [0]}))
    out, results, loaded = study.parent / "out", Results(study.parent / "results"), load_study(study)
    results.folder.mkdir()
    asked = len(questions_of("easy_vqa"))
    for run in runs_of(loaded, out, list(loaded.arms), loaded.seeds):
        one = {**record(run.arm, 0, "1" * asked), "recipe": fingerprint(run.recipe)}
        one["scores"]["scenes"] = one["scores"]["easy_vqa"]  # which the study no longer asks for
        results.write(one)

    def scored(study, run, **_):
        told = record(run.arm, run.seed, "0" * asked)
        told["scores"]["easy_vqa"] |= {"dense": told["scores"]["easy_vqa"]["trained"]}
        return {**told, "recipe": fingerprint(run.recipe)}

    monkeypatch.setattr("eval.study.score", scored)
    before = results.file("window", 0).read_text()
    assert main([str(study), "--out", str(out)]) == 1  # no trained run is there to ask
    told = capsys.readouterr()
    assert "window-seed0.json: got no answers to easy_vqa under dense, and no " in told.err
    assert "| window" not in told.out
    assert results.file("window", 0).read_text() == before

    finish_run(study, out, "window")
    assert main([str(study), "--out", str(out)]) == 0
    told = capsys.readouterr().out
    assert told.count("its result is there") == 1
    assert told.index("| window, dense | 1 | 0.00 % |") < told.index("| window | 1 | 0.00 % |")  # the study's order
    assert results.read("window", 0)["scores"].keys() == {"easy_vqa", "scenes"}


def test_a_schedule_that_a_trained_model_refuses_is_one_line(study, monkeypatch, capsys):
    def refused(*_, **__):
        raise ScheduleError("schedule: refused")

    monkeypatch.setattr("eval.study.score", refused)
    finish_run(study, study.parent / "out", "dense")
    assert main([str(study), "--out", str(study.parent / "out"), "--arms", "dense", "--seeds", "0"]) == 1
    assert capsys.readouterr().err == "schedule: refused\n"


SAVES = """
import signal, sys, time
def save(number, _):
    time.sleep(1)  # longer than subprocess.run would wait before it kills
    print(signal.Signals(number).name, flush=True)
    sys.exit(0)
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, save)
print("ready", flush=True)
time.sleep(60)
"""


def test_a_record_counts_the_visual_tokens_that_training_saw(monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)  # a family whose images differ in size, so its config names no count
    recipe = load_recipe("recipes/qwen2_5_vl_3b_fused.yaml", [f"output={tmp_path}"])
    run = {"steps": 2, "samples": 10, "tokens": 1000, "visual_tokens": 600, "seconds": 1.0}
    (tmp_path / "final").mkdir()
    (tmp_path / "final/run.json").write_text(json.dumps({**run, "precision": "bf16", "ranks": 1}))
    checkpoint = Checkpoint("run", ROOT / "recipes/configs/qwen2.5-vl-3b", "chat_template", "processor", {}, [])
    (phase,) = record_of("fused", 0, recipe, checkpoint, {})["phases"]
    text_config = checkpoint.config.text_config
    fused, dense = (plan_cost(text_config, plan, visual=60, text=40).flops for plan in (StagePlan(9, 27), None))
    assert (phase["visual_tokens"], phase["flops"], phase["dense_flops"]) == (600, 30 * fused, 30 * dense)

    (tmp_path / "final/run.json").write_text(json.dumps({"steps": 2}))
    with pytest.raises(CheckpointError, match="cannot be read"):
        record_of("fused", 0, recipe, checkpoint, {})


def keep_results(file, arms, right="10"):
    """Keeps a result of each arm with each seed, as if it had been trained."""
    loaded = load_study(file)
    total = len(questions_of("easy_vqa"))
    for run in runs_of(loaded, file.parent / "out", arms, loaded.seeds):
        found = record(run.arm, run.seed, (right * total)[:total])
        Results(Path(loaded.results)).write(
            {**copy.deepcopy(found), "recipe": fingerprint(run.recipe), "start": start_of(run.recipe.model)}
        )


def test_several_windows_are_drawn_over_the_layers(study):
    arms = {
        "dense": {"set": ["model.stages=null"]},
        "first": {"set": ["model.stages={enter: 0, exit: 3}"], "label": "layers 0-2"},
        "kv": {"set": ["model.stages={enter: 2, exit: 5, update: kv}"]},
        "last": {"set": ["model.stages={enter: 5, exit: 8}"]},
    }
    fields = {**yaml.safe_load(study.read_text()), "arms": arms, "picture": ["dense", "first"]}
    study.write_text(yaml.safe_dump(fields))
    results, options = study.parent / "results", [str(study), "--out", str(study.parent / "out"), "--report"]

    keep_results(study, ["dense", "first", "kv"])
    assert main(options) == 0
    drawn = {name: (results / name).read_bytes() for name in ("accuracy.png", "curves.png")}
    assert not (results / "windows.png").exists()  # there is one window to see

    keep_results(study, ["last"])
    assert main(options) == 0
    assert (results / "windows.png").stat().st_size > 1000
    for name, before in drawn.items():
        assert (results / name).read_bytes() == before  # of the chosen arms alone


def test_names_that_would_lie_on_each_other_move_up():
    places = [(1.0, 50.0, "a"), (1.2, 50.5, "b"), (1.1, 52.0, "c"), (9.0, 50.1, "d")]
    found = {name: (x, y) for x, y, name in apart(places, width=1.0, gap=2.0)}
    assert found == {"a": (1.0, 50.0), "b": (1.2, 52.0), "c": (1.1, 54.0), "d": (9.0, 50.1)}


@pytest.mark.parametrize(("number", "reaches"), [(signal.SIGINT, "both"), (signal.SIGTERM, "the study alone")])
def test_a_stopped_study_waits_until_its_training_has_saved(number, reaches):
    with subprocess.Popen([sys.executable, "-c", SAVES], stdout=subprocess.PIPE) as child:
        assert child.stdout.readline() == b"ready\n"

        def stop():
            if reaches == "both":  # as a terminal sends it
                child.send_signal(number)
            os.kill(os.getpid(), number)

        timer = threading.Timer(0.2, stop)
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            finish(child)
        timer.join()
        assert (child.returncode, child.stdout.read()) == (0, f"{number.name}\n".encode())
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_studies_beside_each_other_on_several_gpus_meet_at_different_ports(study, monkeypatch):
    started = []

    class Ended:
        returncode = 0

        def __init__(self, command, **_):
            started.append(command)

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(subprocess, "Popen", Ended)
    loaded = load_study(study)
    for run in runs_of(loaded, study.parent / "out", ["dense", "window"], [0]):
        assert not train(loaded, run)
    ports = {command[command.index("--master_port") + 1] for command in started}
    assert [Path(command[0]).name for command in started] == ["deepspeed", "deepspeed"]
    assert len(ports) == 2

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert not train(loaded, run)
    assert started[-1][0] == sys.executable


@pytest.mark.slow
def test_a_study_trains_keeps_and_goes_on(study, capsys, monkeypatch):
    """One arm is trained and answers; whole results are read again without training; the table has both arms."""
    out = study.parent / "out"

    def machines():
        pytest.fail("a run that was trained in fp32 answers in the machine's precision")

    monkeypatch.setattr("eval.study.dtype", machines)
    options = [str(study), "--out", str(out)]
    assert main([*options, "--arms", "window", "--seeds", "0", "--limit", "16"]) == 0
    assert "window, seed 0: easy_vqa trained " in capsys.readouterr().out
    assert (out / "runs/window-seed0/final").is_dir()
    assert not list((study.parent / "results").glob("*.json"))  # a part of the questions is no result

    keep_results(study, ["dense", "window"])
    assert main(options) == 0
    told = capsys.readouterr().out
    assert told.count("its result is there") == 4
    assert "| window | 2 | 50.01 ± 0.00 % |" in told
    table = (study.parent / "results/table.md").read_text()
    assert table in told
    assert (study.parent / "results/accuracy.png").stat().st_size > 1000
    assert (study.parent / "results/curves.png").stat().st_size > 1000
