"""A run directory that was really played, without a model: a scripted policy on real canvases, graded and logged."""

import json
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from scripted import add, conditional, delete, loop, modify, parallel

import operators
from backends import SimulatedBackend
from canvas import Canvas, CanvasConfig
from metrics import evaluation_record, rollout_metrics, trajectory_record
from rewards import RewardConfig, grade, reward
from rollout import Job, RolloutConfig, Trajectory, rollout
from tasks import Task, toy_tasks

FINISH = "<action>finish</action>"
FULL = [add("Plan"), "I want two opinions.\n" + parallel("Programmer, Custom"), "no edit at all <b>bold</b>", add("Aggregate"),
        conditional("Verify", "Revise"), loop("Review, Revise"), add("Format", "Say it in one word."),
        modify("n1", "Decompose"), FINISH]
SCRIPTS = (FULL, [add("Custom"), delete("n1"), add("Format"), FINISH], [add("Custom"), FINISH])


class Words:
    """Ids are characters; a piece of text has up to four of them, as tokens have."""

    end_id = 0

    def prompt_ids(self, system: str, user: str) -> list[int]:
        return [1] * (len(system + user) // 4)

    def feedback_ids(self, text: str, ended: bool) -> list[int]:
        return [1] * (len(text) // 4 + 1)

    def decode(self, ids: list[int]) -> str:
        return "".join(self.pieces[i] if i else "" for i in ids)

    def __init__(self) -> None:
        self.pieces, self.ids = [""], {}

    def sampled(self, text: str) -> list[int]:
        found = [text[i:i + 4] for i in range(0, len(text), 4)]
        for piece in found:
            if piece not in self.ids:
                self.ids[piece] = len(self.pieces)
                self.pieces.append(piece)
        return [*(self.ids[piece] for piece in found), self.end_id]


class Reader:
    """A policy that reads its edits from a script, chosen by the seed; the answers are as long as their ids."""

    def __init__(self, words: Words) -> None:
        self.words, self.turns = words, {}

    def submit(self, requests: list[Any]) -> list[Future]:
        futures = [Future() for _ in requests]
        for request, future in zip(requests, futures, strict=True):
            script, turn = self.turns.setdefault(request.key, [SCRIPTS[len(self.turns) % len(SCRIPTS)], 0])
            self.turns[request.key][1] += 1
            ids = self.words.sampled(script[min(turn, len(script) - 1)])
            future.set_result(SimpleNamespace(ids=ids, logprobs=[-0.5] * len(ids), version=0))
        return futures

    def release(self, key: object) -> None:
        self.turns[key, len(self.turns)] = self.turns.pop(key)  # an id may come again


def play(tasks: list[Task], per_task: int = 3) -> list[Trajectory]:
    library, backend, words = operators.library(), SimulatedBackend(0), Words()

    def score(tau: Trajectory) -> None:
        tau.answer = tau.canvas.answer
        tau.grade = grade(tau.task, tau.answer)
        tau.parts = reward(tau.canvas, tau.grade, RewardConfig())
        tau.reward = tau.parts.total

    jobs = [Job(task, i, 7 * i) for task in tasks for i in range(per_task)]
    return rollout(jobs, Reader(words), words, lambda task: Canvas(task, library, backend, CanvasConfig(max_turns=12)), score,
                   RolloutConfig(max_context=10**6, lockstep=True))


def write(path: Path, *rows: dict[str, Any]) -> None:
    with path.open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def make_run(path: Path, steps: int = 3, evaluation: bool = False) -> Path:
    """`steps` steps of three trajectories for each of two tasks; or an evaluation of as many."""
    path.mkdir(parents=True)
    prompts = {name: op.prompt for name, op in operators.library().items()}
    (path / "args.json").write_text(json.dumps({"flags": {"executor_url": None, "seed": 0}, "prompts": prompts}))
    for step in range(steps):
        taus = play([toy_tasks("toy_math", steps, 0)[step], toy_tasks("toy_qa", steps, 0)[step]])
        if evaluation:
            write(path / "trajectories.jsonl", *(evaluation_record(tau, ("policy", "random")[tau.index % 2]) for tau in taus))
            continue
        mean = sum(tau.reward for tau in taus) / len(taus)
        for tau in taus:
            tau.advantage = tau.reward - mean
        write(path / "trajectories.jsonl", *(trajectory_record(tau, step) for tau in taus))
        write(path / "metrics.jsonl", {"step": step, **rollout_metrics(taus), "grad_norm": 0.1 + step / 50, "entropy": 1.0})
    return path
