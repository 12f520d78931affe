#!/bin/sh
# Waits until the server on a socket is healthy and asks it one question; prints the answer.
#   sh smoke-test.sh SOCKET_FOLDER
# The question is asked by a second container of the same image: nothing but docker is needed for it.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
docker=${DOCKER:-docker}
if [ $# -ne 1 ] || [ ! -d "$1" ]; then
  echo "usage: sh smoke-test.sh SOCKET_FOLDER" >&2
  exit 2
fi
sockets=$(cd "$1" && pwd)
image=$(cat "$here/../images/IMAGE_ID")
program='
import http.client, json, socket, sys, time
def ask(method, path, body=None):
    connection = http.client.HTTPConnection("localhost", timeout=70)
    connection.sock = socket.socket(socket.AF_UNIX)
    connection.sock.settimeout(70)
    connection.sock.connect("/run/strongroom/http.sock")
    connection.request(method, path, body, {"Content-Type": "application/json"})
    reply = connection.getresponse()
    return reply.status, reply.read()
until = time.monotonic() + 240
status = 0
while status != 200:
    try:
        status = ask("GET", "/ping")[0]
    except OSError:
        status = 0
    if time.monotonic() > until:
        sys.exit("error: the server was not healthy within 240 s\nhint: docker logs strongroom")
    time.sleep(0.2)
question = {"messages": [{"role": "user", "content": "What is the capital of France?"}], "temperature": 0}
status, body = ask("POST", "/invocations", json.dumps(question | {"max_tokens": 32}))
print(json.dumps({"ok": status == 200, "status": status, "answer": json.loads(body)}, separators=(",", ":")))
sys.exit(status != 200)
'
exec "$docker" run --rm --read-only --cap-drop ALL --security-opt no-new-privileges --network none \
  --user "${STRONGROOM_USER:-10001:10001}" --pids-limit 64 --memory 256m \
  --volume "$sockets:/run/strongroom" --entrypoint /opt/strongroom/bin/python "$image" -I -B -c "$program"
