"""Whether a policy server is what the trainer needs: one check after the other, each failure with the flag that mends it.

    python train.py --check --policy-url http://127.0.0.1:8000 --model MODEL ...       prints them all, and trains nothing

The adapter that is tried has random weights: a new one, whose B is zero, would say nothing about whether it is used.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from lora import disable_lora, lora_layers
from policy import FRAME, SampleRequest
from vllm_sampler import PROBE, VLLMSampler
from vllm_server import ServerError

TEXTS = (PROBE, "\n\n  1234567 don't\tÜberraschung 漢字 🙂<think></think>\r\n",
         "<action>add</action> <operator>Plan</operator>\n\n\n")
B_STD = 0.02  # of the tried adapter: moves log-probabilities by far more than float32 rounds
# What a check builds on, beside a server with a model: where that failed, its own failure would say nothing.
NEEDS = {"server": (), "model": ("server",), "weights": ("server", "model", "log-probs"),
         "LoRA": ("server", "model", "log-probs", "weights", "adapters")}


@dataclass(frozen=True)
class Check:
    name: str
    ok: bool
    text: str                    # what was found; of a failure, one sentence that says what to do


def checks(sampler: VLLMSampler) -> Iterator[Check]:
    """Run the checks in order, the ones that the others need first; the sampler then samples the base model."""
    failed: set[str] = set()
    for name, run in (("server", reachable), ("model", model_served), ("context", context), ("tokenizer", tokenizer),
                      ("log-probs", processed_logprobs), ("weights", weights), ("adapters", runtime_loading),
                      ("LoRA", try_adapter)):
        if failed & set(NEEDS.get(name, ("server", "model"))):
            continue
        try:
            yield Check(name, True, run(sampler))
        except ServerError as error:
            failed.add(name)
            yield Check(name, False, str(error))


def require(sampler: VLLMSampler) -> None:
    """Raise ServerError with everything that is wrong with the server."""
    if failed := [f"{check.name}: {check.text}" for check in checks(sampler) if not check.ok]:
        raise ServerError("the policy server cannot be used.\n  " + "\n  ".join(failed), again=False)


def refuse(message: str) -> ServerError:
    return ServerError(message, again=False)


def reachable(sampler: VLLMSampler) -> str:
    try:
        version = sampler.server.json("/version", timeout=10).get("version")
    except ServerError as error:
        raise refuse(f"no vLLM answers ({error}); start one with scripts/serve_vllm.sh MODEL, or correct --policy-url") from None
    return f"vLLM {version} at {sampler.server.url}"


def model_served(sampler: VLLMSampler) -> str:
    root = sampler.find_base().get("root")
    return f"{sampler.base} ({root})"


def context(sampler: VLLMSampler) -> str:
    needed, given = sampler.max_context, sampler.find_base().get("max_model_len") or 0
    if given < needed:
        raise refuse(f"conversations may have {needed} tokens and the server takes {given}; start it with "
                     f"--max-model-len {needed}, or train with --max-context {given}")
    return f"{given} tokens, needed are {needed}"


def tokenizer(sampler: VLLMSampler) -> str:
    ours = sampler.tokenizer
    ids = {text: ours.encode(text) for text in TEXTS} | dict(zip(FRAME, [[ours.start_id], [ours.end_id], [ours.pad_id]],
                                                               strict=True))
    for text, expected in ids.items():
        body = {"model": sampler.base, "prompt": text, "add_special_tokens": False}
        if (got := sampler.server.json("/tokenize", body).get("tokens")) != expected:
            raise refuse(f"the server reads {text!r} as ids {got}, our tokenizer as {expected}; serve the directory of --model")
    return f"the same ids for {len(ids)} texts"


def processed_logprobs(sampler: VLLMSampler) -> str:
    """Of one candidate the probability is 1: that is reported only if top_k was applied before."""
    request = SampleRequest("check", sampler.tokenizer.prompt_ids(PROBE, PROBE), 8, seed=0)
    sample = sampler.sample_once(request, None, sampler.distribution | {"temperature": 1.0, "top_p": 1.0, "top_k": 1})
    if min(sample.logprobs) < -1e-5:
        raise refuse("log-probabilities are those before temperature, top-k and masks, not those that tokens are drawn with; "
                     "start the server with --logprobs-mode processed_logprobs")
    return "processed: those that tokens are drawn with"


def weights(sampler: VLLMSampler) -> str:
    with disable_lora(sampler.model):
        gap = sampler.logprob_gap(None)
    if not gap <= sampler.tolerance:
        raise refuse(f"log-probabilities of the base model differ from ours by {gap:.3g} nats (at most {sampler.tolerance}); "
                     f"serve the directory of --model, with --dtype {str(sampler.dtype).removeprefix('torch.')}")
    return f"log-probabilities of the base model agree with ours to {gap:.1e} nats"


def runtime_loading(sampler: VLLMSampler) -> str:
    try:
        sampler.server.call("/v1/load_lora_adapter", {})         # names no adapter, so that nothing can be loaded
    except ServerError as error:
        if error.status in (404, 405):
            raise refuse("adapters cannot be loaded while the server runs; start it with --enable-lora and the environment "
                         "variable VLLM_ALLOW_RUNTIME_LORA_UPDATING=true") from None
        if error.status not in (400, 422):
            raise
    return "can be loaded while the server runs"


def try_adapter(sampler: VLLMSampler) -> str:
    """Load an adapter with random weights, of the rank and targets of this run, and see it sample what ours would."""
    layers = lora_layers(sampler.model)
    if not layers:
        return "no adapter is used"
    rank, kept = next(iter(layers.values())).rank, {name: layer.lora_B.detach().clone() for name, layer in layers.items()}
    generator = torch.Generator().manual_seed(0)
    try:
        with torch.no_grad():
            for layer in layers.values():
                layer.lora_B.copy_(torch.randn(layer.lora_B.shape, generator=generator) * B_STD)
        sampler.load_adapter(version=0)
        gap, effect = sampler.logprob_gap(sampler.adapter), sampler.logprob_gap(None)
        sampler.drop_adapter()
    except ServerError as error:
        raise refuse(f"{error}{repair(str(error), rank)}") from None
    finally:
        with torch.no_grad():
            for name, layer in layers.items():
                layer.lora_B.copy_(kept[name])
    return f"rank {rank}: an adapter moves log-probabilities by {effect:.2g} nats, on the server as here to {gap:.1e}"


def repair(message: str, rank: int) -> str:
    """What to change, from what the server said."""
    if "max_lora_rank" in message or "rank" in message.lower():
        allowed = next(n for n in (1, 8, 16, 32, 64, 128, 256, 320, 512, rank) if n >= rank)
        return f"; start the server with --max-lora-rank {allowed}"
    if "No adapter found" in message:
        return "; the server must be able to read it under the same path: choose an --out where it can"
    if "not enabled" in message.lower() or "lora_manager" in message.lower():
        return "; start the server with --enable-lora"
    return ""
