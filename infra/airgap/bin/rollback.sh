#!/bin/sh
# Gives the name of the image back to the one that was loaded before; start the container again afterwards.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
docker=${DOCKER:-docker}
image=$(cat "$here/../images/IMAGE")
if ! before=$("$docker" image inspect --format '{{.Id}}' strongroom:previous 2>/dev/null); then
  echo "error: no image was there before this one" >&2
  echo "hint: load the older bundle" >&2
  exit 4
fi
"$docker" tag "$before" "$image"
echo "$image is $before again" >&2
