#!/bin/sh
# Releases the demo's artifacts to a registry on this machine, pulls one back, checks it, compares it with its source, and
# builds it again. Usage: demo-release.sh FOLDER_OF_QEXPORT, after `qexport run recipes/gptq-4bit.yaml`.
set -eu
PATH="$1:$PATH"
folder=out/releases
command -v docker-registry > /dev/null || {
    echo "docker-registry is missing (Debian: apt-get install docker-registry)" >&2
    exit 2
}

step() {
    printf '\n$ %s\n' "$*"
    "$@"
}

rm -rf "$folder"
mkdir -p "$folder"
openssl ecparam -name prime256v1 -genkey -noout -out "$folder/release.key"
openssl ec -in "$folder/release.key" -pubout -out "$folder/release.pub" 2> /dev/null

port=$(python -c 'import socket; free = socket.socket(); free.bind(("127.0.0.1", 0)); print(free.getsockname()[1])')
cat > "$folder/registry.yml" << END
version: 0.1
log: {level: error, accesslog: {disabled: true}}
storage: {filesystem: {rootdirectory: $PWD/$folder/registry}}
http: {addr: "127.0.0.1:$port"}
END
docker-registry serve "$folder/registry.yml" 2> "$folder/registry.log" &
trap 'kill $!' EXIT
repository=oci://127.0.0.1:$port/models/notes
release=$repository:notes-1.0.0_gptq-4bit

step qexport release out/gptq-4bit --name notes --version 1.0.0 --sign "$folder/release.key" --to "$repository"
step qexport release --list "$repository"
step qexport check "$release" --signature "$folder/release.pub" --to "$folder/pulled"
step qexport diff --weights --exit-code "$folder/pulled" out/gptq-4bit/safetensors
step qexport promote "$release" --as stable --signature "$folder/release.pub"
step qexport rebuild "$folder/pulled" --recipe recipes/gptq-4bit.yaml

printf '\nOne byte of the weights is changed:\n'
cp -r "$folder/pulled" "$folder/changed"
printf 'x' | dd of="$folder/changed/model.safetensors" bs=1 seek=1000000 conv=notrunc 2> /dev/null
if step qexport check "$folder/changed" --signature "$folder/release.pub"; then exit 1; fi
printf '\nIt was refused.\n'
