#!/bin/sh
# Runs the demo on two workers of a Ray cluster on this machine, kills one of them on the way, and holds the result against
# the demo's. Usage: demo-ray.sh FOLDER_OF_QEXPORT, after `make demo`.
set -eu
PATH="$1:$PATH"
folder=out/demo-ray
log=out/demo-ray.log

rm -rf "$folder" "$folder.partial" "$folder.rejected"
: > "$log"
echo "\$ qexport run recipes/gptq-4bit.yaml --workers 2 --output $folder"
qexport run recipes/gptq-4bit.yaml --workers 2 --output "$folder" >> "$log" 2>&1 &
run=$!
tail -n +1 -f --pid="$run" "$log" &

until grep -q 'quantize *block 3 ' "$log"; do
    kill -0 "$run" 2> /dev/null || {
        wait "$run"
        exit 1
    }
    sleep 0.2
done
worker=$(pgrep -n -f '^ray::_Worker')
printf '\n$ kill -9 %s  # a worker, in the middle of a block\n\n' "$worker"
kill -9 "$worker"
wait "$run"
wait

grep -q 'begins anew' "$log" || {
    echo "the run did not notice that a worker was killed" >&2
    exit 1
}
# The report has timings, and SHA256SUMS the report's digest; the manifest has the digest of the report without them.
echo "\$ diff -r --exclude report --exclude SHA256SUMS out/gptq-4bit $folder"
diff -r --exclude report --exclude SHA256SUMS out/gptq-4bit "$folder"
echo "the same bytes"
