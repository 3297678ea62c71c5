"""Time of a step's sampling: the sampler in this process against a vLLM server, same model, tasks, seeds and machine.

    python bench/sampler_step.py --model runs/tiny --policy-url http://127.0.0.1:8000 [any flag of train.py]

Prints, for each, seconds of adapter sync and of the rollout (median of five steps after a first one that is not counted)
and policy tokens a second. The executor is the simulated one unless --executor-url is given; the update is the same for both.
"""

import sys
import time
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parent.parent))

from eval import rollout_config
from rollout import rollout
from train import check_flags, choose_jobs, make_model, parse_args
from world import World, load_tasks, make_sampler


def main() -> None:
    args = parse_args()
    check_flags(args)
    pool, world, (model, tokenizer) = load_tasks(args)[0], World(args), make_model(args)
    for url in (None, args.policy_url):
        args.policy_url = url
        sampler = make_sampler(args, model, tokenizer)
        sync, sampling, tokens = [], [], []
        for step in range(6):
            began = time.monotonic()
            sampler.load_adapter(version=step)
            synced = time.monotonic()
            taus = rollout(choose_jobs(pool, step, args), sampler, tokenizer, world.new_canvas, world.score,
                           rollout_config(args, world))
            sync.append(synced - began)
            sampling.append(time.monotonic() - synced)
            tokens.append(sum(sum(tau.mask) for tau in taus))
        sampler.close()
        print(f"{' '.join(url or ['in this process'])}: {len(taus)} trajectories; sync {median(sync[1:]):.3f} s, rollout "
              f"{median(sampling[1:]):.2f} s, {sum(tokens[1:]) / sum(sampling[1:]):.0f} policy tokens/s", flush=True)


if __name__ == "__main__":
    main()
