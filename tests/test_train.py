"""train.py and eval.py as their users run them: flags, errors, resume, determinism, learning."""

import argparse
import errno
import json
import random
import re
import resource
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from forked import Program
from safetensors import SafetensorError
from safetensors.torch import load_file
from scripted import TRAIN_WITH_LEGAL_EDITS

import eval as evaluation
import sandbox
import train
import warmstart
from cwrpo import UpdateConfig, group_advantages, update
from flags import UsageError
from lora import add_lora, disable_lora, lora_parameters
from policy import InProcessSampler
from qwen3 import Qwen3
from rollout import Job, RolloutConfig, Trajectory, rollout
from rundir import RunDir, RunError, naming_lacks
from tasks import toy_tasks
from world import World, load_policy

ROOT = Path(__file__).parent.parent
SMALL = ["--tasks-per-source", "1", "--rollouts-per-task", "2", "--eval-tasks", "2", "--max-turns", "3", "--no-baselines",
         "--save-every", "1", "--max-context", "1200"]
TIMINGS = re.compile(r"seconds|tokens_per_second")


def command(*words: object) -> list[str]:
    return [sys.executable, *map(str, words)]


def fails(capsys: pytest.CaptureFixture, main: object, *words: object) -> str:
    """Run a program's main with these arguments; it must end with a message and a non-zero exit, without a traceback."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["program", *map(str, words)])
        with pytest.raises(SystemExit) as exit_:
            main()
    message = exit_.value.code if isinstance(exit_.value.code, str) else capsys.readouterr().err
    assert exit_.value.code not in (0, None)
    assert "Traceback" not in message
    return message


# ---- pure functions of (seed, step) -----------------------------------------------------------------------------------


def arguments(*words: object) -> argparse.Namespace:
    return train.parse_args(list(map(str, words)))


def test_jobs_are_a_pure_function_of_seed_and_step() -> None:
    args, pool = arguments("--tasks-per-source", 3, "--rollouts-per-task", 2), toy_tasks("toy_math", 7, 0)
    assert train.choose_jobs(pool, 5, args) == train.choose_jobs(pool, 5, args)
    assert train.choose_jobs(pool, 5, args) != train.choose_jobs(pool, 6, args)


def test_every_task_comes_equally_often() -> None:
    args, pool = arguments("--tasks-per-source", 3, "--rollouts-per-task", 2), toy_tasks("toy_qa", 7, 0)
    counts = Counter(job.task.id for step in range(14) for job in train.choose_jobs(pool, step, args))
    assert set(counts.values()) == {2 * 3 * 14 // 7}


def test_no_two_rollouts_of_a_step_share_a_seed() -> None:
    args, pool = arguments("--tasks-per-source", 4, "--rollouts-per-task", 3), toy_tasks("toy_code", 3, 0)  # tasks repeat
    seeds = [job.seed for step in range(3) for job in train.choose_jobs(pool, step, args)]
    assert len(set(seeds)) == len(seeds) == 36


def test_warm_up_starts_above_zero_and_the_schedule_ends_at_a_tenth() -> None:
    args = arguments("--lr", 1.0, "--warmup-steps", 3, "--steps", 10)
    rates = [train.learning_rate(step, args) for step in range(11)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[10] == pytest.approx(0.1)
    assert rates[3:] == sorted(rates[3:], reverse=True)


# ---- flags and errors -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("program", [train, evaluation])
@pytest.mark.parametrize(("words", "shown"), [(["--help"], "0.3"), (["--preset", "paper", "--help"], "0.6")])
def test_help_shows_the_defaults_of_the_preset(program: object, words: list[str], shown: str,
                                               capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        program.parse_args(words)
    assert f"and so of scoring (default {shown})" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(("words", "chars"), [([], 600), (["--no-brief"], 6000), (["--preset", "paper"], 6000)])
def test_a_brief_policy_reads_the_beginning_of_a_problem(words: list[str], chars: int) -> None:
    assert World(arguments(*words)).config.problem_chars == chars


@pytest.mark.parametrize(("words", "told"), [([], False), (["--top-p", "0.95"], True), (["--top-k", "20"], True),
                                             (["--top-k", "0"], False), (["--preset", "paper"], True)])
def test_truncated_sampling_is_said_to_bias_the_ratio(words: list[str], told: bool) -> None:
    assert ("ratio is biased" in train.truncation_note(arguments(*words))) == told


@pytest.mark.parametrize("norm", ["trajectory", "token", "constant"])
def test_every_loss_norm_reaches_the_update(norm: str) -> None:
    args = arguments("--loss-norm", norm, "--tasks-per-source", 2, "--rollouts-per-task", 3, "--max-turns", 4,
                     "--max-new-tokens", 5)
    config = train.update_config(args, vocab_limit=7, n_sources=2)
    assert (config.loss_norm, config.loss_constant, config.vocab_limit) == (norm, 2 * 2 * 3 * 4 * 5, 7)


def test_every_flag_is_read() -> None:
    """A flag that no code reads promises something that does not happen."""
    sources = {name: (ROOT / f"{name}.py").read_text() for name in ("train", "eval", "flags", "world", "summary")}
    code = re.sub(r"add_argument\(.*", "", "\n".join(sources.values()))
    flags = re.findall(r'add_argument\("--([a-z-]+)"', "\n".join(sources.values()))
    assert len(flags) > 40
    for flag in set(flags) - {"help-markdown"}:              # an action of its own
        name = flag.replace("-", "_")
        read = re.search(rf"(args|first)\.{name}\b", code) or re.search(rf'names = [^)]*"{name}"', code)
        assert read, f"--{flag} is never read"


def test_args_repeats_a_run_but_for_what_is_given_and_where_it_goes(tmp_path: Path) -> None:
    stored = {"flags": {"out": "runs/a", "resume": True, "preset": "paper", "lr": 0.125, "steps": 7, "data": ["a", "b"]}}
    (tmp_path / "args.json").write_text(json.dumps(stored))
    args = train.parse_args(["--args", str(tmp_path / "args.json"), "--steps", "9"])
    assert (args.lr, args.steps, args.data, args.resume, args.out) == (0.125, 9, ["a", "b"], False, Path("runs/default"))
    assert args.max_new_tokens == 1024, "the flags of the file are all there is, and no preset's"


@pytest.mark.parametrize(("text", "expected"), [("", "is no args.json of a run"), ("[]", "is no args.json of a run"),
                                                ('{"flags": {"lora_magic": 1}}', "does not know: lora_magic")])
def test_a_file_that_is_no_args_json_is_refused(text: str, expected: str, tmp_path: Path) -> None:
    (tmp_path / "args.json").write_text(text)
    with pytest.raises(UsageError, match=expected):
        train.parse_args(["--args", str(tmp_path / "args.json")])


@pytest.mark.parametrize("program", ["train.py", "eval.py", "canvas.py", "report.py", "tasks.py", "warmstart.py", "lora.py"])
def test_help_is_a_manual_with_three_examples(program: str, tmp_path: Path) -> None:
    asked = Program(ROOT / program, "--help", place=tmp_path)
    assert asked.ended() == 0, asked.err.read_text()
    said = asked.out.read_text()
    assert "usage:" in said
    assert said.count(f"python {program} ") + said.count(f"python {program}\n") >= 3  # example commands


WHAT_WAS_IMPORTED = """
import runpy, sys
before, sys.argv = set(sys.modules), sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    print("imported:", *sorted({name.split(".")[0] for name in sys.modules.keys() - before}), file=sys.stderr)
"""


@pytest.mark.parametrize(("words", "code", "said"), [
    (["train.py", "--help"], 0, "--lora-rank"), (["train.py", "--help-markdown"], 0, "| `--lora-rank"),
    (["train.py", "--lora-rnk", "4"], 2, "unrecognized arguments: --lora-rnk 4"),
    (["train.py", "--resume", "--lr", "1"], 1, "train.py: --resume takes the run's own flags; remove --lr"),
    (["train.py", "--resume", "--out", "no_such_run"], 1, "train.py: no_such_run is not a run directory"),
    (["eval.py", "--help"], 0, "--baseline"), (["eval.py", "--runs", "many"], 2, "invalid int value: 'many'")])
def test_flags_are_answered_before_anything_is_imported_but_our_files_and_pythons(words: list[str], code: int, said: str) -> None:
    """torch alone takes seconds."""
    done = subprocess.run(command("-c", WHAT_WAS_IMPORTED, *words), cwd=ROOT, capture_output=True, text=True, timeout=120)
    (_, *imported), = (line.split() for line in done.stderr.splitlines() if line.startswith("imported: "))
    assert set(imported) - sys.stdlib_module_names - {path.stem for path in ROOT.glob("*.py")} == set()
    assert "flags" in imported
    assert (done.returncode, said in done.stdout + done.stderr) == (code, True)


SIGNAL_DURING_IMPORT = """
import os, runpy, sys
module, number, *sys.argv = sys.argv[1:]
class Finder:
    def find_spec(name, *_):
        if name == module:
            try: os.kill(os.getpid(), int(number))
            except BaseException as error: raise ImportError("some packages say that of whatever happens") from error
sys.meta_path.insert(0, Finder)
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("program", ["train.py", "eval.py"])
@pytest.mark.parametrize("module", ["torch", "flags"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "sigterm"])
def test_a_signal_during_the_imports_ends_the_program_with_a_line(number: int, module: str, program: str) -> None:
    done = subprocess.run(command("-c", SIGNAL_DURING_IMPORT, module, int(number), program), cwd=ROOT, capture_output=True,
                          text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", f"{program}: interrupted\n")


@pytest.mark.parametrize(("words", "expected"), [
    (["--data", "no_such_file.jsonl"], "no_such_file.jsonl"),
    (["--operators", "Plan,Programmr"], "Programmr"),
    (["--rollouts-per-task", 1, "--group-by", "task"], "--rollouts-per-task 1"),
    (["--executor-url", "http://127.0.0.1:1"], "--executor-model"),
    (["--policy-url", "http://127.0.0.1:1", "http://127.0.0.1:1"], "--policy-url names a server twice"),
    (["--replay"], "--executor-cache"),
    (["--temperature", 0], "--temperature"),
    (["--top-p", 1.5], "--top-p"),
    (["--steps", 0], "--steps"),
    (["--feedback-chars", 50], "--feedback-chars"),
    (["--policy-timeout", 0], "--policy-timeout"),
    (["--reward-weights", "1,2"], "--reward-weights"),
    (["--finish-rules", "checker,magic"], "magic"),
    (["--model", "no_such_model"], "no_such_model"),
    (["--operator-file", "no_such_ops.py"], "no_such_ops.py"),
    (["--resume"], "args.json"),
])
def test_bad_flags_get_one_clear_message(words: list, expected: str, tmp_path: Path,
                                         capsys: pytest.CaptureFixture) -> None:
    assert expected in fails(capsys, train.main, "--out", tmp_path / "run", *words)


def test_a_malformed_data_line_is_named(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    file = tmp_path / "tasks.jsonl"
    file.write_text('{"problem": "1+1?", "ground_truth": "2", "source": "gsm8k"}\n{"problem": oops\n')
    assert f"{file}:2" in fails(capsys, train.main, "--out", tmp_path / "run", "--data", file)


def test_an_empty_data_set_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    assert "no tasks" in fails(capsys, train.main, "--out", tmp_path / "run", "--data", tmp_path / "empty.jsonl")


def test_tasks_that_leave_none_to_hold_out_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    file = tmp_path / "three.jsonl"
    file.write_text("".join(f'{{"problem": "{n}+1?", "ground_truth": "{n + 1}", "source": "gsm8k"}}\n' for n in range(3)))
    assert "at least 4 of a source" in fails(capsys, train.main, "--out", tmp_path / "run", "--data", file)


def test_an_existing_run_is_not_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "metrics.jsonl").write_text("precious\n")
    assert "--resume" in fails(capsys, train.main, "--out", tmp_path)
    assert (tmp_path / "metrics.jsonl").read_text() == "precious\n"


def test_an_unreadable_checkpoint_is_named(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    run.create({"flags": {}})
    checkpoint = run.path / "checkpoints" / "step_000001"
    checkpoint.mkdir()
    (checkpoint / "adapter_config.json").write_text("{torn")
    (run.path / "latest").write_text("checkpoints/step_000001\n")
    model = torch.nn.Linear(2, 2)
    with pytest.raises(RunError, match="step_000001"):
        run.restore(model, torch.optim.SGD(model.parameters(), lr=1.0))


def test_a_full_disk_ends_the_run_with_a_message_and_keeps_the_checkpoint(
        tmp_path: Path, tiny_model: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    append = RunDir.append

    def full(self: RunDir, name: str, *records: dict) -> None:
        if name == "metrics.jsonl" and records[0]["step"] == 1:
            raise OSError(errno.ENOSPC, "No space left on device", str(self.path / name))
        append(self, name, *records)

    monkeypatch.setattr(RunDir, "append", full)
    out = tmp_path / "run"
    assert "No space left" in fails(capsys, train.main, "--out", out, "--model", tiny_model, "--steps", 2, *SMALL)
    assert (out / "latest").read_text() == "checkpoints/step_000001\n"


def no_thread() -> None:
    raise RuntimeError("can't start new thread")  # as threading does; a limit on processes does not bind root


@pytest.mark.parametrize(("lacks", "advice"), [
    (no_thread, "can't start new thread; raise `ulimit -u`"),
    (lambda: bytearray(2**60), "lower --micro-batch-tokens"),
    (lambda: torch.empty(2**50), "can't allocate memory"),
])
@pytest.mark.parametrize(("program", "makes"), [(train, "World"), (evaluation, "JudgedWorld")])
def test_a_machine_without_threads_or_memory_is_named_with_what_to_do(
        tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, program: ModuleType,
        makes: str, lacks: Callable[[], object], advice: str) -> None:
    monkeypatch.setattr(program, makes, lambda args: lacks())
    message = fails(capsys, program.main, "--model", tiny_model, "--out", tmp_path / "run")
    assert advice in message
    assert "--resume" in message


def test_an_error_of_ours_keeps_its_traceback() -> None:
    with pytest.raises(RuntimeError, match="shapes do not fit"), naming_lacks():
        raise RuntimeError("shapes do not fit")


@pytest.mark.parametrize("write", [lambda run: run.append("metrics.jsonl", {"step": 1}), lambda run: run.write_json("x.json", {}),
                                   lambda run: run.save(1, torch.nn.Linear(2, 2), torch.optim.SGD([torch.zeros(1)], lr=1.0))],
                         ids=["log", "json", "checkpoint"])
def test_a_full_disk_is_named_with_the_file_that_did_not_fit(write: object, tmp_path: Path,
                                                             monkeypatch: pytest.MonkeyPatch) -> None:
    """A limit on the size of files stands for the disk: it fails in the same calls."""
    monkeypatch.setattr("lora.save_adapter", lambda model, directory: directory.mkdir())
    run = RunDir(tmp_path / "run")
    run.create({"flags": {}})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1, hard))
    try:
        with pytest.raises(OSError, match="File too large") as error:
            write(run)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert str(tmp_path) in str(error.value)
    assert run.latest() is None
    assert list((run.path / "checkpoints").iterdir()) == []


def test_a_checkpoint_that_does_not_fit_the_disk_is_reported_and_leaves_nothing_behind(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(model: object, directory: Path) -> None:
        directory.mkdir()
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("lora.save_adapter", full)
    run = RunDir(tmp_path / "run")
    run.create({"flags": {}})
    model = torch.nn.Linear(2, 2)
    with pytest.raises(OSError, match=r"step_000001 could not be written: .*No space left"):
        run.save(1, model, torch.optim.SGD(model.parameters(), lr=1.0))
    assert list((run.path / "checkpoints").iterdir()) == []
    assert run.latest() is None


# ---- whole runs -------------------------------------------------------------------------------------------------------


def test_a_killed_run_resumes_to_the_same_bits(tmp_path: Path, tiny_model: Path) -> None:
    """SIGKILL at three moments, then --resume: weights and logs equal those of a run that was left alone."""
    words = ["--model", tiny_model, "--steps", 4, *SMALL]
    whole, killed = tmp_path / "whole", tmp_path / "killed"

    def started(*words: object) -> Program:
        return Program(ROOT / "train.py", *words, place=tmp_path)

    assert started("--out", whole, *words).ended() == 0
    rng = random.Random(0)
    for attempt in range(3):
        start = words if not (killed / "args.json").exists() else ["--resume"]
        process = started("--out", killed, *start)
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and len(RunDir(killed).read("metrics.jsonl")) <= attempt and process.is_alive():
            time.sleep(0.02)
        time.sleep(rng.random())  # into the next step, somewhere
        process.kill()
        process.join()
    assert started("--out", killed, "--resume").ended() == 0
    weights = [load_file(run / "checkpoints/step_000004/adapter_model.safetensors") for run in (whole, killed)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0] | weights[1])
    logs = [[{k: v for k, v in row.items() if not TIMINGS.search(k)} for row in RunDir(run).read("metrics.jsonl")]
            for run in (whole, killed)]
    assert logs[0] == logs[1]
    assert [row["step"] for row in logs[1]] == [0, 1, 2, 3]
    summary = json.loads((killed / "summary.json").read_text())
    assert summary["trajectories"] == 4 * 3 * 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "sigterm"])
def test_a_run_that_waits_for_its_executor_ends_at_once_and_resumes(number: int, tmp_path: Path, tiny_model: Path) -> None:
    """The executor accepts connections and never answers: the threads that wait for it must not delay the end."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        words = ["--model", tiny_model, "--steps", 1, *SMALL, "--executor-url", url, "--executor-model", "m"]
        with subprocess.Popen(command("-c", TRAIN_WITH_LEGAL_EDITS, "--out", tmp_path / "run", *words), cwd=ROOT, text=True,
                              stderr=subprocess.PIPE, stdout=subprocess.DEVNULL) as process:
            server.settimeout(120)
            with server.accept()[0]:
                began = time.monotonic()
                process.send_signal(number)
                message = process.communicate(timeout=60)[1]
                assert time.monotonic() - began < 5  # 1.5 by intention; machines are busy
        assert process.returncode == 1
        assert message.endswith("train.py: interrupted; continue with --resume\n")
        assert "Traceback" not in message
    assert RunDir(tmp_path / "run").read_args()["flags"]["steps"] == 1


SLOW_TO_END = """
import sys, time
from rundir import end_on_signals
class Slow:
    def __del__(self): print("taken apart", flush=True)
end_on_signals("interrupted", seconds=60)
slow = Slow()
try:
    print("ready")
    print("flushed later", end="")
    sys.stderr.write("waiting\\n")
    time.sleep(60)
except KeyboardInterrupt:
    if sys.argv[1:]: time.sleep(60)
    sys.exit("interrupted")
"""


@pytest.mark.parametrize("signals", [[signal.SIGINT], [signal.SIGTERM], [signal.SIGINT, signal.SIGINT], [signal.SIGTERM] * 2])
def test_an_interrupted_run_says_so_and_a_second_signal_ends_it_at_once(signals: list[int]) -> None:
    with subprocess.Popen(command("-c", SLOW_TO_END, *["stuck"] * (len(signals) - 1)), cwd=ROOT, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stderr.readline() == "waiting\n"
        for number in signals:
            time.sleep(0.2)
            process.send_signal(number)
        assert process.communicate(timeout=30)[1] == "interrupted\n"
    assert process.returncode == 1


def test_an_interrupted_run_loses_nothing_that_was_printed_and_is_not_taken_apart() -> None:
    """To unload torch takes seconds."""
    with subprocess.Popen(command("-c", SLOW_TO_END), cwd=ROOT, text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE) as process:
        process.stderr.readline()
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=30)[0] == "ready\nflushed later"


def test_a_sandbox_that_contains_less_than_required_is_a_usage_error(monkeypatch: pytest.MonkeyPatch,
                                                                     capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    monkeypatch.setattr(sandbox, "_settled", lambda: sandbox._Settled(("plain",), ("udp", "files"), {}))
    message = fails(capsys, train.main, "--require-sandbox", "files", "--out", tmp_path / "run")
    assert "--require-sandbox files: sandbox level files is required, but programs can send UDP packets, read files" in message
    assert not (tmp_path / "run").exists()


# ---- learning ---------------------------------------------------------------------------------------------------------


class Parrot:
    """A canvas of one turn that rewards a short turn: the policy has to end it early."""

    def prompt(self) -> tuple[str, str]:
        return "Say little.", "Now."

    def step(self, text: str) -> SimpleNamespace:
        return SimpleNamespace(text="", ok=True, done=True, stop_reason="finished", error="", info={})


def test_a_tiny_policy_visibly_learns(tiny_model: Path) -> None:
    """The whole path - sampler, rollout, advantages, loss, optimiser - on a task that a person can check."""
    from policy import ChatTokenizer

    tokenizer, model = ChatTokenizer(tiny_model), Qwen3.from_pretrained(tiny_model)
    torch.manual_seed(0)
    add_lora(model, 8, 16, 0.0, ("q_proj", "v_proj", "up_proj", "down_proj"))
    optimizer = torch.optim.AdamW(lora_parameters(model), lr=5e-3, weight_decay=0.0)
    sampler = InProcessSampler(model, tokenizer.end_id, vocab_limit=tokenizer.vocab_size, max_context=512)

    def score(tau: Trajectory) -> None:
        tau.reward = -float(tau.turns[0].n_sampled)

    means = []
    for step in range(12):
        sampler.load_adapter(version=step)
        taus = rollout([Job(step, i, 100 * step + i) for i in range(24)], sampler, tokenizer, lambda task: Parrot(), score,
                       RolloutConfig(max_context=512, max_new_tokens=12, min_new_tokens=1, lockstep=True))
        rewards = [tau.reward for tau in taus]
        for tau, advantage in zip(taus, group_advantages(rewards, [0] * len(taus)).tolist(), strict=True):
            tau.advantage = advantage
        update(model, optimizer, taus, UpdateConfig(vocab_limit=tokenizer.vocab_size), disable_lora)
        means.append(sum(rewards) / len(rewards))
    sampler.close()
    assert sum(means[-4:]) / 4 > sum(means[:3]) / 3 + 2, means  # turns are two tokens shorter, of eight


@pytest.mark.parametrize("name", warmstart.LESSONS)
def test_the_warm_start_imitates_legal_edits(tiny_model: Path, name: str) -> None:
    """The canvas of the demonstrations accepted every edit of them."""
    for task in toy_tasks("toy_math", 5, 3):
        episode = warmstart.demonstrate(task, 0, name)
        answers = [text for who, text in episode if who == "feedback"]
        assert all(text.startswith("OK") for text in answers)
    assert json.loads((tiny_model / "warmstart.json").read_text())["episodes"] == 30


@pytest.mark.parametrize(("name", "throughout"), [("tiny", True), ("tiny-grammar", False)])
def test_a_policy_is_taught_by_its_lesson(name: str, throughout: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """bench/results/ablations began with a tiny-grammar that knows the kind in its last states alone."""
    taught = []
    monkeypatch.setattr(warmstart, "imitate", lambda *words: taught.append(words[-1]) or 0.0)
    warmstart.build(tmp_path / name, episodes=6, progress=False, name=name)
    assert taught == [throughout]


def test_a_policy_made_on_the_spot_is_the_one_that_was_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """--model tiny-grammar trains what knows the grammar alone, in a directory of its own."""
    made = []
    monkeypatch.setattr(warmstart, "build", lambda directory, seed, progress, name: made.append((directory.name, name)))
    monkeypatch.chdir(tmp_path)
    for name in warmstart.LESSONS:
        with pytest.raises(UsageError, match="no such directory"):  # nothing was really made
            load_policy(train.parse_args(["--model", name]))
    (first, tiny), (second, grammar) = made
    assert (tiny, grammar) == ("tiny", "tiny-grammar")
    assert (first[:7], second[:15]) == ("tiny-0-", "tiny-grammar-0-")


# ---- README -----------------------------------------------------------------------------------------------------------


def readme_commands() -> list[str]:
    pages = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))
    text = "\n".join(path.read_text() for path in pages)
    blocks = re.findall(r"```(?:bash|sh)\n(.*?)```", text, flags=re.DOTALL)
    lines = [line.split("#")[0].strip() for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [part.strip() for line in lines for part in line.split("&&") if part.strip()]


def test_readme_names_only_files_that_exist() -> None:
    programs = {word for line in readme_commands() for word in line.split() if re.fullmatch(r"[\w/]+\.(py|sh|txt)", word)}
    assert "train.py" in programs
    assert [name for name in programs if not (ROOT / name).exists() and name != "my_ops.py"] == []


@pytest.mark.parametrize("line", [line for line in readme_commands() if line.startswith(("python train.py", "python eval.py"))])
def test_readme_commands_have_flags_that_exist(line: str, tmp_path: Path) -> None:
    words = shlex.split(line)
    if "--args" in words:                                    # of a run that is not here
        (tmp_path / "args.json").write_text('{"flags": {}}')
        words[words.index("--args") + 1] = str(tmp_path / "args.json")
    parse = train.parse_args if words[1] == "train.py" else evaluation.parse_args
    if "--resume" not in words:
        parse(words[2:])


def taught_kinds(throughout: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """(300, D) states inside an edit that enter the last layer, and that leave it, of a model that was taught by imitation.

    The first token tells the kind, 60 arbitrary ones follow, then an edit of four, for all kinds the same.
    """
    rng = random.Random(0)

    def example(kind: int) -> tuple[list[int], list[int], int]:
        return [50 + kind, *rng.choices(range(50), k=60), 60, 61, 62, 63], [0] * 61 + [1] * 4, kind

    torch.manual_seed(0)
    model = Qwen3(replace(warmstart.tiny_config(64), hidden_size=32, intermediate_size=64))
    warmstart.imitate(model, [example(i % 3) for i in range(300)], 0, progress=False, throughout=throughout)
    entering: list[torch.Tensor] = []
    model.model.layers[-1].register_forward_pre_hook(lambda layer, given: entering.append(given[0]))
    with torch.no_grad():
        leaving = model.hidden(torch.tensor([example(i % 3)[0] for i in range(300)]))
    return entering[0][:, -3], leaving[:, -3]


def told_apart(states: torch.Tensor) -> float:
    """How many of the last 150 lie next to the centre of their own kind's first."""
    kinds = torch.arange(300) % 3
    centres = torch.stack([states[:150][kinds[:150] == kind].mean(0) for kind in range(3)])
    return (torch.cdist(states[150:], centres).argmin(1) == kinds[150:]).double().mean().item()


def test_what_imitates_knows_the_kind_of_the_task_while_it_writes() -> None:
    _, leaving = taught_kinds(throughout=False)
    assert told_apart(leaving) > 0.9  # 0.64 without being taught


def test_what_must_know_the_kind_throughout_knows_it_before_the_last_layer() -> None:
    entering, leaving = taught_kinds(throughout=True)
    assert told_apart(leaving) > 0.9
    assert told_apart(entering) > 0.9  # 0.8 if it is read off the last states alone
