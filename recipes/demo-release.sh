#!/bin/sh
# Releases the demo's artifacts to a registry on this machine, pulls them, checks them, compares one with its source, serves
# one, builds one again, and shows what is refused. Usage: demo-release.sh FOLDER_OF_QEXPORT, after `make demo`.
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

# refused WHAT_WAS_DONE COMMAND...: the command must fail.
refused() {
    printf '\n%s\n' "$1"
    shift
    if step "$@"; then exit 1; fi
}

# changed NAME: a copy of what was pulled, to be changed.
changed() {
    cp -r "$folder/pulled" "$folder/$1"
    echo "$folder/$1"
}

rm -rf "$folder"
mkdir -p "$folder"
for name in release another; do
    openssl ecparam -name prime256v1 -genkey -noout -out "$folder/$name.key"
    openssl ec -in "$folder/$name.key" -pubout -out "$folder/$name.pub" 2> /dev/null
done
key="$folder/release.pub"

port=$(python -c 'import socket; free = socket.socket(); free.bind(("127.0.0.1", 0)); print(free.getsockname()[1])')
cat > "$folder/registry.yml" << END
version: 0.1
log: {level: error, accesslog: {disabled: true}}
storage: {filesystem: {rootdirectory: $PWD/$folder/registry}, delete: {enabled: true}}
http: {addr: "127.0.0.1:$port"}
END
docker-registry serve "$folder/registry.yml" 2> "$folder/registry.log" &
trap 'kill $!' EXIT
repository=127.0.0.1:$port/models/notes
release=oci://$repository:notes-1.0.0_gptq-4bit

step qexport run recipes/int8.yaml 'export=[{layout: onnx}]' output=out/int8-onnx --force
step qexport release out/gptq-4bit out/int8-onnx --name notes --version 1.0.0 --sign "$folder/release.key" --to "oci://$repository"
step qexport release --list "oci://$repository"
step qexport check "$release" --signature "$key" --to "$folder/pulled"
step qexport diff --weights --exit-code "$folder/pulled" out/gptq-4bit/safetensors
step qexport promote "$release" --as stable --signature "$key"

step qexport check "oci://$repository:notes-1.0.0_int8.onnx" --signature "$key" --to "$folder/pulled-onnx"
step python "$folder/pulled-onnx/launch/generate.py" "The three primary colors are" 24

step qexport rebuild "$folder/pulled" --recipe recipes/gptq-4bit.yaml

it=$(changed flipped)
printf 'x' | dd of="$it/model.safetensors" bs=1 seek=1000000 conv=notrunc 2> /dev/null
refused 'One byte of the weights is changed:' qexport check "$it" --signature "$key"
it=$(changed edited)
echo 'As good as the 16-bit model.' >> "$it/README.md"
refused 'The card is edited:' qexport check "$it" --signature "$key"
it=$(changed swapped)
cp "$folder/pulled-onnx/report/report.json" "$it/report/report.json"
refused "The report is another artifact's:" qexport check "$it" --signature "$key"
refused 'Somebody else has the key:' qexport check "$folder/pulled" --signature "$folder/another.pub"

python - "$repository" notes-1.0.0_gptq-4bit << 'END'
import json
import sys
from urllib.request import Request, urlopen

(host, _, name), tag = sys.argv[1].partition("/"), sys.argv[2]
manifests = f"http://{host}/v2/{name}/manifests/"
index = {"Accept": "application/vnd.oci.image.index.v1+json"}
digest = urlopen(Request(manifests + tag, headers=index)).headers["Docker-Content-Digest"]
referrers = json.load(urlopen(Request(manifests + digest.replace(":", "-"), headers=index)))["manifests"]
signature = next(each for each in referrers if "sigstore" in each["artifactType"])
urlopen(Request(manifests + signature["digest"], method="DELETE"))
END
refused "The signature's referrer is deleted in the registry:" qexport check "$release" --signature "$key"
printf '\nAll were refused.\n'
