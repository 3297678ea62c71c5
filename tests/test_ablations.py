"""bench/ablations.py: what its variants change, that results are cached and resumed, and the statistics of its report."""

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import some_trajectories

import cwrpo
import train

sys.path.insert(0, str(Path(__file__).parent.parent / "bench"))
import ablation_report
import ablations


def arguments(tmp_path: Path, model: Path, **more: Any) -> argparse.Namespace:
    flags = f"--model {model} --tasks-per-source 1 --rollouts-per-task 2 --max-turns 2 --max-context 1000 --save-every 1"
    return argparse.Namespace(**{"variants": ["full"], "seeds": [0], "steps": 2, "eval_tasks": 1, "flags": flags,
                                 "work": tmp_path / "work", "results": tmp_path / "results"} | more)


@pytest.mark.parametrize(("name", "more"), [
    ("ablations", {"variants": list(ablations.VARIANTS), "seeds": [3, 4, 5, 6, 7], "steps": 40, "flags": ""}),
    ("default", {"variants": ["full", "grpo"], "seeds": [3, 4, 5], "steps": 50,
                 "flags": "--model tiny --max-turns 12 --temperature 0.3"}),
    ("default", {"variants": ["full"], "seeds": [6, 7], "steps": 50, "flags": "--model tiny --max-turns 12 --temperature 0.3"})])
def test_the_results_that_are_kept_stand_for_the_flags_of_their_command(name: str, more: dict[str, Any], tmp_path: Path) -> None:
    """docs/ABLATIONS.md has the commands; another flag in SHARED would be refused, and a result that is missing be to do."""
    assert ablations.to_do(arguments(tmp_path, tmp_path, eval_tasks=64, results=ablations.RESULTS.parent / name, **more)) == []


def test_the_flags_of_the_default_results_are_the_presets() -> None:
    """Where the preset moves on, bench/results/default is no longer the default run and has to be made anew."""
    preset = vars(train.parse_args([]))
    flags = json.loads((ablations.RESULTS.parent / "default/full-3.json").read_text())["flags"]
    other = {"seed", "quiet", "no_baselines"}
    assert {k: v for k, v in vars(train.parse_args(flags)).items() if k not in other} == \
        {k: v for k, v in preset.items() if k not in other}


def test_every_variant_is_flags_that_train_knows() -> None:
    for name, words in ablations.VARIANTS.items():
        args = train.parse_args(words.split())
        assert name == "full" or words, name
        train.check_flags(args)


def test_no_two_variants_are_the_same_run() -> None:
    """reinforce-1024 has the flags of kl-off, and a part that train.py has no flag for."""
    flags = [vars(train.parse_args(words.split())) for name, words in ablations.VARIANTS.items() if name != "reinforce-1024"]
    assert [flags.index(each) for each in flags] == list(range(len(flags)))


def test_dr_grpo_centres_and_does_not_divide() -> None:
    rewards, groups = [1.0, 0.0, -0.2, 0.6], ["a", "a", "b", "b"]
    with ablations.historical("dr-grpo"):
        assert train.group_advantages(rewards, groups).tolist() == pytest.approx([0.5, -0.5, -0.4, 0.4])
    assert train.group_advantages(rewards, groups).tolist() == pytest.approx([1, -1, -1, 1])


def test_reinforce_compares_with_the_step_and_sees_the_first_1024_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list = []
    monkeypatch.setattr(cwrpo, "update", lambda model, optimizer, taus, *rest: seen.extend(taus))
    tau, = some_trajectories(1)
    tau.tokens, tau.mask, tau.sampled_logprobs = [1] * 2000, [0, 1] * 1000, [0.0, -1.0] * 1000
    with ablations.historical("reinforce-1024"):
        assert train.group_advantages([1.0, 0.0], ["a", "b"]).tolist() == [0.5, -0.5]
        train.update(None, None, [tau], None, None)
    assert (len(seen[0].tokens), len(seen[0].mask), len(seen[0].sampled_logprobs)) == (1024, 1024, 1024)
    assert len(tau.tokens) == 2000


def test_a_run_that_was_cut_off_goes_on_and_a_result_is_not_made_twice(tiny_model: Path, tmp_path: Path,
                                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    args, steps, update = arguments(tmp_path, tiny_model), [], train.update

    def cut_off(*words: Any) -> Any:
        steps.append(1)
        if len(steps) == 2:
            raise KeyboardInterrupt
        return update(*words)

    monkeypatch.setattr(train, "update", cut_off)
    with pytest.raises(KeyboardInterrupt):
        ablations.run("full", 0, args)
    assert ablations.to_do(args) == [("full", 0)]
    ablations.run("full", 0, args)
    assert len(steps) == 3  # the first step was not taken again
    assert ablations.to_do(args) == []
    result = json.loads((tmp_path / "results" / "full-0.json").read_text())
    assert (result["trajectories"], len(result["curves"]["reward"]), len(result["records"])) == (12, 2, 7)
    with pytest.raises(ValueError, match="was begun with another lr"):
        ablations.run("full", 0, arguments(tmp_path, tiny_model, flags=args.flags + " --lr 1"))
    with pytest.raises(ValueError, match="was made with other flags"):
        ablations.to_do(arguments(tmp_path, tiny_model, steps=3))


def test_the_main_variants_come_first_and_alone_have_seeds_6_and_7(tmp_path: Path) -> None:
    args = arguments(tmp_path, tmp_path, variants=list(ablations.VARIANTS), seeds=[5, 6])
    left = ablations.to_do(args)
    assert [name for name, _ in left[:5]] == list(ablations.MAIN)
    assert [name for name, seed in left if seed == 6] == list(ablations.MAIN)


# ---- the report


def made(seed: int, iid: list[float], ood: list[float], accuracy: list[float], **more: Any) -> dict[str, Any]:
    """A result with these scores of toy_math (IID) and toy_aime (OOD)."""
    scores = [("toy_math", score) for score in iid] + [("toy_aime", score) for score in ood]
    records = [{"task_id": f"{source}-{seed}-{i}", "source": source, "score": score, "operators": 5, "turns": 4, "feasible": True,
                "hacks": {"no_op": i % 2}, "workflow": "Custom"} for i, (source, score) in enumerate(scores)]
    curves = dict.fromkeys(ablations.CURVES, accuracy)
    return {"variant": "full", "seed": seed, "warm_start": "w", "trajectories": 10 * len(accuracy), "curves": curves,
            "records": records, **more}


def test_a_difference_is_paired_by_task_and_its_interval_is_as_wide_as_the_seeds_make_it() -> None:
    full = {0: made(0, [0, 1] * 20, [0], [0]), 1: made(1, [1, 0] * 20, [0], [0])}
    better = {0: made(0, [1, 1] * 20, [0], [0]), 1: made(1, [1, 0] * 20, [0], [0])}  # +0.5 in one seed, 0 in the other
    mean, low, high = ablation_report.difference(full, better, ood=False)
    assert mean == pytest.approx(0.25)
    assert (low, high) == (pytest.approx(0.0, abs=0.02), pytest.approx(0.55, abs=0.1))
    assert ablation_report.difference(full, better, ood=True) == (0, 0, 0)


def test_steps_are_counted_to_where_the_mean_of_five_reaches_the_goal() -> None:
    values = [0.0] * 5 + [1.0] * 10
    assert ablation_report.steps_to(values, 0.6) == 8
    assert ablation_report.steps_to([1.0] * 4, 0.6) is None  # fewer than five are no mean
    assert ablation_report.steps_to(values, 1.1) is None


def test_a_workflow_counts_for_the_last_operator_in_it_that_answers() -> None:
    result = made(0, [1, 0, 1, 0], [1], [0])
    workflows = ("Custom -> Programmer -> Format", "(Programmer -> Review) * 2 -> Plan", "[Plan, Custom] -> Verify", "Plan")
    for record, workflow in zip(result["records"], workflows, strict=False):  # the fifth is of an OOD source
        record["workflow"] = workflow
    table = ablation_report.last_table({"full": {0: result}}).splitlines()
    assert [line.replace(" ", "") for line in table if ":" in line] == [
        "|Programmer|50%:0.50|", "|Custom|25%:1.00|", "|none|25%:0.00|"]


def write(directory: Path, name: str, result: dict[str, Any]) -> None:
    (directory / f"{name}-{result['seed']}.json").write_text(json.dumps(result))


def test_the_report_comes_from_the_files_alone(tmp_path: Path) -> None:
    rising = np.linspace(0, 1, 20).tolist()
    for seed in (0, 1):
        write(tmp_path, "full", made(seed, [1, 1, 0, 1], [0, 1], rising))
        write(tmp_path, "no-release", made(seed, [0, 1, 0, 1], [0, 0], rising))
        (tmp_path / f"reachable-{seed}.json").write_text(json.dumps({"seed": seed, "accuracy": 0.8}))
    text = ablation_report.report(tmp_path, ["full", "no-mask", "no-release"], tmp_path)
    row = next(line for line in text.splitlines() if line.startswith("| no-release"))
    assert row.split("|")[2:5] == [" 2     ", " 0.500 ± 0.000 ", " 0.000 ± 0.000 "]
    assert "-0.250 (" in row
    assert re.search(r"\| full +\| 170 ", text)  # 0.72 is the mean of steps 13 to 17
    assert (tmp_path / "ablations.png").exists()
    assert (tmp_path / "dynamics.png").exists()


@pytest.mark.parametrize(("name", "other"), [("warm_start", "v"), ("trajectories", 7)])
def test_what_cannot_be_compared_is_not(tmp_path: Path, name: str, other: Any) -> None:
    write(tmp_path, "full", made(0, [1], [1], [1.0]))
    write(tmp_path, "no-mask", made(0, [1], [1], [1.0], **{name: other}))
    with pytest.raises(ValueError, match=f"different {name}"):
        ablation_report.load(tmp_path, ["full", "no-mask"])
