#!/bin/sh
# What `make demo` shows: the whole life of a small model, then a talk with a real pretrained one.   sh scripts/demo.sh [short]
# `short`: every stage of that life with few steps, in minutes, and no claims. Needs .venv (make setup).
# Stopped anywhere, it goes on where it was; what is finished is not done again.
set -eu
cd "$(dirname "$0")/.."
whimbrel() { .venv/bin/python -m whimbrel "$@"; }
say() { printf '\n%s\n' "$*"; }
begun=$(date +%s)
life() { whimbrel run recipes/nano-tiny.yaml "$@"; }

if [ "${1:-}" = short ]; then
    # shellcheck disable=SC2046
    life --out runs/nano-tiny-short $(grep -v '^#' scripts/short.txt)
    seconds=$(($(date +%s) - begun))
    say "Done in $((seconds / 60)) min $((seconds % 60)) s. Open: $PWD/runs/nano-tiny-short/report.html"
    exit
fi

say "1 of 2: a life in a quarter of an hour. Real pages -> a small hybrid of Mamba-2 and attention -> longer texts -> thoughts
        -> preferences -> rewards -> merged, cut, taught by its parent, rounded to eight bits; examined after each"
life

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

Open:       $PWD/runs/nano-tiny/report.html
Type next:  .venv/bin/whimbrel chat runs/nano-tiny/int8         ask it \"What is 7+5-9+2-4?\"; /nothink, /think 16
            .venv/bin/whimbrel chat smollm2                     a conversation; /help there
            .venv/bin/whimbrel run recipes/nano-tiny.yaml grpo.train.steps=120
                                                                reward it longer; everything before stays as it is
            .venv/bin/whimbrel plan nemotron-nano-9b-v2 --memory 22GiB --context 131072
                                                                would it fit, and how fast at best
            .venv/bin/whimbrel doctor                           what this machine can do"
exit $failed
