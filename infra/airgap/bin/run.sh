#!/bin/sh
# Runs the loaded image with no network and everything taken away that can be; it answers on a Unix socket.
#   sh run.sh MODEL_FOLDER SOCKET_FOLDER [NAME]
# SOCKET_FOLDER must be writable for user 10001, or for STRONGROOM_USER; http.sock appears in it.
# KEY_FOLDER, if given, is seen as /run/secrets; STRONGROOM_KEY and STRONGROOM_VENDOR_ROOTS (or _CUSTOMER_ROOTS)
# say what opens the model, STRONGROOM_ALLOW_PLAINTEXT=on serves one that is not sealed.
# STRONGROOM_MEMORY (3g) and STRONGROOM_PIDS (256) limit it. --dry-run as the fourth argument shows the command.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
docker=${DOCKER:-docker}
if [ $# -lt 2 ] || [ $# -gt 4 ] || [ "${4:---dry-run}" != --dry-run ]; then
  echo "usage: sh run.sh MODEL_FOLDER SOCKET_FOLDER [NAME [--dry-run]]" >&2
  exit 2
fi
for folder in "$1" "$2" "${KEY_FOLDER:-$1}"; do
  if [ ! -d "$folder" ]; then
    echo "error: there is no folder \`$folder\`" >&2
    echo "hint: make it, or name another" >&2
    exit 2
  fi
done
model=$(cd "$1" && pwd)
sockets=$(cd "$2" && pwd)
name=${3:-strongroom}
image=$(cat "$here/../images/IMAGE_ID")
memory=${STRONGROOM_MEMORY:-3g}
shown=${4:-}
keys=${KEY_FOLDER:+$(cd "$KEY_FOLDER" && pwd)}
set -- run --detach --name "$name" --restart unless-stopped --stop-timeout 30 \
  --read-only --cap-drop ALL --security-opt no-new-privileges \
  --security-opt "seccomp=$here/../run/seccomp.json" \
  --user "${STRONGROOM_USER:-10001:10001}" --network none --ipc private --shm-size 64m \
  --pids-limit "${STRONGROOM_PIDS:-256}" --memory "$memory" --memory-swap "$memory" --ulimit core=0 \
  --tmpfs /tmp:rw,noexec,nosuid,nodev,size=64m \
  --volume "$model:/opt/ml/model:ro" --volume "$sockets:/run/strongroom" \
  ${keys:+--volume "$keys:/run/secrets:ro"} \
  --env STRONGROOM_LISTEN=unix:/run/strongroom/http.sock \
  --env "STRONGROOM_SOCKET_MODE=${STRONGROOM_SOCKET_MODE:-0660}" \
  --env STRONGROOM_KEY --env STRONGROOM_VENDOR_ROOTS --env STRONGROOM_CUSTOMER_ROOTS \
  --env STRONGROOM_ALLOW_PLAINTEXT \
  "$image" serve
if [ -n "$shown" ]; then
  printf '%s\n' "$docker $*"
  exit 0
fi
exec "$docker" "$@"
