#!/usr/bin/env bash
# Asks a running server with curl alone: is it ready, which model, one answer whole, one streamed.
#   python -m ming_app serve                            # in another terminal
#   bash examples/api/curl.sh http://127.0.0.1:7860     # the key, where one is needed, in OPENAI_API_KEY
set -eu
address=${1:-http://127.0.0.1:7860}

ask() { # PATH [JSON]: curl reads the key from its standard input, so that no list of processes shows it
  local path=$1
  shift
  if [ "$#" -gt 0 ]; then set -- --json "$1"; fi
  printf 'header = "Authorization: Bearer %s"\n' "${OPENAI_API_KEY:-none}" |
    curl --config - --silent --show-error --fail-with-body --no-buffer "$@" "$address$path"
  echo
}

ask /ready
ask /v1/models
ask /v1/chat/completions '{"messages": [{"role": "user", "content": "贫血有哪些常见原因？"}], "max_tokens": 40}'
ask /v1/chat/completions '{"messages": [{"role": "user", "content": "What is anaemia?"}], "max_tokens": 40, "stream": true}'
