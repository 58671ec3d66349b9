#!/usr/bin/env bash
# Trains the default model on a machine with torch and a GPU, but neither network nor npm:
#
#   bash recipes/emoji/away.sh BUNDLE RUN OUT SECONDS [OPTION...]
#
# BUNDLE holds corpus.tar.xz, tokenizer.safetensors and the wheels that the machine lacks; README.md says how to pack it.
# RUN keeps the run: the same call goes on from there. OUT receives what is taken home, eight files below 16 MiB: weights,
# config.json, two sheets, the log. The call ends before SECONDS are over, with what was trained until then. OPTIONs go
# to `train`, for example --keep-tokenizer, or --dry-run --device cpu to see that all of it runs. Paths are relative to
# the root of the repository.
set -euo pipefail
[ $# -ge 4 ] || { sed -n '2,12s/^# \{0,1\}//p' "$0" >&2; exit 2; }
bundle=$1 run=$2 out=$3 seconds=$4
shift 4
cd "$(dirname "$0")/../.."
mkdir -p "$run" "$out"
touch "$run/log.txt"
trap 'cp "$run/log.txt" "$out"' EXIT
# Two minutes are left for what comes before the first step and after the last one: the sheet of samples, the export.
stop_after=$(python3 -c "print(max(0.1, ($seconds - 120) / 60))")

site=$(mktemp -d)
if compgen -G "$bundle/*.whl" > /dev/null; then
    python3 -m pip install --quiet --no-index --no-deps --no-compile --target "$site" "$bundle"/*.whl
fi
# The model package is not installed here: its text encoder is found by this entry point.
mkdir "$site/foveate_emoji-0.dist-info"
printf 'Metadata-Version: 2.1\nName: foveate-emoji\nVersion: 0\n' > "$site/foveate_emoji-0.dist-info/METADATA"
printf '[foveate.models]\nemoji = foveate_emoji:EMOJI_TINY\n' > "$site/foveate_emoji-0.dist-info/entry_points.txt"
export PYTHONPATH="$PWD/src:$PWD/packages/foveate-emoji/src:$PWD:$site" PYTHONUNBUFFERED=1

[ -d "$run/corpus" ] || tar xJf "$bundle/corpus.tar.xz" -C "$run"
train() {
    python3 -m recipes.emoji train recipes/emoji/configs/emoji.yaml --output "$run" \
        --tokenizer "$bundle/tokenizer.safetensors" "$@" 2> >(tee -a "$run/log.txt" >&2)
}
folder=$(train --stage model --stop-after "$stop_after" "$@") || {
    [ $? = 75 ] || exit 1
    folder=$(train --stage export "$@")
}
cp "$folder"/transformer* "$folder"/autoencoder* "$folder/config.json" "$(dirname "$folder")"/*.png "$out"
