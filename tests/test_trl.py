"""The loss against TRL's own code: pip install --no-deps trl==1.16.0

TRL needs pandas, pyarrow and datasets, too much for a test dependency, but the arithmetic of its loss needs torch alone.
So the one method is taken out of the installed source and called with a stand-in for the trainer. Without that very
version this file is skipped; test_cwrpo.py compares with TRL's documented formulas in any case.
"""

import ast
import importlib.util
import textwrap
from collections import defaultdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_cwrpo import some_arguments

from cwrpo import cwrpo_loss


def trl_version() -> str:
    try:
        return version("trl")
    except PackageNotFoundError:
        return ""


pytestmark = pytest.mark.skipif(trl_version() != "1.16.0", reason="to compare with TRL: pip install --no-deps trl==1.16.0")


def trl_loss(arguments: dict, loss_type: str, corrected: bool) -> torch.Tensor:
    """Return what GRPOTrainer._compute_loss makes of the arguments of cwrpo_loss."""
    path = Path(importlib.util.find_spec("trl").origin).parent / "trainer" / "grpo_trainer.py"
    source = path.read_text(encoding="utf-8")
    method = next(node for node in ast.walk(ast.parse(source)) if getattr(node, "name", "") == "_compute_loss")
    space = {"torch": torch, "nanmin": torch.min, "nanmax": torch.max}
    exec(textwrap.dedent("\n".join(source.splitlines()[method.lineno - 1:method.end_lineno])), space)
    new, mask = arguments["logprobs"], arguments["mask"]
    B, T = mask.shape
    one_process = SimpleNamespace(gather=lambda x: x, gather_for_metrics=lambda x: x, reduce=lambda x, reduction=None: x,
                                  num_processes=1, sync_gradients=False)
    trainer = SimpleNamespace(
        loss_type=loss_type, beta=arguments["kl_coef"], epsilon_low=0.2, epsilon_high=0.28, max_completion_length=T,
        use_vllm=corrected, vllm_importance_sampling_correction=True, importance_sampling_level="token",
        top_entropy_quantile=1.0, off_policy_mask_threshold=None, current_gradient_accumulation_steps=1,
        aux_loss_enabled=False, _entropy_bonus_enabled=False, model=SimpleNamespace(training=True), accelerator=one_process,
        args=SimpleNamespace(delta=None, use_bias_correction_kl=False), _metrics=defaultdict(lambda: defaultdict(list)),
        _get_per_token_logps_and_entropies=lambda *args, **kwargs: (new, torch.zeros(B, T), None))
    capped = (arguments["old_logprobs"] - arguments["sampled_logprobs"]).exp().clamp(max=1.2)
    return space["_compute_loss"](trainer, None, {
        "prompt_ids": torch.zeros(B, 1), "prompt_mask": torch.ones(B, 1), "completion_ids": torch.zeros(B, T),
        "completion_mask": mask.double(), "advantages": arguments["advantages"], "importance_sampling_ratio": capped,
        "old_per_token_logps": arguments["old_logprobs"], "ref_per_token_logps": arguments["ref_logprobs"]})


@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize("beta", [0.0, 0.04])
@pytest.mark.parametrize(("loss_type", "loss_norm"), [("grpo", "trajectory"), ("bnpo", "token"), ("dr_grpo", "constant")])
def test_loss_and_gradient_equal_those_of_trls_own_code(loss_type: str, loss_norm: str, beta: float, corrected: bool) -> None:
    arguments = some_arguments(B=4, T=9) | {"kl_coef": beta}
    denominator = {"trajectory": 4, "token": int(arguments["mask"].sum()), "constant": 4 * 9}[loss_norm]
    results = []
    for ours in (True, False):
        new = arguments["logprobs"].clone().requires_grad_()
        given = arguments | {"logprobs": new}
        loss = cwrpo_loss(**(given | {"denominator": denominator}), loss_norm=loss_norm, clip_eps_high=0.28,
                          tis_cap=1.2 if corrected else None)[0] if ours else trl_loss(given, loss_type, corrected)
        loss.backward()
        results.append((loss.detach(), new.grad))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=1e-14)
