#!/bin/sh
# Verifies the bundle and loads its image into docker. Idempotent; the image that was there before stays as
# `strongroom:previous`, for rollback.sh.
#   sh load.sh FINGERPRINT [--dry-run]
# Exit status: as verify.sh; 4 docker refused.
set -eu
LC_ALL=C
export LC_ALL
here=$(cd "$(dirname "$0")" && pwd)
docker=${DOCKER:-docker}

say() { printf '%s\n' "$*" >&2; }
fail() {
  say "error: $2"
  say "hint: $3"
  exit "$1"
}

if [ $# -lt 1 ] || [ $# -gt 2 ] || [ "${2:---dry-run}" != --dry-run ]; then
  say "usage: sh load.sh FINGERPRINT [--dry-run]"
  exit 2
fi
sh "$here/verify.sh" "$1" "$here/.."
cd "$here/.."
image=$(cat images/IMAGE)
wanted=$(cat images/IMAGE_ID)
command -v "$docker" >/dev/null 2>&1 || fail 3 "\`$docker\` is not there" "install docker, or set DOCKER"
architecture=$("$docker" version --format '{{.Server.Arch}}' 2>/dev/null) ||
  fail 3 "no docker daemon answers" "start docker; may this user speak to it?"
[ "$architecture" = "$(cat images/ARCHITECTURE)" ] ||
  fail 3 "this machine is $architecture, the image is $(cat images/ARCHITECTURE)" "take the other bundle"
needed=$(cat images/NEEDED_KB)
free=$(df -Pk "$("$docker" info --format '{{.DockerRootDir}}')" 2>/dev/null | awk 'NR == 2 { print $4 }')
if [ -n "$free" ] && [ "$free" -lt "$needed" ]; then
  fail 3 "$free kB are free where docker keeps images, $needed kB are needed" \
    "remove images with \`docker image prune\`"
fi

before=$("$docker" image inspect --format '{{.Id}}' "$image" 2>/dev/null || true)
if [ "$before" = "$wanted" ]; then
  say "loaded already: $image"
  exit 0
fi
if [ $# -eq 2 ]; then
  say "would load $image ($wanted)"
  exit 0
fi
gzip -dc images/strongroom.tar.gz | "$docker" load >/dev/null ||
  fail 4 "docker did not load the image" "read the lines above"
loaded=$("$docker" image inspect --format '{{.Id}}' "$image" 2>/dev/null || true)
if [ "$loaded" != "$wanted" ]; then
  if [ -n "$before" ]; then "$docker" tag "$before" "$image"; fi
  fail 5 "docker loaded $loaded, the bundle names $wanted" "get the bundle again, from the vendor"
fi
if [ -n "$before" ]; then "$docker" tag "$before" strongroom:previous; fi
say "loaded: $image ($wanted)"
