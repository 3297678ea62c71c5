#!/usr/bin/env bash
# Chromium for tests/test_browser.py, which Playwright (requirements-dev.txt) drives: about a minute, once a machine.
# Exit code 3: none is here and none can be had; the tests are then skipped. Elsewhere: set CHROMIUM to a browser's path.
set -euo pipefail
for name in "${CHROMIUM:-chromium}" chromium chromium-browser google-chrome google-chrome-stable chrome; do
    if path=$(command -v "$name"); then
        echo "browser: $path"
        exit
    fi
done
if ! command -v apt-get >/dev/null || [ "$(id -u)" != 0 ]; then
    echo "no Chromium, and no apt-get as root to install it: the browser tests will be skipped" >&2
    exit 3
fi
export DEBIAN_FRONTEND=noninteractive
(apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium fonts-dejavu-core) >/dev/null || exit 3
echo "browser: $(command -v chromium)"
