#!/bin/bash
# namespaces.sh N FOLDER PROGRAM...
#
# Runs PROGRAM N times, each in a network namespace of its own with the address
# 10.77.0.(INDEX + 1), the namespaces joined by a bridge; INDEX is in its
# environment. FOLDER receives out.INDEX, err.INDEX and status.INDEX. If a file
# FOLDER/cut appears, the line of the last one is cut. To be run in namespaces of
# its own, in which it is root: unshare --map-root-user --net --mount.
set -eu
count=$1 folder=$2
shift 2
ip link set lo up
ip link add name hub type bridge
ip link set hub up
last=$((count - 1))
for i in $(seq 0 $last); do
  address=10.77.0.$((i + 1))
  printf '127.0.0.1 localhost\n%s %s\n' "$address" "$(hostname)" \
    > "$folder/hosts.$i"
  mkfifo "$folder/go.$i"
  INDEX=$i unshare --net --mount bash -c '
    read < "$1/go.$INDEX"
    mount --bind "$1/hosts.$INDEX" /etc/hosts
    shift
    exec "$@"' start "$folder" "$@" \
    > "$folder/out.$i" 2> "$folder/err.$i" &
  process=$!
  eval "process_$i=$process"
  while [ "$(readlink /proc/$process/ns/net)" = "$(readlink /proc/$$/ns/net)" ]
  do
    sleep .02
  done
  ip link add "near$i" type veth peer name "far$i" netns $process
  ip link set "near$i" master hub
  ip link set "near$i" up
  nsenter --net=/proc/$process/ns/net sh -c \
    "ip link set lo up; ip addr add $address/24 dev far$i; ip link set far$i up"
done
for i in $(seq 0 $last); do
  echo go > "$folder/go.$i"
done
{
  until [ -e "$folder/cut" ]; do sleep .1; done
  ip link set "near$last" down
} &
watch=$!
for i in $(seq 0 $last); do
  status=0
  eval "wait \$process_$i" || status=$?
  echo $status > "$folder/status.$i"
done
kill $watch 2> /dev/null || true
