"""The rollout loop against fakes: ids that only append, independent trajectories, and every way an episode can end."""

import os
import random
import signal
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from rollout import Job, RolloutConfig, SampleRequest, Trajectory, rollout, turn_seed

WAIT = 10  # seconds after which an event that should have come counts as a deadlock


@dataclass
class Feedback:
    text: str = "ok"
    ok: bool = True
    done: bool = False
    stop_reason: str | None = None
    error: str = ""
    info: dict = field(default_factory=dict)


FINISHED = Feedback("bye", done=True, stop_reason="finished")


@dataclass
class Sample:
    ids: list[int]
    logprobs: list[float]
    version: int = 0


class Characters:
    """One id per character; '.' is the end token."""

    end_id = ord(".")

    def prompt_ids(self, system: str, user: str) -> list[int]:
        return [ord(c) for c in f"<{system}|{user}>"]

    def feedback_ids(self, text: str, ended: bool) -> list[int]:
        return [ord(c) for c in ("" if ended else ".") + f"[{text}]"]

    def decode(self, ids: list[int]) -> str:
        return "".join(map(chr, ids))


class Sampler:
    """Answers at once. `say` makes a turn's text from its request; an exception from it lands in the future."""

    def __init__(self, say: Callable[[SampleRequest], str] = lambda request: "ab.") -> None:
        self.say, self.batches, self.released = say, [], []

    def submit(self, requests: list[SampleRequest]) -> list[Future]:
        self.batches.append(requests)
        futures = [Future() for _ in requests]
        for request, future in zip(requests, futures, strict=True):
            try:
                ids = [ord(c) for c in self.say(request)]
                future.set_result(Sample(ids, [-0.5 - i / 100 for i in range(len(ids))]))
            except Exception as error:
                future.set_exception(error)
        return futures

    def release(self, key: object) -> None:
        self.released.append(key)


class Canvas:
    """Plays `answers`, a list of Feedback or functions that return one; the last finishes."""

    def __init__(self, *answers: Feedback | Callable[[], Feedback]) -> None:
        self.answers, self.heard = list(answers) or [FINISHED], []

    def prompt(self) -> tuple[str, str]:
        return "s", "t"

    def step(self, text: str) -> Feedback:
        answer = self.answers[len(self.heard)]
        self.heard.append(text)
        return answer() if callable(answer) else answer


def give_reward(tau: Trajectory) -> None:
    tau.reward = 1.0


def play(canvases: list[Canvas], sampler: Sampler | None = None, score: Callable = give_reward,
         tokenizer: Any = None, **config: Any) -> list[Trajectory]:
    """Roll out one job per canvas."""
    jobs = [Job(task=i, index=0, seed=100 + i) for i in range(len(canvases))]
    return rollout(jobs, sampler or Sampler(), tokenizer or Characters(), lambda task: canvases[task], score,
                   RolloutConfig(**config))


def workers_left() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("rollout")]


# ---- ids and mask


def test_mask_line_under_token_line_of_a_two_turn_trajectory() -> None:
    turns = iter(["add.", "fin."])
    [tau] = play([Canvas(Feedback("seen"), FINISHED)], Sampler(lambda request: next(turns)))
    assert "".join(map(chr, tau.tokens)) == "<s|t>add.[seen]fin."
    assert "".join(" ^"[m] for m in tau.mask) == "     ^^^^      ^^^^"
    scored = [logprob != 0.0 for logprob in tau.sampled_logprobs]
    assert scored == [bool(m) for m in tau.mask]
    assert tau.sampled_logprobs[5:9] == [-0.5, -0.51, -0.52, -0.53]


def test_a_turn_tells_how_many_characters_each_of_its_tokens_stands_for() -> None:
    class Pairs(Characters):  # the end token has no text
        def decode(self, ids: list[int]) -> str:
            return "".join(2 * chr(i) for i in ids if i != self.end_id)

    [tau] = play([Canvas(FINISHED)], Sampler(lambda request: "ab."), tokenizer=Pairs())
    assert (tau.turns[0].text, tau.turns[0].widths) == ("aabb", [2, 2, 0])


def test_an_unfinished_turn_is_ended_by_feedback_that_is_not_trained() -> None:
    turns = iter(["add", "fin."])
    [tau] = play([Canvas(Feedback("seen"), FINISHED)], Sampler(lambda request: next(turns)))
    assert "".join(map(chr, tau.tokens)) == "<s|t>add.[seen]fin."
    assert "".join(" ^"[m] for m in tau.mask) == "     ^^^       ^^^^"
    assert tau.canvas.heard == ["add", "fin"]


def test_ids_survive_a_tokenizer_whose_text_does_not_round_trip() -> None:
    class Lossy(Characters):
        def decode(self, ids: list[int]) -> str:
            return "same text every time"

    turns = iter(["\ufffd\x00q.", "zz."])
    sampler = Sampler(lambda request: next(turns))
    [tau] = play([Canvas(Feedback("seen"), FINISHED)], sampler, tokenizer=Lossy())
    assert [i for i, m in zip(tau.tokens, tau.mask, strict=True) if m] == [ord(c) for c in "\ufffd\x00q.zz."]
    assert tau.canvas.heard == ["same text every time"] * 2


def test_every_request_continues_the_one_before_and_keeps_its_key() -> None:
    sampler = Sampler()
    [tau] = play([Canvas(Feedback("1"), Feedback("2"), FINISHED)], sampler)
    requests = [request for batch in sampler.batches for request in batch]
    for earlier, later in zip(requests, [*requests[1:], SampleRequest(requests[0].key, tau.tokens, 0, 0)], strict=True):
        assert later.tokens[:len(earlier.tokens)] == earlier.tokens
        assert len(later.tokens) > len(earlier.tokens)
        assert later.key == earlier.key
    assert sampler.released == [requests[0].key]


def test_turns_keep_what_was_said_and_answered() -> None:
    [tau] = play([Canvas(Feedback("no", ok=False, info={"invalid": True}), FINISHED)])
    assert [(turn.text, turn.n_sampled, turn.feedback, turn.ok, turn.info) for turn in tau.turns] == [
        ("ab", 3, "no", False, {"invalid": True}), ("ab", 3, "bye", True, {})]


def test_version_is_the_oldest_adapter_that_wrote_a_turn() -> None:
    class Updated(Sampler):
        def submit(self, requests: list[SampleRequest]) -> list[Future]:
            futures = super().submit(requests)
            for future in futures:
                future.result().version = 6 + len(self.batches)
            return futures

    [tau] = play([Canvas(Feedback(), FINISHED)], Updated())
    assert ([turn.version for turn in tau.turns], tau.version) == ([7, 8], 7)
    assert Trajectory(task=0, index=0).version is None


@pytest.mark.parametrize("logprobs", [[-1.0], [-1.0, None], [-1.0, float("nan")], [-1.0, -float("inf")]])
def test_a_missing_logprob_is_an_error_and_never_zero(logprobs: list) -> None:
    tau = Trajectory(task=0, index=0)
    tau.add_prompt([1])
    with pytest.raises(ValueError, match="log-probabilit"):
        tau.add_sample(Sample([5, 6], logprobs))
    assert tau.tokens == [1]


def test_an_empty_sample_is_an_error() -> None:
    with pytest.raises(ValueError, match="0 ids"):
        Trajectory(task=0, index=0).add_sample(Sample([], []))


def test_prompt_first_and_feedback_only_after_a_sample() -> None:
    tau = Trajectory(task=0, index=0)
    tau.add_prompt([1])
    with pytest.raises(AssertionError, match="prompt comes first"):
        tau.add_prompt([2])
    with pytest.raises(AssertionError, match="nothing was sampled"):
        tau.add_feedback([2])


# ---- seeds and room


def test_turn_seeds_depend_on_job_and_turn_and_on_nothing_else() -> None:
    sampler = Sampler()
    play([Canvas(Feedback(), FINISHED), Canvas()], sampler, lockstep=True)
    assert [[request.seed for request in batch] for batch in sampler.batches] == [
        [turn_seed(100, 0), turn_seed(101, 0)], [turn_seed(100, 1)]]
    seeds = {turn_seed(seed, turn) for seed in range(50) for turn in range(50)}
    assert len(seeds) == 2500
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert turn_seed(1, 0) == 894933081445914327, "a run must be repeatable by later versions"


def test_a_turn_gets_the_room_that_is_left_but_no_more_than_its_maximum() -> None:
    sampler = Sampler(lambda request: "x" * (request.max_new_tokens - 1) + ".")
    [tau] = play([Canvas(Feedback(), FINISHED)], sampler, max_context=30, max_new_tokens=12, min_new_tokens=4)
    assert [batch[0].max_new_tokens for batch in sampler.batches] == [12, 30 - 5 - 12 - 4]
    assert len(tau.tokens) == 30


@pytest.mark.parametrize(("max_context", "stop_reason", "n_tokens"), [(16, "finished", 15), (15, "max_tokens", 8)])
def test_feedback_is_appended_only_if_a_turn_fits_behind_it(max_context: int, stop_reason: str, n_tokens: int) -> None:
    # prompt 5 + sample 3 + feedback 4 = 12, and at least 4 more
    [tau] = play([Canvas(Feedback("ok"), FINISHED)], max_context=max_context, min_new_tokens=4)
    assert (tau.stop_reason, len(tau.tokens), tau.reward, tau.dropped) == (stop_reason, n_tokens, 1.0, "")
    assert tau.turns[0].feedback == "ok"


def test_a_prompt_that_leaves_no_room_ends_the_episode_before_its_first_turn() -> None:
    sampler = Sampler()
    [tau] = play([Canvas()], sampler, max_context=8, min_new_tokens=4)
    assert (tau.stop_reason, tau.tokens, tau.turns, tau.reward) == ("max_tokens", [], [], 1.0)
    assert sampler.batches == []


# ---- ends


@pytest.mark.parametrize("stop_reason", ["finished", "max_turns"])
def test_the_canvas_ends_an_episode_and_its_last_feedback_is_not_appended(stop_reason: str) -> None:
    sampler = Sampler()
    [tau] = play([Canvas(Feedback("bye", done=True, stop_reason=stop_reason))], sampler)
    assert (tau.stop_reason, tau.reward, tau.dropped, tau.error) == (stop_reason, 1.0, "", "")
    assert "".join(map(chr, tau.tokens)) == "<s|t>ab."
    assert sampler.released == [sampler.batches[0][0].key]


def test_a_sampler_failure_drops_its_trajectory_only() -> None:
    def say(request: SampleRequest) -> str:
        if request.seed == turn_seed(101, 1):
            raise ConnectionError("server is down")
        return "ab."

    sampler, scored = Sampler(say), []

    def score(tau: Trajectory) -> None:
        scored.append(tau.task)
        tau.reward = 1.0

    taus = play([Canvas(Feedback(), FINISHED) for _ in range(3)], sampler, score)
    assert [tau.stop_reason for tau in taus] == ["finished", "policy_error", "finished"]
    assert (taus[1].dropped, taus[1].error, taus[1].reward) == ("policy_error", "ConnectionError: server is down", None)
    assert sorted(scored) == [0, 2]
    assert len(sampler.released) == 3


def test_an_unreachable_executor_drops_its_trajectory_unscored() -> None:
    lost = Feedback("", ok=False, done=True, stop_reason="executor_error", error="no executor at http://x")
    taus = play([Canvas(lost), Canvas()])
    assert [tau.dropped for tau in taus] == ["executor_error", ""]
    assert (taus[0].error, taus[0].reward) == ("no executor at http://x", None)


def test_a_grader_error_drops_the_trajectory() -> None:
    def score(tau: Trajectory) -> None:
        tau.grade = SimpleNamespace(error="grader timed out" if tau.task == 0 else "")
        tau.reward = None if tau.task == 0 else 0.5

    taus = play([Canvas(), Canvas()], score=score)
    assert [(tau.dropped, tau.reward) for tau in taus] == [("grader_error", None), ("", 0.5)]


def test_a_score_that_leaves_no_reward_is_a_bug() -> None:
    with pytest.raises(AssertionError, match="no reward"):
        play([Canvas()], score=lambda tau: None)


def test_an_unknown_stop_reason_is_a_bug() -> None:
    with pytest.raises(AssertionError, match="'tired' is none of"):
        play([Canvas(Feedback(done=True, stop_reason="tired"))])


def test_as_many_trajectories_come_out_as_jobs_went_in_and_in_their_order() -> None:
    taus = play([Canvas(*[Feedback()] * (i % 3), FINISHED) for i in range(17)], workers=4)
    assert [tau.task for tau in taus] == list(range(17))
    assert [len(tau.turns) for tau in taus] == [1 + i % 3 for i in range(17)]
    assert play([]) == []


def test_seconds_are_booked_per_phase() -> None:
    def slow() -> Feedback:
        threading.Event().wait(0.2)
        return FINISHED

    [tau] = play([Canvas(slow)])
    assert tau.seconds.keys() == {"policy", "executor", "grading"}
    assert tau.seconds["executor"] > 0.1


# ---- concurrency


def test_a_slow_canvas_delays_only_its_own_trajectory() -> None:
    others_done = threading.Event()

    def slow() -> Feedback:
        assert others_done.wait(WAIT), "the other trajectory waited for this one"
        return FINISHED

    def last() -> Feedback:
        others_done.set()
        return FINISHED

    taus = play([Canvas(slow), Canvas(Feedback(), Feedback(), last)])
    assert [len(tau.turns) for tau in taus] == [1, 3]


def test_a_slow_sample_delays_only_its_own_trajectory() -> None:
    other_done = threading.Event()

    class HalfSlow(Sampler):
        def submit(self, requests: list[SampleRequest]) -> list[Future]:
            futures = super().submit(requests)
            if len(self.batches) > 1:
                return futures
            late: Future = Future()

            def answer() -> None:
                late.set_result(futures[0].result()) if other_done.wait(WAIT) else late.set_exception(TimeoutError())

            threading.Thread(target=answer).start()
            return [late, *futures[1:]]

    def last() -> Feedback:
        other_done.set()
        return FINISHED

    taus = play([Canvas(), Canvas(Feedback(), last)], HalfSlow())
    assert [tau.stop_reason for tau in taus] == ["finished", "finished"]


def test_canvas_steps_run_at_the_same_time() -> None:
    together = threading.Barrier(3, timeout=WAIT)

    def meet() -> Feedback:
        together.wait()
        return FINISHED

    assert len(play([Canvas(meet) for _ in range(3)])) == 3


def test_grading_does_not_hold_up_the_others() -> None:
    other_done = threading.Event()

    def score(tau: Trajectory) -> None:
        assert tau.task == 1 or other_done.wait(WAIT), "the other trajectory waited for a grading"
        tau.reward = 0.0

    def last() -> Feedback:
        other_done.set()
        return FINISHED

    assert len(play([Canvas(), Canvas(Feedback(), last)], score=score, lockstep=True)) == 2


def test_lockstep_submits_the_same_batches_whatever_the_canvases_take() -> None:
    def batches(delays: int) -> list[list[tuple]]:
        clock = random.Random(delays)

        def slow() -> Feedback:
            threading.Event().wait(clock.random() / 100)
            return Feedback()

        sampler = Sampler()
        play([Canvas(*[slow] * (i % 4), FINISHED) for i in range(8)], sampler, lockstep=True)
        return [[(request.seed, request.tokens) for request in batch] for batch in sampler.batches]

    first = batches(1)
    assert [len(batch) for batch in first] == [8, 6, 4, 2]
    assert batches(2) == first
    assert batches(3) == first


def test_a_bug_in_a_sampler_is_not_taken_for_a_failed_server() -> None:
    def say(request: SampleRequest) -> str:
        raise AttributeError("a bug in the sampler")

    with pytest.raises(AttributeError, match="a bug in the sampler"):
        play([Canvas(FINISHED)], Sampler(say))
    assert workers_left() == []


def test_an_exception_in_a_canvas_propagates_and_leaves_neither_threads_nor_keys() -> None:
    started, sampler = threading.Event(), Sampler()

    def broken() -> Feedback:
        assert started.wait(WAIT)
        raise ZeroDivisionError("a bug in the canvas")

    def running() -> Feedback:
        started.set()
        threading.Event().wait(0.05)
        return Feedback()

    with pytest.raises(ZeroDivisionError, match="a bug in the canvas"):
        play([Canvas(broken), Canvas(running, FINISHED)], sampler)
    assert workers_left() == []
    assert sorted(sampler.released) == sorted(request.key for request in sampler.batches[0])


def test_ctrl_c_leaves_neither_threads_nor_keys_nor_queued_steps() -> None:
    def press_ctrl_c() -> Feedback:
        threading.Event().wait(0.05)                 # until the loop has queued the others and waits
        os.kill(os.getpid(), signal.SIGINT)
        threading.Event().wait(0.05)                 # the only worker is busy while the interrupt arrives
        return FINISHED

    canvases, sampler = [Canvas(press_ctrl_c) for _ in range(10)], Sampler()
    before = signal.signal(signal.SIGINT, signal.default_int_handler)    # a shell's background jobs start with it ignored
    try:
        with pytest.raises(KeyboardInterrupt):
            play(canvases, sampler, workers=1)
    finally:
        signal.signal(signal.SIGINT, before)
    assert workers_left() == []
    assert len(sampler.released) == 10
    assert sum(len(canvas.heard) for canvas in canvases) == 1, "queued canvas steps ran after the interrupt"
