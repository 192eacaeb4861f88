#!/bin/sh
# What `make demo` shows: real pages become a small language model, then a real pretrained one answers.   sh scripts/demo.sh
# Needs .venv (make setup). Stopped anywhere, it goes on where it was; what is finished is not done again.
set -eu
cd "$(dirname "$0")/.."
whimbrel() { .venv/bin/python -m whimbrel "$@"; }
say() { printf '\n%s\n' "$*"; }
begun=$(date +%s)

say "1 of 2: 844 real pages -> documents -> tokenizer -> a small hybrid of Mamba-2 and attention, and what it writes"
whimbrel run recipes/first-flight.yaml

say "2 of 2: a real pretrained model, SmolLM2-135M, in the same engine"
failed=0
if whimbrel fetch smollm2; then
    say "Two questions in one conversation, the likeliest answer to each:"
    set -- "What is the capital of France?" "Name one famous building there."
    printf '  > %s\n' "$@"
    printf '%s\n' "$@" | whimbrel chat smollm2 max_tokens=80
else
    failed=1 # the line above says why; without a network the first part is still worth looking at
fi

seconds=$(($(date +%s) - begun))
say "Done in $((seconds / 60)) min $((seconds % 60)) s.

Open:       $PWD/runs/first-flight/report.html
Type next:  .venv/bin/whimbrel chat smollm2                     a conversation; /help there
            .venv/bin/whimbrel run recipes/first-flight.yaml pretrain.train.steps=4000
                                                                train longer; everything before stays as it is
            .venv/bin/whimbrel plan nemotron-nano-9b-v2 --memory 22GiB --context 131072
                                                                would it fit, and how fast at best
            .venv/bin/whimbrel doctor                           what this machine can do"
exit $failed
